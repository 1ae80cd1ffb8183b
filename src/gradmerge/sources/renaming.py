"""Checkpoints of one architecture that store it under different names, read under common ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from typing_extensions import override

from gradmerge.common.errors import Problem, shorten
from gradmerge.common.low_rank import LowRank
from gradmerge.sources.base import Checkpoint, View
from gradmerge.sources.compatibility import is_private
from gradmerge.sources.loader import Fused, Loader, Split
from gradmerge.sources.windows import Window


class RenamedView(View):
    """A checkpoint under other names, without the tensors that no loader reads.

    Args:
        inner: the checkpoint.
        names: name in `inner` of each tensor of the view, in order.
    """

    def __init__(self, inner: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(inner)
        self._names = names
        self._infos = {name: replace(inner.infos[own], name=name) for name, own in names.items()}

    @override
    def changes(self, name: str) -> bool:
        return False

    @override
    def own_name(self, name: str) -> str:
        return self._names[name]

    @override
    def form(self, name: str) -> Tensor:
        return self.read(name)


class PartedView(View):
    """A checkpoint of which some tensors are read as several.

    Args:
        inner: the checkpoint.
        parts: for each such tensor, the name of each part and its place in the tensor.
    """

    def __init__(self, inner: Checkpoint, parts: Mapping[str, Mapping[str, Window]]) -> None:
        super().__init__(inner)
        self._parts = {
            name: (own, window)
            for own, windows in parts.items()
            for name, window in windows.items()
        }
        self._infos = {}
        for own, info in inner.infos.items():
            windows = parts.get(own)
            if windows is None:
                self._infos[own] = info
            else:
                for name, window in windows.items():
                    self._infos[name] = replace(info, name=name, shape=window.shape)

    @override
    def changes(self, name: str) -> bool:
        return name in self._parts and not self._parts[name][1].is_run

    @override
    def stored_as(self, name: str) -> Hashable | None:
        if name not in self._parts:
            return super().stored_as(name)
        own, window = self._parts[name]
        whole = self.inner.stored_as(own)
        return None if whole is None else (whole, window)

    @override
    def update(self, name: str) -> LowRank | None:
        return None if name in self._parts else super().update(name)

    @override
    def form(self, name: str) -> Tensor:
        own, window = self._parts[name]
        return window.of(self.inner.read(own)).contiguous()

    @override
    def read(self, name: str) -> Tensor:
        kept = name in self._kept or name not in self._parts
        return super().read(name) if kept else self.form(name)


def unify_names(
    checkpoints: Mapping[str, Checkpoint],
    build: Callable[[], nn.Module | None],
    private: Sequence[str] = (),
) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """Give all checkpoints the same names, as transformers does when it loads them.

    Names that agree stay as they are. Where they do not, tensors get the names under which
    transformers saves them, and those that it passes over on loading (position ids, masks and
    rotary frequencies of older versions) are left out. Where some store apart what others store
    as one tensor (experts, as transformers saves them since version 5 or before), all are read
    apart.

    Args:
        checkpoints: opened checkpoints by name.
        build: returns the network of the merge without weights; None if it is unknown.
        private: regular expressions of tensors that stay with their task.

    Returns:
        The checkpoints, and notes on tensors that are left out.
    """
    shared = [
        {name for name in checkpoint.infos if not is_private(name, private)}
        for checkpoint in checkpoints.values()
    ]
    module = None if all(names == shared[0] for names in shared) else build()
    if module is None:
        return dict(checkpoints), []
    loader = Loader(module)
    unifying = _Unifying(_read_apart(checkpoints, loader), loader)
    return unifying.run(), unifying.notes


def _read_apart(checkpoints: Mapping[str, Checkpoint], loader: Loader) -> dict[str, Checkpoint]:
    """Read tensors as their parts where other checkpoints store these apart."""
    plain: set[str] = set()  # parameters that a checkpoint stores as they are
    wholes: dict[str, Mapping[str, Window]] = {}  # those that one stores in parts
    places, split = {}, {}
    for name, checkpoint in checkpoints.items():
        shapes = {own: tuple(info.shape) for own, info in checkpoint.infos.items()}
        found = loader.places(list(shapes), shapes)
        converted, _ = loader.conversions(found, shapes)
        places[name] = {own: place.name for own, place in found.items() if not place.conversion}
        plain.update(places[name].values())
        wholes.update({c.place: c.parts for c in converted if isinstance(c, Fused)})
        split[name] = {c.name: c.parts for c in converted if isinstance(c, Split)}
    views: dict[str, Checkpoint] = {}
    for name, checkpoint in checkpoints.items():
        parts = {own: p for own, p in split[name].items() if not plain.isdisjoint(p)}
        for own, place in places[name].items():
            windows = wholes.get(place)
            if windows and loader.known[place] == tuple(checkpoint.infos[own].shape):
                parts[own] = windows
        views[name] = PartedView(checkpoint, parts) if parts else checkpoint
    return views


class _Unifying:
    def __init__(self, checkpoints: Mapping[str, Checkpoint], loader: Loader) -> None:
        self.checkpoints, self.loader = checkpoints, loader
        self.places = {
            name: {own: place.name for own, place in loader.places(list(c.infos)).items()}
            for name, c in checkpoints.items()
        }
        self.notes: list[Problem] = []

    def run(self) -> dict[str, Checkpoint]:
        self._leave_out()
        spelled: dict[str, set[str]] = {}
        for places in self.places.values():
            counts = Counter(places.values())
            for own, place in places.items():
                if counts[place] > 1:  # two tensors for one place: nobody knows which is loaded
                    places[own] = own
                spelled.setdefault(places[own], set()).add(own)
        kept = {place: next(iter(names)) for place, names in spelled.items()}
        if any(len(names) > 1 for names in spelled.values()):
            kept = self._saved(list(spelled))
        views: dict[str, Checkpoint] = {}
        for name, checkpoint in self.checkpoints.items():
            names = {kept[place]: own for own, place in self.places[name].items()}
            changed = list(names.items()) != [(own, own) for own in checkpoint.infos]
            views[name] = RenamedView(checkpoint, names) if changed else checkpoint
        return views

    def _leave_out(self) -> None:
        """Leave out tensors that only some checkpoints store and that the loader passes over."""
        stored = [set(places.values()) for places in self.places.values()]
        ignored = {
            place
            for place in set().union(*stored)
            if not all(place in places for places in stored) and self.loader.ignores(place)
        }
        for name, checkpoint in self.checkpoints.items():
            lost = [own for own, place in self.places[name].items() if place in ignored]
            self.places[name] = {o: p for o, p in self.places[name].items() if p not in ignored}
            if lost:
                self.notes.append(
                    Problem(
                        "ignored",
                        checkpoint.label,
                        shorten(lost),
                        "no such tensor, as in the others",
                        "one that older versions stored",
                        "transformers passes over it when it loads the model, so it is left out.",
                        fatal=False,
                    )
                )

    def _saved(self, places: Sequence[str]) -> dict[str, str]:
        """Return the names that transformers saves; the module's own if it could not read these."""
        saved = self.loader.saved(places)
        back = self.loader.places(list(saved.values()))
        if len(set(saved.values())) < len(saved):
            return {place: place for place in places}
        read_back = all(back[name].name == place for place, name in saved.items())
        return saved if read_back else {place: place for place in places}
