"""Tasks of a compact EMR-Merging: computed from base, shared vector, mask and scale.

folder/emr.json                          base, scale of each task, names of the base's own tensors
folder/unified.st                        u of every merged tensor, float32
folder/tasks/<task>/masks.st             one bit per entry, eight per byte
folder/tasks/<task>/own.st               the task's own tensors (head, buffers), if it has any
folder/tasks/<task>/config.json, ...     config and tokenizer

The three are safetensors files under a suffix that nothing takes for the weights of a model; older
folders have them as *.safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, SourceError, nearest, shorten
from gradmerge.common.files import read_json
from gradmerge.common.schema import a_name, an_amount, require_shape
from gradmerge.sources.base import Checkpoint
from gradmerge.sources.files import SafetensorsCheckpoint

FORMAT = "gradmerge-emr-1"
_DESCRIPTION = {
    "base": {"from": str, "sha256": str},
    "scales": {a_name: an_amount},
    "unchanged?": [str],
}


class EMRCheckpoint(Checkpoint):
    """`theta_k = A + r_k M_k (.) u` for merged tensors, `A` for those that no task changes, the
    task's own tensor for all others.

    Args:
        folder: the compact folder.
        task: the task `k`.
        base: `A`; its fingerprint is checked before the first tensor is computed.
    """

    def __init__(self, folder: Path, task: str, base: Checkpoint) -> None:
        described = read_description(folder)
        scales = described["scales"]
        if task not in scales:
            raise SourceError(
                f"{folder}: unknown task {task!r} (choose from {shorten(list(scales))})."
                f"{nearest(task, scales)}"
            )
        self._base, self._scale = base, float(scales[task])
        self._expected = described["base"]["sha256"]
        self._unchanged = frozenset(described.get("unchanged", ()))
        own, label = folder / "tasks" / task, f"{folder} task {task}"
        self._unified = SafetensorsCheckpoint([part_of(folder, "unified")], label, side=folder)
        self._masks = SafetensorsCheckpoint([part_of(own, "masks")], label)
        self._own = SafetensorsCheckpoint(
            [file for file in (part_of(own, "own"),) if file.is_file()], label, side=own
        )
        self._reject_misfits(label)
        merged = {name: base.infos[name] for name in (*self._unified.infos, *self._unchanged)}
        super().__init__(label, {**merged, **self._own.infos}, own, read_json(own / "config.json"))

    def _reject_misfits(self, label: str) -> None:
        wrong = [f"{name}: missing" for name in self._unchanged if name not in self._base.infos]
        for name, info in self._unified.infos.items():
            base, mask = self._base.infos.get(name), self._masks.infos.get(name)
            if (
                base is None
                or mask is None
                or base.shape != info.shape
                or mask.shape != (-(-info.num_elements // 8),)
                or mask.dtype != torch.uint8
                or not (base.dtype.is_floating_point and info.dtype.is_floating_point)
            ):
                forms = [part and (part.shape, part.dtype) for part in (info, base, mask)]
                wrong.append("{}: {}, base {}, mask {}".format(name, *forms))
        if wrong:
            raise SourceError(
                f"{label}: the files do not fit the base {self._base.label} or each other: "
                f"{shorten(wrong)}. Is this the base that the sources were fine-tuned from?"
            )

    @property
    @override
    def parts(self) -> Sequence[Checkpoint]:
        return (*self._base.parts, self._unified, self._masks, self._own)

    @cached_property
    def _base_hash(self) -> str:
        return self._base.fingerprint()

    @override
    def read(self, name: str) -> Tensor:
        if name in self._own.infos:
            return self._own.read(name)
        if self._base_hash != self._expected:
            raise SourceError(
                f"{self._label}: expected a base with fingerprint {self._expected[:12]}, got "
                f"{self._base.label} with {self._base_hash[:12]}. Give the base that was merged on."
            )
        if name in self._unchanged:
            return self._base.read(name)
        unified = self._unified.read(name)
        bits = np.unpackbits(self._masks.read(name).numpy(), count=unified.numel())
        mask = torch.from_numpy(bits).view(unified.shape).bool()
        stored = self._base.read(name)
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        return wide + torch.where(mask, unified, 0.0).mul_(self._scale)

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self._scale!r}{self._base_hash}".encode())
        for part in (self._unified, self._masks, self._own):
            digest.update(part.fingerprint().encode())
        return digest.hexdigest()


def part_of(folder: Path, name: str) -> Path:
    """Return a file of a compact folder, under its older name if that exists."""
    older = folder / f"{name}.safetensors"
    return older if older.is_file() else folder / f"{name}.st"


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of `emr.json`: label and fingerprint of the base, scale of each task.

    Raises:
        SourceError: there is no such file, or it is of another format.
    """
    found = read_json(folder / "emr.json")
    if found is None or found.get("format") != FORMAT:
        raise SourceError(
            f"{folder}: expected emr.json of format {FORMAT}, which `gradmerge merge --outputs "
            "compact` writes."
        )
    require_shape(folder / "emr.json", found, _DESCRIPTION, "Copy the folder again.")
    if not found["scales"]:
        raise SourceError(
            f"{folder / 'emr.json'}: expected the scale of each task in `scales`, got none. Copy "
            "the folder again."
        )
    return found


def require_tasks(folder: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the content of `emr.json` if a compact folder has these tasks.

    Raises:
        ConfigError: it lacks a task.
        SourceError: as for `read_description`.
    """
    found = read_description(folder)
    for task in tasks:
        if task not in found["scales"]:
            raise ConfigError(
                f"tasks: unknown task {task!r} (choose from {shorten(list(found['scales']))})."
                f"{nearest(task, found['scales'])}"
            )
    return found
