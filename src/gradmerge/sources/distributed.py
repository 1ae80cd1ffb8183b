"""Folders of torch.distributed.checkpoint (DCP): `.metadata` and `__*.distcp`, read lazily.

The metadata is a pickle, which could run code. It is read with an unpickler that knows the classes
of the format and nothing else. Tensors are read one at a time, by the library's own reader, from
all shards that hold a part of them, on any number of processes.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, GradmergeError, SourceError, shorten
from gradmerge.common.files import near, read_bytes, read_json
from gradmerge.common.hub import expanded
from gradmerge.common.memory import in_file
from gradmerge.common.names import require_file
from gradmerge.sources.base import AbstractSource, Checkpoint, TensorInfo
from gradmerge.sources.files import FileCheckpoint, HuggingFace
from gradmerge.sources.skeleton import build_skeleton

METADATA = ".metadata"
_FSDP = "pytorch_model_fsdp_0"  # the folder that Accelerate writes in a checkpoint's
_MODEL = ("model", "module", "state_dict")
_NOT_WEIGHTS = re.compile(
    r"(lr_?)?sched(uler)?s?(_|$)|optim(izer)?s?(_|$)|ema(_|$)|rng|(data_?)?loader|train(er)?_state"
    r"|(grad_)?scaler|callbacks|loops"
)
# Parts of names that FSDP, torch.compile and activation checkpointing add.
_WRAPPED = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.|^module\.")

_FORMAT = "torch.distributed.checkpoint."
_CLASSES = {
    f"{_FORMAT}metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_FORMAT}filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the format; reject every other."""
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return lambda *parts: "/".join(map(str, parts))  # where it was saved: only a text
        raise pickle.UnpicklingError(f"{module}.{name}")


@dataclass(frozen=True)
class Stored:
    """The content of the metadata of a distributed checkpoint."""

    metadata: Any
    """The library's own object."""
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype of each tensor by its key."""
    paths: Mapping[str, tuple[str, ...]]
    """Keys of the nested state that lead to each tensor."""
    ends: Mapping[str, int]
    """Least size of each shard in bytes, by its name."""


def read_metadata(folder: Path) -> Stored:
    """Read the metadata of a distributed checkpoint; code in it never runs.

    Raises:
        SourceError: it is damaged, of another format, or holds objects that it does not need.
    """
    path = folder / METADATA
    try:
        found = _Unpickler(io.BytesIO(read_bytes(path))).load()
        ends: dict[str, int] = defaultdict(int)
        for index, place in found.storage_data.items():
            name = require_file(path, place.relative_path, SourceError)
            ends[name] = max(ends[name], int(place.offset) + int(place.length))
            if getattr(place, "transform_descriptors", None):
                raise SourceError(
                    f"{path}: expected shards as they are, got {index.fqn} encoded by "
                    f"{', '.join(place.transform_descriptors)}. Save the checkpoint without it."
                )
        tensors = {
            str(key): (tuple(map(int, header.size)), header.properties.dtype)
            for key, header in found.state_dict_metadata.items()
            if hasattr(header, "chunks")
        }
        recorded = found.planner_data or {}
        paths = {key: tuple(map(str, recorded.get(key) or (key,))) for key in tensors}
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path}: expected the metadata of a distributed checkpoint, got an object of {error}, "
            "which is not loaded because unpickling can run code."
        ) from error
    except GradmergeError:
        raise
    except Exception as error:  # pickles of other objects fail in many ways
        raise SourceError(
            f"{path}: expected the metadata of a distributed checkpoint, got a damaged or other "
            f"file ({type(error).__name__}: {str(error)[:200]}). Copy or save it again."
        ) from error
    return Stored(found, tensors, paths, ends)


class DistributedCheckpoint(FileCheckpoint):
    """The weights in a folder of torch.distributed.checkpoint, without states of optimisers.

    Args:
        path: the folder with `.metadata`.
        label: path that messages show.
        folder: folder of the config and tokenizer.
        prefix: beginning of the names of the weights, if it is not to be found.

    Raises:
        SourceError: a shard is missing or cut off, or the weights cannot be told from the rest.
    """

    def __init__(
        self, path: Path, label: str, folder: Path | None = None, prefix: str | None = None
    ) -> None:
        self._path, stored = path, read_metadata(path)
        self._metadata = stored.metadata
        _require_shards(path, stored.ends)
        FileCheckpoint.__init__(self, [path / METADATA, *(path / n for n in stored.ends)], folder)
        self._keys = _names(stored, label, folder, prefix)
        infos = {
            name: TensorInfo(name, *stored.tensors[key], str(path))
            for name, key in self._keys.items()
        }
        self._kept: dict[str, Tensor] = {}
        config = None if folder is None else read_json(folder / "config.json")
        Checkpoint.__init__(self, label, infos, folder, config)

    @override
    def read(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        info = self._infos[name]
        return self._read_into(name, torch.empty(info.shape, dtype=info.dtype))

    def _read_into(self, name: str, out: Tensor) -> Tensor:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        # without `load`, which reads the metadata itself, and warns of missing processes
        reader, planner = FileSystemReader(self._path), DefaultLoadPlanner()
        try:
            planner.set_up_planner({self._keys[name]: out}, self._metadata, is_coordinator=True)
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # of the library, or of what reads the tensor
            raise SourceError(
                f"{self._path}: tensor {self._keys[name]} cannot be read: {type(error).__name__}: "
                f"{str(error)[:300]}. Copy or save the checkpoint again."
            ) from error
        return out

    @override
    def keep(self) -> None:
        """Read all tensors once, into temporary files without names (`TMPDIR`)."""
        for name, info in self._infos.items():
            if name not in self._kept:
                self._kept[name] = self._read_into(name, in_file(info.shape, info.dtype))


def _require_shards(path: Path, ends: Mapping[str, int]) -> None:
    sizes = {}
    for name in ends:
        with suppress(OSError):
            sizes[name] = (path / name).stat().st_size
    lost = sorted(ends.keys() - sizes.keys())
    short = sorted(name for name, size in sizes.items() if size < ends[name])
    for what, names in (("that exist", lost), ("that are complete", short)):
        if names:
            raise SourceError(
                f"{path}: expected shards {what}, but these are not: {shorten(names)}. "
                "Copy them again, of all nodes that saved."
            )


def _names(stored: Stored, label: str, folder: Path | None, prefix: str | None) -> dict[str, str]:
    """Return the key of each weight by its name in the network."""
    if prefix is None:
        found = _without_shared(_weights(stored.paths, label), folder)
    else:
        start, keys = prefix.rstrip(".") + ".", list(stored.tensors)
        found = {key.removeprefix(start): key for key in keys if key.startswith(start)}
        if not found:
            raise SourceError(
                f"{label}: expected names that start with {start!r} (prefix), got {shorten(keys)}."
            )
    return {_WRAPPED.sub("", name): key for name, key in found.items()}


def _weights(paths: Mapping[str, tuple[str, ...]], label: str) -> dict[str, str]:
    """Return the key of each weight by its name: keys beside `model` are states of the training."""
    groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for key, path in paths.items():
        # what was saved under flat names begins in the same way
        known = path[:-1] if len(path) > 1 else path[0].split(".")[:2]
        if not any(_NOT_WEIGHTS.match(part) for part in known):
            groups[path[:-1]][path[-1]] = key
    named = [place for place in groups if place and place[-1] in _MODEL]
    chosen = named if len(named) == 1 else list(groups)
    if len(chosen) != 1:
        listed = [f"{'.'.join(place) or 'no key'} ({len(g)})" for place, g in groups.items()]
        raise SourceError(
            f"{label}: expected weights under one key, such as `model`, got tensors under "
            f"{shorten(listed) or 'none'}. Name it: class_path: Distributed, with `prefix`."
        )
    return groups[chosen[0]]


def _without_shared(names: Mapping[str, str], folder: Path | None) -> dict[str, str]:
    """Return names without beginnings that all share, as far as the network does not have them."""
    found = dict(names)
    options = [found]
    while len({name.partition(".")[0] for name in found}) == 1 and all("." in n for n in found):
        found = {name.partition(".")[2]: key for name, key in found.items()}
        options.append(found)
    if len(options) == 1:
        return options[0]
    known: set[str] = set()
    if folder is not None and (folder / "config.json").is_file():
        with suppress(SourceError):  # an architecture that transformers does not have
            known = set(build_skeleton(folder).state_dict(keep_vars=True))
    plain = [{_WRAPPED.sub("", name) for name in names} for names in options]
    return options[max(range(len(options)), key=lambda i: (len(known & plain[i]), -i))]


def find_metadata(path: Path) -> Path | None:
    """Return the folder of a distributed checkpoint at a path, or in a checkpoint of Accelerate."""
    places = (path, path / _FSDP)
    return next((place for place in places if (place / METADATA).is_file()), None)


@dataclass(frozen=True)
class Distributed(AbstractSource):
    """A folder of torch.distributed.checkpoint (FSDP, torchtitan, Accelerate).

    Names are those of the saved state: the key that holds the weights (`model`, `app.model`), the
    states of optimisers and what FSDP, torch.compile and `module.` add are left out. Where all
    names share a beginning, it is left out if the network of the config has none like it.
    """

    path: str
    """The folder with `.metadata` and `__*.distcp`, or a checkpoint's folder with one of
    Accelerate's in it."""
    config: str | None = None
    """Folder or hub id with config.json and tokenizer. Default: the first of the folder and the two
    above it that has a config."""
    prefix: str | None = None
    """Beginning of the names of the weights, such as `app.model`. Default: found as above."""

    @override
    def open(self) -> Checkpoint:
        path = expanded(self.path)
        place = find_metadata(path)
        if place is None:
            raise SourceError(
                f"{self.path}: expected a folder with {METADATA}, as torch.distributed.checkpoint "
                f"writes it, but it has none.{near(path) if not path.exists() else ''}"
            )
        folder: Path | None
        if self.config is not None:
            folder = HuggingFace(self.config).local_folder()
            if not (folder / "config.json").is_file():
                raise ConfigError(f"Distributed.config: {self.config} has no config.json.")
        else:
            above = (place, *place.absolute().parents[:2])
            folder = next((p for p in above if (p / "config.json").is_file()), None)
        return DistributedCheckpoint(place, self.path, folder, self.prefix)
