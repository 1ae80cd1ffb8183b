"""A network cut into a chain of blocks, each of which takes the hidden state of the one before.

Nothing is known of the architecture. A pass of the network with stand-ins in place of its blocks
records how each block is called; the stand-ins hand the hidden state on, so no weight of a block is
read. `BlockChain.verify` checks once that running the recorded calls one by one is the network
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    KeyPath,
    key_get,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_with_path,
    tree_unflatten,
)

from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.patterns import search
from gradmerge.drivers.layerwise.activations import ActivationStore
from gradmerge.drivers.layerwise.files import with_own_keys
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.engine.reading import NOT_INPUTS

_REMEDY = "Name other `blocks`, or learn end to end: leave `driver` out."

# ---- which modules are the blocks ----------------------------------------------------------------


END = "(after the last block)"


@dataclass(frozen=True)
class ChainBlock:
    """A module whose input is the output of the block before; or all that follows the last."""

    name: str
    """Name of the module, or `END`."""
    tensors: tuple[str, ...]
    """Tensors in it whose coefficients are learned, in the order of the plan."""


def find_blocks(plan: Plan, patterns: Sequence[str] | None = None) -> list[ChainBlock]:
    """Return the blocks of a plan's network, in the order of its modules.

    Args:
        plan: an opened recipe, with a raw parameter per slot.
        patterns: regular expressions that match whole names of modules; default: the members of the
            network's one `nn.ModuleList` that is in no other list, or of the network itself if it
            is an `nn.Sequential`.
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
    owners = _owners(plan, names)
    if not any(owners.values()):
        raise ConfigError(
            f"LayerWise: the blocks {shorten(names)} hold no tensor whose coefficients are "
            "learned. Name others in `blocks`."
        )
    return [
        ChainBlock(name, tuple(t for t, owner in owners.items() if owner == name)) for name in names
    ]


def _default_blocks(skeleton: nn.Module) -> list[str]:
    if isinstance(skeleton, nn.Sequential):
        return [name for name, _ in skeleton.named_children()]
    lists: list[str] = []
    for name, module in skeleton.named_modules():
        weighs = isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
        if weighs and not any(name.startswith(f"{other}.") for other in lists):
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
        if not any(search(pattern, name, whole=True) for name in modules):
            raise ConfigError(
                f"LayerWise: blocks: no module of {type(skeleton).__name__} has a name that "
                f"matches {pattern!r} as a whole.{nearest(pattern, modules)}"
            )
    found = [name for name in modules if any(search(p, name, whole=True) for p in patterns)]
    for outer, name in product(found, found):
        if name.startswith(f"{outer}."):
            raise ConfigError(
                f"LayerWise: the block {name} lies within the block {outer}. Name one of them."
            )
    return found


def _owners(plan: Plan, names: Sequence[str]) -> dict[str, str]:
    """Return the block of each learned tensor, which has no part outside of it; or ""."""
    assert plan.binding is not None
    owners: dict[str, str] = {}
    first: dict[str, str] = {}
    for tensor in plan.learned:
        places = plan.binding.owners[tensor]
        found = {next((b for b in names if p.startswith(f"{b}.")), ""): p for p in places}
        if len(found) > 1:
            uses = " and ".join(f"{place} (of {b or 'no block'})" for b, place in found.items())
            raise ConfigError(
                f"LayerWise: {tensor} is tied: it is {uses}, so it cannot be learned with one "
                "block alone. Freeze it (recipe.frozen), or learn end to end: leave `driver` out."
            )
        owners[tensor] = next(iter(found))
        other = first.setdefault(plan.layout.slots[tensor].key, tensor)
        if owners[other] != owners[tensor]:
            here, there = (owners[name] or "no block" for name in (tensor, other))
            raise ConfigError(
                f"LayerWise: {other} (of {there}) and {tensor} (of {here}) share a coefficient, "
                "which one block's loss would decide for both. Take a granularity within a block, "
                "such as Tensor, Column, Element, or Group with one group per block."
            )
    return owners


# ---- how blocks are called -----------------------------------------------------------------------

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(None))
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a call of a block."""


@dataclass(frozen=True)
class Passing:
    """A batch on its way through the blocks: its hidden state and how each block is called."""

    source: str
    """Source whose private tensors it uses."""
    name: str
    """Name of its hidden state among the activations, which is replaced block by block."""
    calls: Sequence[Call]
    """One per block, with tensors among the activations, and None for the hidden state."""
    mask: Tensor | None
    """Its attention mask `[batch, tokens]`, 0 on padding, if there is any."""


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, (tuple, list)) and type(value) is not dict


def _place(keys: KeyPath) -> str:
    """Return where a leaf of a call stands, e.g. `args[2]`, `position_embeddings[0]`."""
    if keys[0].idx == 0:  # type: ignore[attr-defined]
        return f"args{keystr(keys[1:])}"
    return f"{keys[1].key}{keystr(keys[2:])}"  # type: ignore[attr-defined]


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

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest accepted deviation from the network itself, as a share of its largest value."""


class _Stopped(Exception):  # noqa: N818 (it is no error)
    """The last block has been called."""


@dataclass
class _Traced:
    """A call of a block in a plain pass, with copies of its tensors."""

    number: int
    given: dict[KeyPath, Any]
    output: Any
    hidden: Tensor


class BlockChain:
    """The network of a plan, run block by block with weights that are given by name.

    `verify` must be called first: it finds how blocks are called.

    Args:
        plan: an opened recipe with a network, which is changed: its parameters become properties.
        blocks: regular expressions of the blocks' names; see `find_blocks`.
        dtype: dtype of the computation.
        device: where it runs.
    """

    def __init__(
        self, plan: Plan, blocks: Sequence[str] | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = with_own_keys(plan)
        self.blocks = find_blocks(self.plan, blocks)
        self.model = MergedModel(self.plan, memory="streamed", dtype=dtype, raw={}).to(device)
        """The network, which takes all weights by name, with raw coefficients as far as known."""
        for module in self.model.skeleton.modules():
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False  # type: ignore[union-attr]
        self.store = ActivationStore()
        """Hidden states between blocks, and what else blocks are called with."""
        self.gives_logits = False
        """Whether the network's output can be scored."""
        self.end = ChainBlock(END, ())
        """What follows the last block: the tensors on which nothing before depends."""
        self.tied: list[str] = []
        """Tensors that follow the last block, but are bound to what precedes it."""
        self._source = ""
        self._hidden: list[KeyPath] = []  # where the hidden state is in each block's call
        self._forms: list[Any] = []  # outputs of the blocks, without their tensors

    @property
    def steps(self) -> list[ChainBlock]:
        """Blocks in the order of learning, and the end if it has tensors to learn."""
        return [*self.blocks, *([self.end] if self.end.tensors else [])]

    @property
    def source(self) -> str:
        """Source whose private tensors are used: that of the batch which runs."""
        return self._source

    @source.setter
    def source(self, source: str) -> None:
        self._source = source
        self.model.network_buffers.serve(source)

    def moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with its tensors in the dtype and on the device of the computation."""
        place = self.model.place
        return {k: place(v) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def run_network(self, batch: Mapping[str, Any]) -> Any:
        """Return the network's output for a placed batch, with the weights that are set."""
        return self.model.run(**{k: v for k, v in batch.items() if k not in NOT_INPUTS})

    @torch.no_grad()
    def theta(self, name: str, finished: bool = False) -> Tensor:
        """Return a merged tensor, after the recipe's finalisers where asked for."""
        model, state = self.model, self.model.state
        if name not in state.fixed and self.plan.layout.slots[name].key not in state.raw:
            raise ConfigError(
                f"LayerWise: {name} is used outside of its block, so it cannot be learned with "
                f"that block alone. {_REMEDY}"
            )
        return model.build(name, state.own(name), model.dtype_of(name), finished=finished)

    def weights(self, theta: Callable[[str], Tensor]) -> AbstractContextManager[None]:
        """Within the context the network takes the merged tensors that `theta` gives, and private
        ones of `source`.
        """
        tensors, read = self.plan.tensors, self.plan.read
        return self.model.as_weights(
            lambda name: theta(name) if name in tensors else read(self.source, name)
        )

    def enter(self, batch: Mapping[str, Any], source: str, name: str) -> Passing:
        """Run what precedes the first block on a placed batch, with the weights that are set, and
        record how each block is called.
        """
        calls: list[Call] = []
        constants: dict[Tensor, Tensor] = {}  # one that many blocks take is hashed once

        def keep(block: int, keys: KeyPath, leaf: Any) -> Any:
            if keys == self._hidden[block]:
                return None
            if isinstance(leaf, Tensor):
                if leaf not in constants:
                    constants[leaf] = self.store.constant(leaf)
                return constants[leaf]
            if isinstance(leaf, _PLAIN):
                return leaf
            raise ConfigError(
                f"LayerWise: {self.blocks[block].name} is called with {_place(keys)} of type "
                f"{type(leaf).__name__}, which cannot be kept between batches; expected tensors, "
                "numbers, strings and None, in tuples, lists or dicts. Learn end to end: leave "
                "`driver` out."
            )

        def record(block: int, _: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = key_get((args, kwargs), self._hidden[block])
            if not calls:
                self.store.put(name, hidden)
            calls.append(tree_map_with_path(partial(keep, block), (args, kwargs), is_leaf=_is_leaf))
            if len(calls) == len(self.blocks):
                raise _Stopped
            return _output_with(self._forms[block], hidden)

        self.source = source
        with self._standing_in(record), suppress(_Stopped):
            self.run_network(batch)
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
            return Passing(source, name, calls, None)
        return Passing(source, name, calls, self.store.constant(mask))

    def kept(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a placed batch whose tensors are among the activations."""
        return {k: self.store.constant(v) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @contextmanager
    def expert(self, source: str) -> Iterator[None]:
        """Within the context the network runs with a source's weights, each placed once."""
        stored = self.plan.reader(source, self.model.device)
        read = cache(lambda name: self.model.place(stored(name)))
        with self.model.as_source(source), self.model.as_weights(read):
            yield

    def hidden(self, passing: Passing, copy: bool = False) -> Tensor:
        """Return a batch's hidden state on the device; only a copy may be written to."""
        return self.store.get(passing.name).to(self.model.device, copy=copy)

    def run(self, number: int, passing: Passing) -> Tensor:
        """Return the hidden state after a block, which runs with the weights that are set."""

        def fill(keys: KeyPath, leaf: Any) -> Any:
            if keys == self._hidden[number]:
                return self.hidden(passing, copy=True)  # a block may write over its input
            return leaf.to(self.model.device) if isinstance(leaf, Tensor) else leaf

        self.source = passing.source  # also of weights that backward asks for again
        args, kwargs = tree_map_with_path(fill, passing.calls[number], is_leaf=_is_leaf)
        return _hidden_of(self.blocks[number].name, self._module(number)(*args, **kwargs))

    def leaving(self, passing: Passing) -> AbstractContextManager[None]:
        """Within the context no block runs: each returns a batch's hidden state after the last."""
        self.source = passing.source
        hidden = self.hidden(passing, copy=True)
        return self._standing_in(lambda block, *_, **__: _output_with(self._forms[block], hidden))

    def outputs(self, passing: Passing, batch: Mapping[str, Any]) -> list[Tensor]:
        """Return what the network gives out for a batch after its last block, with the weights that
        are set: its logits, or all its tensors if it has none.
        """
        with self.leaving(passing):
            output = self.run_network(self.moved(batch))
        logits = getattr(output, "logits", None)
        leaves = [logits] if isinstance(logits, Tensor) else tree_leaves(output)
        return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]

    @contextmanager
    def _standing_in(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within the context `forward(number, own, ...)` replaces each block's `own` forward."""
        modules = [self._module(number) for number in range(len(self.blocks))]
        before = [module.__dict__.get("forward") for module in modules]
        for number, module in enumerate(modules):
            module.forward = partial(forward, number, module.forward)
        try:
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                del module.forward
                if own is not None:
                    module.forward = own

    def _module(self, number: int) -> nn.Module:
        return self.model.skeleton.get_submodule(self.blocks[number].name)

    # ---- verification ---------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self, batch: Mapping[str, Any], source: str) -> float:
        """Find how blocks are called, and check that running them one by one is the network itself.

        Args:
            batch: one placed example.
            source: source whose weights are used.

        Returns:
            The largest deviation from the network's output, as a share of its largest value.
        """
        with self.model.as_source(source):
            traced, output = self._traced(batch)
            self._take_order(traced)
            self._hidden = self._hidden_places(traced)
            self._forms = [call.output for call in traced]
            begun, ended_by = set[str](), set[str]()
            with self._noting(source, begun):
                passing = self.enter(batch, source, "hidden")
            self._require_constant(traced, passing)
            for number in range(len(self.blocks)):
                self.store.put(passing.name, self.run(number, passing))
            with self._noting(source, ended_by), self.leaving(passing):
                ended = self.run_network(batch)
        self._take_end(begun, ended_by)
        logits, last = (getattr(out, "logits", out) for out in (output, ended))
        self.gives_logits = isinstance(logits, Tensor) and logits.dim() in (2, 3)
        deviation = max(
            _deviation(self.hidden(passing), traced[-1].hidden),
            _deviation(*(_hidden_of("the network", out) for out in (last, logits))),
        )
        if not deviation <= _TOLERANCE[self.model.dtype]:
            raise ConfigError(
                f"LayerWise: running {type(self.model.skeleton).__name__} block by block deviates "
                f"from the network itself by {deviation:.2g} of its largest value (at most "
                f"{_TOLERANCE[self.model.dtype]:g}): its blocks are more than a chain. {_REMEDY}"
            )
        return deviation

    def _noting(self, source: str, names: set[str]) -> AbstractContextManager[None]:
        """Within the context, a source's weights are used, and their names noted."""

        def read(name: str) -> Tensor:
            names.add(name)
            return self.plan.read(source, name)

        return self.model.as_weights(read)

    def _take_end(self, begun: set[str], ended: set[str]) -> None:
        """Find the tensors to learn after the last block.

        Args:
            begun: names of the tensors that are used before the first block.
            ended: names of all tensors that are used outside of blocks.
        """
        slots, binding = self.plan.layout.slots, self.plan.binding
        assert binding is not None
        within = {name for block in self.blocks for name in block.tensors}
        outside = [name for name in self.plan.learned if name not in within]
        follow = [name for name in outside if name in ended and name not in begun]
        kept = {slots[name].key for name in outside if name not in follow}
        own = [name for name in follow if slots[name].key not in kept]
        both = [name for name in outside if name in begun and len(binding.owners[name]) > 1]
        self.end = ChainBlock(END, tuple(own))
        self.tied = [*both, *(name for name in follow if name not in own)]

    def _traced(self, batch: Mapping[str, Any]) -> tuple[list[_Traced], Any]:
        """Return each block's call in a plain pass, and the network's output."""
        traced: list[_Traced] = []

        def trace(block: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            leaves = tree_flatten_with_path((args, kwargs), _is_leaf)[0]
            given = {keys: _copied(leaf) for keys, leaf in leaves}
            output = own(*args, **kwargs)
            hidden = _copied(_hidden_of(self.blocks[block].name, output))
            form = _output_with(output, torch.empty(0))
            traced.append(_Traced(block, given, form, hidden))
            return output

        with self._standing_in(trace):
            return traced, self.run_network(batch)

    def _take_order(self, traced: Sequence[_Traced]) -> None:
        """Sort the blocks as they ran; each must have run once."""
        order = [call.number for call in traced]
        for number, block in enumerate(self.blocks):
            if order.count(number) != 1:
                raise ConfigError(
                    f"LayerWise: {block.name} runs {order.count(number)} times in one pass, "
                    "expected once, so its coefficients cannot be learned at one place. "
                    f"{_REMEDY}"
                )
        self.blocks = [self.blocks[number] for number in order]

    def _hidden_places(self, traced: Sequence[_Traced]) -> list[KeyPath]:
        """Return which argument of each block is the hidden state of the block before."""
        found: list[KeyPath] = []
        for block, before, call in zip(self.blocks[1:], traced, traced[1:], strict=False):
            same = [keys for keys, v in call.given.items() if not _deviation(v, before.hidden)]
            if not same:
                raise ConfigError(
                    f"LayerWise: no argument of {block.name} "
                    f"({', '.join(map(_place, call.given))}) is what the block before returned: "
                    f"something between them changes it. {_REMEDY}"
                )
            found.append(same[0])
        tensors = [keys for keys, v in traced[0].given.items() if isinstance(v, Tensor)]
        if not tensors:
            raise ConfigError(f"LayerWise: {self.blocks[0].name} takes no tensor.")
        return [found[0] if found and found[0] in tensors else tensors[0], *found]

    def _require_constant(self, traced: Sequence[_Traced], passing: Passing) -> None:
        """Reject arguments, besides the hidden state, that depend on the blocks before."""
        for number, call in enumerate(traced):
            recorded = dict(tree_flatten_with_path(passing.calls[number], _is_leaf)[0])
            for keys, leaf in call.given.items():
                apart = _deviation(leaf, recorded.get(keys))
                if keys != self._hidden[number] and apart > _TOLERANCE[self.model.dtype]:
                    raise ConfigError(
                        f"LayerWise: {_place(keys)} of {self.blocks[number].name} depends on what "
                        "the blocks before it computed, so the block cannot be learned from its "
                        f"hidden state alone. {_REMEDY}"
                    )


def _copied(value: Any) -> Any:
    """Return a tensor as it is now: blocks may write over it."""
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


def _deviation(got: Any, expected: Any) -> float:
    """Return the largest difference as a share of the largest value; infinity between kinds."""
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if type(got) is type(expected) and got == expected else math.inf
    got, expected = got.cpu(), expected.cpu()
    finite = expected.isfinite()
    if got.dtype != expected.dtype or not torch.equal(got.isfinite(), finite):
        return math.inf
    if not finite.any():
        return 0.0
    got, expected = got[finite].double(), expected[finite].double()
    largest, apart = expected.abs().max(), (got - expected).abs().max()
    return float(apart / largest if largest else apart)
