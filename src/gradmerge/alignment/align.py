"""Views of opened sources with their units in one order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gradmerge.alignment.base import AbstractAlignment, Aligned, AlignmentContext
from gradmerge.alignment.moments import CollectedActivations
from gradmerge.alignment.symmetry.derive import file_names, to_spec
from gradmerge.alignment.symmetry.example import candidates
from gradmerge.alignment.symmetry.handwritten import read_spec
from gradmerge.alignment.symmetry.spec import Axis, PermutationSpec, share_moved
from gradmerge.alignment.symmetry.trace import trace
from gradmerge.alignment.symmetry.verify import verify
from gradmerge.alignment.views import AlignedView
from gradmerge.errors import ConfigError, GradmergeError, shorten
from gradmerge.sources import Checkpoint
from gradmerge.sources.base import fingerprints_of
from gradmerge.sources.compatibility import is_private
from gradmerge.sources.skeleton import bind_or_refuse


def align_sources(
    method: AbstractAlignment,
    sources: Mapping[str, Checkpoint],
    spec: PermutationSpec,
    skeleton: nn.Module | None = None,
    private: Sequence[str] = (),
    statistics: str | None = None,
) -> tuple[dict[str, Checkpoint], Aligned]:
    """Return views of all sources with their units in one order, and that order.

    Args:
        method: finds the order.
        sources: opened, in order.
        spec: the groups of units.
        skeleton: the network without weights; not needed with a hand-written specification.
        private: regular expressions of tensors that stay with their task: they follow the units
            that they read, but are not compared.
        statistics: folder that `gradmerge collect` wrote, for methods that need moments on data.

    Raises:
        ConfigError: a head does not fit the specification, or the statistics that the method needs
            are missing.
    """
    _require_heads(spec, sources, private)
    activations = None
    if method.needs is not None and statistics is not None:
        activations = CollectedActivations(statistics, spec, fingerprints_of(sources))
    names = compared(sources, skeleton, private)
    found = method.align(AlignmentContext(spec, sources, names, skeleton, activations))
    report = {
        "method": type(method).__name__,
        "output_changes_by": spec.checked,
        "groups": {name: group.size for name, group in spec.groups.items()},
        "moved": {
            source: {group: round(share_moved(change), 6) for group, change in maps.items()}
            for source, maps in found.maps.items()
        },
        "objective": found.objective,
        **found.report,
    }
    views = {
        name: AlignedView(checkpoint, spec, maps) if (maps := found.maps.get(name)) else checkpoint
        for name, checkpoint in sources.items()
    }
    return views, replace(found, report=report)


def find_spec(
    method: AbstractAlignment, sources: Mapping[str, Checkpoint], skeleton: nn.Module | None
) -> PermutationSpec:
    """Return the specification that a method names, or the traced one.

    Raises:
        ConfigError: there is no network to trace, or it cannot be traced.
    """
    first = next(iter(sources.values()))
    names, example = list(first.infos), getattr(method, "example", None)
    given = getattr(method, "spec", None)
    if given is None and skeleton is None:
        raise ConfigError(
            f"{type(method).__name__} traces the network to find which units may change places, "
            "and no source tells which network it is: expected a folder with a config, or a module "
            "from Python.\nGive one, or a hand-written specification (`spec` of the alignment)."
        )
    if given is None:
        assert skeleton is not None
        idle = getattr(method, "unreached", ())
        return traced_spec(skeleton, names, first.label, example, idle)
    shapes = {name: info.shape for name, info in first.infos.items()}
    spec = read_spec(given, shapes, skeleton)
    if skeleton is None:
        return spec
    files = file_names(skeleton, bind_or_refuse(skeleton, names, first.label))
    checked = partial(verify, spec, skeleton, files, written=True)
    return _first_that_runs(skeleton, example, checked)


def traced_spec(
    skeleton: nn.Module,
    names: Sequence[str],
    label: str = "the checkpoint",
    example: Mapping[str, Any] | None = None,
    unreached: Sequence[str] = (),
) -> PermutationSpec:
    """Trace the groups of a network, and check them on random weights.

    Args:
        skeleton: the network; its weights are not used.
        names: tensors by their names in the files.
        label: whose names they are, for messages.
        example: arguments of its forward: tensors, or shapes; default: derived.
        unreached: regular expressions of parameters that take no part in the network.

    Raises:
        ConfigError: the network cannot be run or traced, or a permutation changes its output.
    """
    binding = bind_or_refuse(skeleton, names, label)
    files = file_names(skeleton, binding)

    def attempt(inputs: Mapping[str, Any]) -> PermutationSpec:
        spec = to_spec(trace(skeleton, inputs, unreached), skeleton, binding)
        return verify(spec, skeleton, files, inputs)

    return _first_that_runs(skeleton, example, attempt)


def _first_that_runs(
    skeleton: nn.Module,
    example: Mapping[str, Any] | None,
    attempt: Callable[[Mapping[str, Any]], PermutationSpec],
) -> PermutationSpec:
    failures = []
    for inputs in candidates(skeleton, example):
        try:
            return attempt(inputs)
        except GradmergeError:
            raise
        except Exception as error:  # whatever a network raises on an input that is not its own
            shapes = {k: list(v.shape) if torch.is_tensor(v) else v for k, v in inputs.items()}
            described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            failures.append(f"{described}: {type(error).__name__}: {error}")
    raise ConfigError(
        f"alignment: {type(skeleton).__name__} does not run on {shorten(failures, 2)}. Give "
        "`example` of the alignment: shapes by the name of the argument, e.g. "
        "{x: [1, 3, 32, 32]}."
    )


def compared(
    sources: Mapping[str, Checkpoint], skeleton: nn.Module | None, private: Sequence[str]
) -> tuple[str, ...]:
    """Return the names of the floating-point parameters that all sources share."""
    first = next(iter(sources.values()))
    names = [
        name
        for name, info in first.infos.items()
        if info.dtype.is_floating_point
        and not is_private(name, private)
        and all(name in checkpoint.infos for checkpoint in sources.values())
    ]
    if skeleton is None:
        return tuple(n for n in names if not n.endswith(("running_mean", "running_var")))
    binding = bind_or_refuse(skeleton, list(first.infos), first.label)
    return tuple(name for name in names if name in binding.parameters)


def _require_heads(
    spec: PermutationSpec, sources: Mapping[str, Checkpoint], private: Sequence[str]
) -> None:
    """Reject heads with other tensors than the specification: their inputs would not be permuted.

    Raises:
        ConfigError: a head has other tensors, or of other sizes.
    """
    first = next(iter(sources.values()))
    for name, checkpoint in sources.items():
        own = [n for n in checkpoint.infos if is_private(n, private) and n not in first.infos]
        if own:
            raise ConfigError(
                f"alignment: source {name} ({checkpoint.label}) has private tensors that the "
                f"network does not: {shorten(own)}.\nNothing tells which units they read, so they "
                "cannot follow the permutation. Rename them like those of the first source."
            )
        for tensor, axes in spec.tensors.items():
            shape = checkpoint.infos[tensor].shape if tensor in checkpoint.infos else None
            if shape is not None and not _fits(axes, shape):
                raise ConfigError(
                    f"alignment: {tensor} of source {name} is {list(shape)}, the specification "
                    f"says {[axis.size for axis in axes]}; its units cannot be told."
                )


def _fits(axes: Sequence[Axis], shape: Sequence[int]) -> bool:
    """True if a tensor has all units of its axes; axes without groups may be of another size."""
    pairs = zip(axes, shape, strict=False)
    return len(axes) == len(shape) and all(a.size == n for a, n in pairs if a.groups)
