"""Weighted averages of several checkpoints of one training run, read one tensor at a time."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, SourceError, require, shorten
from gradmerge.common.files import near
from gradmerge.common.hub import expanded
from gradmerge.sources.base import Checkpoint, View
from gradmerge.sources.compatibility import check
from gradmerge.sources.compatibility import require as require_compatible

SCHEDULES = ("average", "linear", "cosine")


def shares(weights: str | Sequence[float], count: int) -> list[float]:
    """Return the weights of a run's last checkpoints, oldest first; they sum to 1.

    Args:
        weights: `average`, `linear`, `cosine` (see `RunAverage`), or one number per checkpoint.
        count: number of checkpoints `n`.

    Examples:
        >>> [round(share, 3) for share in shares("linear", 4)]
        [0.1, 0.2, 0.3, 0.4]
    """
    if weights == "average":
        found = [1.0] * count
    elif weights == "linear":
        found = [float(i) for i in range(1, count + 1)]
    elif weights == "cosine":
        found = [(1 - math.cos(math.pi * i / count)) / 2 for i in range(1, count + 1)]
    else:
        found = [float(weight) for weight in weights]
        expected = f"one weight per checkpoint, {count} in all, oldest first"
        require(len(found) == count, "RunAverage.weights", expected, len(found))
    return [share / math.fsum(found) for share in found]


def matching(pattern: str, last: int | None, suffixes: Sequence[str]) -> list[Path]:
    """Return the checkpoints that match a pattern, in the order of the numbers in their names.

    Args:
        pattern: path with `*`, `?` or `[...]`.
        last: how many of the last ones. Default: all.
        suffixes: endings of files that are checkpoints; others are passed over.

    Raises:
        SourceError: none match, or fewer than asked for.
    """
    found = [Path(name) for name in glob(str(expanded(pattern)), recursive=True)]
    found = [path for path in found if path.is_dir() or path.suffix in suffixes]
    found.sort(key=lambda path: [*map(_number, re.split(r"(\d+)", str(path)))])
    if not found:
        above = next(p for p in Path(pattern).parents if not re.search(r"[*?[]", str(p)))
        there = "" if above.expanduser().is_dir() else f" There is no folder {above}.{near(above)}"
        raise SourceError(
            f"{pattern}: expected checkpoints of a run (folders, or files ending in "
            f"{', '.join(suffixes)}), but nothing matches.{there}"
        )
    if last is not None and len(found) < last:
        raise SourceError(
            f"{pattern}: expected at least {last} checkpoints (last), got {len(found)}: "
            f"{shorten([path.name for path in found])}. Lower `last`, or keep more checkpoints "
            "while training (save_total_limit)."
        )
    return found if last is None else found[-last:]


def _number(part: str) -> tuple[int, int | str]:
    return (0, int(part)) if part.isdecimal() else (1, part)


class AveragedCheckpoint(View):
    """`sum_i w_i theta_i` over checkpoints of one run, in float32 or wider.

    Config, tokenizer and integer tensors are those of the newest.

    Args:
        label: the pattern, which messages show.
        members: the opened checkpoints by name, oldest first.
        weights: their weights, which sum to 1.

    Raises:
        CompatibilityError: the checkpoints have other tensors, configs or tokenizers.
    """

    def __init__(
        self, label: str, members: Mapping[str, Checkpoint], weights: Sequence[float]
    ) -> None:
        require_compatible(check(dict(reversed(list(members.items())))))
        super().__init__(list(members.values())[-1])
        self._label = label
        self._members, self._weights = list(members.values()), list(weights)

    @property
    @override
    def parts(self) -> Sequence[Checkpoint]:
        return [part for member in self._members for part in member.parts]

    @override
    def changes(self, name: str) -> bool:
        return len(self._members) > 1 and self._infos[name].dtype.is_floating_point

    @override
    def form(self, name: str) -> Tensor:
        info = self._infos[name]
        total = torch.zeros(info.shape, dtype=torch.promote_types(info.dtype, torch.float32))
        for member, weight in zip(self._members, self._weights, strict=True):
            total.add_(member.read(name).to(total.dtype), alpha=weight)
        return total

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for member, weight in zip(self._members, self._weights, strict=True):
            digest.update(f"{member.fingerprint()}|{weight!r}|".encode())
        return digest.hexdigest()


def require_window(path: str, last: int | None, weights: str | Sequence[float]) -> None:
    """Reject options of a `RunAverage` before anything is opened.

    Raises:
        ConfigError: an option has an invalid value.
    """
    if not is_pattern(path):
        raise ConfigError(
            f"RunAverage.path: expected a pattern with *, such as run/checkpoint-*, got {path!r}."
        )
    require(last is None or last >= 1, "RunAverage.last", "a number of at least 1", last)
    if isinstance(weights, str):
        names = f"{', '.join(SCHEDULES)} or a list of numbers"
        require(weights in SCHEDULES, "RunAverage.weights", names, repr(weights))
        return
    sound = all(math.isfinite(w) for w in weights) and abs(math.fsum(weights)) > 1e-9
    require(sound, "RunAverage.weights", "finite numbers whose sum is not 0", list(weights))
    if last is not None:
        shares(weights, last)


def is_pattern(path: str) -> bool:
    """Return whether a path stands for several checkpoints."""
    return "*" in path and not Path(path).exists()
