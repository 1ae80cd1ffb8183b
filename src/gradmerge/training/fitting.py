"""Checks that prepared examples fit the network, before anything is learned."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import rows_of
from gradmerge.engine.predict import is_causal
from gradmerge.engine.reading import CLASSES, TARGET, TOKENS, reading_of
from gradmerge.training.examples import Kind, Stage, TaskData
from gradmerge.training.generation import Question
from gradmerge.training.kinds import KINDS
from gradmerge.training.kinds.causal import Windows
from gradmerge.training.labels import Labels


def require_kind(network: nn.Module | None, kind: Kind, where: str) -> None:
    """Reject a kind of examples that the network does not take.

    Raises:
        ConfigError: it lacks the input, or predicts something else.
    """
    wanted = KINDS[kind]
    if network is None or not wanted.predicts:
        return
    names = inspect.signature(network.forward).parameters
    # all of transformers' take further keywords, and ignore them
    takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
    name, needed = type(network).__name__, wanted.input
    if needed not in names and (hasattr(network, "config") or not takes_any):
        raise ConfigError(
            f"{where}: expected a kind of examples that {name} takes, got {kind}, whose input is "
            f"{needed}; its inputs are {', '.join(list(names)[:5])}."
        )
    predicts = reading_of(network).predicts
    # a network of one's own may predict anything but the next token, which its name tells
    unknown = not hasattr(network, "config") and "the next token" not in wanted.predicts
    if predicts not in wanted.predicts and not (unknown and not is_causal(network)):
        raise ConfigError(
            f"{where}: expected a kind of examples that fits {name}, which predicts {predicts}, "
            f"got {kind}.\nSet `kind` of the task, or merge models for that kind."
        )


def classes_of(merged: Any, task: str, data: TaskData) -> int | None:
    """Return the number of classes of a task's head if a config of transformers states it."""
    network = merged.skeleton
    reading = reading_of(network)
    if reading not in (CLASSES, TOKENS) or not hasattr(network, "config"):
        return None
    plan = merged.plan
    source = plan.serving.get(data.source or task) if plan.private else None
    if source is None or source.config is None:
        return getattr(network.config, "num_labels", None) if not plan.private else None
    labels = source.config.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else source.config.get("num_labels")


def require_examples(
    prepared: Any, data: TaskData, processor: Any, network: nn.Module | None, where: str
) -> Labels | None:
    """Reject examples that the network cannot take, and return their labels if they have any.

    Texts to classify are prepared here only if one could be too long or have an unknown token.

    Raises:
        ConfigError: an example has too many tokens, or one that the network does not know.
    """
    labels = getattr(prepared, "labels", None)
    if KINDS[data.kind].input != "input_ids" or data.kind == "tensors" or network is None:
        return labels
    tokens, positions = tokens_of(network), positions_of(network)
    if isinstance(prepared, Windows):
        _require_tokens(prepared.tokens, tokens, positions, where, "")
        return labels
    too_long = positions is not None and data.max_length > positions
    if too_long or (tokens is not None and len(processor) > tokens):
        for index in range(len(prepared)):
            for ids in listed(prepared[index]["input_ids"]):
                _require_tokens(ids, tokens, positions, where, f", row {index}")
    return labels


def listed(value: Any) -> list[Any]:
    """Return the sequences of an example: itself, or several."""
    return value if isinstance(value, list) else [value]


def _require_tokens(
    ids: Any, tokens: int | None, positions: int | None, where: str, row: str
) -> None:
    length = ids.shape[-1]
    if positions is not None and length > positions:
        raise ConfigError(
            f"{where}{row}: expected at most {positions} tokens, the positions of the network, got "
            f"{length}. Set max_length: {positions} (or less)."
        )
    largest = int(ids.max())
    if tokens is not None and largest >= tokens:
        raise ConfigError(
            f"{where}{row}: expected tokens 0 to {tokens - 1}, which the network has embeddings "
            f"of, got {largest}.\nThe tokenizer does not belong to these models: set "
            "data.processor to the folder of the one that does."
        )


def require_room(
    task: str,
    data: TaskData,
    asked: Mapping[Stage, Sequence[Question]],
    network: nn.Module | None,
) -> None:
    """Reject texts to generate that have more tokens than the network has positions.

    Raises:
        ConfigError: prompt and new tokens together do not fit.
    """
    # the decoder of an encoder-decoder has positions of its own
    if network is None or data.generation is None or reading_of(network) is TARGET:
        return
    positions = positions_of(network)
    if positions is None:
        return
    longest = max((len(q.ids) for questions in asked.values() for q in questions), default=0)
    new = data.generation.max_new_tokens
    if longest + new > positions:
        raise ConfigError(
            f"task {task}: expected at most {positions} tokens, the positions of the network, got "
            f"prompts of {longest} and generation.max_new_tokens: {new}. Reduce one of them "
            "(max_length cuts prompts)."
        )


# Share of the spread of the logits: what one network in one precision computes differs by less.
_TOLERANCE = 1e-3


@torch.no_grad()
def require_apart(merged: MergedModel, task: str, batch: Mapping[str, Any]) -> None:
    """Reject packed windows if an example sees those before it, which depends on the network.

    Where transformers builds the attention mask from positions, it does not; recurrent states and
    older attention do. So the network is asked: other tokens in the first example of a window must
    not change the logits of the others.

    Raises:
        ConfigError: they do.
    """
    starts = (batch["position_ids"] == 0).int()
    several = (starts.sum(dim=1) > 1).nonzero().flatten().tolist()
    if not several:
        return
    row = slice(several[0], several[0] + 1)
    second = int(starts[row].nonzero()[1, 1])
    window = {
        key: value[row] if isinstance(value, Tensor) and value.dim() > 1 else value
        for key, value in batch.items()
        if key != "labels"
    }
    ids = window["input_ids"]
    other = ids.clone()
    other[:, :second] = (ids[:, :second] - 1).abs()
    before, after = (
        rows_of(merged, task, {**window, "input_ids": given})[0][second:] for given in (ids, other)
    )
    if (before - after).abs().max() > _TOLERANCE * before.std():
        raise ConfigError(
            f"task {task}: expected a network in which the examples of a window do not see one "
            f"another, got {type(merged.skeleton).__name__}, whose predictions change with the "
            "examples before. Set packing: false."
        )


def tokens_of(network: nn.Module) -> int | None:
    """Return the number of token embeddings of a network of transformers."""
    try:
        found = network.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(found, "num_embeddings", None)


def positions_of(network: nn.Module) -> int | None:
    """Return the longest text that learned positions allow; None if they are computed."""
    config: Any = getattr(network, "config", None)
    stated = getattr(config, "max_position_embeddings", None)
    for name, module in network.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not isinstance(stated, int):
            continue
        # some have rows for an offset besides (OPT, RoBERTa)
        if ("position" in last or last == "wpe") and 0 <= module.num_embeddings - stated <= 2:
            # RoBERTa counts from the padding token on
            return stated if module.padding_idx is None else stated - module.padding_idx - 1
    return None
