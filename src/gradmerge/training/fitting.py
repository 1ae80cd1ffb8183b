"""Checks that prepared examples fit the network, before anything is learned."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.predict import is_causal
from gradmerge.engine.reading import CLASSES, TOKENS, reading_of
from gradmerge.training.examples import Kind, TaskData
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
