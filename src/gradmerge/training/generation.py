"""Scores of generated texts: exact match, ROUGE, and a test of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradmerge.common.errors import ConfigError, require
from gradmerge.training.monitors import GENERATED

if TYPE_CHECKING:
    from gradmerge.engine.merged import MergedModel

_MOST = 2**20


@dataclass(frozen=True)
class Generation:
    """Scores of the texts that the merged model generates, greedily, on selection and test."""

    metrics: list[Literal["exact_match", "rouge"]] = field(default_factory=lambda: ["exact_match"])
    """exact_match: share of texts equal to the wanted one, without spaces around them; rouge: mean
    F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""
    max_new_tokens: int = 64
    """Maximum number of tokens to generate per text."""
    limit: int | None = None
    """Maximum number of texts per split. Default: all examples."""
    splits: list[Literal["selection", "test"]] = field(
        default_factory=lambda: ["selection", "test"]
    )
    """Splits on which texts are generated; `[test]` saves the time of each validation."""
    check: Callable[[str, Mapping[str, Any]], bool] | None = None
    """Function that says whether a generated text passes, given the text and its row; their share
    is logged as `passed`. A YAML names a function of a module that `--allow_modules` names."""

    def __post_init__(self) -> None:
        """Check the options."""
        known = ("exact_match", "rouge")
        if any(name not in known for name in self.metrics) or not (self.metrics or self.check):
            raise ConfigError(
                f"generation.metrics: expected some of {', '.join(known)}, or a `check`, got "
                f"{self.metrics}."
            )
        tokens = self.max_new_tokens
        require(1 <= tokens <= _MOST, "generation.max_new_tokens", f"1 to {_MOST}", tokens)
        least = self.limit is None or self.limit >= 1
        require(least, "generation.limit", "at least 1 example", self.limit)
        known_splits = set(self.splits) <= {"selection", "test"} and bool(self.splits)
        require(known_splits, "generation.splits", "selection, test or both", self.splits)

    def scores(self, text: str, wanted: str, row: Mapping[str, Any]) -> dict[str, float]:
        """Return the scores of one generated text."""
        found: dict[str, float] = {}
        if "exact_match" in self.metrics:
            found["exact_match"] = float(text.strip() == wanted.strip())
        if "rouge" in self.metrics:
            from torchmetrics.functional.text import rouge_score

            values = rouge_score(text, wanted, rouge_keys=("rouge1", "rouge2", "rougeL"))
            found |= {key: float(values[f"{key}_fmeasure"]) for key in GENERATED if "rouge" in key}
        if self.check is not None:
            found["passed"] = float(bool(self.check(text, row)))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores."""
        wanted = {*self.metrics, *(("passed",) if self.check else ())}
        return tuple(n for n in GENERATED if n in wanted or ("rouge" in n and "rouge" in wanted))


@dataclass(frozen=True)
class Question:
    """Tokens that ask for a text."""

    ids: Sequence[int]
    wanted: str
    """The text."""
    row: Mapping[str, Any]
    """The row of the data."""


def answers(
    merged: MergedModel,
    task: str,
    questions: Sequence[Question],
    tokenizer: Any,
    options: Generation,
    batch_size: int,
) -> Iterator[tuple[Question, str]]:
    """Generate a text for each question with the merged network.

    Decoding is greedy. Prompts are padded on the left, since a text continues at its end; those of
    an encoder-decoder on the right, where training pads them.
    """
    import torch

    network: Any = merged.skeleton
    config = greedy(network, merged.plan.folder, tokenizer, options.max_new_tokens)
    encodes = bool(getattr(network.config, "is_encoder_decoder", False))
    for start in range(0, len(questions), batch_size):
        several = questions[start : start + batch_size]
        longest = max(len(question.ids) for question in several)
        ids = torch.full((len(several), longest), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(several):
            size = len(question.ids)
            place = slice(0, size) if encodes else slice(longest - size, longest)
            ids[row, place], mask[row, place] = torch.tensor(list(question.ids)), 1
        with torch.no_grad(), merged.prepared(task):
            found = network.generate(
                input_ids=ids.to(merged.device),
                attention_mask=mask.to(merged.device),
                generation_config=config,
            )
        new = found if encodes else found[:, longest:]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        yield from zip(several, texts, strict=True)


def greedy(network: Any, folder: str | Path | None, tokenizer: Any, max_new_tokens: int) -> Any:
    """Return the settings of greedy decoding, with the special tokens that the folder states."""
    from transformers import GenerationConfig

    stated = stated_generation(network, folder)
    end = stated.eos_token_id if stated.eos_token_id is not None else tokenizer.eos_token_id
    first = end[0] if isinstance(end, list) else end
    options = (tokenizer.pad_token_id, stated.pad_token_id, first, 0)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=next(token for token in options if token is not None),
        bos_token_id=stated.bos_token_id,
        decoder_start_token_id=stated.decoder_start_token_id,
        forced_bos_token_id=stated.forced_bos_token_id,
    )


def stated_generation(network: Any, folder: str | Path | None) -> Any:
    """Return the settings of generation that the folder states, or else those of the network."""
    from transformers import GenerationConfig

    if folder is not None and (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return network.generation_config
