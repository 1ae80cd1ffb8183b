"""A network cut into a chain of blocks, each of which takes the hidden state of the one before.

Nothing is known of the architecture. A pass of the network with stand-ins in place of its blocks
records how each block is called; the stand-ins hand the hidden state on, so no weight of a block is
read. `Chain.verify` checks once that running the recorded calls one by one is the network itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    SequenceKey,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_with_path,
    tree_unflatten,
)

from gradmerge.drivers.layerwise.activations import Activations
from gradmerge.drivers.layerwise.files import slot_id
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError, nearest, shorten

Read = Callable[[str, str], Tensor]
"""Returns a tensor by the source that serves the batch (for private tensors) and its own name."""

# ---- which modules are the blocks ----------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A module whose input is the output of the block before."""

    name: str
    """Name of the module."""
    tensors: tuple[str, ...]
    """Merged tensors that it holds, in the order of the plan."""


def find_blocks(plan: Plan, patterns: Sequence[str] | None = None) -> list[Block]:
    """Return the blocks of a plan's network, in the order of its modules.

    Args:
        plan: an opened recipe.
        patterns: regular expressions that match whole names of modules; default: the members of the
            network's one `nn.ModuleList` that is in no other list, or of the network itself if it
            is an `nn.Sequential`.

    Raises:
        ConfigError: the network has no such blocks, blocks lie within each other, a tensor is used
            in a block and elsewhere, or a coefficient is shared between blocks.
    """
    skeleton = plan.skeleton
    if skeleton is None or plan.binding is None:
        raise ConfigError(
            "LayerWise: the sources carry no config to build the network from, so its blocks are "
            "unknown. Pass the network as `module`."
        )
    if getattr(getattr(skeleton, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"LayerWise: expected a network whose blocks form one chain, got the encoder-decoder "
            f"{type(skeleton).__name__}, whose decoder blocks also take the encoder's output. "
            "Learn end to end: leave `driver` out."
        )
    names = _default_blocks(skeleton) if patterns is None else _matching(skeleton, patterns)
    blocks = [Block(name, _tensors_of(plan, name)) for name in names]
    if not any(name not in plan.fixed for block in blocks for name in block.tensors):
        raise ConfigError(
            f"LayerWise: the blocks {shorten(names)} hold no tensor whose coefficients are "
            "learned. Name others in `blocks`."
        )
    _require_own_coefficients(plan, blocks)
    return blocks


def _default_blocks(skeleton: nn.Module) -> list[str]:
    if isinstance(skeleton, nn.Sequential):
        return [name for name, _ in skeleton.named_children()]
    lists: list[str] = []
    for name, module in skeleton.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if (
            isinstance(module, nn.ModuleList)
            and not inside
            and any(True for _ in module.parameters())
        ):
            lists.append(name)
    if len(lists) != 1:
        found = f"several ({shorten(lists)})" if lists else "none"
        raise ConfigError(
            f"LayerWise: expected {type(skeleton).__name__} to stack its blocks in one "
            f"nn.ModuleList, got {found}. Name the blocks: `blocks`, regular expressions that "
            "match whole module names, e.g. ['layer[1-4]']."
        )
    members = skeleton.get_submodule(lists[0]).named_children()
    return [f"{lists[0]}.{name}" for name, _ in members]


def _matching(skeleton: nn.Module, patterns: Sequence[str]) -> list[str]:
    modules = [name for name, _ in skeleton.named_modules() if name]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in modules):
            raise ConfigError(
                f"LayerWise: blocks: no module of {type(skeleton).__name__} has a name that "
                f"matches {pattern!r} as a whole.{nearest(pattern, modules)}"
            )
    found = [name for name in modules if any(re.fullmatch(p, name) for p in patterns)]
    for name in found:
        outer = next((other for other in found if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ConfigError(
                f"LayerWise: the block {name} lies within the block {outer}. Name one of them."
            )
    return found


def _tensors_of(plan: Plan, block: str) -> tuple[str, ...]:
    """Return the merged tensors of a block.

    Raises:
        ConfigError: one is used outside of the block as well.
    """
    assert plan.binding is not None
    held = []
    for name in plan.tensors:
        places = plan.binding.parameters.get(name, ())
        within = [place for place in places if place.startswith(f"{block}.")]
        others = [place for place in places if place not in within]
        if within and others and name not in plan.fixed:
            raise ConfigError(
                f"LayerWise: {name} is tied: it is {within[0]} of the block {block} and "
                f"{others[0]} outside of it, so it cannot be learned with that block alone. Freeze "
                "it (recipe.frozen), or learn end to end: leave `driver` out."
            )
        if within:
            held.append(name)
    return tuple(held)


def _require_own_coefficients(plan: Plan, blocks: Sequence[Block]) -> None:
    """Reject coefficients shared between blocks, or between a block and the rest."""
    owners = {name: block.name for block in blocks for name in block.tensors}
    first: dict[str, str] = {}
    for name in plan.learned:
        other = first.setdefault(slot_id(plan.layout.slots[name]), name)
        here, there = owners.get(name, "no block"), owners.get(other, "no block")
        if here != there:
            raise ConfigError(
                f"LayerWise: {other} (of {there}) and {name} (of {here}) share a coefficient, "
                "which one block's loss would decide for both. Take a granularity within a block, "
                "such as Tensor, Column, Element, or Group with one group per block."
            )


# ---- how blocks are called -----------------------------------------------------------------------

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(None))
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a call of a block."""


@dataclass(frozen=True)
class _Kept:
    """A tensor among the activations, in place of a tensor in a recorded call."""

    name: str


@dataclass(frozen=True)
class Passing:
    """A batch on its way through the blocks: its hidden state and how each block is called."""

    source: str
    """Source whose private tensors it uses."""
    store: Activations
    """Activations that hold its tensors."""
    name: str
    """Name of its hidden state, which is replaced block by block."""
    calls: Sequence[Call]
    """One per block, with names in place of tensors."""
    mask: str | None
    """Name of its attention mask `[batch, tokens]`, if there is any padding."""


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, (tuple, list)) and type(value) is not dict


def _path(keys: tuple[Any, ...]) -> str:
    """Return where a leaf of a call stands, e.g. `args[2]`, `position_embeddings[0]`."""
    if keys[0] == SequenceKey(0):
        return f"args{keystr(keys[1:])}"
    return f"{keys[1].key}{keystr(keys[2:])}"


def _leaves(call: Call) -> dict[str, Any]:
    """Return the leaves of all arguments by their paths."""
    return {_path(keys): leaf for keys, leaf in tree_flatten_with_path(call, _is_leaf)[0]}


def _changed(call: Call, change: Callable[[str, Any], Any]) -> Call:
    """Return a call with `change(path, leaf)` in place of each leaf."""
    return tree_map_with_path(lambda keys, leaf: change(_path(keys), leaf), call, is_leaf=_is_leaf)


def _hidden_of(block: str, output: Any) -> Tensor:
    """Return the hidden state in a block's output: the first of its tensors."""
    first = next(iter(tree_leaves(output)), None)
    if not isinstance(first, Tensor):
        raise ConfigError(
            f"LayerWise: {block} returned {type(output).__name__}, expected a tensor, or a tuple "
            "or an output of transformers that begins with one."
        )
    return first


def _output_with(output: Any, hidden: Tensor) -> Any:
    """Return an output of the same form with another hidden state, and None for the rest."""
    leaves, form = tree_flatten(output)
    return tree_unflatten([hidden, *[None] * (len(leaves) - 1)], form)


# ---- the chain -----------------------------------------------------------------------------------

_NOT_INPUTS = frozenset({"labels", "bytes_per_token"})
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest accepted deviation from the network itself, as a share of its largest value."""


class _Stopped(Exception):  # noqa: N818 (it is no error)
    """The last block has been called."""


@dataclass
class _Traced:
    """A call of a block in a plain pass, with copies of its tensors."""

    number: int
    given: dict[str, Any]
    output: Any
    hidden: Tensor


class Chain:
    """The network of a plan, run block by block with weights that are given by name.

    `verify` must be called first: it finds how blocks are called.

    Args:
        plan: an opened recipe with a network, which is changed: its parameters become properties.
        blocks: its blocks.
        dtype: dtype of the computation.
        device: where it runs.
    """

    def __init__(
        self, plan: Plan, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan, self.blocks = plan, list(blocks)
        self.model = MergedModel(plan, memory="streamed", dtype=dtype, raw={}).to(device)
        """The network; it has no coefficients of its own and takes all weights by name."""
        for module in self.model.skeleton.modules():
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False  # type: ignore[union-attr]
        self.gives_logits = False
        """Whether the network's output can be scored."""
        self._modules = [self.model.skeleton.get_submodule(block.name) for block in blocks]
        self._source = ""  # of the batch that runs
        self._paths: list[str] = []  # of the hidden state among the leaves of each block's call
        self._forms: list[Any] = []  # outputs of the blocks, without their tensors

    def place(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype and on the device of the computation."""
        dtype = self.model.dtype if tensor.dtype.is_floating_point else tensor.dtype
        return tensor.to(device=self.model.device, dtype=dtype)

    def moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors placed."""
        return {k: self.place(v) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def run_network(self, batch: Mapping[str, Any]) -> Any:
        """Return the network's output for a placed batch, with the weights that are set."""
        return self.model.skeleton(**{k: v for k, v in batch.items() if k not in _NOT_INPUTS})

    @contextmanager
    def weights(self, read: Read) -> Iterator[None]:
        """Within the context the network takes the tensors that `read` gives."""
        with self.model.as_weights(lambda name: read(self._source, name)):
            yield

    def enter(
        self, batch: Mapping[str, Any], source: str, store: Activations, name: str
    ) -> Passing:
        """Run what precedes the first block, with the weights that are set, and record how each
        block is called.

        Args:
            batch: placed, of one task.
            source: source whose private tensors the task uses.
            store: activations that hold the batch's tensors from now on.
            name: name of the hidden state among them.
        """
        calls: list[Call] = []
        constants: dict[Tensor, _Kept] = {}  # one that many blocks take is hashed once

        def keep(block: int, path: str, leaf: Any) -> Any:
            if path == self._paths[block]:
                return _Kept(name)
            if isinstance(leaf, Tensor):
                if leaf not in constants:
                    constants[leaf] = _Kept(store.put_constant(leaf))
                return constants[leaf]
            if isinstance(leaf, _PLAIN):
                return leaf
            raise ConfigError(
                f"LayerWise: {self.blocks[block].name} is called with {path} of type "
                f"{type(leaf).__name__}, which cannot be kept between batches; expected tensors, "
                "numbers, strings and None, in tuples, lists or dicts. Learn end to end: leave "
                "`driver` out."
            )

        def record(block: int, _: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = _leaves((args, kwargs))[self._paths[block]]
            if not calls:
                store.put(name, hidden)
            calls.append(_changed((args, kwargs), partial(keep, block)))
            if len(calls) == len(self.blocks):
                raise _Stopped
            return _output_with(self._forms[block], hidden)

        self._source = source
        with self._standing_in(record), suppress(_Stopped):
            self.run_network(batch)
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
            return Passing(source, store, name, calls, None)
        return Passing(source, store, name, calls, store.put_constant(mask))

    def hidden(self, passing: Passing, copy: bool = False) -> Tensor:
        """Return a batch's hidden state on the device; only a copy may be written to."""
        return passing.store.get(passing.name).to(self.model.device, copy=copy)

    def mask(self, passing: Passing) -> Tensor | None:
        """Return `[batch, tokens]`, 0 on padding, or None without padding."""
        if passing.mask is None:
            return None
        return passing.store.get(passing.mask).to(self.model.device)

    def run(self, number: int, passing: Passing) -> Tensor:
        """Return the hidden state after a block, which runs with the weights that are set."""
        self._source = passing.source  # also of weights that backward asks for again
        args, kwargs = self._filled(number, passing)
        return _hidden_of(self.blocks[number].name, self._modules[number](*args, **kwargs))

    def _filled(self, number: int, passing: Passing) -> Call:
        def fill(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, _Kept):
                return leaf
            if leaf.name == passing.name:
                return self.hidden(passing, copy=True)  # a block may write over its input
            return passing.store.get(leaf.name).to(self.model.device)

        return _changed(passing.calls[number], fill)

    @contextmanager
    def leaving(self, passing: Passing) -> Iterator[None]:
        """Within the context the network's last block returns a batch's hidden state, and no block
        runs.
        """

        def hand_on(block: int, _: Any, *args: Any, **kwargs: Any) -> Any:
            last = block == len(self.blocks) - 1
            hidden = _leaves((args, kwargs))[self._paths[block]]
            return _output_with(
                self._forms[block], self.hidden(passing, copy=True) if last else hidden
            )

        with self._standing_in(hand_on):
            yield

    @contextmanager
    def _standing_in(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within the context `forward(number, own, ...)` replaces each block's `own` forward."""
        replaced = [(m, m.__dict__.get("forward"), m.forward) for m in self._modules]
        for number, (module, _, own) in enumerate(replaced):
            module.__dict__["forward"] = partial(forward, number, own)
        try:
            yield
        finally:
            for module, set_before, _ in replaced:
                del module.__dict__["forward"]
                if set_before is not None:
                    module.__dict__["forward"] = set_before

    # ---- verification ---------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self, batch: Mapping[str, Any], source: str) -> float:
        """Find how blocks are called, and check that running them one by one is the network itself.

        Args:
            batch: one placed example.
            source: source whose weights are used.

        Returns:
            The largest deviation from the network's output, as a share of its largest value.

        Raises:
            ConfigError: the blocks are no chain; the message names the block and its argument.
        """
        with self.model.as_source(source):
            traced, output = self._traced(batch)
            self._order_as(traced)
            self._paths = self._hidden_paths(traced)
            self._forms = [call.output for call in traced]
            store = Activations()
            passing = self.enter(batch, source, store, "hidden")
            self._require_constant(traced, passing)
            for number in range(len(self.blocks)):
                store.put(passing.name, self.run(number, passing))
            with self.leaving(passing):
                ended = self.run_network(batch)
        logits = getattr(output, "logits", output)
        self.gives_logits = isinstance(logits, Tensor) and logits.dim() in (2, 3)
        deviation = max(
            _deviation(self.hidden(passing), traced[-1].hidden),
            _deviation(_first_of(ended), _first_of(output)),
        )
        if not deviation <= _TOLERANCE[self.model.dtype]:
            raise ConfigError(
                f"LayerWise: running {type(self.model.skeleton).__name__} block by block deviates "
                f"from the network itself by {deviation:.2g} of its largest value (at most "
                f"{_TOLERANCE[self.model.dtype]:g}): its blocks are more than a chain. Name other "
                "`blocks`, or learn end to end: leave `driver` out."
            )
        return deviation

    def _traced(self, batch: Mapping[str, Any]) -> tuple[list[_Traced], Any]:
        """Return each block's call in a plain pass, and the network's output."""
        traced: list[_Traced] = []

        def copied(_: str, leaf: Any) -> Any:  # a block may write over its input
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        def trace(block: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = _leaves(_changed((args, kwargs), copied))
            output = own(*args, **kwargs)
            hidden = _hidden_of(self.blocks[block].name, output).clone()
            form = _output_with(output, torch.empty(0))
            traced.append(_Traced(block, given, form, hidden))
            return output

        with self._standing_in(trace):
            return traced, self.run_network(batch)

    def _order_as(self, traced: Sequence[_Traced]) -> None:
        """Take the order in which blocks ran; each must have run once."""
        order = [call.number for call in traced]
        for number, block in enumerate(self.blocks):
            if order.count(number) != 1:
                raise ConfigError(
                    f"LayerWise: {block.name} runs {order.count(number)} times in one pass, "
                    "expected once, so its coefficients cannot be learned at one place. Name other "
                    "`blocks`, or learn end to end: leave `driver` out."
                )
        self.blocks = [self.blocks[number] for number in order]
        self._modules = [self._modules[number] for number in order]

    def _hidden_paths(self, traced: Sequence[_Traced]) -> list[str]:
        """Return which argument of each block is the hidden state of the block before."""
        paths: list[str] = []
        for block, (before, call) in zip(self.blocks[1:], pairwise(traced), strict=True):
            same = [path for path, v in call.given.items() if _same(v, before.hidden)]
            if not same:
                raise ConfigError(
                    f"LayerWise: no argument of {block.name} ({', '.join(call.given)}) is what the "
                    "block before returned: something between them changes it. Name other "
                    "`blocks`, or learn end to end: leave `driver` out."
                )
            paths.append(same[0])
        tensors = [path for path, v in traced[0].given.items() if isinstance(v, Tensor)]
        if not tensors:
            raise ConfigError(f"LayerWise: {self.blocks[0].name} takes no tensor.")
        return [paths[0] if paths and paths[0] in tensors else tensors[0], *paths]

    def _require_constant(self, traced: Sequence[_Traced], passing: Passing) -> None:
        """Reject arguments, besides the hidden state, that depend on the blocks before."""
        for number, call in enumerate(traced):
            recorded = _leaves(self._filled(number, passing))
            for path, leaf in call.given.items():
                if path == self._paths[number]:
                    continue
                if not _same(leaf, recorded.get(path), _TOLERANCE[self.model.dtype]):
                    raise ConfigError(
                        f"LayerWise: {path} of {self.blocks[number].name} depends on what the "
                        "blocks before it computed, so the block cannot be learned from its hidden "
                        "state alone. Name other `blocks`, or learn end to end: leave `driver` out."
                    )


def _first_of(output: Any) -> Tensor:
    """Return logits, or the first tensor of an output."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else _hidden_of("the network", output)


def _same(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and _deviation(first, second) <= tolerance
    return type(first) is type(second) and bool(first == second)


def _deviation(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
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
