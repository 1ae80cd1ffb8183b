"""A task of an EMR-Merging in compact form: formed from base, shared vector, mask and scale.

folder/unified.safetensors               u of every merged tensor, float32
folder/emr.json                          base, tasks and scales
folder/tasks/<task>/masks.safetensors    a bit per entry, eight to a byte
folder/tasks/<task>/own.safetensors      what is the task's own: head, buffers (where there are)
folder/tasks/<task>/config.json, ...     config and tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import SourceError, nearest, shorten
from gradmerge.sources.base import Checkpoint, TensorInfo
from gradmerge.sources.files import SafetensorsCheckpoint, read_json

FORMAT = "gradmerge-emr-1"


class EMRCheckpoint(Checkpoint):
    """`theta_k = A + r_k M_k (.) u` for merged tensors, the task's own tensor for all others."""

    def __init__(self, folder: Path, task: str, base: Checkpoint) -> None:
        self._base = base
        self._checked = False
        self._label = f"{folder} task {task}"
        described = read_description(folder)
        scales = described["scales"]
        if task not in scales:
            raise SourceError(
                f"{folder}: there is no task {task!r}.{nearest(task, scales)} There are: "
                f"{shorten(list(scales))}."
            )
        self._scale = float(scales[task])
        self._expected = str(described["base"]["sha256"])
        self._folder = folder / "tasks" / task
        label = str(self._folder)
        self._unified = SafetensorsCheckpoint([folder / "unified.safetensors"], str(folder))
        self._masks = SafetensorsCheckpoint([self._folder / "masks.safetensors"], label)
        own = self._folder / "own.safetensors"
        self._own = SafetensorsCheckpoint([own] if own.is_file() else [], label)
        self._refuse_misfits()
        merged = {name: base.infos[name] for name in self._unified.infos}
        self._infos = {**merged, **self._own.infos}

    def _refuse_misfits(self) -> None:
        wrong = []
        for name, info in self._unified.infos.items():
            found = self._base.infos.get(name)
            if found is None or found.shape != info.shape:
                wrong.append(f"{name}: {info.shape}, base {found.shape if found else 'none'}")
            mask = self._masks.infos.get(name)
            if mask is None or mask.shape != (-(-info.num_elements // 8),):
                wrong.append(f"{name}: {info.num_elements} entries, mask {mask and mask.shape}")
        if wrong:
            raise SourceError(
                f"{self._label}: does not fit together or its base {self._base.label}: "
                f"{shorten(wrong)}. Is this the base that the sources were fine-tuned from?"
            )

    def require_base(self) -> None:
        """Read the whole base and refuse another one than the tasks were merged on.

        Raises:
            SourceError: the fingerprints differ.
        """
        got = self._base.fingerprint()
        if got != self._expected:
            raise SourceError(
                f"{self._label}: expected a base with fingerprint {self._expected[:12]}, got "
                f"{self._base.label} with {got[:12]}. Give the base that was merged on."
            )
        self._checked = True

    @property
    @override
    def label(self) -> str:
        return self._label

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """See `Checkpoint.infos`; merged tensors carry the base's dtype."""
        return self._infos

    @property
    @override
    def folder(self) -> Path | None:
        return self._folder

    @property
    @override
    def config(self) -> Mapping[str, Any] | None:
        return read_json(self._folder / "config.json")

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`; merged tensors are formed in float32 or wider and kept there.

        Raises:
            SourceError: the base is another than the tasks were merged on (read whole, once).
        """
        if name in self._own.infos:
            return self._own.read(name)
        if not self._checked:
            self.require_base()
        unified = self._unified.read(name)
        bits = np.unpackbits(self._masks.read(name).numpy(), count=unified.numel())
        mask = torch.from_numpy(bits).view(unified.shape).bool()
        stored = self._base.read(name)
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        return wide + torch.where(mask, unified, 0.0).mul_(self._scale)

    def fingerprint(self) -> str:
        """Hash of the files' fingerprints and the scale."""
        digest = hashlib.sha256(f"{FORMAT} {self._scale!r}".encode())
        for part in (self._base, self._unified, self._masks, self._own):
            digest.update(part.fingerprint().encode())
        return digest.hexdigest()


def read_description(folder: Path) -> dict[str, Any]:
    """What `emr.json` says: the base's label and fingerprint, and the scale of each task.

    Raises:
        SourceError: there is no such file, or it says something else.
    """
    found = read_json(folder / "emr.json")
    if found is None or found.get("format") != FORMAT:
        raise SourceError(
            f"{folder}: expected emr.json of format {FORMAT}, which `gradmerge merge --outputs "
            "compact` writes."
        )
    return found
