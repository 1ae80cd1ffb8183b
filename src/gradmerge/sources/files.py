"""Sources that are files: safetensors (single, sharded), Hugging Face folders, hub ids, `.bin`."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import SourceError, shorten
from gradmerge.sources.base import AbstractSource, Checkpoint, TensorInfo, without_aliases

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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

# Code (`*.py`) lies beside the config; nothing runs it unless the recipe trusts it.
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]

# The limit of the format itself; a longer "header" is the start of some other file.
_MAX_HEADER = 100_000_000

_CONVERT = (
    "Convert it once, on a machine where you trust the file: "
    "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` writes safetensors."
)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file; nothing but its header is read.

    Raises:
        SourceError: the file is missing, truncated or not safetensors.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise SourceError(
                    f"{path}: expected a safetensors file, got {len(prefix)} bytes. "
                    "The file is empty or cut off; copy or download it again."
                )
            (length,) = struct.unpack("<Q", prefix)
            size = path.stat().st_size
            if length > min(size - 8, _MAX_HEADER):
                raise SourceError(
                    f"{path}: expected a safetensors header of {length} bytes, got a file of "
                    f"{size} bytes. It is cut off or no safetensors file; copy it again."
                )
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: expected a safetensors file, but no such file exists."
        ) from error
    except OSError as error:
        raise SourceError(f"{path}: expected a readable safetensors file, got: {error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(
            f"{path}: its header is not JSON, so this is no safetensors file."
        ) from error
    try:
        infos, end = _parse_header(header, path)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise SourceError(
            f"{path}: its header is JSON but does not describe tensors, so this is no safetensors "
            f"file ({type(error).__name__}: {error})."
        ) from error
    if 8 + length + end != size:
        raise SourceError(
            f"{path}: expected {8 + length + end} bytes as its header says, got {size}. "
            "The file is cut off or was written over; copy or download it again."
        )
    return infos


def _parse_header(header: dict[str, Any], path: Path) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a header and the end of the last one in the data."""
    infos = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise SourceError(
                f"{path}: tensor {name}: dtype {entry['dtype']} has no torch counterpart here; "
                "convert the checkpoint to bfloat16, float16 or float32."
            )
        start, stop = entry["data_offsets"]
        infos[name] = TensorInfo(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]], str(path))
        if stop - start != infos[name].num_bytes:
            raise ValueError(f"{name} of shape {entry['shape']} cannot fill {stop - start} bytes")
        end = max(end, stop)
    return infos, end


class SafetensorsCheckpoint(Checkpoint):
    """Tensors mapped from one or more safetensors files.

    In a task's folder of an export the index names the task's own head in place of the shared one,
    which lies with the shared weights in the folder above.
    """

    def __init__(
        self,
        files: list[Path],
        label: str,
        folder: Path | None = None,
        places: Mapping[str, Path] | None = None,
    ) -> None:
        self._label = label
        self._folder = folder
        self._infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        self._mapped: dict[str, Tensor] = {}
        for file in files:
            for name, info in read_header(file).items():
                place = (places or {}).get(name, file)
                if place != file and place.parent != file.parent:
                    continue
                if name in self._infos:
                    raise SourceError(
                        f"{label}: tensor {name} stands in both {self._infos[name].file} and "
                        f"{file}; remove the stale shard."
                    )
                self._infos[name] = info

    @property
    @override
    def label(self) -> str:
        return self._label

    @property
    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    @override
    def folder(self) -> Path | None:
        return self._folder

    @cached_property
    @override
    def config(self) -> Mapping[str, Any] | None:
        if self._folder is None:
            return None
        return read_json(self._folder / "config.json")

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`; the pages are mapped, not copied."""
        if name in self._mapped:
            # A view takes no memory to keep and several microseconds to make, which adds up over
            # sources, tensors and steps.
            return self._mapped[name]
        info = self._infos[name]
        if info.file not in self._handles:
            try:
                self._handles[info.file] = safe_open(info.file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise SourceError(f"{info.file}: cannot be opened: {error}") from error
        tensor: Tensor = self._handles[info.file].get_tensor(name)
        self._mapped[name] = tensor
        return tensor


class TorchFileCheckpoint(Checkpoint):
    """A `.bin`/`.pt` state dict, loaded without running any code and memory-mapped."""

    def __init__(self, files: list[Path], label: str, folder: Path | None = None) -> None:
        self._label = label
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            for name, tensor in without_aliases(_load_without_code(file)).items():
                self._tensors[name] = tensor
                self._infos[name] = TensorInfo(name, tuple(tensor.shape), tensor.dtype, str(file))

    @property
    @override
    def label(self) -> str:
        return self._label

    @property
    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    @override
    def folder(self) -> Path | None:
        return self._folder

    @cached_property
    @override
    def config(self) -> Mapping[str, Any] | None:
        return None if self._folder is None else read_json(self._folder / "config.json")

    @override
    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


def _load_without_code(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise SourceError(f"{file}: expected a torch file, but no such file exists.")
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
    wrong = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise SourceError(
            f"{file}: expected tensors only, got other values under {shorten(wrong)}. "
            "Save the module's state_dict() alone."
        )
    return state


def _weight_files(folder: Path, single: str) -> tuple[list[Path], dict[str, Path]]:
    """The weight files of a folder and where its index promises each tensor, in transformers'
    order: the single file if it is there, else the shards of the index.
    """
    if (folder / single).is_file():
        return [folder / single], {}
    path = folder / f"{single}.index.json"
    index = read_json(path)
    if index is None:
        return [], {}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SourceError(f"{path}: expected a `weight_map` from tensors to shards, got none.")
    files = [folder / name for name in sorted(set(places.values()))]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise SourceError(
            f"{folder}: its index names shards that do not exist: {shorten(lost)}. "
            "Copy or download them again."
        )
    return files, {name: folder / file for name, file in places.items()}


def read_json(path: Path) -> dict[str, Any] | None:
    """The file as a dict, or None when it does not exist.

    Raises:
        SourceError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(loaded, dict):
        raise SourceError(f"{path}: expected a JSON object, got {type(loaded).__name__}.")
    return loaded


@dataclass(frozen=True)
class SafetensorsFile(AbstractSource):
    """One bare safetensors file, without config or tokenizer."""

    path: str
    """Path of the file."""

    @override
    def open(self) -> Checkpoint:
        return SafetensorsCheckpoint([Path(self.path).expanduser()], self.path)


@dataclass(frozen=True)
class TorchFile(AbstractSource):
    """One `.bin` or `.pt` state dict; a pickle that would run code is refused."""

    path: str
    """Path of the file."""

    @override
    def open(self) -> Checkpoint:
        return TorchFileCheckpoint([Path(self.path).expanduser()], self.path)


@dataclass(frozen=True)
class HuggingFace(AbstractSource):
    """A Hugging Face model: a local folder, or a hub id with its revision."""

    path: str
    """Local folder or hub id (``owner/name``)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    token: str | None = field(default=None, repr=False)
    """Hub token; the default is the one you are logged in with."""

    @override
    def open(self) -> Checkpoint:
        folder = self.local_folder()
        label = self.path if self.revision is None else f"{self.path}@{self.revision}"
        kind: type[SafetensorsCheckpoint] | type[TorchFileCheckpoint] = SafetensorsCheckpoint
        files, promised = _weight_files(folder, "model.safetensors")
        if not files:
            kind = TorchFileCheckpoint
            if folder != Path(self.path).expanduser():  # a hub snapshot, fetched without `.bin`
                folder = self._download([*_SMALL_FILES, "pytorch_model*.bin"])
            files, promised = _weight_files(folder, "pytorch_model.bin")
        if not files:
            there = shorten(sorted(file.name for file in folder.iterdir())) or "nothing"
            raise SourceError(
                f"{folder}: expected model.safetensors, model.safetensors.index.json or "
                f"pytorch_model.bin, got {there}.{_adapter_hint(folder)}"
            )
        if kind is SafetensorsCheckpoint:
            checkpoint: Checkpoint = SafetensorsCheckpoint(files, label, folder, promised)
        else:
            checkpoint = kind(files, label, folder)
        lost = [name for name in promised if name not in checkpoint.infos]
        if lost and kind is SafetensorsCheckpoint:  # a .bin index also names tied tensors twice
            raise SourceError(
                f"{folder}: its index names tensors that its shards do not hold: {shorten(lost)}. "
                "Index and shards come from different saves; copy or download them again."
            )
        return checkpoint

    def local_folder(self) -> Path:
        """The folder itself, or the hub snapshot in the local cache (downloaded when missing).

        Raises:
            SourceError: neither a folder nor a hub repository that can be had.
        """
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return folder
        if self.path.startswith((".", "/", "~")) or self.path.count("/") > 1:
            raise SourceError(f"{self.path}: expected a folder, but none exists there.")
        return self._download([*_SMALL_FILES, "model*.safetensors", "adapter_model.safetensors"])

    def _download(self, patterns: list[str]) -> Path:
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.path, revision=self.revision, token=self.token, allow_patterns=patterns
                )
            )
        except Exception as error:  # the hub client raises a wide and changing family
            raise SourceError(
                f"{self.path}: no such local folder, and the hub gave no snapshot "
                f"(revision {self.revision or 'main'}): {type(error).__name__}: {error}. "
                "Check the name and the network, or give the path of a local folder."
            ) from error


def _adapter_hint(folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        return ""
    return " This is a LoRA adapter: give it as `class_path: Lora` with its `base`."
