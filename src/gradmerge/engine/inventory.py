"""The tensors of a merge by kind: merged tensors, buffers and private tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from gradmerge.coefficients import MergeTensor
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.patterns import matches
from gradmerge.engine.recipe import Recipe
from gradmerge.finalisers import AbstractRescale
from gradmerge.sources import Checkpoint
from gradmerge.sources.compatibility import is_private
from gradmerge.sources.sharing import same_place, shared_tensors
from gradmerge.sources.skeleton import Network

_BUFFER_NAME = re.compile(
    r"(running_mean|running_var|num_batches_tracked|inv_freq|position_ids"
    r"|attn_mask|causal_mask|masked_bias)$"
)


@dataclass(frozen=True)
class Inventory:
    """The tensors of a merge by kind, in the order of the network if there is one."""

    private: list[str]
    """Names of tensors that stay with their task."""
    buffers: list[str]
    """Names of buffers."""
    tensors: dict[str, MergeTensor]
    """Tensors to merge, by name."""


def names_of(reference: Checkpoint, first: Checkpoint, private: Sequence[str]) -> list[str]:
    """Return the names of a merge's tensors: shared ones as in the reference, then private ones.

    Args:
        reference: the base, or the first source.
        first: the first source, which has private tensors.
        private: regular expressions of tensors that stay with their task.
    """
    names = [name for name in reference.infos if not is_private(name, private)]
    return [*names, *(name for name in first.infos if is_private(name, private))]


def take_inventory(
    names: Sequence[str], reference: Checkpoint, network: Network | None, private: Sequence[str]
) -> Inventory:
    """Sort the tensors of a merge (see `names_of`) by kind."""
    names = list(names)
    if network is not None:
        names = [name for name in names if name not in network.binding.ties]
        names.sort(key=_module_order(network))
    kept = [name for name in names if is_private(name, private)]
    shared = [name for name in names if name not in set(kept)]
    _require_real(shared, reference, network)
    buffers = [name for name in shared if _is_buffer(name, reference, network)]
    tensors = {
        name: _describe(name, reference, network) for name in shared if name not in set(buffers)
    }
    return Inventory(kept, buffers, tensors)


def find_unchanged(
    recipe: Recipe,
    base: Checkpoint | None,
    sources: Mapping[str, Checkpoint],
    names: Collection[str],
) -> frozenset[str]:
    """Return the tensors that are the base's in all sources, if directions start at the base."""
    if base is None or recipe.resolved_origin != "base":
        return frozenset()
    checkpoints = [base, *sources.values()]
    if all(isinstance(finaliser, AbstractRescale) for finaliser in recipe.finalisers):
        return frozenset(shared_tensors(names, checkpoints))
    # REPAIR changes channels whose tensors are the same: it leaves alone what is frozen
    return frozenset(name for name in names if same_place(name, checkpoints))


def find_trained(
    found: Inventory,
    trained: Sequence[str],
    adapters: Mapping[str, int],
    first: Checkpoint,
    network: Network | None,
) -> tuple[list[str], dict[str, int]]:
    """Find what a fit trains per task.

    Args:
        found: the tensors of the merge.
        trained: regular expressions of private tensors.
        adapters: rank per regular expression of merged matrices; the first match wins.
        first: the first source, which has private tensors.
        network: the network, if it is known.

    Returns:
        Names of private tensors, and the rank of the adapter of each merged matrix that has one.

    Raises:
        ConfigError: an expression matches no such tensor; the message lists all of them.
    """
    used = found.private if network is None else network.binding.owners
    own = [n for n in found.private if n in used and not _is_buffer(n, first, network)]
    matrices = [name for name, tensor in found.tensors.items() if len(tensor.shape) == 2]
    lost = [
        f"trained: {p!r} matches no private parameter (private: {shorten(own) or 'none'}); add it "
        "to `private`, so that each task has its own"
        for p in trained
        if not any(matches([p], name) for name in own)
    ]
    lost += [
        f"adapters: {p!r} matches no merged matrix (such as {shorten(matrices, 2) or 'none'})"
        for p in adapters
        if not any(matches([p], name) for name in matrices)
    ]
    if lost:
        raise ConfigError("; ".join(lost) + ".")
    ranks = {}
    for name in matrices:
        rank = next((r for p, r in adapters.items() if matches([p], name)), None)
        if rank is not None:
            ranks[name] = rank
    return [name for name in own if matches(trained, name)], ranks


def _require_real(names: Sequence[str], reference: Checkpoint, network: Network | None) -> None:
    learnable = names if network is None else network.binding.owners
    found = [n for n in names if n in learnable and reference.infos[n].dtype.is_complex]
    if found:
        raise ConfigError(
            f"{reference.label}: expected real weights, got complex ones: {shorten(found)}. They "
            "are not merged.\n"
            "Store real and imaginary parts (torch.view_as_real) in every source, or leave them to "
            "their tasks with `private`."
        )


def _is_buffer(name: str, reference: Checkpoint, network: Network | None) -> bool:
    if not reference.infos[name].dtype.is_floating_point:
        return True
    if network is not None:
        return name in network.binding.buffers
    return bool(_BUFFER_NAME.search(name))


def _describe(name: str, reference: Checkpoint, network: Network | None) -> MergeTensor:
    shape = reference.infos[name].shape
    if network is None or name not in network.binding.owners:
        return MergeTensor(name, shape)
    axis, stacked = network.input_axis(name, shape)
    return MergeTensor(name, shape, axis, stacked)


def _module_order(network: Network) -> Callable[[str], int]:
    """Sort key: the order of the network's parameters (files are often sorted by name)."""
    names = [name for name, _ in network.module.named_parameters(remove_duplicate=False)]
    place = {name: i for i, name in enumerate(names)}
    first = {key: place[places[0]] for key, places in network.binding.owners.items()}
    return lambda name: first.get(name, len(place))
