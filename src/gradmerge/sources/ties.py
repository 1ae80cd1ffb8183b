"""Tied tensors, decided as transformers does when it loads a checkpoint: by content.

A config may tie tensors (the output head to the embedding). Where a file holds one of them, it
stands for all; equal copies are one tensor; and a tensor that is stored with other values is kept
apart, whatever the config says. All checkpoints of a merge must have the same tensors: what is
apart in one of them is apart in all, and the others give the values that they would load.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from gradmerge.common.errors import ConfigError, Problem, SourceError, shorten
from gradmerge.common.patterns import matches
from gradmerge.sources.base import Checkpoint, View
from gradmerge.sources.compatibility import is_private
from gradmerge.sources.skeleton import build_skeleton, renames, tied_groups

_FLAG = "tie_word_embeddings"
_CHUNK = 1 << 22
# Tensors that classes of transformers tie, though they are not large matrices or are in blocks.
_MAY_BE_TIED = re.compile(r"decoder\.bias$|class_embed|bbox_embed|shared_transf")


class Networks:
    """The networks that checkpoints describe, each built at most once.

    Args:
        specs: what the user gave for each checkpoint, by name: paths, sources or modules.
        module: the architecture of all, if it is given.
        trust_remote_code: allow modelling code in folders to run.
    """

    def __init__(
        self,
        specs: Mapping[str, Any],
        module: nn.Module | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._specs, self._module, self._trusts = specs, module, trust_remote_code
        self._by_ties: dict[str, nn.Module | None] = {}
        self._by_folder: dict[Path, nn.Module] = {}

    def build(self, folder: Path) -> nn.Module:
        """Return the network of a folder without weights; the caller may change it."""
        built = self._by_folder.pop(folder, None)
        return build_skeleton(folder, self._trusts) if built is None else built

    def look(self, folder: Path) -> nn.Module:
        """Return the network of a folder without weights, which nobody may change."""
        if folder not in self._by_folder:
            self._by_folder[folder] = build_skeleton(folder, self._trusts)
        return self._by_folder[folder]

    def first(self, checkpoints: Mapping[str, Checkpoint]) -> nn.Module | None:
        """Return the network of the first checkpoint that describes a known one."""
        networks = (self.tied(name, opened) for name, opened in checkpoints.items())
        return next((network for network in networks if network is not None), None)

    def tied(self, name: str, checkpoint: Checkpoint) -> nn.Module | None:
        """Return a network with the ties of a checkpoint's own config; None if it is unknown."""
        spec = self._specs.get(name)
        inner = getattr(spec, "module", spec)
        given = self._module or (inner if isinstance(inner, nn.Module) else None)
        if given is not None or checkpoint.folder is None or checkpoint.config is None:
            return given
        key = _key(checkpoint.config)
        if key not in self._by_ties:
            self._by_ties[key] = None
            with suppress(SourceError):  # its own code, which may not run; reported if needed
                built = build_skeleton(checkpoint.folder, self._trusts)
                self._by_ties[key] = self._by_folder[checkpoint.folder] = built
        return self._by_ties[key]


class TiedView(View):
    """A checkpoint with the tensors that the merge has of each tied group.

    Args:
        inner: the checkpoint.
        names: name in `inner` of each tensor of the view, in order.
        copies: tensors of `inner` that are copies -> name of their original in the view.
        unties: whether nothing is tied any more, which its config then says.
    """

    def __init__(
        self,
        inner: Checkpoint,
        names: Mapping[str, str],
        copies: Mapping[str, str],
        unties: bool,
    ) -> None:
        super().__init__(inner)
        self._names, self.copies = names, copies
        self._infos = {n: replace(inner.infos[own], name=n) for n, own in names.items()}
        self._config = _untied(inner.config) if unties else inner.config

    @property
    def moved(self) -> dict[str, str]:
        """Name in the checkpoint of each tensor that it holds under another name only."""
        return {name: own for name, own in self._names.items() if name != own}

    @override
    def changes(self, name: str) -> bool:
        return False

    @override
    def own_name(self, name: str) -> str:
        return self._names[name]

    @override
    def form(self, name: str) -> torch.Tensor:
        return self.read(name)


def tied_view(checkpoint: Checkpoint) -> TiedView | None:
    """Return the view of a checkpoint that settles its ties, if it has one."""
    while isinstance(checkpoint, View) and not isinstance(checkpoint, TiedView):
        checkpoint = checkpoint.inner
    return checkpoint if isinstance(checkpoint, TiedView) else None


def moved_in(checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Return which tensors a merge has that are stored under other names only."""
    views = {name: tied_view(checkpoint) for name, checkpoint in checkpoints.items()}
    return [f"{t} of {name}" for name, view in views.items() if view for t in view.moved]


@dataclass(frozen=True)
class Settled:
    """The checkpoints of a merge after their ties are settled."""

    checkpoints: dict[str, Checkpoint]
    """All by name, with the same tensors of each tied group."""
    apart: tuple[str, ...]
    """Names in the module of tensors that the config ties but the merge keeps apart."""
    notes: tuple[Problem, ...]
    """What is kept apart, and why."""


def may_be_tied(checkpoints: Mapping[str, Checkpoint], private: Sequence[str]) -> bool:
    """Return whether ties could matter to a merge without a network, from headers and configs.

    It takes a network to know, but transformers takes longer to import than a small merge.
    """
    first = next(iter(checkpoints.values()))
    if any(checkpoint.infos.keys() != first.infos.keys() for checkpoint in checkpoints.values()):
        return True
    settings = [c.config for c in checkpoints.values() if c.config is not None]
    if any(list(_flags(config)) != list(_flags(settings[0])) for config in settings):
        return True
    if not all(any(matches([pattern], name) for name in first.infos) for pattern in private):
        return True
    return any(_has_copies(checkpoint) for checkpoint in checkpoints.values())


def _has_copies(checkpoint: Checkpoint) -> bool:
    flags = list(_flags(checkpoint.config or {}))
    if flags and not any(flags):
        return False
    shapes = set()
    for name, info in checkpoint.infos.items():
        if _MAY_BE_TIED.search(name):
            return True
        if len(info.shape) > 1 and not re.search(r"(^|\.)\d+(\.|$)", name):
            if info.shape in shapes:
                return True
            shapes.add(info.shape)
    return False


def _flags(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield each setting of `tie_word_embeddings` in a config and the configs in it."""
    for key, value in config.items():
        if key == _FLAG:
            yield value
        elif isinstance(value, Mapping):
            yield from _flags(value)


def _key(config: Mapping[str, Any]) -> str:
    """Return a key of what decides which tensors a config ties."""
    return repr([config.get("model_type"), config.get("architectures"), list(_flags(config))])


def settle_ties(
    checkpoints: Mapping[str, Checkpoint], networks: Networks, private: Sequence[str] = ()
) -> Settled:
    """Give all checkpoints the same tensors of each tied group (see the module's description).

    Args:
        checkpoints: opened checkpoints by name.
        networks: the networks that they describe.
        private: regular expressions of tensors that stay with their task. A head whose name they
            match is kept apart from an embedding that is merged.

    Raises:
        SourceError: a module that is not of transformers ties tensors that a checkpoint keeps
            apart.
    """
    modules = {name: networks.tied(name, opened) for name, opened in checkpoints.items()}
    found = (m for m in modules.values() if m is not None and tied_groups(m))
    module = next(found, None)
    if module is None:
        return Settled(dict(checkpoints), (), ())
    settling = _Settling(checkpoints, modules, module, private)
    return settling.run()


class _Settling:
    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        modules: Mapping[str, nn.Module | None],
        module: nn.Module,
        private: Sequence[str],
    ) -> None:
        self.checkpoints, self.module, self.private = checkpoints, module, private
        self.groups = tied_groups(module)
        tied = {place for group in self.groups for place in group}
        self.loose = {
            name
            for name, other in modules.items()
            if other is not None and other is not module and _is_untied(other, self.groups)
        }
        self.lacking = {
            name: tied - {place for place, _ in other.named_parameters(remove_duplicate=False)}
            for name, other in modules.items()
            if other is not None
        }
        self.stored: dict[str, dict[str, str]] = {}
        for name, checkpoint in checkpoints.items():
            try:
                places = renames(module, list(checkpoint.infos))
            except ConfigError:  # some are fused or split on loading; tied ones never are
                places = {own: own for own in checkpoint.infos}
            self.stored[name] = {p: own for own, p in places.items() if p in tied}
        self.names: dict[str, dict[str, str]] = {
            name: {own: own for own in checkpoint.infos} for name, checkpoint in checkpoints.items()
        }
        self.copies: dict[str, dict[str, str]] = {name: {} for name in checkpoints}
        self.notes: list[Problem] = []

    def run(self) -> Settled:
        apart = [place for group in self.groups for place in self._settle(group)]
        unties = len(apart) == sum(len(group) - 1 for group in self.groups)
        checkpoints: dict[str, Checkpoint] = {}
        for name, checkpoint in self.checkpoints.items():
            changed = list(self.names[name]) != list(checkpoint.infos)
            if changed or (unties and any(_flags(checkpoint.config or {_FLAG: True}))):
                checkpoint = TiedView(checkpoint, self.names[name], self.copies[name], unties)
            checkpoints[name] = checkpoint
        return Settled(checkpoints, tuple(apart), tuple(self.notes))

    def _settle(self, group: Sequence[str]) -> list[str]:
        """Settle one group; return what is apart from its first place."""
        anchor, others = group[0], group[1:]
        apart = {}
        for place in others:
            reason = self._apart(anchor, place, others)
            if reason is not None:
                apart[place] = reason
        for place, reason in apart.items():
            self._note(anchor, place, reason)
        together = [anchor, *(place for place in others if place not in apart)]
        for name in self.checkpoints:
            stored = self.stored[name]
            first = self._name_of([anchor], together)
            kept = {first: self._effective(name, anchor, others)}
            for place in apart:
                own = stored.get(place)
                if own is None and name not in self.loose and not self._lacks(name, place):
                    own = self._effective(name, anchor, others)
                kept[self._name_of([place], [place])] = own
            old = {stored[place] for place in group if place in stored}
            self._replace(name, old, kept)
            self.copies[name].update({own: first for own in old if own not in self.names[name]})
        return list(apart)

    def _effective(self, name: str, anchor: str, others: Sequence[str]) -> str | None:
        """Return the name in a checkpoint of the tensor that is loaded as the first of a group."""
        stored = self.stored[name]
        if anchor in stored or name in self.loose:
            return stored.get(anchor)
        return next((stored[place] for place in others if place in stored), None)

    def _name_of(self, first: Sequence[str], then: Sequence[str]) -> str:
        """Return the name in the files of places; that in the module if no file has them."""
        for places in (first, then):
            for place in places:
                for stored in self.stored.values():
                    if place in stored:
                        return stored[place]
        return first[0]

    def _apart(self, anchor: str, place: str, others: Sequence[str]) -> list[str] | str | None:
        """Return the checkpoints in which a place is apart; or why it is, or None."""
        holders = []
        for name, checkpoint in self.checkpoints.items():
            own, other = self.stored[name].get(place), self._effective(name, anchor, others)
            if name in self.loose or (
                own and other and own != other and not _same(checkpoint, own, other)
            ):
                holders.append(name)
        if holders:
            return holders
        tasks = [name for name in self.checkpoints if name != "base"]
        if all(self._lacks(name, place) for name in tasks):
            return None  # only the base has such a head
        if self._is_private(place) and not self._is_private(anchor):
            return "it is private, but not what it is tied to"
        return None

    def _lacks(self, name: str, place: str) -> bool:
        """Return whether a checkpoint's own class has no such parameter."""
        return place in self.lacking.get(name, ()) and place not in self.stored[name]

    def _is_private(self, place: str) -> bool:
        names = {place, *(stored[place] for stored in self.stored.values() if place in stored)}
        return any(is_private(name, self.private) for name in names)

    def _note(self, anchor: str, place: str, reason: list[str] | str) -> None:
        if isinstance(reason, str):
            got = f"it apart, because {reason}"
        else:
            where = [self.checkpoints[name].label for name in reason]
            if not hasattr(self.module, "all_tied_weights_keys"):
                raise SourceError(
                    f"{shorten(where)}: expected one tensor for {anchor} and {place}, which "
                    f"{type(self.module).__name__} ties, got two. Load it into an untied module."
                )
            got = f"a tensor of its own in {shorten(where)}"
        rest = [self.checkpoints[n].label for n in self.checkpoints if place not in self.stored[n]]
        todo = "They are merged apart, as transformers loads them"
        todo += f"; that of {shorten(rest)} is its {anchor}." if rest else "."
        self.notes.append(
            Problem("ties", "the merge", place, f"it tied to {anchor}", got, todo, fatal=False)
        )

    def _replace(self, name: str, old: set[str], new: Mapping[str, str | None]) -> None:
        """Replace a group's tensors among the names of a checkpoint's view."""
        kept = {shown: own for shown, own in new.items() if own is not None}
        names = self.names[name]
        self.names[name] = {n: o for n, o in names.items() if n not in old or n in kept} | kept


def _is_untied(module: nn.Module, groups: Sequence[Sequence[str]]) -> bool:
    """Return whether a module has the places of all groups, but as separate parameters."""
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return not tied_groups(module) and all(place in own for group in groups for place in group)


def _same(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Return whether two tensors of a checkpoint have the same values; stops where they differ."""
    if checkpoint.infos[first].shape != checkpoint.infos[second].shape:
        return False
    pair = [checkpoint.read(name).reshape(-1).split(_CHUNK) for name in (first, second)]
    wide = torch.promote_types(pair[0][0].dtype, pair[1][0].dtype)
    return all(torch.equal(a.to(wide), b.to(wide)) for a, b in zip(*pair, strict=True))


def _untied(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a config that ties nothing, so that every loader keeps the tensors apart.

    Unchanged if the setting means more than ties to its class (T5 scales its outputs by it).
    """
    from transformers import CONFIG_MAPPING

    if config is None:
        return None
    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        tied, untied = (
            kind.from_dict(copy.deepcopy(_with_flag(config, value))).to_dict()
            for value in (True, False)
        )
    except Exception:  # a class of its own code, or a file that transformers reads in another way
        return config
    if untied.get(_FLAG) or _with_flag(tied, False) != _with_flag(untied, False):
        return config
    return _with_flag(config, False)


def _with_flag(config: Mapping[str, Any], value: bool, top: bool = True) -> dict[str, Any]:
    changed = {
        key: _with_flag(inner, value, top=False) if isinstance(inner, Mapping) else inner
        for key, inner in config.items()
    }
    if top or _FLAG in config:
        changed[_FLAG] = value
    return changed


def untie(module: nn.Module, places: Sequence[str]) -> None:
    """Give parameters of a network without weights tensors of their own; changes the module."""
    for place in places:
        owner, _, name = place.rpartition(".")
        parent = module.get_submodule(owner)
        shared = parent._parameters.get(name)
        if shared is not None:
            own = torch.empty_like(shared, device="meta")
            parent._parameters[name] = nn.Parameter(own, requires_grad=False)
    still = [place for group in tied_groups(module) for place in group if place in places]
    if still:
        raise SourceError(
            f"{type(module).__name__}: expected one tensor for tied names, got two in a "
            f"checkpoint: {shorten(still)} belongs to a module with several names, which has one "
            "tensor. Store the tensor that the model uses under all of its names."
        )
