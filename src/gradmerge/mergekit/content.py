"""What a mergekit file says, as data, and the list of what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmerge.errors import ConfigError
from gradmerge.mergekit.methods import Method

Settings = Mapping[str, Any]

# The keys of a file, by place.
OF_A_FILE = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
OF_A_MODEL = ("model", "parameters")
OF_A_SLICE = ("sources", "base_model", "residual_weight", "parameters")
OF_SOURCES = ("model", "layer_range", "parameters")


@dataclass(frozen=True)
class ModelReference:
    """A model as mergekit names one: `path`, `owner/name@revision`, each with `+adapter`."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        text = self.path if self.revision is None else f"{self.path}@{self.revision}"
        if self.lora is None:
            return text
        revision = "" if self.lora_revision is None else f"@{self.lora_revision}"
        return f"{text}+{self.lora}{revision}"


@dataclass(frozen=True)
class Input:
    """One model that goes into a slice."""

    model: ModelReference
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A range of layers and what goes into it."""

    inputs: tuple[Input, ...]
    parameters: Settings = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    """First layer and one past the last; None for all."""

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Its models, in order."""
        return tuple(entry.model for entry in self.inputs)


@dataclass(frozen=True)
class Document:
    """A whole file."""

    path: str
    method: Method
    slices: tuple[Slice, ...]
    base: ModelReference | None = None
    module_parameters: Settings = field(default_factory=dict)
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: ModelReference | str | None = None
    """`union`, `base` or a model whose tokenizer is taken; None: no tokens are moved."""
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    """`auto`, or the text of one."""

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """All inputs, each once, in order of appearance."""
        return tuple(dict.fromkeys(model for part in self.slices for model in part.models))


class Problems(list[str]):
    """What is wrong with a file, each once."""

    def add(self, where: str, what: str) -> None:
        """Note a problem."""
        text = f"{where}: {what}" if where else what
        if text not in self:
            self.append(text)

    def stop(self, path: str) -> None:
        """Raise if there is any.

        Raises:
            ConfigError: with all of them.
        """
        if self:
            count = "one problem keeps" if len(self) == 1 else f"{len(self)} problems keep"
            raise ConfigError(
                f"{path}: {count} this mergekit file from being read:\n"
                + "\n".join(f"  {problem}" for problem in self)
            )
