"""From what a user writes (a path, a hub id, a module) to a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from gradmerge.errors import ConfigError, SourceError
from gradmerge.sources.base import AbstractSource, Checkpoint
from gradmerge.sources.emr import EMRCheckpoint, read_description
from gradmerge.sources.files import HuggingFace, SafetensorsFile, TorchFile, read_json
from gradmerge.sources.in_memory import InMemory
from gradmerge.sources.lora import Lora

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
FILE_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def as_source(value: Any, base: AbstractSource | None = None) -> AbstractSource:
    """The source that `value` means.

    A string or path is a Hugging Face folder, a LoRA adapter folder (it holds
    adapter_config.json), a task's folder of a compact EMR-Merging (it holds masks.safetensors), a
    `.safetensors`, `.bin` or `.pt` file, or else a hub id (``owner/name`` or
    ``owner/name@revision``). A module or a mapping of tensors is taken as it is.

    Raises:
        SourceError: a LoRA folder without a base to put it on.
        ConfigError: a value of another type, or a file of another kind.
    """
    if isinstance(value, AbstractSource):
        return value
    if isinstance(value, (nn.Module, Mapping)):
        return InMemory(value)
    if not isinstance(value, (str, Path)):
        raise ConfigError(
            f"a source is a path, a hub id, a module or a state dict; got {type(value).__name__}."
        )
    text = str(value)
    path = Path(text).expanduser()
    if path.suffix == ".safetensors":
        return SafetensorsFile(str(path))
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(str(path))
    if (path / "adapter_config.json").is_file() and not (path / "model.safetensors").is_file():
        return Lora(str(path), base if base is not None else _own_base(path))
    if (path / "masks.safetensors").is_file() and (path.parent.parent / "emr.json").is_file():
        return EMR(str(path.parent.parent), path.name, base)
    if path.is_dir():
        return HuggingFace(str(path))
    if path.exists():
        raise ConfigError(
            f"{text}: expected a folder or a file ending in .safetensors, .bin, .pt or .pth."
        )
    name, _, revision = text.partition("@")
    return HuggingFace(name, revision=revision or None)


def _own_base(path: Path) -> AbstractSource:
    settings = read_json(path / "adapter_config.json") or {}
    name = settings.get("base_model_name_or_path")
    if not name:
        raise SourceError(
            f"{path}: this adapter does not say which base it was trained on. Give it: "
            "`base:` in the recipe, or `class_path: Lora` with `base`."
        )
    source = as_source(name)
    revision = settings.get("revision")
    return replace(source, revision=revision) if isinstance(source, HuggingFace) else source


@dataclass(frozen=True)
class EMR(AbstractSource):
    """A task of a folder that `gradmerge merge --outputs compact` wrote (EMR-Merging, arXiv
    2405.17461): `A + r_k M_k (.) u`, formed when asked for.
    """

    path: str
    """The compact folder."""
    task: str
    """The task."""
    base: AbstractSource | None = None
    """The base that was merged on; default: where the folder says it is."""

    @override
    def open(self) -> Checkpoint:
        folder = Path(self.path).expanduser()
        base = self.base or as_source(read_description(folder)["base"]["from"])
        return EMRCheckpoint(folder, self.task, base.open())
