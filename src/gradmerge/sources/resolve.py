"""Turn what a user writes (a path, a hub id, a module) into a source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from gradmerge.common.errors import ConfigError, GradmergeError, SourceError
from gradmerge.common.hub import expanded, require_hub_id, without_downloads
from gradmerge.common.names import FILE_SUFFIXES
from gradmerge.sources.averaged import (
    AveragedCheckpoint,
    is_pattern,
    matching,
    require_window,
    shares,
)
from gradmerge.sources.base import AbstractSource, Checkpoint
from gradmerge.sources.distributed import Distributed, find_metadata
from gradmerge.sources.emr import EMRCheckpoint, part_of, read_description
from gradmerge.sources.files import HuggingFace, SafetensorsFile, TorchFile, has_weights
from gradmerge.sources.in_memory import InMemory
from gradmerge.sources.lora import Lora, read_adapter
from gradmerge.sources.quantised import is_gguf

TORCH_SUFFIXES = FILE_SUFFIXES[1:]


def as_source(value: Any, base: AbstractSource | None = None) -> AbstractSource:
    """Return the source that `value` stands for.

    A string or path is a Hugging Face folder, a folder of torch.distributed.checkpoint (with
    .metadata), the folder of a LoRA adapter (with adapter_config.json) or of a task of a compact
    EMR-Merging (with masks.st), a `.safetensors`, `.bin`, `.pt` or `.pth` file, or else a hub id
    (``owner/name`` or ``owner/name@revision``). Modules and mappings of tensors are used as they
    are. A path with `*` stands for the average of all checkpoints that match (`RunAverage`).

    Args:
        value: path, hub id, module, state dict or source.
        base: the recipe's base, for adapters and tasks.

    Raises:
        SourceError: an adapter has no base.
        ConfigError: `value` has another type, or is a file of another kind, or a path that does
            not exist.
    """
    if isinstance(value, AbstractSource):
        return value
    if isinstance(value, (nn.Module, Mapping)):
        return InMemory(value)
    if not isinstance(value, (str, Path)):
        raise ConfigError(
            "expected a path, hub id, module or state dict as a source, got "
            f"{type(value).__name__}."
        )
    return _located(str(value), base, ())


def _located(
    text: str, base: AbstractSource | None, asked: tuple[Path, ...], own: bool = False
) -> AbstractSource:
    """Return the source at a path, or the hub id.

    Args:
        text: path or hub id.
        base: the recipe's base, for adapters and tasks.
        asked: adapters and tasks whose own base is looked for, outermost first.
        own: the text is the base that a file names, which may be an old hub id without owner.
    """
    if not text:
        raise ConfigError("expected a path or hub id as a source, got an empty text.")
    if is_pattern(text):
        return RunAverage(text, base=base)
    path = expanded(text)
    if path.suffix == ".safetensors":
        return SafetensorsFile(str(path))
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(str(path))
    if (path / "adapter_config.json").is_file() and not (path / "model.safetensors").is_file():
        return Lora(str(path), base if base is not None else _own_base(path, asked))
    if part_of(path, "masks").is_file() and (path.parent.parent / "emr.json").is_file():
        folder = path.parent.parent
        if base is None and asked:  # else when it is opened
            base = _base_of(folder, _place_of_base(folder), asked)
        return EMR(str(folder), path.name, base)
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        if path.is_file() and is_gguf(path):
            raise ConfigError(
                f"{text}: expected weights that PyTorch can read, got a GGUF file, which llama.cpp "
                "writes. Give the checkpoint that it was made from."
            )
        raise ConfigError(
            f"{text}: expected a folder or a file ending in .safetensors, .bin, .pt or .pth."
        )
    name, _, revision = text.partition("@")
    if revision and expanded(name).exists():
        raise SourceError(
            f"{text}: {name} exists here, where it has no revision; remove @{revision}."
        )
    require_hub_id(name, single=own)
    return HuggingFace(name, revision=revision or None)


def _of_folder(path: Path) -> AbstractSource:
    """Return the source of a folder: weights of Hugging Face, else a distributed checkpoint."""
    if find_metadata(path) is not None and not has_weights(path):
        return Distributed(str(path))
    return HuggingFace(str(path))


def _own_base(path: Path, asked: tuple[Path, ...]) -> AbstractSource:
    settings = read_adapter(path)
    name = settings.get("base_model_name_or_path")
    if not name:
        raise SourceError(
            f"{path}: adapter_config.json does not name the base that the adapter was trained on. "
            "Give it: `base:` in the recipe, or `class_path: Lora` with `base`."
        )
    return _base_of(path, name, asked, settings.get("revision"))


def base_of_compact(folder: Path) -> AbstractSource:
    """Return the base that a compact EMR-Merging was made on, as its emr.json names it."""
    return _base_of(folder, _place_of_base(folder), ())


def _place_of_base(folder: Path) -> str:
    """Return the base of a compact folder: a place relative to it, another path, or a hub id."""
    place = str(read_description(folder)["base"]["from"])
    return os.path.normpath(folder / place) if place.startswith("../") else place


@dataclass(frozen=True)
class _NamedByFile(HuggingFace):
    """A hub id that a file names, and not the user: it is taken from the local cache."""

    file: str = ""

    @override
    def _download(self, patterns: list[str]) -> Path:
        with without_downloads(self.file, "Name it: `base:` in the recipe, or `--base`."):
            return super()._download(patterns)


def _base_of(
    path: Path, name: str, asked: tuple[Path, ...], revision: str | None = None
) -> AbstractSource:
    """Return the base that a folder names; adapters may stand on adapters, but not in a circle."""
    place = path.resolve()
    if place in asked:
        circle = " -> ".join(map(str, [*asked, place]))
        raise SourceError(
            f"{path}: expected a model as its base in the end, got a circle: {circle}. Give the "
            "base: `base:` in the recipe."
        )
    try:
        source = _located(name, None, (*asked, place), own=True)
    except GradmergeError as error:
        if asked:
            raise
        raise SourceError(
            f"{path} names {name!r} as its base: {error}\nGive the base: `base:` in the recipe."
        ) from error
    if isinstance(source, HuggingFace) and not expanded(source.path).is_dir():
        source = _NamedByFile(source.path, revision or source.revision, file=str(path))
    return source


@dataclass(frozen=True)
class EMR(AbstractSource):
    """A task of an EMR-Merging in compact form: `A + r_k M_k (.) u` (arXiv 2405.17461).

    `gradmerge merge --outputs compact` writes the folder.
    """

    path: str
    """The compact folder."""
    task: str
    """The task."""
    base: AbstractSource | None = None
    """The base that was merged on; default: the path or hub id in the folder's emr.json."""

    @override
    def open(self) -> Checkpoint:
        folder = expanded(self.path)
        base = self.base or base_of_compact(folder)
        return EMRCheckpoint(folder, self.task, base.open())


@dataclass(frozen=True)
class RunAverage(AbstractSource):
    """A weighted average of the last checkpoints of one training run.

    `theta = sum_i w_i theta_i` over the last `n` checkpoints, from the oldest (`i = 1`) to the
    newest (`i = n`), with weights that sum to 1:

    - `average`: `w_i = 1 / n`. Of checkpoints at a constant learning rate, it stands for a linear
      decay of that rate (WSM, arXiv 2507.17634; earlier LAWA, arXiv 2209.14981);
    - `linear`: `w_i ~ i`, falling linearly with age;
    - `cosine`: `w_i ~ (1 - cos(pi i / n)) / 2`, falling slowly at first, then faster.

    It is read one tensor at a time, and takes any place that another source takes. Config,
    tokenizer and other files are those of the newest checkpoint.
    """

    path: str
    """Pattern of the checkpoints, such as run/checkpoint-*; they are ordered by the numbers in
    their names. Each may be anything that a source's path may be."""
    last: int | None = None
    """Number of checkpoints, counted from the newest. Default: all that match."""
    weights: Literal["average", "linear", "cosine"] | list[float] = "average"
    """Schedule of the weights, or one number per checkpoint, oldest first, scaled to sum to 1."""
    base: AbstractSource | None = None
    """Base of the checkpoints if they are adapters. Default: as each adapter names it."""

    def __post_init__(self) -> None:
        """Check everything that needs no open file."""
        require_window(self.path, self.last, self.weights)

    @override
    def open(self) -> Checkpoint:
        places = matching(self.path, self.last, FILE_SUFFIXES)
        weights = shares(self.weights, len(places))
        opened = {str(place): as_source(place, self.base).open() for place in places}
        return AveragedCheckpoint(self.path, opened, weights)
