"""Sources: frozen descriptions (`AbstractSource`) that open to lazy checkpoints (`Checkpoint`)."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import FingerprintError, NonFiniteError, shorten
from gradmerge.common.finite import NonFinite, non_finite, scan
from gradmerge.common.low_rank import LowRank
from gradmerge.common.memory import in_file
from gradmerge.common.progress import Progress
from gradmerge.sources.identity import FileState, hashes_of
from gradmerge.sources.side_files import is_compared

Self = TypeVar("Self", bound="Shared")
_hashing = threading.local()
"""The progress of the hashing that a thread takes part in."""


class Shared:
    """Frozen data that may be as large as all sources: deep copies of its owner share it."""

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """Return the object itself."""
        return self


@dataclass(frozen=True)
class TensorInfo:
    """Header of one tensor, known without reading its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    """File or label that messages show."""

    @property
    def num_elements(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Size in bytes in the stored dtype."""
        return self.num_elements * self.dtype.itemsize


class Checkpoint(Shared, ABC):
    """An opened source: headers in memory, tensors read (mapped) one at a time, by name.

    Subclasses define `read`, and call this constructor or override the properties.

    Args:
        label: path, hub id or description that messages show.
        infos: header of every tensor by name.
        folder: Hugging Face folder with config and tokenizer, if there is one.
        config: `config.json` as plain data, if there is one.
    """

    _folder: Path | None = None
    _config: Mapping[str, Any] | None = None
    _flaws: dict[str, NonFinite] | None = None

    def __init__(
        self,
        label: str,
        infos: Mapping[str, TensorInfo],
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._label, self._infos, self._folder, self._config = label, infos, folder, config

    @property
    def label(self) -> str:
        """Path, hub id or description that messages show."""
        return self._label

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Header of every tensor by name."""
        return self._infos

    @property
    def folder(self) -> Path | None:
        """Hugging Face folder with config and tokenizer, if there is one."""
        return self._folder

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that this checkpoint was trained with; most often `folder`."""
        return self.folder

    @property
    def config(self) -> Mapping[str, Any] | None:
        """`config.json` as plain data, if there is one."""
        return self._config

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, contiguous, in its stored dtype; mapped from disk if possible.

        A tensor that is computed on reading (a LoRA update) may have a wider dtype than its header.
        Callers must not write to it.
        """

    def keep(self) -> None:
        """Prepare for repeated reading, if tensors are computed on every read."""

    def stored_as(self, name: str) -> Hashable | None:
        """Return what tells the place of a tensor from all others; None if it is computed.

        Tensors of two checkpoints with the same place are the same.
        """
        return None

    def update(self, name: str) -> LowRank | None:
        """Return how a tensor differs from a stored one, if by a product of small matrices."""
        return None

    @property
    def parts(self) -> Sequence[Checkpoint]:
        """The stored checkpoints that this one is computed from, without repetition: itself."""
        return (self,)

    @property
    def watched(self) -> Sequence[FileState]:
        """The files of a stored checkpoint as they were when it was opened."""
        return ()

    @property
    def side_files(self) -> Sequence[Path]:
        """Config, tokenizer and adapter settings beside the weights of a stored checkpoint."""
        return ()

    @property
    def flaws(self) -> Mapping[str, NonFinite]:
        """Entries of the stored tensors that are NaN or infinite, by name.

        The first access reads the weights once, unless `fingerprint` has read them.
        """
        if self._flaws is None:
            found = ((name, non_finite(self.read(name))) for name in self.infos)
            self._flaws = {name: flaw for name, flaw in found if flaw is not None}
        return self._flaws

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors, in order of name.

        Reads one tensor at a time; the same weights give the same fingerprint however they are
        sharded. The pass finds the `flaws`, too.
        """
        digest, flaws = hashlib.sha256(), {}
        progress: Progress | None = getattr(_hashing, "progress", None)
        for name in sorted(self.infos):
            info, tensor = self.infos[name], self.read(name)
            digest.update(f"{name}|{info.dtype}|{info.shape}|".encode())
            flaw = scan(tensor, tensor_bytes(tensor), digest.update)
            if progress is not None:
                progress.advance(tensor.nbytes)
            if flaw is not None:
                flaws[name] = flaw
        self._flaws = flaws
        return digest.hexdigest()


class AbstractSource(ABC):
    """A description of frozen weights, which can be opened."""

    @abstractmethod
    def open(self) -> Checkpoint:
        """Read the headers.

        Raises:
            SourceError: the files are missing, damaged, or would need unpickling code.
        """


class View(Checkpoint):
    """Another checkpoint of which some tensors are changed on reading.

    The fingerprint is that of the checkpoint on disk.

    Args:
        inner: the checkpoint.
    """

    def __init__(self, inner: Checkpoint) -> None:
        super().__init__(inner.label, inner.infos, inner.folder, inner.config)
        self.inner = inner
        self._kept: dict[str, Tensor] = {}

    @property
    @override
    def tokenizer_folder(self) -> Path | None:
        return self.inner.tokenizer_folder

    @property
    @override
    def parts(self) -> Sequence[Checkpoint]:
        return self.inner.parts

    @abstractmethod
    def changes(self, name: str) -> bool:
        """Return whether the view changes this tensor."""

    @abstractmethod
    def form(self, name: str) -> Tensor:
        """Compute a tensor that changes."""

    def own_name(self, name: str) -> str:
        """Return the name in `inner` of a tensor that does not change."""
        return name

    @override
    def stored_as(self, name: str) -> Hashable | None:
        return None if self.changes(name) else self.inner.stored_as(self.own_name(name))

    @override
    def update(self, name: str) -> LowRank | None:
        return None if self.changes(name) else self.inner.update(self.own_name(name))

    @override
    def read(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        return self.form(name) if self.changes(name) else self.inner.read(self.own_name(name))

    @override
    def keep(self) -> None:
        """Write the changed tensors to temporary files (`TMPDIR`) and map them from there.

        The files have no names, so that a killed run leaves none.
        """
        self.inner.keep()
        for name in self.infos:
            if name not in self._kept and self.changes(name):
                formed = self.form(name)
                self._kept[name] = in_file(formed.shape, formed.dtype).copy_(formed)

    @override
    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def infos_of(tensors: Mapping[str, Tensor], file: str) -> dict[str, TensorInfo]:
    """Return the headers of tensors in memory; `file` is shown in messages."""
    return {
        name: TensorInfo(name, tuple(tensor.shape), tensor.dtype, file)
        for name, tensor in tensors.items()
    }


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep tied tensors, which share memory, once: under the first of their names.

    Safetensors files do the same, so both forms of a checkpoint have the same names.
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
    """Return the raw bytes of a tensor, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:
        flat = flat.clone(memory_format=torch.contiguous_format)  # one entry may have any stride
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprints_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Return the fingerprint of each checkpoint; reads all weights once, in parallel."""
    infos = [i for c in checkpoints.values() for part in c.parts for i in part.infos.values()]
    size = sum(info.num_bytes for info in infos)

    def count_in(progress: Progress) -> None:
        _hashing.progress = progress

    with (
        Progress("hashing the sources", size, "GB", 1e9) as progress,
        # hashing releases the GIL
        ThreadPoolExecutor(torch.get_num_threads(), "hash", count_in, (progress,)) as pool,
    ):
        hashes = pool.map(lambda checkpoint: checkpoint.fingerprint(), checkpoints.values())
        return dict(zip(checkpoints, hashes, strict=True))


def watched_files(checkpoints: Iterable[Checkpoint]) -> tuple[FileState, ...]:
    """Return all files of the checkpoints as they were when they were opened."""
    states = (
        state for checkpoint in checkpoints for part in checkpoint.parts for state in part.watched
    )
    return tuple(dict.fromkeys(states))


def side_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the SHA-256 of the config, tokenizer and adapter settings of a checkpoint, by name."""
    return hashes_of(part.side_files for part in checkpoint.parts)


@dataclass(frozen=True)
class Flaw:
    """A stored tensor with NaN or infinity."""

    tensor: str
    file: str
    names: tuple[str, ...]
    """The checkpoints that it belongs to."""
    entries: NonFinite


def find_flaws(
    checkpoints: Mapping[str, Checkpoint], buffers: Collection[str]
) -> tuple[list[Flaw], list[str]]:
    """Return the stored tensors with NaN or infinity; reads all weights unless they were read.

    Buffers, as the masks of some models, may be infinite where all checkpoints that have them
    agree.

    Args:
        checkpoints: by name.
        buffers: names of tensors that are not learned.

    Returns:
        The flaws, and the names of infinite buffers, which are none.
    """
    found = [(name, part) for name, checkpoint in checkpoints.items() for part in checkpoint.parts]
    _read_once([part for _, part in found])
    places: dict[tuple[str, str], Flaw] = {}
    for name, part in found:
        for tensor, entries in part.flaws.items():
            file = part.infos[tensor].file
            known = places.get((tensor, file))
            names = (*(known.names if known else ()), name)
            places[tensor, file] = Flaw(tensor, file, names, entries)
    masks = {
        tensor
        for tensor in {tensor for tensor, _ in places}.intersection(buffers)
        if all(flaw.entries.infinite for flaw in places.values() if flaw.tensor == tensor)
        and _agree(tensor, checkpoints.values())
    }
    return [flaw for flaw in places.values() if flaw.tensor not in masks], sorted(masks)


def require_finite(checkpoints: Mapping[str, Checkpoint], buffers: Collection[str]) -> list[str]:
    """Reject checkpoints with flaws (see `find_flaws`), and return the names of infinite buffers.

    Raises:
        NonFiniteError: the message names tensors, sources and files.
    """
    flaws, masks = find_flaws(checkpoints, buffers)
    if flaws:
        lines = [f"{' and '.join(f.names)} ({f.file}): {f.tensor}: {f.entries}" for f in flaws]
        raise NonFiniteError(
            f"sources: expected finite weights, got NaN or infinity in {len(flaws)} "
            f"tensor{'s' if len(flaws) > 1 else ''}. {shorten(lines)}.\n"
            "A merge spreads them to all that depends on them. Copy or download the checkpoint "
            "again, or leave it out."
        )
    return masks


def _read_once(parts: Iterable[Checkpoint]) -> None:
    """Find the flaws of stored checkpoints in parallel; the same files are read once."""
    groups: dict[Any, list[Checkpoint]] = {}
    for part in parts:
        groups.setdefault(tuple(part.watched) or id(part), []).append(part)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for flaws, group in zip(
            pool.map(lambda group: group[0].flaws, groups.values()), groups.values(), strict=True
        ):
            for part in group[1:]:
                part._flaws = dict(flaws)


def _agree(tensor: str, checkpoints: Iterable[Checkpoint]) -> bool:
    """Return whether a tensor is the same in all checkpoints that have it."""
    first, *others = (c.read(tensor) for c in checkpoints if tensor in c.infos)
    return all(torch.equal(first, other.to(first.device)) for other in others)


def require_same_files(
    what: str, expected: Mapping[str, Mapping[str, str]], got: Mapping[str, Mapping[str, str]]
) -> None:
    """Reject what was made with other configs, tokenizers or adapter settings.

    Args:
        what: what was made, for the message.
        expected: SHA-256 of each source's files by name, at that time. Sources that are missing,
            as in files of earlier versions, are not compared.
        got: the same now.

    Raises:
        FingerprintError: some differ; the message names them.
    """
    wrong = [
        f"{source}: {file}"
        for source, files in expected.items()
        for file in {**files, **got.get(source, {})}
        if is_compared(file, file in files) and files.get(file) != got.get(source, {}).get(file)
    ]
    if wrong:
        raise FingerprintError(
            f"{what} with other configs, tokenizers or adapter settings: {shorten(wrong)} differ "
            "from those of that time. Give the files of that time, or start again with these."
        )


def require_same(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """Reject coefficients that were trained on other weights.

    Args:
        expected: fingerprint of each source when the coefficients were trained.
        got: fingerprint of each source now.

    Raises:
        FingerprintError: some differ; the message names them.
    """
    wrong = [name for name in {**expected, **got} if got.get(name) != expected.get(name)]
    if wrong:
        pairs = (
            f"{n}: expected {expected.get(n, 'none')[:12]}, got {got.get(n, 'none')[:12]}"
            for n in wrong[:5]
        )
        raise FingerprintError(
            f"the coefficients were trained on other weights of: {shorten(wrong)}. "
            f"{'; '.join(pairs)}. Give the sources they were trained on, or train again."
        )
