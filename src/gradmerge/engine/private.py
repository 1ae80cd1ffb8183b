"""Parameters that are trained per task beside the coefficients: private tensors and adapters."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from gradmerge.coefficients.base import parameter_key
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.engine.autograd import Patch
from gradmerge.engine.plan import Plan
from gradmerge.sources.windows import Window


class PrivateParts(nn.Module):
    """Parts of each task alone: trained private tensors, and adapters of merged matrices.

        theta_task = theta + B A,   B = 0 at the start (LoRA, arXiv 2106.09685, with alpha = rank)

    Parameters belong to tasks, not to sources: two tasks may share a source. They are float32, or
    float64 in a model of float64. A private tensor starts at that of the task's source, whose own
    stays as it is: as a teacher the source runs with its stored tensors.

    Args:
        plan: the opened recipe, which says what is trained (`trained`, `ranks`).
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan
        self._trained, self._private = frozenset(plan.trained), frozenset(plan.private)
        self._tasks: dict[str, str] = {}
        self._stored: dict[tuple[str, str], Tensor] = {}
        self.values = nn.ParameterDict()
        """Parameters by task and tensor, in the order of the tasks."""
        self.proxies: Mapping[str, Tensor] | None = None
        """Stand-ins of the parameters while the backward passes of a step run."""
        self.settled = False
        """True once the parameters belong to a fit; from then on there are no other tasks."""

    @property
    def active(self) -> bool:
        """True if anything is trained per task."""
        return bool(self._plan.trained or self._plan.ranks)

    def serve(self, tasks: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> None:
        """Have parameters for the given tasks; those of a fit are kept, whatever is asked for.

        Args:
            tasks: source by task.
            device: device of new parameters.
            dtype: dtype of new parameters.

        Raises:
            ConfigError: the parameters belong to a fit that had no such task.
        """
        if not self.active or self._tasks == dict(tasks):
            return
        if self.settled:
            lost = [task for task in tasks if task not in self._tasks]
            if lost:
                raise ConfigError(
                    f"tasks: expected those of the fit ({', '.join(self._tasks)}), whose private "
                    f"parts were trained, got {', '.join(lost)}.\nName the task as in the fit."
                )
            return
        before, self.values = self.values, nn.ParameterDict()
        for task, source in tasks.items():
            for key, start in self._starts(task, source).items():
                if self._tasks.get(task) == source:
                    self.values[key] = before[key]
                else:
                    self.values[key] = nn.Parameter(start.to(device, dtype, copy=True))
        self._tasks = dict(tasks)

    def _starts(self, task: str, source: str) -> dict[str, Tensor]:
        """Return the initial values of a task's parameters; none of tensors that it lacks."""
        found = {}
        with torch.inference_mode(False):
            for name in self._plan.trained:
                if name in self._plan.serving[source].infos:  # else the source serves no task
                    found[_key(task, name)] = self._plan.read(source, name)
            for name, rank in self._plan.ranks.items():
                rows, columns = self._plan.tensors[name].shape
                seed = zlib.crc32(f"{task}\n{name}".encode()) ^ (torch.initial_seed() & 0xFFFFFFFF)
                generator = torch.Generator().manual_seed(seed)
                bound = columns**-0.5  # as PEFT: uniform, by the number of inputs
                noise = torch.rand(rank, columns, generator=generator)
                found[_key(task, name, "B")] = torch.zeros(rows, rank)
                found[_key(task, name, "A")] = (2 * noise - 1) * bound
        return found

    def changes(self, names: Collection[str]) -> bool:
        """Return whether a parameter of these tensors must be changed for the task that runs.

        A stored private tensor alone is read for its task, but among others it is in a parameter
        that is built once for all tasks.
        """
        own = self._private if len(names) > 1 else self._trained
        return any(name in own or name in self._plan.ranks for name in names)

    def tensor(self, task: str | None, name: str) -> Tensor | None:
        """Return a task's own private tensor, differentiable; None if it is not trained."""
        return self._read(task, name) if name in self._trained else None

    def update(self, task: str | None, name: str) -> Tensor | None:
        """Return `B A` of a merged matrix, differentiable; None if it has no adapter."""
        if name not in self._plan.ranks:
            return None
        left, right = self._read(task, name, "B"), self._read(task, name, "A")
        if left is None or right is None:
            return None
        with torch.autocast(left.device.type, enabled=False):
            return left @ right

    def apply_to(
        self,
        theta: Tensor,
        task: str,
        source: str,
        key: str,
        windows: Mapping[str, Window] | None,
    ) -> Tensor:
        """Return a parameter with all that the task has of its own in it, differentiable.

        Args:
            theta: the parameter.
            task: the task.
            source: its source.
            key: name of the stored tensor that it is.
            windows: if it is fused of several, the window of each on it.
        """
        if windows is None:
            update = self.update(task, key)
            return theta if update is None else theta + update.to(theta.dtype)
        patches, values = [], []
        for name, window in windows.items():
            update = self.update(task, name)
            own = self.tensor(task, name) if update is None else update
            if own is None and name in self._private:
                own = self.stored(source, name, theta.dtype, theta.device)
            if own is not None:
                patches.append((window, update is not None))
                values.append(own)
        patched: Tensor = Patch.apply(theta, patches, *values)
        return patched

    def stored(self, source: str, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a source's own private tensor, or an integer parameter (no source), kept."""
        if (source, name) not in self._stored:
            with torch.inference_mode(False):
                own = self._plan.read(source, name) if source else self._plan.buffer(name)
                kept = own.to(device).to(dtype)
                self._stored[source, name] = kept.clone() if kept is own else kept
        return self._stored[source, name]

    def forget(self) -> None:
        """Discard the sources' tensors: dtype or device have changed."""
        self._stored.clear()

    def count(self) -> dict[str, int]:
        """Return the number of trained parameters per task."""
        return {
            task: sum(
                value.numel()
                for key, value in self.values.items()
                if key.startswith(_key(task, ""))
            )
            for task in self._tasks
        }

    def record(self) -> dict[str, object]:
        """Return what was trained as plain data: tensors, ranks, and numbers per task."""
        return {
            "tensors": list(self._plan.trained),
            "adapters": dict(self._plan.ranks),
            "parameters": self.count(),
        }

    @property
    def words(self) -> str:
        """Description of what is trained per task."""
        ranks = self._plan.ranks
        named = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
        parts = [shorten(self._plan.trained)] if self._plan.trained else []
        parts += [f"LoRA of rank {named} on {len(ranks)} matrices"] if ranks else []
        counts = set(self.count().values())
        most = f"{'up to ' if len(counts) > 1 else ''}{max(counts, default=0):,}"
        return f"{' and '.join(parts)} ({most} parameters per task)"

    def _read(self, task: str | None, name: str, part: str = "") -> Tensor | None:
        if task is None:
            return None
        key = _key(task, name, part)
        if self.proxies is not None:
            return self.proxies.get(key)
        return self.values.get(key, None)


def _key(task: str, name: str, part: str = "") -> str:
    """Return the key of a parameter; no name of a task has a colon."""
    return ":".join([parameter_key(task), parameter_key(name), *([part] if part else [])])
