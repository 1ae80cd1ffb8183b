"""Places of sources: what is kept, read ahead and sent ahead, with results that do not change."""

from __future__ import annotations

import gc
import itertools
import mmap
from typing import Any, ClassVar

import pytest
import torch

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Column
from gradmerge.common import memory as memory_module
from gradmerge.common.errors import ConfigError
from gradmerge.common.memory import PageLocked, read_ahead
from gradmerge.engine import placement as placement_module
from gradmerge.engine import plan as plan_module
from gradmerge.engine.opening import open_plan
from gradmerge.engine.placement import Item, Items, Order, Transfers, chosen, described, words_of
from gradmerge.engine.plan import Plan
from gradmerge.preprocess import Trim
from tiny import relatives

CPU = torch.device("cpu")


def network():
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 6))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return [model.to(torch.bfloat16) for model in relatives(network())]


RECIPES = {
    "base": {},
    "zero": {"origin": "zero"},
    "frozen": {"frozen": {"0.bias": "origin", "2.bias": "mean"}},
    "processed": {"preprocess": [Trim(0.5)]},
    "processed from the mean": {"preprocess": [Trim(0.5)], "origin": "mean"},
}


def recipe_of(models, name):
    options = dict(RECIPES[name])
    base = None if "origin" in options else models[0]
    sources = dict(zip("ab", models[1:], strict=False))
    return Recipe(sources, base, coefficients=Column(), **options)


def step(merged):
    merged.zero_grad()
    inputs = torch.linspace(-1, 1, 24).expand(3, 24)
    loss, _ = merged.accumulate([lambda: merged(inputs).square().mean()])
    loss.backward()
    return [loss.detach(), *(raw.grad for raw in merged.raw.values())]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", RECIPES)
def test_results_do_not_depend_on_the_places_of_sources(models, name, memory):
    merged = MergedModel(recipe_of(models, name), memory=memory)
    expected = step(merged)
    plan = merged.plan
    for item in (item for tensor in plan.tensors for item in plan.items(tensor)):
        found = plan._item(item)
        assert (found.shape, found.dtype) == plan.form(item)
    for word in ("mapped", "device"):
        plan.place(dict.fromkeys(plan.owners, word), CPU)
        for _ in range(3):  # what comes next is known from the second step on
            assert all(map(torch.equal, step(merged), expected))
    plan.unload()
    assert plan.placed is None
    assert all(map(torch.equal, step(merged), expected))


def test_copies_are_read_instead_of_files_and_those_of_others_are_not(models, monkeypatch):
    merged = MergedModel(recipe_of(models, "base"))
    merged.plan.place({"base": "mapped", "a": "device", "b": "mapped"}, CPU)
    read, stored = set(), Plan._stored
    monkeypatch.setattr(
        Plan, "_stored", lambda self, owner, name: read.add(owner) or stored(self, owner, name)
    )
    step(merged)
    assert read == {"base", "b"}
    with merged.as_source("a"):
        merged(torch.ones(1, 24))
    assert read == {"base", "b"}
    sizes, dtypes = merged.plan.sizes()
    entries = sum(parameter.numel() for parameter in network().parameters())
    assert sizes == {"base": 2 * entries, "a": 2 * entries, "b": 2 * entries}
    assert dtypes["a"] == {"bfloat16"}


def test_rows_of_a_process_are_placed_and_whole_tensors_read_from_files(models, monkeypatch):
    monkeypatch.setattr(plan_module, "SMALLEST_SHARED", 1)
    monkeypatch.setattr("gradmerge.engine.frozen.FrozenTensors.rows", lambda p, n: p.share(n, 1, 2))
    plan = open_plan(recipe_of(models, "base"))
    plan.place(dict.fromkeys(plan.owners, "device"), CPU)
    rows = plan.rows("0.weight")
    part = plan.read("a", "0.weight", rows, CPU)
    assert part.data_ptr() == plan.read("a", "0.weight", rows, CPU).data_ptr()
    assert part.data_ptr() != plan.read("a", "0.weight", rows).data_ptr()
    assert torch.equal(part, models[1][0].weight[20:])
    assert torch.equal(plan.read("a", "0.weight", device=CPU), models[1][0].weight)
    assert plan.sizes()[0]["a"] == 2 * (20 * 24 + 20 + 3 * 40 + 3)


# ---- what comes next ----------------------------------------------------------------------------


def following(passes, count=2):
    """What is expected after each use in the last of several passes."""
    order = Order()
    for uses in passes[:-1]:
        for name in uses:
            order.after(name, count)
    return ["".join(order.after(name, count)) for name in passes[-1]]


def test_what_follows_is_known_in_both_directions_of_a_pass():
    there = "abcd"
    uses = there + there[::-1]  # a use that follows itself is the same one
    assert following([uses] * 3) == ["bc", "cd", "dc", "cb", "cb", "ba", "ab", "bc"]
    assert following([there]) == [""] * 4


def test_blocks_that_run_again_before_their_backward_are_told_from_the_first_run():
    uses = "abcdef" + "deffed" + "abccba"  # two blocks with activation checkpointing
    expected = [
        next(name for name in uses[i:] + uses if name != here) for i, here in enumerate(uses)
    ]
    assert following([uses] * 3, 1) == expected
    # an evaluation in between is forgotten after a pass
    assert following([uses, uses[:6], uses, uses, uses], 1) == expected


def test_a_long_fit_remembers_a_bounded_number_of_uses(monkeypatch):
    monkeypatch.setattr(placement_module, "_MOST", 10)
    order = Order()
    for _ in range(50):
        for name in "abc":
            order.after(name, 1)
    assert len(order._seen) <= 10
    assert len(order._pairs) <= 10


def test_tensors_that_follow_are_read_ahead_once_each(models, monkeypatch):
    advised = []
    monkeypatch.setattr(placement_module, "read_ahead", lambda *place: advised.append(place))
    merged = MergedModel(recipe_of(models, "base"))
    merged.plan.place(dict.fromkeys(merged.plan.owners, "mapped"), CPU)
    step(merged)
    advised.clear()
    step(merged)
    places = {
        (tensor.data_ptr(), tensor.nbytes)
        for tensor in (
            merged.plan._item(i) for n in merged.plan.tensors for i in merged.plan.items(n)
        )
    }
    assert set(advised) == places
    # a tensor stays among those that follow from one to the next; three orders turn round in it
    assert max(advised.count(place) for place in places) <= 3


def test_reading_ahead_asks_for_the_pages_of_what_is_not_in_memory(monkeypatch):
    page, asked = mmap.PAGESIZE, []
    resident = {}

    def know(place, size, seen):
        seen._obj.value = resident.get(place, 1)
        return 0

    def advise(place, size, what):
        asked.append((place, size))

    monkeypatch.setattr(memory_module, "_mapped_calls", lambda: (know, advise))
    start, size = 100 * page + 24, 300_000
    read_ahead(start, size)
    assert asked == []  # all of it is there
    resident[(start + size - 1) // page * page] = 0
    read_ahead(start, size)
    assert asked[0][0] == 100 * page
    assert asked[-1][0] + asked[-1][1] == start + size
    assert all(first[0] + first[1] == then[0] for first, then in itertools.pairwise(asked))
    asked.clear()
    read_ahead(start, 1000)  # too small to be worth a call
    assert asked == []


# ---- page-locked memory and copies ahead --------------------------------------------------------


class Runtime:
    def __init__(self):
        self.locked = {}

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        self.locked[address] = size
        return 0 if size < 1 << 29 else 2

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]
        return 0


def test_page_locked_blocks_hold_copies_and_are_unlocked_with_them(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(PageLocked, "_BLOCKS", (4096, 8192))
    memory = PageLocked()
    tensors = [
        torch.arange(700, dtype=torch.float32),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.ones(3, 0),
        torch.arange(1000, dtype=torch.int16).view(10, 100).T,
        torch.arange(3000, dtype=torch.float64),
        torch.arange(900, dtype=torch.float32),
        torch.ones(100),  # where there is room in the first block
    ]
    copies = [memory.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        inside = [a <= copy.data_ptr() <= a + size for a, size in runtime.locked.items()]
        assert any(inside) or not copy.numel()
    # 2,800 bytes and 2; 2,000; a block of its own; then blocks of the largest size
    assert list(runtime.locked.values()) == [4096, 4096, 24_064, 8192]
    assert copies[-1].data_ptr() < copies[0].data_ptr() + 4096
    with pytest.raises(ConfigError, match="page-locked memory, got CUDA error 2"):
        memory._new(1 << 29)
    runtime.locked.popitem()
    del memory
    gc.collect()
    assert runtime.locked == {}


class Stream:
    """A stream that notes what it does; events are positions in it."""

    log: ClassVar[list[Any]] = []

    def __init__(self, name="side"):
        self.name = name

    def record_event(self):
        event = Event(self.name, len(self.log))
        self.log.append((self.name, event))
        return event

    def wait_event(self, event):
        self.log.append((self.name, ("waits for", event)))


class Event:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def synchronize(self):
        Stream.log.append(("host", ("waits for", self)))


class Host:
    def __init__(self, name):
        self.name = name

    def to(self, device, non_blocking):
        assert non_blocking
        Stream.log.append((Stream.now, ("copies", self.name)))
        return Copied(self.name)


class Copied(Host):
    def record_stream(self, stream):
        Stream.log.append((stream.name, ("keeps", self.name)))


@pytest.fixture
def streams(monkeypatch):
    Stream.log, Stream.now = [], "main"

    class Inside:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            Stream.now = self.stream.name

        def __exit__(self, *_):
            Stream.now = "main"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: Stream.log.append("all"))
    return Stream


def test_copies_made_ahead_are_waited_for_kept_and_bounded(streams):
    tokens = [Items((Item("a", str(i)), Item("b", str(i)))) for i in range(40)]
    pinned = {token.each[0]: Host(str(i)) for i, token in enumerate(tokens)}  # b is elsewhere
    transfers = Transfers(torch.device("cuda"), streams=True)
    for i, token in enumerate(tokens):
        taken = transfers.take(token)
        assert list(taken) == ([token.each[0]] if i else [])  # the first one was not expected
        transfers.expect(tokens[i + 1 : i + 3], pinned)
        assert len(transfers._waiting) <= 2
    for i in range(1, 40):
        copied = streams.log.index(("side", ("copies", str(i))))
        done = next(e for name, e in streams.log[copied:] if name == "side" and type(e) is Event)
        waited = streams.log.index(("main", ("waits for", done)))
        assert copied < waited < streams.log.index(("main", ("keeps", str(i))))
    # the host waits for what it used some tensors ago, never for the present one
    waits = [what[1] for name, what in streams.log if name == "host"]
    used = [event for name, event in streams.log if name == "main" and type(event) is Event]
    assert waits == used[: len(used) - placement_module._BEHIND]


def test_a_wrong_guess_is_dropped_and_nothing_else_copied_again(streams):
    a, b, c = (Items((Item("a", name),)) for name in "abc")
    transfers = Transfers(torch.device("cuda"), streams=True)
    pinned = {item: Host(item.tensor) for item in (*a, *b, *c)}
    transfers.expect([a, b], pinned)
    transfers.expect([b, c], pinned)
    assert transfers.take(a) == {}
    assert [copy.name for copy in transfers.take(b).values()] == ["b"]
    copies = [what[1] for _, what in streams.log if type(what) is tuple and what[0] == "copies"]
    assert copies == ["a", "b", "c"]
    transfers.end()
    assert streams.log[-1] == "all"
    assert transfers.take(c) == {}


# ---- words --------------------------------------------------------------------------------------


def test_words_are_by_source_with_one_for_the_rest():
    assert words_of("pinned", "ab") == {"a": "pinned", "b": "pinned"}
    assert words_of({"base": "device"}, ["base", "a"]) == {"base": "device", "a": "auto"}
    assert words_of({"a": "mapped", "*": "device"}, "ab") == {"a": "mapped", "b": "device"}
    with pytest.raises(ConfigError, match=r"got 'devise' for a\. Did you mean 'device'"):
        words_of({"a": "devise"}, "ab")
    with pytest.raises(ConfigError, match=r"unknown sources c \(choose from a, b, and '\*' for"):
        words_of({"c": "device"}, "ab")
    with pytest.raises(ConfigError, match="expected device or mapped on cpu, got pinned for a:"):
        words_of({"a": "pinned"}, "ab", CPU)


@pytest.mark.parametrize(
    ("words", "device", "host", "expected"),
    [
        ("auto auto auto", 100, 100, "device device device"),
        ("auto auto auto", 12, 5, "device device pinned"),
        ("auto auto auto", 9, 0, "device mapped device"),  # a smaller one fits where one did not
        ("mapped auto auto", 9, 9, "mapped device pinned"),
        ("auto auto device", 8, 0, "device mapped device"),  # what is asked for comes first
        ("auto auto auto", -1, -1, "mapped mapped mapped"),
    ],
)
def test_auto_takes_the_device_then_the_host_then_files(words, device, host, expected):
    owners = ("base", "a", "b")
    found = chosen(
        dict(zip(owners, words.split(), strict=True)), {"base": 4, "a": 6, "b": 4}, device, host
    )
    assert " ".join(found.values()) == expected


def test_the_line_of_the_log_names_places_sizes_and_dtypes():
    words = {"base": "device", "a": "device", "b": "mapped"}
    sizes = {"base": 2 * 10**9, "a": 10**9, "b": 5 * 10**8}
    dtypes = {"base": {"bfloat16"}, "a": {"float32", "bfloat16"}, "b": {"float16"}}
    assert described(words, sizes, dtypes) == (
        "base, a: on the device, 3 GB in bfloat16 and float32; b: in files, 0.5 GB in float16"
    )
