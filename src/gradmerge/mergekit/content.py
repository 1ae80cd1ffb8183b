"""The parts of a mergekit file as data, and the list of problems found in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmerge.errors import ConfigError
from gradmerge.mergekit.methods import Method

Settings = Mapping[str, Any]


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
class Slice:
    """A range of layers and the models that go into it."""

    inputs: Mapping[ModelReference, Settings]
    """Models in order, each with its own parameters."""
    parameters: Settings = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    """First layer and one past the last; None for all."""


@dataclass(frozen=True)
class Document:
    """A whole file."""

    method: Method
    slices: tuple[Slice, ...]
    base: ModelReference | None = None
    module_parameters: Settings = field(default_factory=dict)
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: ModelReference | str | None = None
    """`union`, `base`, or the model whose tokenizer the merge has; None: no tokens are moved."""
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    """`auto`, or the text of a template."""

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """All inputs, each once, in order of appearance."""
        return tuple(dict.fromkeys(model for part in self.slices for model in part.inputs))


class Problems(list[str]):
    """The problems of a file, each once."""

    def add(self, where: str, what: str) -> None:
        """Note a problem."""
        text = f"{where}: {what}" if where else what
        if text not in self:
            self.append(text)

    def stop(self, path: str) -> None:
        """Raise one error that lists all problems, if there are any.

        Raises:
            ConfigError: there are problems.
        """
        if self:
            count = "one problem" if len(self) == 1 else f"{len(self)} problems"
            raise ConfigError("\n  ".join([f"{path}: this mergekit file has {count}:", *self]))
