"""Description of a task's data, its rows, and what converts them to tokens and pixels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Subset

from gradmerge.common.errors import ConfigError, nearest, require
from gradmerge.common.failures import reading
from gradmerge.training.generation import Generation

Kind = Literal[
    "causal_lm",
    "chat",
    "completion",
    "instruction",
    "seq2seq",
    "text_classification",
    "token_classification",
    "question_answering",
    "masked_lm",
    "embeddings",
    "image_classification",
    "zero_shot_image_classification",
    "tensors",
]
Stage = Literal["adaptation", "selection", "test"]
STAGES: tuple[Stage, ...] = ("adaptation", "selection", "test")

_CAUSAL: tuple[Kind, ...] = ("causal_lm", "chat", "completion", "instruction")
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class TaskData:
    """The dataset of one task: its source, its splits, and the columns to read.

    Each task has three disjoint splits: coefficients are learned on `adaptation`, checkpoints and
    settings are chosen on `selection`, and `test` is for the final scores.
    """

    path: str | Mapping[str, Any]
    """Hub id, name of a builder (csv, json, parquet, imagefolder, or text: one example per
    non-blank line), or a folder written by `save_to_disk`; from Python also a mapping of the three
    splits to datasets."""
    kind: Kind = "causal_lm"
    """Kind of examples, by which their columns are read (see the guide on data); tensors are
    mappings of model inputs already."""
    name: str | None = None
    """Configuration of a hub dataset."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Local files, or a mapping from split to files."""
    splits: dict[str, str] | None = None
    """Split expression for each of adaptation, selection and test, e.g. `train[:256]`. Default: the
    splits with these names, or train, validation and test; a single split is cut by `fractions`."""
    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
    """Shares of adaptation, selection and test in a single split, cut after a seeded shuffle."""
    text: str = "text"
    """Text column. Default: `text`, else `content` or `sentence`."""
    image: str = "image"
    """Image column."""
    label: str = "label"
    """Label column (class numbers); a dataset without it is unlabelled."""
    max_length: int = 512
    """Maximum tokens per text, or tokens per window of packed texts."""
    limit: dict[str, int] | None = None
    """Maximum number of examples (packed causal_lm: windows) by split, e.g. `{test: 1000}`."""
    source: str | None = None
    """Source that provides the task's head and teacher. Default: the source named like the task."""
    revision: str | None = None
    """Revision of a hub dataset."""
    columns: dict[str, str] | None = None
    """Column of each role of the kind, e.g. `{prompt: question, completion: answer}`. Default: the
    first of the role's usual names that the data have."""
    packing: bool | None = None
    """Fill windows of `max_length` tokens with several texts, instead of padding each. causal_lm
    cuts the concatenated documents, other kinds of language models pack whole examples. Default:
    true for causal_lm, false for the others."""
    truncation: Literal["right", "left"] = "right"
    """Side on which texts of more than `max_length` tokens are cut."""
    turns: Literal["all", "last"] = "all"
    """Turns of the assistant in a chat that have a loss."""
    masked: float = 0.15
    """Share of the tokens that masked_lm hides."""
    class_names: list[str] | None = None
    """Names of the classes of zero_shot_image_classification, in the order of the class numbers.
    Default: those of the label column."""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    """Texts that describe a class by its name; several are averaged."""
    pooling: Literal["mean", "cls", "last", "max"] | None = None
    """How the tokens of a text become its embedding. Default: that of the folder's
    `1_Pooling/config.json`, else the mean."""
    similarity_scale: float = 20.0
    """Factor on the cosine similarities of embeddings of which the cross-entropy is taken."""
    generation: Generation | None = None
    """Also score generated texts, of kinds with an answer: chat, completion, instruction,
    seq2seq."""

    def __post_init__(self) -> None:
        """Check the options that need no data."""
        if not isinstance(self.path, (str, Path, Mapping)):
            raise ConfigError(
                "path: expected the name of a data set or of a builder (json, csv, imagefolder, "
                f"...) as text, got {self.path!r}."
            )
        if isinstance(self.path, Mapping) and not set(STAGES) & self.path.keys():
            raise ConfigError(
                f"path: expected text, or from Python a mapping of {', '.join(STAGES)} to "
                f"datasets, got a mapping of {', '.join(map(str, self.path)) or 'nothing'}."
            )
        for option, given in (("splits", self.splits), ("limit", self.limit)):
            for key in given or {}:
                if key not in STAGES:
                    raise ConfigError(
                        f"{option}: unknown split {key!r} (choose from {', '.join(STAGES)})."
                        f"{nearest(key, STAGES)}"
                    )
        one = math.isclose(sum(self.fractions), 1, abs_tol=1e-6)
        if len(self.fractions) != 3 or not one or min(self.fractions) <= 0:
            raise ConfigError(
                f"fractions: expected three positive shares that sum to 1, got {self.fractions}."
            )
        least = 2 if self.kind in _CAUSAL else 1  # a token, and the next one to predict
        allowed = least <= self.max_length <= _LONGEST
        require(allowed, "max_length", f"{least} to {_LONGEST} tokens", self.max_length)
        for stage, count in (self.limit or {}).items():
            require(count >= 1, f"limit.{stage}", "at least 1 example", count)
        require(0 < self.masked < 1, "masked", "a share between 0 and 1", self.masked)
        scale = self.similarity_scale
        require(0 < scale < math.inf, "similarity_scale", "a positive number", scale)
        wrong = [text for text in self.templates if "{}" not in text]
        require(bool(self.templates) and not wrong, "templates", "texts with {}", self.templates)

    @property
    def packs(self) -> bool:
        """True if windows hold several texts."""
        return self.kind == "causal_lm" if self.packing is None else self.packing

    @property
    def limits_rows(self) -> bool:
        """True if `limit` counts rows, false if it counts windows."""
        return not (self.kind == "causal_lm" and self.packs)


Processor = Literal["tokenizer", "image_processor", "both"]


def load_processor(
    folder: str | Path | None, kind: Processor, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer or image processor of a model folder, or a processor of both.

    Code that ships with it runs only if the recipe trusts it.

    Raises:
        ConfigError: no folder is given, or it has none.
    """
    import transformers

    if folder is None:
        raise ConfigError(
            "expected a source folder with a tokenizer, got none. Set data.processor."
        )
    auto = {
        "tokenizer": transformers.AutoTokenizer,
        "image_processor": transformers.AutoImageProcessor,
        "both": transformers.AutoProcessor,
    }[kind]
    what = f"cannot load its {auto.__name__.removeprefix('Auto').lower()}"
    with reading(folder, what, "Set data.processor to a folder that has one.", ConfigError):
        return auto.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def padding_id(tokenizer: Any, network: Any, classifies: bool) -> int:
    """Return the padding token: the tokenizer's, else the network's, else 0.

    A decoder for sequence classification reads the last token that differs from the padding token
    of its config, so for these networks the config takes precedence.

    Args:
        tokenizer: tokenizer or image processor, or None.
        network: the network, or None if unknown.
        classifies: true if texts to classify are batched.

    Raises:
        ConfigError: the network needs a padding token, but its config has none.
    """
    config: Any = getattr(network, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    given = getattr(tokenizer, "pad_token_id", None)
    if network is not None and _looks_for_padding(network):
        if own is None and classifies:
            token = f"{given}, the tokenizer's" if given is not None else "its eos_token_id"
            raise ConfigError(
                f"{type(network).__name__} classifies by the last token that is not padding, but "
                f"its config has no pad_token_id. Set pad_token_id in the config.json of every "
                f"source (e.g. {token}), or set data.batch_size and data.eval_batch_size to 1."
            )
        given = own if own is not None else given
    found = given if given is not None else own
    return 0 if found is None else int(found)


def _looks_for_padding(network: Any) -> bool:
    """Return true for a decoder classifier, whose forward compares with the padding token."""
    kind = type(network)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = getattr(code, "co_names", ())
    return kind.__name__.endswith("ForSequenceClassification") and "pad_token_id" in names


def columns_of(split: Any, where: str) -> list[str]:
    """Return the names of the columns of a split.

    Raises:
        ConfigError: its rows are not mappings.
    """
    known = getattr(split, "column_names", None)
    if isinstance(known, list):
        return known
    first = row_of(split, 0, where)
    if not isinstance(first, Mapping):
        kind = type(first).__name__
        raise ConfigError(f"{where}: expected rows that map columns to values, got {kind}.")
    return list(first)


def row_of(rows: Any, index: int, where: str) -> Any:
    """Return a row of a split.

    Raises:
        ConfigError: it cannot be read, such as a damaged image.
    """
    with reading(f"{where}, row {index}", "cannot be read", "Repair or remove it.", ConfigError):
        return rows[index]


def first_rows(rows: Any, limit: int | None) -> Any:
    """Return the first rows of a split, or all without a limit."""
    return rows if limit is None else Subset(rows, range(min(limit, len(rows))))
