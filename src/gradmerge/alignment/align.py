"""Views of opened sources with their units in one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gradmerge.alignment.base import AbstractAlignment, Aligned, AlignmentContext
from gradmerge.alignment.moments import CollectedActivations
from gradmerge.alignment.symmetry.derive import to_spec
from gradmerge.alignment.symmetry.example import candidates
from gradmerge.alignment.symmetry.handwritten import read_spec
from gradmerge.alignment.symmetry.spec import PermutationSpec, share_moved
from gradmerge.alignment.symmetry.trace import trace
from gradmerge.alignment.symmetry.verify import verify
from gradmerge.alignment.views import AlignedView
from gradmerge.common.errors import ConfigError, GradmergeError, shorten
from gradmerge.sources import Checkpoint
from gradmerge.sources.base import fingerprints_of
from gradmerge.sources.compatibility import is_private
from gradmerge.sources.skeleton import Network


def align_sources(
    method: AbstractAlignment,
    sources: Mapping[str, Checkpoint],
    spec: PermutationSpec,
    network: Network | None = None,
    private: Sequence[str] = (),
    statistics: str | None = None,
) -> tuple[dict[str, Checkpoint], Aligned]:
    """Return views of all sources with their units in one order, and that order.

    Private tensors follow the units that they read, but are not compared.
    """
    _require_heads(spec, sources, private)
    activations = None
    if method.needs is not None and statistics is not None:
        activations = CollectedActivations(statistics, spec, fingerprints_of(sources))
    names = compared(sources, network, private)
    module = None if network is None else network.module
    found = method.align(AlignmentContext(spec, sources, names, module, activations))
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
    method: AbstractAlignment, sources: Mapping[str, Checkpoint], network: Network | None
) -> PermutationSpec:
    """Return the specification that a method names, or the traced one."""
    first = next(iter(sources.values()))
    given, written = getattr(method, "spec", None), None
    if given is not None:
        shapes = {name: info.shape for name, info in first.infos.items()}
        written = read_spec(given, shapes, None if network is None else network.module)
    if network is not None:
        made = [*network.binding.fused, *network.binding.split]
        if made:
            raise ConfigError(
                f"alignment: {type(network.module).__name__} fuses or splits {len(made)} tensors "
                f"when it loads them ({shorten(made)}), whose units cannot be matched yet.\n"
                "Leave `alignment` out; fine-tuned models of one base rarely need it."
            )
        example, unreached = getattr(method, "example", None), getattr(method, "unreached", ())
        return traced_spec(network, example, unreached, written)
    if written is not None:
        return written
    raise ConfigError(
        f"{type(method).__name__} traces the network to find which units may change places, and no "
        "source tells which network it is: expected a folder with a config, or a module from "
        "Python.\nGive one, or a hand-written specification (`spec` of the alignment)."
    )


def traced_spec(
    network: Network,
    example: Mapping[str, Any] | None = None,
    unreached: Sequence[str] = (),
    written: PermutationSpec | None = None,
) -> PermutationSpec:
    """Trace the groups of a network (or take written ones), and check them on random weights."""
    skeleton, binding = network.module, network.binding
    files, failures = binding.file_names, []
    for inputs in candidates(skeleton, example):
        try:
            spec = written or to_spec(trace(skeleton, inputs, unreached), binding)
            return verify(spec, skeleton, files, inputs, written=written is not None)
        except GradmergeError:
            raise
        except Exception as error:  # whatever a network raises on an input that is not its own
            shapes = {k: list(v.shape) if torch.is_tensor(v) else v for k, v in inputs.items()}
            described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            failures.append(f"{described}: {type(error).__name__}: {error}")
    raise ConfigError(
        f"alignment: {type(skeleton).__name__} does not run on {shorten(failures, 2)}. Give "
        "`example` of the alignment: shapes by the name of the argument, e.g. {x: [1, 3, 32, 32]}."
    )


def compared(
    sources: Mapping[str, Checkpoint], network: Network | None, private: Sequence[str]
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
    if network is None:
        return tuple(n for n in names if not n.endswith(("running_mean", "running_var")))
    return tuple(name for name in names if name in network.binding.parameters)


def _require_heads(
    spec: PermutationSpec, sources: Mapping[str, Checkpoint], private: Sequence[str]
) -> None:
    """Reject heads with other tensors than the specification, whose inputs would stay."""
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
            if tensor not in checkpoint.infos:
                continue
            shape = checkpoint.infos[tensor].shape
            pairs = zip(axes, shape, strict=False)
            if len(axes) != len(shape) or any(a.size != n for a, n in pairs if a.groups):
                raise ConfigError(
                    f"alignment: {tensor} of source {name} is {list(shape)}, the specification "
                    f"says {[axis.size for axis in axes]}; its units cannot be told."
                )
