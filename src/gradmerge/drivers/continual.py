"""New sources merged onto an earlier merge, whose own sources are not needed any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require, shorten
from gradmerge.common.files import read_json
from gradmerge.common.schema import a_name, an_amount, require_shape
from gradmerge.drivers.base import Job
from gradmerge.drivers.fold import AbstractFold, Node
from gradmerge.engine.recipe import Recipe
from gradmerge.preprocess import Orthogonalise
from gradmerge.sources import AbstractSource, HuggingFace
from gradmerge.training.module import MergeModule

# What is read of an earlier merge's provenance.
_PROVENANCE = {
    "driver?": {
        "members?": [str],
        "sources?": {str: dict},
        "steps?": [{"lambda?": an_amount}],
    },
    "sources?": {str: {"sha256?": str}},
    "tasks?": {a_name: str},
}


@dataclass(frozen=True, kw_only=True)
class Continual(AbstractFold):
    """Each source of the recipe in turn onto an earlier merge.

        theta_t = A + c_1 (theta_{t-1} - A) + c_2 (theta_new - A)

    with c starting at ((t - 1) / t, 1 / t), the plain average. The sources of the earlier merge are
    not read: for their tasks, an objective's teacher is the earlier merge with the task's own head.
    With `projection`, directions are OPCM's (arXiv 2501.09522): the new one is projected off what
    the merge already uses (see `Orthogonalise`), c starts at 1, and

        B'_1 = lambda_{t-1} B_1 / lambda_t,  B'_2 = P_t / lambda_t
        lambda_t = |lambda_{t-1} B_1 + P_t| / (((t - 1) |B_1| + |B_2|) / t)
    """

    earlier: str
    """Model folder of the earlier merge."""
    earlier_sources: int | None = None
    """Number of sources in it; default: as its provenance.json says."""
    projection: bool = False
    """Project each new direction off the merged one; needs a base."""
    alpha: float = 0.5
    """For the projection: share of singular values to protect, see `Orthogonalise`."""

    @property
    def _folder(self) -> Path:
        return Path(self.earlier).expanduser()

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        if not self._folder.is_dir():
            raise ConfigError(f"earlier: {self.earlier}: expected a model folder, got no folder.")
        path = self._folder / "provenance.json"
        found = read_json(path, ConfigError) or {}
        require_shape(path, found, _PROVENANCE, "Restore it, or remove it.", ConfigError)
        return found

    @property
    def _driver(self) -> dict[str, Any]:
        """The entry of the driver that made the earlier merge, empty if there was none."""
        return self._provenance.get("driver", {})

    @property
    def _members(self) -> tuple[str, ...]:
        """Names of the sources in the earlier merge, as far as they are known."""
        merged = [name for name in self._provenance.get("sources", {}) if name != "base"]
        return tuple(self._driver.get("members", merged))

    @property
    def _count(self) -> int:
        count = self.earlier_sources or len(self._members)
        if count < 1:
            raise ConfigError(
                f"earlier: {self.earlier} has no provenance.json that states how many sources are "
                "in it, and the start depends on that. State it: --driver.earlier_sources."
            )
        return count

    @override
    def fold(self, models: list[Node], merge: Callable[[Node, Node], Node]) -> None:
        reduce(merge, models)

    @override
    def nodes(self, job: Job) -> list[Node]:
        new, origin = job.recipe.sources, job.recipe.resolved_origin
        if self.projection:
            expected = "origin base, whose task vectors it projects (or leave it out)"
            require(origin == "base", "projection", expected, origin)
            steps = ", ".join(type(step).__name__ for step in job.recipe.preprocess)
            require(not steps, "projection", "directions without preprocess", steps)
        both = [name for name in self._members if name in new]
        if both:
            raise ConfigError(
                f"{', '.join(both)}: the earlier merge {self.earlier} has a source of that name. "
                "Rename the new one (and set `source` of its tasks)."
            )
        self._warn_of_forgetting(job)
        name = "earlier"
        while name in new or name in self._members:
            name = f"{name}_"
        members = self._members or (name,)
        earlier = Node(name, HuggingFace(self.earlier), members, self._count)
        return [earlier, *super().nodes(job)]

    def _warn_of_forgetting(self, job: Job) -> None:
        earlier = {*self._members, *self._provenance.get("tasks", {})}
        used = {task.source or name for name, task in job.data.tasks.items()}
        if earlier and not earlier & used:
            rank_zero_warn(
                f"Continual: no task belongs to {shorten(sorted(earlier))} of the earlier merge: "
                "coefficients learned on new tasks alone forget the earlier. Add some of their "
                "data or a prior (L2ToInit), or merge without learning (`gradmerge merge`)."
            )

    @override
    def serving(self, job: Job) -> dict[str, str | AbstractSource]:
        """The earlier merge stands for its sources and tasks, each with its own head."""
        found: dict[str, str | AbstractSource]
        found = dict.fromkeys(self._members, HuggingFace(self.earlier))
        for task, source in self._provenance.get("tasks", {}).items():
            own = self._folder / "tasks" / task
            found[task] = found[source] = HuggingFace(str(own) if own.is_dir() else self.earlier)
        return {**found, **super().serving(job)}

    @override
    def reads(self, job: Job) -> dict[str, Any]:
        got = job.fingerprints.get("base")
        known = self._provenance.get("sources", {}).get("base", {}).get("sha256")
        if known is not None and got is not None and known != got:
            raise ConfigError(
                f"earlier: {self.earlier} is a merge over another base (expected {known[:12]}, "
                f"got {got[:12]}), and its difference from this one is not a merged direction. "
                "Give the base that it was made over."
            )
        return {"earlier": HuggingFace(self.earlier).open().fingerprint()}

    @override
    def origins(self, job: Job) -> dict[str, dict[str, str]]:
        known = self._driver.get("sources") or self._provenance.get("sources", {})
        return {**known, **job.sources}

    @override
    def shares(self, left: int, right: int) -> list[float]:
        return [1.0, 1.0] if self.projection else super().shares(left, right)

    @override
    def prepared(self, recipe: Recipe, pair: Sequence[Node], before: Mapping[str, Any]) -> Recipe:
        if not self.projection:
            return recipe
        step = Orthogonalise(self.alpha, "model", self._scale(before), pair[0].weight)
        return replace(recipe, preprocess=[step])

    @override
    def found(self, module: MergeModule, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return `lambda_t`: the first direction's length before and after the projection."""
        if not self.projection:
            return {}
        plan = module.merged.plan
        squares = [plan.direction(name)[0].double().square().sum() for name in plan.tensors]
        first = math.sqrt(float(sum(squares)))
        now = math.sqrt(float(plan.direction_norms()[0]))
        scale = self._scale(before)
        return {"lambda": scale * first / now if now else scale}

    def _scale(self, before: Mapping[str, Any]) -> float:
        """Return `lambda_{t-1}` of the step before, or else of the earlier merge.

        An earlier merge of another kind has `sqrt(t - 1)`, as orthogonal directions of equal length
        have.
        """
        steps = self._driver.get("steps") or [{}]
        known = before.get("lambda", steps[-1].get("lambda"))
        return math.sqrt(self._count) if known is None else float(known)
