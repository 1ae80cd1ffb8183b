"""What a source is: a frozen recipe (`AbstractSource`) that opens to a lazy `Checkpoint`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradmerge.errors import FingerprintError, shorten

Key = TypeVar("Key")
Value = TypeVar("Value")
Self = TypeVar("Self", bound="Shared")


class Shared:
    """What is frozen, and may be as large as all sources: a deep copy of its owner shares it."""

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """Itself."""
        return self


class SharedDict(Shared, dict[Key, Value]):
    """Copies of frozen tensors, made when they are first wanted."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor, known without reading its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def num_elements(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Size in bytes in the stored dtype."""
        return self.num_elements * self.dtype.itemsize


class Checkpoint(Shared, ABC):
    """An opened source: headers in memory, tensors read (mapped) one at a time, by name."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The path, hub id or description that messages show."""

    @property
    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """Header of every tensor by name."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor `name`, contiguous, in its stored dtype; mapped from disk where possible.

        A tensor that is formed when asked for (a LoRA update) may come in a wider dtype than its
        header says. Callers must not write to it.
        """

    @property
    def folder(self) -> Path | None:
        """The Hugging Face folder with config and tokenizer, if there is one."""
        return None

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder whose tokenizer this checkpoint was trained with; most often `folder`."""
        return self.folder

    @property
    def config(self) -> Mapping[str, Any] | None:
        """`config.json` as plain data, if there is one."""
        return None

    def keep(self) -> None:
        """Prepare for being read again and again, where tensors are formed at every reading."""

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors, in order of name.

        Streamed a tensor at a time; the same weights give the same fingerprint however they are
        sharded.
        """
        digest = hashlib.sha256()
        for name in sorted(self.infos):
            info = self.infos[name]
            digest.update(f"{name}|{info.dtype}|{info.shape}|".encode())
            digest.update(tensor_bytes(self.read(name)))
        return digest.hexdigest()


class AbstractSource(ABC):
    """Where frozen weights come from."""

    @abstractmethod
    def open(self) -> Checkpoint:
        """Read the headers.

        Raises:
            SourceError: the files are missing, damaged, or would need unpickling code.
        """


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors, which are one piece of memory, once: under the first of their names.

    A safetensors file holds a tied tensor once too, so both forms of a checkpoint name the same.
    """
    kept: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() > 1 and tensor.device.type != "meta":
            if place in seen:
                continue
            seen.add(place)
        kept[name] = tensor
    return kept


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:
        flat = flat.clone(memory_format=torch.contiguous_format)  # one entry may have any stride
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprints_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Content hash of each checkpoint; reads all weights once, several checkpoints at a time."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the lock
        hashes = pool.map(lambda checkpoint: checkpoint.fingerprint(), checkpoints.values())
        return dict(zip(checkpoints, hashes, strict=True))


def require_same(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """Refuse coefficients that were trained on other weights.

    Raises:
        FingerprintError: names and hashes of the sources that differ.
    """
    wrong = [name for name in expected if got.get(name) != expected[name]]
    wrong += [name for name in got if name not in expected]
    if wrong:
        raise FingerprintError(
            f"the coefficients were trained on other weights of: {shorten(wrong)}. "
            + "; ".join(
                f"{n}: expected {expected.get(n, 'none')[:12]}, got {got.get(n, 'none')[:12]}"
                for n in wrong[:5]
            )
            + ". Give the sources they were trained on, or train again."
        )
