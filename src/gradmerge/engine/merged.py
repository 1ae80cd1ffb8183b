"""The differentiable merged model: plain torch, for any `nn.Module`, usable without Lightning.

For every tensor p, `theta_p = combine(theta_1..K, link(z))`, and `dL/dz` is the contraction of
`G_p = dL/dtheta_p` with the directions (see `gradmerge.operators`). No autograd graph spans the
sources, and no source needs a temporary of the model's size.

Memory modes:
    resident: merged tensors live for the whole step, with one merge and one contraction per step.
    streamed: a merged tensor lives while its layer runs and is rebuilt when backward needs it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmerge.alignment.views import original_of
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.memory import BlockPool
from gradmerge.common.typing import Raw
from gradmerge.engine.autograd import Combine, checksums, known_loss
from gradmerge.engine.backward import backward
from gradmerge.engine.buffers import NetworkBuffers
from gradmerge.engine.install import checkpoint_blocks, install, restamp
from gradmerge.engine.opening import open_plan
from gradmerge.engine.parameters import Parameters
from gradmerge.engine.plan import Plan
from gradmerge.engine.precision import Precision
from gradmerge.engine.private import PrivateParts
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.resident import Building, ResidentTensors
from gradmerge.engine.saved import SavedTensors
from gradmerge.engine.state import FitState
from gradmerge.engine.together import Together, require_at_once
from gradmerge.engine.watch import Watches

Memory = Literal["resident", "streamed"]


class MergedModel(nn.Module):
    """A network whose weights are a learned merge of frozen sources.

    Its parameters are the raw coefficients (`raw`) and what the recipe trains per task (`private`),
    in float32. Call it like the network itself; `loss.backward()` fills their gradients. For
    several losses per step use `accumulate`, which keeps one loss's activations alive at a time
    and, in resident memory, merges and contracts once.

    Args:
        recipe: the merge, as a `Recipe` or opened.
        module: the architecture, if no source has a config. It is not changed, and its weights are
            not used.
        memory: `resident` keeps merged tensors for a whole step; `streamed` rebuilds each when its
            layer runs, which takes less memory and more time.
        dtype: dtype of the merged tensors and therefore of the computation.
        tasks: source whose private tensors a task uses, by task. Default: one task per source, with
            its name.
        raw: initial raw coefficients by key. Default: those of the recipe's init. An empty mapping
            gives a network that runs only with given weights (`as_weights`, `as_source`).
        tasks_at_once: number of losses of `accumulate` that share a merge in streamed memory: their
            passes run in step, and one backward pass follows. All their activations live at once.

    Examples:
        >>> import torch
        >>> from gradmerge import MergedModel, Recipe
        >>> base, a, b = (torch.nn.Linear(4, 2) for _ in range(3))
        >>> merged = MergedModel(Recipe(sources={"a": a, "b": b}, base=base))
        >>> merged(torch.ones(1, 4)).sum().backward()
        >>> {key: tuple(raw.grad.shape) for key, raw in merged.raw.items()}
        {'tensor': (2, 2)}
    """

    def __init__(
        self,
        recipe: Recipe | Plan,
        module: nn.Module | None = None,
        memory: Memory = "resident",
        dtype: torch.dtype = torch.float32,
        tasks: Mapping[str, str] | None = None,
        raw: Mapping[str, Tensor] | None = None,
        tasks_at_once: int = 1,
    ) -> None:
        super().__init__()
        plan = open_plan(recipe, module) if isinstance(recipe, Recipe) else recipe
        if plan.skeleton is None or plan.binding is None:
            raise ConfigError(
                "module: expected the architecture, got none, and no source has a config to build "
                "it from; pass the network as `module`."
            )
        if memory not in ("resident", "streamed"):
            raise ConfigError(f"memory: expected 'resident' or 'streamed', got {memory!r}.")
        require_at_once(tasks_at_once, memory)
        plan.prepare_learning()
        self.memory, self.tasks_at_once = memory, tasks_at_once
        self.dtype = dtype
        tasks = dict(tasks) if tasks is not None else {n: n for n in plan.sources}
        lost = [source for source in tasks.values() if source not in plan.serving]
        if lost:
            raise ConfigError(
                f"tasks: unknown sources {shorten(lost)} (choose from {', '.join(plan.serving)})."
            )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        raw = plan.initial_raw() if raw is None else raw
        self.raw = nn.ParameterDict({k: nn.Parameter(value.to(wide)) for k, value in raw.items()})
        self.private = PrivateParts(plan)
        self.state = FitState(plan, self.raw, self.private)
        self.touched: set[str] = set()
        self.heads: dict[Hashable, Any] = {}  # see `rows_by_head`
        self.device = torch.device("cpu")
        # The tuple hides it from nn.Module: its placeholders stay out of parameters() and
        # checkpoints.
        self._skeleton = (plan.skeleton,)
        self._task: str | None = None
        self._given: Callable[[str], Tensor | None] | None = None
        self._stepping: dict[str, Tensor] | None = None
        self._resident = ResidentTensors()
        self._finished = False
        self._together = Together()
        self._watches = Watches()
        self.parameters_made = Parameters(plan.binding, plan.skeleton)
        self._saved = SavedTensors(plan.skeleton, self.parameters_made.first_places)
        shapes = [*(t.shape for t in plan.tensors.values()), *self.parameters_made.shapes.values()]
        self._blocks = BlockPool(torch.Size(shape).numel() for shape in shapes)
        self._precision = Precision(plan.skeleton)
        install(plan.skeleton, self.parameters_made.places, self._fetch)
        self.network_buffers = NetworkBuffers(plan, plan.skeleton)
        self._place_network()
        self.tasks = tasks
        self.train(False)

    @property
    def tasks(self) -> dict[str, str]:
        """Source whose private tensors a task uses, by task."""
        return self._tasks

    @tasks.setter
    def tasks(self, tasks: Mapping[str, str]) -> None:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.private.serve(tasks, self.device, wide)
        self._tasks = dict(tasks)

    @property
    def plan(self) -> Plan:
        """The opened recipe."""
        return self.state.plan

    @property
    def skeleton(self) -> nn.Module:
        """The network; its parameters are placeholders, and its modules fetch merged tensors."""
        return self._skeleton[0]

    @property
    def version(self) -> int:
        """A number that changes whenever a parameter is written."""
        return sum(parameter._version for parameter in self.parameters())

    def require_version(self, version: int) -> None:
        """Reject a backward pass whose coefficients have changed since forward.

        Raises:
            RuntimeError: the raw coefficients were written between forward and backward.
        """
        if version != self.version:
            raise RuntimeError(
                "coefficients changed between forward and backward, so the gradient would mix two "
                "merges; call backward before the optimiser's step."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedModel:
        """Apply `.to(...)` to device and compute dtype; raw coefficients stay float32 or wider."""
        probe = fn(torch.zeros((), dtype=self.dtype, device=self.device))
        wide = torch.float64 if probe.dtype == torch.float64 else torch.float32
        super()._apply(lambda tensor: tensor.to(device=probe.device, dtype=wide), recurse)
        self.device, self.dtype = probe.device, probe.dtype
        self._place_network()
        self._resident.forget(fixed=True)
        self.private.forget()
        return self

    def _place_network(self) -> None:
        """Give the network's placeholders and buffers the dtype and device of the computation."""
        dtypes = self._precision.of(self.dtype)
        restamp(self.skeleton, dtypes, self.device)
        network: Any = self.skeleton
        if self.dtype == torch.float64 and hasattr(network, "set_experts_implementation"):
            network.set_experts_implementation("eager")  # others have no float64 kernels
        self.network_buffers.place(dtypes, self.device)
        places = self.parameters_made.first_places
        self._dtypes = {key: dtypes[place] for key, place in places.items()}

    def dtype_of(self, key: str) -> torch.dtype:
        """Return the dtype of a merged or private tensor: mostly that of the computation."""
        return self._dtypes.get(key, self.dtype)

    def train(self, mode: bool = True) -> MergedModel:
        """Set training mode, in which dropout stays off because the sources are frozen.

        BatchNorm uses batch statistics while training if they are recomputed afterwards.
        """
        super().train(mode)
        self.skeleton.eval()
        self.network_buffers.train(mode)
        return self

    def enable_activation_checkpointing(self) -> None:
        """Recompute each block's activations in backward (see `checkpoint_blocks`)."""
        checkpoint_blocks(
            self.skeleton, lambda: (nullcontext(), self._running(self._task, self._given))
        )

    def build(
        self,
        key: str,
        own: Tensor | float,
        dtype: torch.dtype,
        out: Tensor | None = None,
        finished: bool = False,
    ) -> Tensor:
        """Build `theta` of one tensor from its z, or from the coefficient that it is fixed at.

        There is no graph; finalisers are applied if `finished`.
        """
        # Trainers evaluate in inference mode, and tensors made there cannot be trained with later.
        with torch.inference_mode(False):
            if out is None and not isinstance(own, Tensor) and own == 0.0:
                base = self.plan.base_as(key, dtype, self.device)
                if base is not None:
                    return base
            out = self._empty(self.plan.tensors[key].shape, dtype) if out is None else out
            write = self.state.finish if finished else self.plan.combine
            return write(key, own, out)

    def make(
        self,
        key: str,
        raw: Raw | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        finished: bool = False,
    ) -> Tensor:
        """Build a parameter (or a split tensor) of the stored tensors that it is made of.

        Args:
            key: key of the parameter (see `Parameters`).
            raw: raw coefficients. Default: the model's own.
            dtype: dtype of the result. Default: that of the computation.
            out: tensor to write to.
            finished: apply the recipe's finalisers.
        """
        state = self.state if raw is None else self.state.at(raw)
        dtype = self.dtype_of(key) if dtype is None else dtype
        parts = self.parameters_made.parts(key)
        if parts is None:
            return self.build(key, state.own(key), dtype, out, finished)
        with torch.inference_mode(False):
            out = self._empty(self.parameters_made.shapes[key], dtype) if out is None else out
            for name, window in parts.items():
                if name not in self.plan.tensors:
                    kept = self._private_tensor(name).detach()
                    window.write(out, lambda part, own=kept: part.copy_(own))  # type: ignore[misc]
                    continue
                fill = partial(self.build, name, state.own(name), dtype, finished=finished)
                window.write(out, lambda part, fill=fill: fill(out=part))  # type: ignore[misc]
        return out

    def differentiable(self, key: str, raws: Raw, dtype: torch.dtype, kept: bool = False) -> Tensor:
        """Build a parameter whose backward contracts its gradient to those of raw parameters.

        One that is `kept` for other passes is used if there is one.
        """
        slots = self.plan.layout.slots
        learned = self.parameters_made.learned(key, self.state)
        keys = list(dict.fromkeys(slots[name].key for name in learned))

        def build(raw: Raw) -> Tensor:
            if kept:
                made = self._saved.made(self._make_as, key, dtype, None, self.version)
                return made.detach()  # gets a node of its own
            return self.make(key, raw, dtype)

        def contract(grad: Tensor, raw: Raw, version: int = self.version) -> dict[str, Tensor]:
            self.require_version(version)
            grads: dict[str, Tensor] = {}
            own = self.state.at(raw)
            self.touched.update(self.parameters_made.contract(own, grads, key, grad))
            return grads

        theta: Tensor = Combine.apply(build, contract, keys, *(raws[k] for k in keys))
        return theta

    def _fetch(self, key: str, casts: bool) -> Tensor:
        watch = self._watches.current
        if watch is None:
            return self._tensor(key, casts)
        with watch.paused():
            return watch.add(key, self._tensor(key, casts))

    def _tensor(self, key: str, casts: bool) -> Tensor:
        cut = self.parameters_made.cuts.get(key)
        if cut is not None:
            name, window = cut
            return window.of(self._tensor(name, casts))
        if self._given is not None:
            return self._given_tensor(key, self._given)
        if not self.plan.tensors.keys() & self.parameters_made.names(key):
            return self._private_parameter(key)
        task = self.task if self.private.changes(self.parameters_made.names(key)) else None
        if self.memory == "resident":
            return self._with_parts(key, self._resident.theta[key], task)
        dtype = self.dtype_of(key)
        if casts and torch.is_autocast_enabled(self.device.type):
            # Build in the dtype that autocast would cast to, because autocast's copy would be saved
            # for backward in every layer.
            dtype = torch.get_autocast_dtype(self.device.type)
        theta = self._with_parts(key, self._shared(key, dtype), task)
        self._saved.add(theta, key, task)
        return theta

    def _shared(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return a merged parameter, made once for all passes that run in step."""
        one = None if self._watches.current else self._together.current()
        if one is None:
            return self._theta(key, dtype)
        task = self._task
        theta = one.read((key, dtype), lambda: self._theta(key, dtype))
        self._task = task  # passes of other tasks ran between
        self.network_buffers.serve(self.serving)
        return theta

    def _theta(self, key: str, dtype: torch.dtype) -> Tensor:
        learned = self.parameters_made.learned(key, self.state)
        kept = self._saved.layers > 0
        if kept and not learned:
            return self._saved.made(self._make_as, key, dtype, None, self.version)
        if self._finished or not learned:
            return self.make(key, dtype=dtype, finished=self._finished)
        return self.differentiable(key, self._stepping or self.raw, dtype, kept)

    @torch.no_grad()
    def _make_as(self, key: str, dtype: torch.dtype, task: str | None) -> Tensor:
        if task is None or not self._saved.layers:
            return self._with_parts(key, self.make(key, dtype=dtype), task)
        whole = self._saved.made(self._make_as, key, dtype, None, self.version)
        return self._with_parts(key, whole, task)

    def _with_parts(self, key: str, theta: Tensor, task: str | None) -> Tensor:
        if task is None:
            return theta
        windows = self.parameters_made.parts(key)
        return self.private.apply_to(theta, task, self.tasks[task], key, windows)

    def _given_tensor(self, key: str, read: Callable[[str], Tensor | None]) -> Tensor:
        def one(name: str) -> Tensor:
            given = read(name)
            if given is None:
                return self._private_tensor(name)
            return given.to(self.device).to(self.dtype_of(name))  # cast there, not here

        dtype = self.dtype_of(key)
        return self.parameters_made.assemble(key, one, lambda shape: self._empty(shape, dtype))

    def _private_parameter(self, key: str) -> Tensor:
        """Return a parameter none of whose tensors is merged."""
        if self.parameters_made.parts(key) is None:
            return self._private_tensor(key)
        return self._with_parts(key, self.make(key), self.task)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.memory == "streamed" and self.device.type == "cpu":
            return self._blocks.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _refresh(self, graph: bool) -> None:
        """Bring the parameters of resident memory up to date with the coefficients."""
        finished, made = self._finished, self.parameters_made
        corrections = self.state.corrections if finished else None
        known = finished, self.version, checksums(self.raw.values()), corrections

        if not self.plan.any(not self._resident.is_current(known, graph)):
            return
        merged = [k for k in made.built if not self.plan.tensors.keys().isdisjoint(made.names(k))]
        learned = {key for key in merged if made.learned(key, self.state)}
        how = Building(
            [key for key in merged if key in learned],
            [key for key in merged if key not in learned],
            lambda key, out: self.make(key, out=out, finished=finished and key in learned),
            lambda key: self.differentiable(key, self.raw, self.dtype_of(key)),
        )
        self._resident.refresh(known, graph, how)

    def place(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the model's device, and in its dtype if it is floating-point."""
        dtype = self.dtype if tensor.dtype.is_floating_point else tensor.dtype
        return tensor.to(self.device).to(dtype)

    def _private_tensor(self, key: str) -> Tensor:
        trained = self.private.tensor(self.task, key)
        if trained is not None:
            return trained.to(self.dtype_of(key))
        shared = key in self.plan.buffers  # an integer parameter
        source = "" if shared else self.serving
        return self.private.stored(source, key, self.dtype_of(key), self.device)

    @property
    def serving(self) -> str:
        """The source whose private tensors are used: that of the task which runs."""
        return self.tasks.get(self.task or "", next(iter(self.plan.sources)))

    @property
    def task(self) -> str | None:
        """The task which runs, or the only one; None if it was not said."""
        return next(iter(self.tasks)) if self._task is None and len(self.tasks) == 1 else self._task

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """Run the network with merged weights.

        In evaluation mode without gradient, finalisers are applied as in the export. They have no
        gradient, so they are off while coefficients learn.

        Args:
            *args: arguments of the network.
            task: the task whose private tensors (head) are used, if the recipe has any.
            **kwargs: keyword arguments of the network.
        """
        with self.prepared(task):
            return self.run(*args, **kwargs)

    @contextmanager
    def prepared(self, task: str | None = None) -> Iterator[None]:
        """Give the network (`skeleton`) merged weights inside the context, merged once.

        Args:
            task: the task whose private tensors (head) are used, if the recipe has any.
        """
        if task is not None and task not in self.tasks:
            raise ConfigError(f"unknown task {task!r} (choose from {', '.join(self.tasks)}).")
        own = [*self.plan.private, *(f"LoRA of {name}" for name in self.plan.ranks)]
        if own and task is None and self._given is None and len(self.tasks) > 1:
            raise ConfigError(
                f"task: expected one of {', '.join(self.tasks)}, got none, but every task has a "
                f"{own[0]} of its own; pass `task=`."
            )
        if self._stepping is None:  # `accumulate` has looked
            self.plan.require_unchanged()
        self._task = task
        self.network_buffers.serve(self.serving)
        if self._given is not None:
            yield
            return
        graph = torch.is_grad_enabled() and self._stepping is None
        evaluates = not (self.training or torch.is_grad_enabled() or self._stepping is not None)
        self._finished = evaluates and self.plan.finalisation.active
        try:
            if self.memory == "resident":
                self._refresh(graph)
                yield
                return
            with self._saved.hooks(self._make_as, lambda: self.version, self.require_version):
                yield
        finally:
            self._finished = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the weights that are set; the first passes of a kind are watched.

        Raises:
            ConfigError: the network writes to its weights, or reads them in a way that does not see
                merged ones.
        """
        kind = self._given is None, self.training, torch.is_grad_enabled()
        return self._watches.run(self.skeleton, kind, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedModel:
        """Copy, unless it is a part of the network that copies itself in its forward.

        Raises:
            ConfigError: the network runs.
        """
        if self._watches.current is not None:
            raise ConfigError(
                f"{type(self.skeleton).__name__}: expected a forward that uses its modules, got "
                "one that copies a module, whose merged weights a copy would not follow.\n"
                "Call the module itself, or use `copy.copy` of it in the network's code."
            )
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        return other

    def accumulate(
        self, losses: Sequence[Callable[[], Tensor]], scale: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the backward passes of several losses in turn and return one differentiable loss.

        Each callable runs this model and returns a scalar. Its backward runs immediately, so that
        only one loss's activations live at a time. In resident memory all losses share one merge,
        and their weight gradients are summed before one contraction, which frees each after use.

        Args:
            losses: callables that return scalar losses.
            scale: internal factor on the losses (a gradient scaler's, for float16). Gradients are
                divided by it.

        Returns:
            The sum of the losses, whose `backward()` adds the known gradients to the parameters,
            and the individual losses.
        """
        self.plan.require_unchanged()
        own = {**dict(self.raw.items()), **dict(self.private.values.items())}
        proxies = {key: parameter.detach().requires_grad_() for key, parameter in own.items()}
        self._stepping = self.private.proxies = proxies
        try:
            with self.plan.together():
                grads, values = backward(self, losses, scale)
            grads |= {k: proxy.grad for k, proxy in proxies.items() if proxy.grad is not None}
        finally:
            self._stepping = self.private.proxies = None
        return known_loss(values, grads, own, scale), values

    def fix_unused(self) -> list[str]:
        """Fix tensors that no backward pass has reached, by `Recipe.unused`, with a warning.

        Otherwise they would be exported with their initial coefficients.

        Returns:
            Names of the tensors that were fixed.
        """
        unused = [key for key in self.state.learned if key not in self.touched]
        if unused:
            value = self.plan.unused_coefficient
            self.state.fix(unused, value)
            self._resident.forget()
            warnings.warn(
                f"{len(unused)} tensors got no gradient and are fixed at coefficient {value:g} "
                f"(recipe.unused): {shorten(unused)}. The objective does not depend on them.",
                stacklevel=2,
            )
        return unused

    def fix(self, names: Sequence[str], coefficient: float) -> None:
        """Fix tensors at a coefficient, as recorded in a checkpoint."""
        self.state.fix(names, coefficient)
        self._resident.forget(fixed=True)

    @contextmanager
    def as_source(self, source: str, own: bool = False) -> Iterator[None]:
        """Run the network with one source's weights inside the context, without gradient or copy.

        Args:
            source: name of a source or head.
            own: use the weights as stored, even if an alignment mixes the source's units.

        Raises:
            ConfigError: there is no such source.
        """
        if source not in self.plan.serving:
            raise ConfigError(
                f"unknown source {source!r} (choose from {', '.join(self.plan.serving)})."
            )
        checkpoint = self.plan.serving[source]
        itself = original_of(checkpoint) if own else checkpoint
        read = self.plan.reader(source, self.device) if itself is checkpoint else itself.read
        with self.network_buffers.of(itself), torch.no_grad(), self.as_weights(read):
            yield

    @contextmanager
    def as_weights(self, read: Callable[[str], Tensor | None]) -> Iterator[None]:
        """Run the network with the given tensors inside the context.

        Gradients reach given tensors that require them, unless gradients are disabled.

        Args:
            read: function that returns the tensor of a name; None stands for the task's own private
                tensor.
        """
        with self._running(self._task, read):
            yield

    @contextmanager
    def _running(
        self, task: str | None, given: Callable[[str], Tensor | None] | None
    ) -> Iterator[None]:
        """Run a task, or given weights, inside the context."""
        before = self._task, self._given
        self._task, self._given = task, given
        if given is None:  # recomputation, maybe between passes of other tasks
            self.network_buffers.serve(self.serving)
        try:
            yield
        finally:
            self._task, self._given = before

    def coefficients(self) -> dict[str, Tensor]:
        """Return `c` of every learned tensor, `[sources, *slot]`, differentiable."""
        return {key: self.state.coefficient(key) for key in self.state.learned}
