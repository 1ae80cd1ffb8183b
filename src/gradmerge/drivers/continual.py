"""New sources onto an earlier merge, whose own sources are not needed any more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from gradmerge.drivers.base import Job
from gradmerge.drivers.fold import AbstractFold, Join, Node
from gradmerge.drivers.pairwise import in_order
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError, shorten
from gradmerge.preprocess import Orthogonalise
from gradmerge.sources import AbstractSource, HuggingFace
from gradmerge.training.module import MergeModule


@dataclass(frozen=True, kw_only=True)
class Continual(AbstractFold):
    """Each source of the recipe in its turn onto an earlier merge.

        theta_t = A + c_1 (theta_{t-1} - A) + c_2 (theta_new - A)

    from c = ((t - 1) / t, 1 / t), the plain average. The sources of the earlier merge are not read:
    where an objective wants the teacher of one of their tasks, the earlier merge is it, with that
    task's own head. With `projection`, directions are OPCM's (arXiv 2501.09522): the new one is
    projected off what the merge already uses (see `Orthogonalise`), c starts at 1, and

        B'_1 = lambda_{t-1} B_1 / lambda_t,  B'_2 = P_t / lambda_t
        lambda_t = |lambda_{t-1} B_1 + P_t| / (((t - 1) |B_1| + |B_2|) / t)
    """

    earlier: str
    """Folder that an earlier merge was exported to."""
    earlier_sources: int | None = None
    """How many sources are in it. Default: as its provenance.json says."""
    projection: bool = False
    """Project each new direction off the merged one; needs a base."""
    alpha: float = 0.5
    """Of the projection: the share of singular values that is protected, see `Orthogonalise`."""
    order: list[str] | Literal["given"] = "given"
    """Names of the new sources in the order that they join; default: as the recipe has them."""

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        folder = Path(self.earlier).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"earlier: {self.earlier}: expected a model folder, got no folder.")
        try:
            found = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            found = None
        return found if isinstance(found, dict) else {}

    @property
    def _members(self) -> tuple[str, ...]:
        """Names of the sources in the earlier merge, as far as they are known."""
        driver = self._provenance.get("driver", {})
        if "members" in driver:
            return tuple(driver["members"])
        return tuple(name for name in self._provenance.get("sources", {}) if name != "base")

    @property
    def _count(self) -> int:
        count = self.earlier_sources or len(self._members)
        if count < 1:
            raise ConfigError(
                f"earlier: {self.earlier} has no provenance.json that says how many sources are in "
                "it, on which the start depends. Say it: --driver.earlier_sources."
            )
        return count

    def joins(self, names: Sequence[str]) -> list[Join]:
        """See `AbstractFold.joins`; the earlier merge is the first name."""
        first, *new = names
        found: list[Join] = []
        for number, name in enumerate(in_order(self.order, new)):
            found.append((number - 1 if number else first, name))
        return found

    def nodes(self, job: Job) -> dict[str, Node]:
        """See `AbstractFold.nodes`: the earlier merge, and the new sources."""
        if self.projection:
            _require_projectable(job.recipe)
        new = super().nodes(job)
        both = [name for name in self._members if name in new]
        if both:
            raise ConfigError(
                f"{', '.join(both)}: the earlier merge {self.earlier} has a source of that name; "
                "give the new one another name (and set `source` of its tasks)."
            )
        self._warn_of_tasks(job)
        name = "earlier"
        while name in new or name in self._members:
            name = f"{name}_"
        members = self._members or (name,)
        return {name: Node(name, HuggingFace(self.earlier), members, self._count), **new}

    def _warn_of_tasks(self, job: Job) -> None:
        """Say that nothing holds the merge to what it knows."""
        earlier = {*self._members, *self._provenance.get("tasks", {})}
        used = {task.source or name for name, task in job.data.tasks.items()}
        if earlier and not earlier & used:
            rank_zero_warn(
                f"Continual: no task is of {shorten(sorted(earlier))}, which the earlier merge "
                "serves: coefficients that are learned on new tasks alone follow those, and the "
                "earlier are forgotten (docs/benchmarks.md). Give some of their data, or a prior "
                "(L2ToInit); or merge without learning (`gradmerge merge`)."
            )

    def serving(self, job: Job) -> dict[str, str | AbstractSource]:
        """See `AbstractFold.serving`: the earlier merge stands for its sources and tasks, each with
        its own head.
        """
        tasks: dict[str, str] = self._provenance.get("tasks", {})
        found: dict[str, str | AbstractSource] = {}
        for member in self._members:
            found[member] = HuggingFace(self.earlier)
        for task, source in tasks.items():
            own = Path(self.earlier).expanduser() / "tasks" / task
            spec = HuggingFace(str(own) if own.is_dir() else self.earlier)
            found[task] = found[source] = spec
        return {**found, **super().serving(job)}

    def reads(self, job: Job) -> dict[str, Any]:
        """See `AbstractFold.reads`: the earlier merge's weights.

        Raises:
            ConfigError: it was made over another base.
        """
        got = job.fingerprints.get("base")
        known = self._provenance.get("sources", {}).get("base", {}).get("sha256")
        if known is not None and got is not None and known != got:
            raise ConfigError(
                f"earlier: {self.earlier} is a merge over another base (expected {known[:12]}, "
                f"got {got[:12]}), so its direction from this one is not a merged direction. "
                "Give the base that it was made over."
            )
        return {"earlier": HuggingFace(self.earlier).open().fingerprint()}

    @override
    def origins(self, job: Job) -> dict[str, dict[str, str]]:
        driver = self._provenance.get("driver", {})
        known = driver.get("sources") or self._provenance.get("sources", {})
        return {**known, **job.sources}

    def shares(self, left: int, right: int) -> list[float]:
        """See `AbstractFold.shares`; of projected directions, 1 each."""
        return [1.0, 1.0] if self.projection else super().shares(left, right)

    def prepared(self, recipe: Recipe, nodes: Sequence[Node], before: Mapping[str, Any]) -> Recipe:
        """See `AbstractFold.prepared`: the projection."""
        if not self.projection:
            return recipe
        count = nodes[0].weight
        step = Orthogonalise(self.alpha, "model", self._scale(before), count)
        return replace(recipe, preprocess=[step])

    def found(self, module: MergeModule, before: Mapping[str, Any]) -> dict[str, Any]:
        """See `AbstractFold.found`: `lambda_t`, from how long the first direction was and is."""
        if not self.projection:
            return {}
        plan = module.merged.plan
        squares = [plan.direction(name)[0].double().square().sum() for name in plan.tensors]
        first = math.sqrt(float(sum(squares)))
        now = math.sqrt(float(plan.direction_norms()[0]))
        scale = self._scale(before)
        return {"lambda": scale * first / now if now else scale}

    def _scale(self, before: Mapping[str, Any]) -> float:
        """`lambda_{t-1}`: the last step's; the earlier merge's own, where it was made so; else
        `sqrt(t - 1)`, which it is for orthogonal directions of one length.
        """
        steps = self._provenance.get("driver", {}).get("steps") or [{}]
        known = before.get("lambda", steps[-1].get("lambda"))
        return math.sqrt(self._count) if known is None else float(known)


def _require_projectable(recipe: Recipe) -> None:
    """Refuse a projection of what are no task vectors.

    Raises:
        ConfigError: there is no base, or the directions are processed already.
    """
    if recipe.resolved_origin != "base":
        raise ConfigError(
            "projection: expected origin base, for it is task vectors that are projected, got "
            f"{recipe.resolved_origin}. Give the base, or leave projection out."
        )
    if recipe.preprocess:
        steps = ", ".join(type(step).__name__ for step in recipe.preprocess)
        raise ConfigError(
            f"projection: it takes the directions as they are, got preprocess {steps}. "
            "Leave one of them out."
        )
