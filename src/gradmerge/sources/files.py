"""Sources in files: Hugging Face folders and hub ids, safetensors (also sharded), `.bin`."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import SourceError, shorten
from gradmerge.common.files import near, parse_json, read_json
from gradmerge.common.finite import as_json
from gradmerge.common.hub import download, expanded, require_hub_id
from gradmerge.common.names import require_file
from gradmerge.common.secrets import remember
from gradmerge.sources.base import AbstractSource, Checkpoint, TensorInfo
from gradmerge.sources.identity import FileState, require_files, require_unchanged, states_of
from gradmerge.sources.in_memory import MemoryCheckpoint
from gradmerge.sources.modules import FlatFolder, network_module
from gradmerge.sources.side_files import DOWNLOADED, side_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}

_CONVERT = (
    "Convert it once, on a machine where you trust the file: "
    "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` writes safetensors."
)


class FileCheckpoint(Checkpoint):
    """A checkpoint in files, which are watched from before the first of them is read.

    Args:
        files: the weights.
        folder: folder of their config and tokenizer.
    """

    needs: FlatFolder | None = None
    """The temporary folder that `folder` is, which must exist as long as this checkpoint."""

    def __init__(self, files: Sequence[Path], folder: Path | None) -> None:
        self._side = () if folder is None else tuple(side_files(folder))
        self._watched = states_of([*files, *self._side])

    @property
    @override
    def watched(self) -> Sequence[FileState]:
        return self._watched

    @property
    @override
    def side_files(self) -> Sequence[Path]:
        return self._side


class SafetensorsCheckpoint(FileCheckpoint):
    """Tensors mapped from one or more safetensors files.

    Args:
        files: the files.
        label: path or hub id that messages show.
        folder: Hugging Face folder that they belong to.
        places: file of each tensor by the folder's index. An exported task's folder replaces heads
            of the shared weights in the folder above by its own.
        side: folder of other settings that belong to them. Default: `folder`.
    """

    def __init__(
        self,
        files: list[Path],
        label: str,
        folder: Path | None = None,
        places: Mapping[str, Path] | None = None,
        side: Path | None = None,
    ) -> None:
        FileCheckpoint.__init__(self, files, side or folder)
        infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        self._mapped: dict[str, Tensor] = {}
        for file in files:
            for name, info in _read_header(file).items():
                place = (places or {}).get(name, file)
                if place != file and place.parent != file.parent:
                    continue
                if name in infos:
                    raise SourceError(
                        f"{label}: tensor {name} is in both {infos[name].file} and {file}; "
                        "remove the stale shard."
                    )
                infos[name] = info
        lost = [name for name in places or () if name not in infos]
        if lost:
            raise SourceError(
                f"{folder}: its index names tensors that its shards do not hold: {shorten(lost)}. "
                "Index and shards are from different saves; copy or download them again."
            )
        Checkpoint.__init__(self, label, infos, folder, _config_of(folder))

    @override
    def read(self, name: str) -> Tensor:
        # Kept: mapping takes microseconds, which add up over sources, tensors and steps.
        if name not in self._mapped:
            file = self._infos[name].file
            if file not in self._handles:
                require_unchanged(self._watched)  # since its header was read
                opened = safe_open(file, framework="pt")
                require_unchanged(self._watched)
                self._handles[file] = opened
            self._mapped[name] = self._handles[file].get_tensor(name)
        return self._mapped[name]

    @override
    def stored_as(self, name: str) -> Hashable | None:
        return os.path.realpath(self._infos[name].file), name


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the headers of all tensors of a safetensors file, in its order.

    Raises:
        SourceError: the file is missing, truncated or not safetensors.
    """
    try:
        # Opening checks the header against the size of the file; with "np" it reserves no memory.
        with safe_open(path, framework="np"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length), path)
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: expected a safetensors file, but no such file exists.{near(path)}"
        ) from error
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path}: expected a complete safetensors file, got: {error}. The file is truncated or "
            "of another kind; copy or download it again."
        ) from error
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise SourceError(
                f"{path}: tensor {name}: unsupported dtype {entry['dtype']}; convert the "
                "checkpoint to bfloat16, float16 or float32. If it is quantised, give the "
                "checkpoint that it was made from."
            )
        infos[name] = TensorInfo(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], str(path))
    return infos


class TorchFileCheckpoint(FileCheckpoint):
    """A `.bin`/`.pt` state dict, loaded without running any code and memory-mapped."""

    def __init__(
        self, files: list[Path], label: str, folder: Path | None = None, side: Path | None = None
    ) -> None:
        FileCheckpoint.__init__(self, files, side or folder)
        parts = [MemoryCheckpoint(_load_without_code(file), str(file)) for file in files]
        self._files = {name: part for part in parts for name in part.infos}
        infos = {name: part.infos[name] for name, part in self._files.items()}
        Checkpoint.__init__(self, label, infos, folder, _config_of(folder))

    @override
    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)


def _config_of(folder: Path | None) -> dict[str, Any] | None:
    return None if folder is None else read_json(folder / "config.json")


def _load_without_code(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise SourceError(f"{file}: expected a torch file, but no such file exists.{near(file)}")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{file}: expected a state dict of plain tensors, got a pickle that would run code "
            f"when loaded, or no torch file at all. It was not loaded. {_CONVERT}"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise SourceError(
            f"{file}: expected a torch zip file that can be memory-mapped, got: {error}. {_CONVERT}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise SourceError(
            f"{file}: expected a dict of tensors, got {type(loaded).__name__}. {_CONVERT}"
        )
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise SourceError(f"{file}: expected names of tensors, got {name!r}. {_CONVERT}")
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise SourceError(
                f"{file}: expected dense tensors, got {name} as {tensor.layout}. {_CONVERT}"
            )
    return state


def _weight_files(folder: Path, single: str) -> tuple[list[Path], dict[str, Path]]:
    """Return the weight files of a folder, and the file of each tensor by its index.

    As in transformers, a single file takes precedence over the shards of an index.
    """
    require_files([folder / single, folder / f"{single}.index.json"])
    if (folder / single).is_file():
        return [folder / single], {}
    path = folder / f"{single}.index.json"
    index = read_json(path)
    if index is None:
        return [], {}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SourceError(f"{path}: expected a `weight_map` from tensors to shards, got none.")
    for name in places.values():
        _require_shard(path, name)
    files = [folder / name for name in sorted(set(places.values()))]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise SourceError(
            f"{folder}: its index names shards that do not exist: {shorten(lost)}. "
            "Copy or download them again."
        )
    return files, {name: folder / file for name, file in places.items()}


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights under the names that transformers gives them."""
    files = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{n}{end}").is_file() for n in files for end in ("", ".index.json"))


def _require_shard(index: Path, name: Any) -> None:
    """Reject a shard that is not in the folder of its index.

    An exported task's folder shares the weights of the folder above `tasks`.
    """
    above = "../../" if index.parent.parent.name == "tasks" else ""
    inner = name.removeprefix(above) if isinstance(name, str) else name
    require_file(index, inner, SourceError)


def write_json(path: Path, value: Any, spelled: bool = False) -> None:
    """Write plain data as indented JSON; for `spelled` see `as_json`."""
    plain = as_json(value, spelled)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class SafetensorsFile(AbstractSource):
    """One bare safetensors file, without config or tokenizer."""

    path: str
    """Path of the file."""

    @override
    def open(self) -> Checkpoint:
        return SafetensorsCheckpoint([expanded(self.path)], self.path)


@dataclass(frozen=True)
class TorchFile(AbstractSource):
    """One `.bin` or `.pt` state dict; a pickle that would run code is refused."""

    path: str
    """Path of the file."""

    @override
    def open(self) -> Checkpoint:
        return TorchFileCheckpoint([expanded(self.path)], self.path)


@dataclass(frozen=True)
class HuggingFace(AbstractSource):
    """A Hugging Face model: a local folder, or a hub id with its revision."""

    path: str
    """Local folder or hub id (``owner/name``)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    token: str | None = field(default=None, repr=False)
    """Hub token; the default is the one you are logged in with. It is never written anywhere."""

    def __post_init__(self) -> None:
        """Keep the token out of all texts."""
        remember(self.token)

    @override
    def open(self) -> Checkpoint:
        folder = self.local_folder()
        label = self.path if self.revision is None else f"{self.path}@{self.revision}"
        network = None if has_weights(folder) else network_module(folder)
        if network is not None:
            flat = FlatFolder(folder, network)
            opened = self._opened(folder / network, label, flat.path)
            opened.needs = flat
            return opened
        return self._opened(folder, label)

    def _opened(self, at: Path, label: str, folder: Path | None = None) -> FileCheckpoint:
        """Open the weights in a folder, with its other files or those of another one."""
        files, places = _weight_files(at, "model.safetensors")
        if files:
            return SafetensorsCheckpoint(files, label, folder or at, places, side=at)
        if folder is None and at != expanded(self.path):  # a hub snapshot, downloaded without them
            at = self._download([*DOWNLOADED, "pytorch_model*.bin"])
        files, _ = _weight_files(at, "pytorch_model.bin")  # its index names tied tensors twice
        if not files:
            names = sorted(file.name for file in at.iterdir())
            hint = ""
            if "adapter_config.json" in names:
                hint = " This is a LoRA adapter: give it as `class_path: Lora` with its `base`."
            elif any(name.endswith(".gguf") for name in names):
                hint = " GGUF is llama.cpp's format: give the checkpoint that it was made from."
            raise SourceError(
                f"{at}: expected model.safetensors, model.safetensors.index.json or "
                f"pytorch_model.bin, got {shorten(names) or 'nothing'}.{hint}"
            )
        return TorchFileCheckpoint(files, label, folder or at, side=at)

    def local_folder(self) -> Path:
        """Return the folder, or the hub snapshot in the local cache (downloaded if missing).

        Raises:
            SourceError: there is no such folder, and no such snapshot could be downloaded.
        """
        folder = expanded(self.path)
        if folder.is_dir():
            return folder
        require_hub_id(self.path, single=True, anywhere=True)
        return self._download([*DOWNLOADED, "model*.safetensors", "adapter_model.safetensors"])

    def _download(self, patterns: list[str]) -> Path:
        return download(self.path, self.revision, self.token, patterns)
