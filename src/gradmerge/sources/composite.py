"""Text models and vision towers as sources of a merge whose base has them as parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.common.errors import CompatibilityError, Problem
from gradmerge.common.low_rank import LowRank
from gradmerge.sources.base import Checkpoint, View
from gradmerge.sources.loader import Fused, Loader
from gradmerge.sources.skeleton import tied_groups

_PARTS = ("text_config", "vision_config", "audio_config")


class WholeView(View):
    """A part of a larger model, of which all other tensors are those of the base.

    Args:
        inner: the part.
        base: the larger model.
        names: name in `inner` of each tensor that it has.
        fused: for each tensor that the base has in one, the places of those of `inner` in it.
        rest: names of the tensors of the base.
    """

    def __init__(
        self,
        inner: Checkpoint,
        base: Checkpoint,
        names: Mapping[str, str],
        fused: Mapping[str, Fused],
        rest: Sequence[str],
    ) -> None:
        super().__init__(inner)
        self._folder, self._config = base.folder, base.config
        self._base, self._names, self._fused, self._rest = base, names, fused, set(rest)
        self._infos = {
            **{name: replace(inner.infos[own], name=name) for name, own in names.items()},
            **{name: base.infos[name] for name in rest},
        }
        for name, made in fused.items():
            first = inner.infos[next(iter(made.parts))]
            self._infos[name] = replace(first, name=name, shape=base.infos[name].shape)

    @override
    def changes(self, name: str) -> bool:
        return name in self._fused

    @override
    def form(self, name: str) -> Tensor:
        info = self._infos[name]
        whole = torch.empty(info.shape, dtype=info.dtype)
        for own, window in self._fused[name].parts.items():
            window.write(whole, _filler(self.inner.read(own)))
        return whole

    @override
    def own_name(self, name: str) -> str:
        return self._names[name]

    @override
    def read(self, name: str) -> Tensor:
        return self._base.read(name) if name in self._rest else super().read(name)

    @override
    def stored_as(self, name: str) -> Hashable | None:
        return self._base.stored_as(name) if name in self._rest else super().stored_as(name)

    @override
    def update(self, name: str) -> LowRank | None:
        return self._base.update(name) if name in self._rest else super().update(name)


def _filler(values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda part: part.copy_(values)


def complete(
    sources: Mapping[str, Checkpoint],
    base: Checkpoint | None,
    look: Callable[[Path], nn.Module],
) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """Put text models and vision towers into the base, if that has them as parts.

    The part of the base that has the parameters of the source is found by their names; its head
    is the base's tensor of the same name. Everything else (another tower, a projector) is the
    base's in such a source, so it has no direction there.

    Args:
        sources: opened sources by name.
        base: the opened base.
        look: returns the network of a folder without weights.

    Returns:
        The sources, and notes on what is the base's.

    Raises:
        CompatibilityError: the base has no part with the parameters of a source.
    """
    found, notes = dict(sources), []
    for name, source in sources.items():
        if base is not None and _is_part(source, base):
            assert base.folder is not None
            assert source.folder is not None
            found[name], note = _whole(source, base, look(source.folder), look(base.folder))
            notes.append(note)
    return found, notes


def _is_part(source: Checkpoint, base: Checkpoint) -> bool:
    """Return whether the base's config has parts, and the source's has none."""
    if source.folder is None or base.folder is None or not source.config or not base.config:
        return False
    return any(key in base.config for key in _PARTS) and not any(
        key in source.config for key in _PARTS
    )


def _whole(
    source: Checkpoint, base: Checkpoint, given: nn.Module, network: nn.Module
) -> tuple[Checkpoint, Problem]:
    prefix = getattr(given, "base_model_prefix", "")
    inner = getattr(given, prefix, given) if prefix else given
    before = "" if inner is given else f"{prefix}."
    wanted = set(inner.state_dict(keep_vars=True))
    path = next(
        (p for p, part in network.named_modules() if set(part.state_dict()) == wanted), None
    )
    if not path:
        raise CompatibilityError(
            f"{source.label}: expected a model like the base {base.label} ("
            f"{type(network).__name__}) or a part of it, got {type(given).__name__}, whose "
            "parameters no part of the base has.\nMerge it with its own base instead."
        )

    def placed(place: str) -> str:
        return f"{path}.{place.removeprefix(before)}" if place.startswith(before) else place

    shapes = _shapes(source)
    loader = Loader(given)
    found = loader.places(list(shapes), shapes)
    converted, _ = loader.conversions(found, shapes)
    inside = {placed(place.name): own for own, place in found.items()}
    for group in tied_groups(given):
        kept = next((inside[p] for p in map(placed, group) if p in inside), None)
        if kept is not None:
            inside = {**dict.fromkeys(map(placed, group), kept), **inside}

    shapes = _shapes(base)
    stored = {own: p.name for own, p in Loader(network).places(list(shapes), shapes).items()}
    wholes = {placed(c.place): c for c in converted if isinstance(c, Fused)}
    fused = {own: wholes[place] for own, place in stored.items() if place in wholes}
    names = {own: inside[place] for own, place in stored.items() if place in inside}
    used = {*names.values(), *(part for made in fused.values() for part in made.parts)}
    names.update({place: own for place, own in inside.items() if own not in used})
    rest = [
        own
        for own, place in stored.items()
        if not (own in names or own in fused or place.startswith(f"{path}."))
    ]
    note = Problem(
        "part",
        source.label,
        f"{len(rest)} tensors outside {path}",
        f"a tensor for each in {type(network).__name__}",
        f"its part {type(given).__name__}",
        "they are the base's in this source; those that no source has are not learned.",
        fatal=False,
    )
    return WholeView(source, base, names, fused, rest), note


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(info.shape) for name, info in checkpoint.infos.items()}
