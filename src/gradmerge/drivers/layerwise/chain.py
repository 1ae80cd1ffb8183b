"""A network as a chain of blocks: what precedes the first runs once a batch, then block by block.

The network itself says how each block is called: it runs with stand-ins for the blocks, which note
their arguments and hand the hidden state on. So nothing is known of its architecture, and what is
noted cannot depend on weights within blocks. Whether that is all there is to it is verified once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.drivers.layerwise.blocks import Block
from gradmerge.engine.buffers import NetworkBuffers
from gradmerge.engine.install import install
from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError

Slot = int | str
"""Where the hidden state stands among the arguments: its position, or its keyword."""

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(None))


class _Hidden:
    """Stands for the hidden state."""


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor of the list."""

    number: int


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without its hidden state."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def filled(
        self, hidden: Tensor, constants: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the block takes them."""
        args, kwargs = _filled((self.args, dict(self.kwargs)), hidden, constants)
        return args, kwargs


class Constants:
    """Tensors beside the hidden states of a batch; one that many blocks take is kept once."""

    def __init__(self) -> None:
        # kept alive here, so that no other tensor gets the identity of one of them
        self._found: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in order of arrival."""
        return [tensor.detach() for tensor in self._found]

    def add(self, tensor: Tensor) -> _Place:
        """A place for a tensor, the same each time it comes."""
        number = self._numbers.setdefault(id(tensor), len(self._found))
        if number == len(self._found):
            self._found.append(tensor)
        return _Place(number)


def take_apart(
    block: str, slot: Slot, args: tuple[Any, ...], kwargs: Mapping[str, Any], constants: Constants
) -> Call:
    """A call as structure and constants.

    Raises:
        ConfigError: an argument is neither plain nor made of tensors.
    """
    for at, argument in arguments(args, kwargs):
        for path, leaf in leaves(said(at), argument):
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise ConfigError(
                    f"LayerWise: {block} is called with {path} of type {type(leaf).__name__}, "
                    "whose contents cannot be kept from batch to batch; expected tensors, numbers, "
                    "strings, None, and tuples, lists or dicts of them. Learn end to end."
                )

    kept = {
        at: _Hidden() if at == slot else _convert(v, constants) for at, v in arguments(args, kwargs)
    }
    return Call(tuple(kept[i] for i in range(len(args))), {key: kept[key] for key in kwargs})


def _convert(value: Any, constants: Constants) -> Any:
    if isinstance(value, Tensor):
        return constants.add(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return _like(value, [_convert(item, constants) for item in value])
    if isinstance(value, dict):
        return {key: _convert(item, constants) for key, item in value.items()}
    return value


def _filled(value: Any, hidden: Tensor, constants: Sequence[Tensor]) -> Any:
    if isinstance(value, _Hidden):
        return hidden
    if isinstance(value, _Place):
        return constants[value.number]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return _like(value, [_filled(item, hidden, constants) for item in value])
    if isinstance(value, dict):
        return {key: _filled(item, hidden, constants) for key, item in value.items()}
    return value


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Slot, Any]]:
    """Arguments with their positions or keywords."""
    yield from enumerate(args)
    yield from kwargs.items()


def said(slot: Slot) -> str:
    """An argument as messages name it."""
    return f"args[{slot}]" if isinstance(slot, int) else slot


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What an argument is made of, with the path to each."""
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for i, item in enumerate(value):
            yield from leaves(f"{path}[{i}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{path}[{key!r}]", item)
    else:
        yield path, value


def hidden_of(block: str, output: Any) -> Tensor:
    """The hidden state in a block's output: the tensor itself, or the first of several.

    Raises:
        ConfigError: there is none.
    """
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise ConfigError(
            f"LayerWise: {block} returned {type(output).__name__}, expected a tensor, or a tuple "
            "or an output of transformers that begins with one."
        )
    return first


def output_with(output: Any, hidden: Tensor) -> Any:
    """An output of the same form with another hidden state, and None for what else it held."""
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)(**{str(first): hidden})
    if isinstance(output, (tuple, list)):
        return _like(output, [hidden, *[None] * (len(output) - 1)])
    return hidden


def _like(value: Any, items: list[Any]) -> Any:
    """A tuple or list of the same kind."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


# Largest deviation of the chain from the network itself, as a share of its largest value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class _Stopped(Exception):  # noqa: N818 (it is no error)
    """The last block has been called."""


@dataclass(frozen=True)
class Start:
    """What reaches the first block of a batch, and how each block is called."""

    hidden: Tensor
    calls: list[Call]
    constants: list[Tensor]


class Chain:
    """The network of a plan, run block by block with weights that are given by name.

    Args:
        plan: an opened recipe with a network, which is changed: its parameters become properties.
        blocks: its blocks.
        dtype: dtype of the computation.
        device: where it runs.
    """

    def __init__(
        self, plan: Plan, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device
    ) -> None:
        assert plan.skeleton is not None
        assert plan.binding is not None
        plan.prepare_learning()
        self.plan, self.blocks = plan, list(blocks)
        self.dtype, self.device = dtype, device
        self.skeleton: nn.Module = plan.skeleton
        install(self.skeleton, plan.binding.parameters, self._fetch, dtype, device)
        self.statistics = NetworkBuffers(plan, self.skeleton)
        self.skeleton.eval()
        for module in self.skeleton.modules():
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False  # type: ignore[union-attr]
        self.modules = [self.skeleton.get_submodule(block.name) for block in blocks]
        self._slots: list[Slot] = []
        self._forms: list[Any] = []
        self._read: Callable[[str], Tensor] | None = None
        self.gives_logits = False
        """Whether the network gives what scores are of; known once it is verified."""

    # ---- weights --------------------------------------------------------------------------------

    def _fetch(self, key: str, casts: bool) -> Tensor:
        assert self._read is not None
        return self.place(self._read(key))

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor as the computation takes it."""
        dtype = self.dtype if tensor.dtype.is_floating_point else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)

    @contextmanager
    def weights(self, read: Callable[[str], Tensor]) -> Iterator[None]:
        """Within the context the network takes the tensors that `read` gives, by name."""
        before, self._read = self._read, read
        try:
            yield
        finally:
            self._read = before

    @contextmanager
    def as_source(self, source: str, block: int | None = None) -> Iterator[None]:
        """Within the context the network is one source, without gradient.

        Args:
            source: its name.
            block: the block that alone will run; its weights are converted once, then.
        """
        kept = {}
        if block is not None:
            names = self.blocks[block].tensors
            kept = {name: self.place(self.plan.read(source, name)) for name in names}

        def read(name: str) -> Tensor:
            return kept[name] if name in kept else self.plan.read(source, name)

        with self.statistics.of_source(source), torch.no_grad(), self.weights(read):
            yield

    # ---- running --------------------------------------------------------------------------------

    def start(self, inputs: Mapping[str, Any]) -> Start:
        """Run what precedes the first block; blocks are only noted. `verify` comes first."""
        constants, calls, first = Constants(), [], []
        last = len(self.blocks) - 1

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            hidden = dict(arguments(args, kwargs))[self._slots[number]]
            first.append(hidden)
            name = self.blocks[number].name
            calls.append(take_apart(name, self._slots[number], args, kwargs, constants))
            if number == last:
                raise _Stopped
            return output_with(self._forms[number], hidden)

        with self._standing_in(stand_in), suppress(_Stopped):
            self.skeleton(**inputs)
        return Start(first[0], calls, constants.tensors)

    def run(self, number: int, call: Call, hidden: Tensor, constants: Sequence[Tensor]) -> Tensor:
        """The hidden state after a block."""
        args, kwargs = call.filled(hidden, constants)
        return hidden_of(self.blocks[number].name, self.modules[number](*args, **kwargs))

    def end(self, inputs: Mapping[str, Any], last: Callable[[Tensor], Tensor]) -> Any:
        """What the network gives where `last` makes the hidden state after the last block of that
        before the first; no block runs.
        """

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            hidden = dict(arguments(args, kwargs))[self._slots[number]]
            if number == len(self.blocks) - 1:
                hidden = last(hidden)
            return output_with(self._forms[number], hidden)

        with self._standing_in(stand_in):
            return self.skeleton(**inputs)

    @contextmanager
    def _standing_in(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within the context `forward(number, ...)` runs in the place of each block's own."""
        before = [module.__dict__.get("forward") for module in self.modules]
        for number, module in enumerate(self.modules):
            module.__dict__["forward"] = partial(forward, number)
        try:
            yield
        finally:
            for module, own in zip(self.modules, before, strict=True):
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own

    # ---- verification ---------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self, inputs: Mapping[str, Any], source: str) -> float:
        """Find how blocks are called, and that running them one by one is the network itself.

        Args:
            inputs: of one example.
            source: whose weights it runs with.

        Returns:
            The largest deviation of what the network gives, as a share of its largest value.

        Raises:
            ConfigError: the blocks are no chain; the message names the block and its argument.
        """
        with self.as_source(source):
            traced, output = self._traced(inputs)
            logits = getattr(output, "logits", output)
            self.gives_logits = isinstance(logits, Tensor) and logits.dim() in (2, 3)
            order = [number for number, *_ in traced]
            for number, block in enumerate(self.blocks):
                if order.count(number) != 1:
                    raise ConfigError(
                        f"LayerWise: {block.name} runs {order.count(number)} times in one pass, "
                        "expected once: its coefficients cannot be learned at one place. Learn "
                        "end to end, or name other `blocks`."
                    )
            self.blocks = [self.blocks[number] for number in order]
            self.modules = [self.modules[number] for number in order]
            self._slots = self._hidden_slots(traced)
            self._forms = [output_with(found, torch.empty(0)) for *_, found in traced]
            start = self.start(inputs)
            self._require_same(traced, start)
            hidden = start.hidden
            for number, call in enumerate(start.calls):
                hidden = self.run(number, call, hidden.clone(), start.constants)
            own = hidden_of(self.blocks[-1].name, traced[-1][-1])
            deviation = max(
                _deviation(hidden, own),
                _deviation(first_of(self.end(inputs, lambda _: hidden)), first_of(output)),
            )
        if not deviation <= TOLERANCE[self.dtype]:
            raise ConfigError(
                f"LayerWise: running {type(self.skeleton).__name__} block by block deviates from "
                f"the network itself by {deviation:.2g} of its largest value, expected at most "
                f"{TOLERANCE[self.dtype]:g} ({self.dtype}). Its blocks are more than a chain; "
                "learn end to end, or name other `blocks`."
            )
        return deviation

    def _traced(self, inputs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Number, arguments and output of each call in a plain pass, and what the pass gives."""
        traced: list[Any] = []
        hooks = []

        def before(
            number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            # copies of top-level tensors: a block may write over what it is given
            def copied(value: Any) -> Any:
                return value.clone() if isinstance(value, Tensor) else value

            found = [copied(v) for v in args], {k: copied(v) for k, v in kwargs.items()}
            traced.append([number, tuple(found[0]), found[1], None])

        def after(number: int, module: nn.Module, args: Any, output: Any) -> None:
            call = next(call for call in reversed(traced) if call[0] == number)
            call[-1] = output_with(output, hidden_of(self.blocks[number].name, output).clone())

        for number, module in enumerate(self.modules):
            hooks.append(
                module.register_forward_pre_hook(partial(before, number), with_kwargs=True)
            )
            hooks.append(module.register_forward_hook(partial(after, number)))
        try:
            return traced, self.skeleton(**inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _hidden_slots(self, traced: Sequence[Any]) -> list[Slot]:
        """Which argument of each block is what the block before gave."""
        slots: list[Slot] = []
        for (_, _, _, output), (number, args, kwargs, _) in pairwise(traced):
            given = hidden_of(self.blocks[number].name, output)
            found = [at for at, v in arguments(args, kwargs) if _equal(v, given, 0.0)]
            if not found:
                names = ", ".join(said(at) for at, _ in arguments(args, kwargs))
                raise ConfigError(
                    f"LayerWise: no argument of {self.blocks[number].name} ({names}) is what the "
                    "block before returned: something between them changes it. Name other "
                    "`blocks`, of which each takes what the one before returns, or learn end to "
                    "end."
                )
            slots.append(found[0])
        _, args, kwargs, _ = traced[0]
        first = [at for at, v in arguments(args, kwargs) if isinstance(v, Tensor)]
        if not first:
            raise ConfigError(f"LayerWise: {self.blocks[0].name} takes no tensor.")
        return [slots[0] if slots and slots[0] in first else first[0], *slots]

    def _require_same(self, traced: Sequence[Any], start: Start) -> None:
        """The arguments that stand-ins noted are those of the plain pass, the hidden state apart.

        Raises:
            ConfigError: one depends on what the blocks before computed.
        """
        for number, (call, (_, args, kwargs, _)) in enumerate(
            zip(start.calls, traced, strict=True)
        ):
            noted = dict(arguments(*call.filled(start.hidden, start.constants)))
            for at, value in arguments(args, kwargs):
                if at == self._slots[number]:
                    continue
                ours = dict(leaves(said(at), noted.get(at)))
                for path, leaf in leaves(said(at), value):
                    if not _equal(leaf, ours.get(path), TOLERANCE[self.dtype]):
                        raise ConfigError(
                            f"LayerWise: {path} of {self.blocks[number].name} depends on what the "
                            "blocks before it computed, besides the hidden state, so the block "
                            "cannot be learned from that state alone. Learn end to end, or name "
                            "other `blocks`."
                        )


def first_of(output: Any) -> Tensor:
    """Logits, or the first tensor of an output."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else hidden_of("the network", output)


def _equal(first: Any, second: Any, tolerance: float) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        if not tolerance or not first.dtype.is_floating_point:
            return torch.equal(first, second)
        return _deviation(first, second) <= tolerance
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return type(first) is type(second) and bool(first == second)


def _deviation(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    if got.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    got, expected = got[finite].double(), expected[finite].double()
    if not expected.numel():
        return 0.0
    largest = float(expected.abs().max())
    apart = float((got - expected).abs().max())
    return apart / largest if largest else apart
