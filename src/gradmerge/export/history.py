"""Scores and losses of a fit by step, for its learning curves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmerge.common.schema import a_count, a_number

_MOST = 1000
"""Points of a curve that are kept; beyond it, every other one goes."""
SAVED = {
    "curves": {str: [[a_number]]},
    "experts": {str: a_number},
    "score": (str, None),
    "higher_is_better": bool,
    "step": (a_count, None),
}
"""Shape of what `History.to_save` gives."""


@dataclass
class History:
    """The measurements of a fit so far."""

    curves: dict[str, list[Any]] = field(default_factory=dict)
    """Pairs of step and value by the name under which a fit logs them."""
    experts: dict[str, float] = field(default_factory=dict)
    """Score of each task's own source on the selection split."""
    score: str | None = None
    """Name of the score by which tasks are judged."""
    higher_is_better: bool = True
    step: int | None = None
    """Step of the coefficients that were kept in the end."""
    _every: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, step: int, value: Any) -> None:
        """Add a value, which may be a tensor without a gradient; it is not waited for."""
        seen, every = self._seen.get(name, 0), self._every.setdefault(name, 1)
        self._seen[name] = seen + 1
        if seen % every:
            return
        points = self.curves.setdefault(name, [])
        points.append((step, value))
        if len(points) >= _MOST:
            del points[1::2]
            self._every[name] = 2 * every

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return the points of a curve; empty if there is none."""
        return [(int(step), float(value)) for step, value in self.curves.get(name, [])]

    def to_save(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "curves": {name: [list(p) for p in self.points(name)] for name in self.curves},
            "experts": dict(self.experts),
            "score": self.score,
            "higher_is_better": self.higher_is_better,
            "step": self.step,
        }

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> History:
        """Return what `to_save` gave; an empty one for a checkpoint of an earlier version."""
        return cls(**{name: copy.deepcopy(saved[name]) for name in SAVED if name in saved})
