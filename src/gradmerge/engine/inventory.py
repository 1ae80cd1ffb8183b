"""The tensors of a merge by kind: merged tensors, buffers and private tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gradmerge.coefficients import MergeTensor
from gradmerge.sources import Checkpoint
from gradmerge.sources.compatibility import is_private
from gradmerge.sources.skeleton import Binding, bind_or_refuse, input_axis

_BUFFER_NAME = re.compile(r"(running_mean|running_var|num_batches_tracked|inv_freq|position_ids)$")


@dataclass(frozen=True)
class Inventory:
    """The tensors of a merge by kind, in the order of the network if there is one."""

    binding: Binding | None
    """Their places in the network, if there is one."""
    private: list[str]
    """Names of tensors that stay with their task."""
    buffers: list[str]
    """Names of buffers."""
    tensors: dict[str, MergeTensor]
    """Tensors to merge, by name."""


def take_inventory(
    reference: Checkpoint,
    sources: Mapping[str, Checkpoint],
    skeleton: nn.Module | None,
    private: Sequence[str],
) -> Inventory:
    """Sort a merge's tensors by kind.

    Args:
        reference: the base, or the first source.
        sources: checkpoints by name.
        skeleton: the network without weights, if there is one.
        private: regular expressions of tensors that stay with their task.
    """
    # Shared tensors as in the reference, private ones as in the sources.
    first = next(iter(sources.values()))
    names = [name for name in reference.infos if not is_private(name, private)]
    names += [name for name in first.infos if is_private(name, private)]
    binding = None
    if skeleton is not None:
        binding = bind_or_refuse(skeleton, names, reference.label)
        names = [name for name in names if name not in binding.ties]
        names.sort(key=_module_order(binding, skeleton))
    kept = [name for name in names if is_private(name, private)]
    shared = [name for name in names if name not in set(kept)]
    buffers = [name for name in shared if _is_buffer(name, reference, binding)]
    tensors = {
        name: _describe(name, reference, binding, skeleton)
        for name in shared
        if name not in set(buffers)
    }
    return Inventory(binding, kept, buffers, tensors)


def _is_buffer(name: str, reference: Checkpoint, binding: Binding | None) -> bool:
    if not reference.infos[name].dtype.is_floating_point:
        return True
    if binding is not None:
        return name in binding.buffers
    return bool(_BUFFER_NAME.search(name))


def _describe(
    name: str, reference: Checkpoint, binding: Binding | None, skeleton: nn.Module | None
) -> MergeTensor:
    places = () if binding is None else binding.parameters.get(name, ())
    axis = input_axis(skeleton, places[0]) if places and skeleton else 1
    return MergeTensor(name, reference.infos[name].shape, axis)


def _module_order(binding: Binding, skeleton: nn.Module) -> Callable[[str], int]:
    """Sort key: the order of the network's parameters (files are often sorted by name)."""
    names = [name for name, _ in skeleton.named_parameters(remove_duplicate=False)]
    place = {name: i for i, name in enumerate(names)}
    first = {key: place[places[0]] for key, places in binding.parameters.items()}
    return lambda name: first.get(name, len(place))
