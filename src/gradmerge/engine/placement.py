"""Places of the sources' tensors while a merge is learned: mapped files, host memory, the device.

What comes next is guessed from what followed before, so that it is read or copied ahead. A wrong
guess costs time only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.memory import PageLocked, read_ahead
from gradmerge.engine.rows import Rows

Place = Literal["device", "pinned", "mapped"]
PLACES: tuple[Place, ...] = ("device", "pinned", "mapped")
REST = "*"
"""Key of all sources that a mapping of placements does not name."""
# Devices that read page-locked memory; `meta` is one without numbers.
_READING = ("cuda", "meta")
_AHEAD = 4
# Uses that are remembered: those of many passes.
_MOST = 1 << 20
# Tensors that the host may be ahead of the device, which bounds the copies that wait to be freed.
_BEHIND = 8

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Item:
    """A frozen tensor that a merge reads, or some rows of it."""

    owner: str
    """A source; or `base`, which stands for the origin."""
    tensor: str
    """Name of the merged tensor."""
    kind: Literal["stored", "direction", "mean", "left", "right"] = "stored"
    """As stored; a direction after preprocessing; the mean of the sources; a factor of an
    adapter."""
    rows: Rows | None = None


Read = Callable[[Item], Tensor]


class Order(Generic[Key]):
    """Guess of what comes next: what followed in the pass before.

    It follows that pass as long as it repeats itself, and else looks for the last time that the
    same two things followed one another.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._seen: list[Key] = []
        self._pairs: dict[tuple[Key | None, Key], int] = {}
        self._place: int | None = None

    def after(self, key: Key, count: int) -> list[Key]:
        """Note that something is used now, and return up to `count` that are likely to follow."""
        last = self._seen[-1] if self._seen else None
        if key != last:
            if len(self._seen) == _MOST:
                self._forget()
            if self._place is not None and self._seen[self._place + 1] == key:
                self._place += 1
            else:
                self._place = self._pairs.get((last, key))
            self._pairs[last, key] = len(self._seen)
            self._seen.append(key)
        if self._place is None:
            return []
        first = self._place + 1
        return list(dict.fromkeys(self._seen[first : first + count]))


@dataclass(frozen=True, eq=False)
class Items:
    """Items that are read together, equal only to themselves: they are looked up at every read."""

    each: tuple[Item, ...]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.each)


class Transfers:
    """Copies of page-locked tensors on a device, made ahead of use on a CUDA stream of their own.

    Args:
        device: the device.
        streams: use CUDA streams; without them (tensors without numbers) copies are made at once.
    """

    def __init__(self, device: torch.device, streams: bool) -> None:
        self._device = device
        self._side: Any = torch.cuda.Stream(device) if streams else None
        self._waiting: dict[Items, tuple[dict[Item, Tensor], Any]] = {}
        self._used: list[Any] = []

    def expect(self, tokens: Sequence[Items], pinned: Mapping[Item, Tensor]) -> None:
        """Start copies of what comes next, and discard those of what does not."""
        for token in [waiting for waiting in self._waiting if waiting not in tokens]:
            del self._waiting[token]  # the stream that wrote it reuses its memory
        for token in tokens:
            if token not in self._waiting:
                # they may be used in training, though an evaluation expects them
                with torch.inference_mode(False), self._ahead():
                    copies = {
                        item: pinned[item].to(self._device, non_blocking=True)
                        for item in token
                        if item in pinned
                    }
                done = None if self._side is None else self._side.record_event()
                self._waiting[token] = copies, done

    def _ahead(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def take(self, token: Items) -> dict[Item, Tensor]:
        """Return the copies that were made ahead, in order with the work that uses them."""
        copies, done = self._waiting.pop(token, ({}, None))
        if self._side is None:
            return copies
        current = torch.cuda.current_stream(self._device)
        if done is not None:
            current.wait_event(done)
        for copy in copies.values():
            copy.record_stream(current)  # its memory is not reused before this work is done
        self._used.append(current.record_event())
        if len(self._used) > _BEHIND:
            self._used.pop(0).synchronize()
        return copies

    def end(self) -> None:
        """Wait for all copies, whose page-locked memory may be freed next."""
        self._waiting.clear()
        if self._side is not None:
            torch.cuda.synchronize(self._device)


@dataclass
class _Places:
    """Present places: copies on the device or in page-locked memory, else files."""

    device: torch.device
    transfers: Transfers | None = None
    memory: PageLocked | None = None
    kept: dict[Item, Tensor] = field(default_factory=dict)
    """Copies on the device."""
    pinned: dict[Item, Tensor] = field(default_factory=dict)
    """Copies in page-locked memory."""
    found: dict[Items, list[Tensor | None]] = field(default_factory=dict)
    """Copies of items that are read together; None for those in files."""
    mapped: dict[Items, list[tuple[int, int]]] = field(default_factory=dict)
    """Address and size of what is read from files, by items that are read together."""
    order: Order[Items] = field(default_factory=Order)
    expected: list[Items] = field(default_factory=list)


class Placement:
    """The frozen tensors of a merge, in files unless they are placed elsewhere.

    Args:
        read: reads an item from its file.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._places: _Places | None = None
        self._groups: dict[Hashable, Items] = {}
        self._lock = threading.Lock()
        self.asked: object = None
        """Request by which items were placed; None if they are read from files."""

    def group(self, key: Hashable, make: Callable[[], Iterable[Item]]) -> Items:
        """Return items that are read together, the same object at every call with a key."""
        found = self._groups.get(key)
        if found is None:
            found = self._groups[key] = Items(tuple(make()))
        return found

    def place(
        self,
        words: Mapping[str, Place],
        items: Iterable[Item],
        device: torch.device,
    ) -> None:
        """Copy items to where their owners' are placed; what comes next is prepared from now on.

        Args:
            words: place of each owner's tensors.
            items: what a step reads.
            device: the device that merges.
        """
        self.unload()
        places = _Places(torch.empty(0, device=device).device)  # with its number
        with torch.inference_mode(False), torch.no_grad():
            for item in items:
                word = words[item.owner]
                if word == "device":
                    # a copy in memory, too, if that is the device
                    places.kept[item] = self._read(item).to(places.device, copy=True)
                elif word == "pinned":
                    read = self._read(item)
                    if places.memory is None:
                        has_numbers = not isinstance(read, FakeTensor)
                        places.transfers = Transfers(places.device, streams=has_numbers)
                        places.memory = PageLocked(locks=has_numbers)
                    places.pinned[item] = places.memory.copy(read)
        self._places = places

    def unload(self) -> None:
        """Free all copies; items are read from files again."""
        if self._places is not None and self._places.transfers is not None:
            self._places.transfers.end()
        self._places = self.asked = None
        self._groups.clear()

    def fetch(self, items: Items, device: torch.device) -> list[Tensor]:
        """Return items on a device, in the dtype in which they are stored."""
        places = self._places
        if places is None or places.device != device:
            return [moved(self._read(item), device) for item in items]
        staged = {} if places.transfers is None else places.transfers.take(items)
        known = places.found.get(items)
        if known is None:
            known = [places.kept.get(item, places.pinned.get(item)) for item in items]
            places.found[items] = known
        found, read = [], []
        for item, copy in zip(items, known, strict=True):
            if staged and item in staged:
                found.append(staged[item])
                continue
            if copy is None:
                copy = self._read(item)
                read.append(copy)
            found.append(moved(copy, device))
        if items not in places.mapped and not any(isinstance(own, FakeTensor) for own in read):
            places.mapped[items] = [(own.data_ptr(), own.nbytes) for own in read]
        with self._lock:  # an export may merge in several threads
            self._prepare(places, places.order.after(items, _AHEAD))
        return found

    @staticmethod
    def _prepare(places: _Places, expected: list[Items]) -> None:
        """Send ahead what is expected, or read it ahead from the disk."""
        if places.transfers is not None:
            places.transfers.expect(expected, places.pinned)
        for items in expected:
            if items not in places.expected:
                for address, size in places.mapped.get(items, ()):
                    read_ahead(address, size)
        places.expected = expected


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a frozen tensor on a device, in its own dtype.

    A copy to another dtype would be widened by the host first.
    """
    if tensor.device == device:
        return tensor
    # frozen host memory may be copied later, and what is pageable is before this returns
    return tensor.to(device, non_blocking=device.type == "cuda")


def words_of(
    placement: str | Mapping[str, str], owners: Collection[str], device: torch.device | None = None
) -> dict[str, str]:
    """Return the placement of each owner: `auto` or one of `PLACES`.

    Args:
        placement: one word for all, or words by owner, `REST` standing for the others.
        owners: `base` and the sources.
        device: the device that merges, if it is known.

    Raises:
        ConfigError: a word or an owner is unknown, or the device has no such place.
    """
    given = {REST: placement} if isinstance(placement, str) else dict(placement)
    words = ("auto", *PLACES)
    wrong = [f"{word!r} for {owner}" for owner, word in given.items() if word not in words]
    lost = [owner for owner in given if owner not in (REST, *owners)]
    if wrong:
        raise ConfigError(
            f"placement: expected one of {', '.join(words)}, got {shorten(wrong)}."
            f"{nearest(str(next(w for w in given.values() if w not in words)), words)}"
        )
    if lost:
        raise ConfigError(
            f"placement: unknown sources {shorten(lost)} (choose from {', '.join(owners)}, and "
            f"{REST!r} for the rest).{nearest(lost[0], owners)}"
        )
    found = {owner: given.get(owner, given.get(REST, "auto")) for owner in owners}
    pinned = [owner for owner, word in found.items() if word == "pinned"]
    if pinned and device is not None and device.type not in _READING:
        raise ConfigError(
            f"placement: expected device or mapped on {device.type}, got pinned for "
            f"{shorten(pinned)}: page-locked memory serves copies to a CUDA device.\n"
            "Use `mapped`, which reads the files as they are, or `device`, a copy in memory."
        )
    return found


def chosen(
    words: Mapping[str, str], sizes: Mapping[str, int], device: int, host: int
) -> dict[str, Place]:
    """Replace `auto`: the device as long as there is room, then page-locked memory, then files.

    Args:
        words: placement of each owner, in the order in which they are placed.
        sizes: bytes of each owner's tensors.
        device: bytes of the device that are free for sources; -1 for none of any size.
        host: bytes of the host's memory that may be page-locked.
    """
    room = {"device": device, "pinned": host}
    found: dict[str, Any] = dict(words)
    for owner in sorted(words, key=lambda owner: words[owner] == "auto"):  # those last
        if words[owner] == "auto":
            fitting = (word for word, free in room.items() if sizes[owner] <= free)
            found[owner] = next(fitting, "mapped")
        if found[owner] in room:
            room[found[owner]] -= sizes[owner]
    return found


def described(
    words: Mapping[str, Place], sizes: Mapping[str, int], dtypes: Mapping[str, Collection[str]]
) -> str:
    """Return where sources are, and their sizes, in words."""
    titles = {"device": "on the device", "pinned": "in page-locked memory", "mapped": "in files"}
    parts = []
    for place, title in titles.items():
        own = [owner for owner, word in words.items() if word == place]
        if own:
            size = sum(sizes[owner] for owner in own) / 1e9
            stored = sorted({name for owner in own for name in dtypes[owner]})
            parts.append(f"{', '.join(own)}: {title}, {size:.3g} GB in {' and '.join(stored)}")
    return "; ".join(parts)
