"""The training stream: seeded order, one global batch for any number of processes, resuming; and
the shares of an evaluation split.
"""

from __future__ import annotations

from itertools import chain, islice

import pytest
import torch
from torch.utils.data import DataLoader

from gradmerge import MergeDataModule, TaskData
from gradmerge.training.examples import STAGES
from gradmerge.training.loaders import (
    ShareLoader,
    StreamLoader,
    TaskStream,
    collate,
    even_batches,
    sample_batches,
)


def numbers(count, first=0):
    return [{"x": torch.tensor(first + i)} for i in range(count)]


def stream_of(batch_size=4, rank=0, world=1, seed=0, **sizes):
    sizes = sizes or {"a": 10, "b": 7}
    stream = TaskStream({t: numbers(n) for t, n in sizes.items()}, collate, batch_size, seed)
    stream.rank, stream.world = rank, world
    return stream


def loader_of(num_workers=0, **options):
    return StreamLoader(stream_of(**options), num_workers)


def plain(batches):
    return [{task: batch["x"].tolist() for task, batch in step.items()} for step in batches]


def epochs(loader, count):
    return [plain(loader) for _ in range(count)]


def test_an_epoch_sees_the_largest_task_once_and_goes_round_the_others():
    (steps,) = epochs(loader_of(), 1)
    assert len(steps) == len(loader_of()) == 3
    largest = list(chain(*(step["a"] for step in steps)))
    assert sorted(largest[:10]) == list(range(10))
    smaller = list(chain(*(step["b"] for step in steps)))
    assert sorted(smaller[:7]) == list(range(7))
    assert all(len(step[task]) == 4 for step in steps for task in "ab")


def test_the_order_is_seeded_and_new_in_each_epoch():
    first, second = epochs(loader_of(), 2)
    assert [first, second] == epochs(loader_of(), 2)
    assert first != second
    assert first != epochs(loader_of(seed=1), 1)[0]


def test_tasks_of_one_size_are_not_in_one_order():
    (steps,) = epochs(loader_of(a=40, b=40, batch_size=40), 1)
    assert steps[0]["a"] != steps[0]["b"]


def test_a_reader_that_never_sees_the_end_gets_the_next_epoch_all_the_same():
    """A trainer that knows the length stops asking after the last step."""
    loader, whole = loader_of(), epochs(loader_of(), 3)
    for expected in whole:
        iterator = iter(loader)
        assert plain(islice(iterator, 3)) == expected


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_global_batch_of_one(world):
    for epoch in range(2):
        alone = epochs(loader_of(batch_size=12), 2)[epoch]
        shares = [
            epochs(loader_of(batch_size=12 // world, rank=rank, world=world), 2)[epoch]
            for rank in range(world)
        ]
        for step, expected in enumerate(alone):
            for task in "ab":
                together = [x for share in shares for x in share[step][task]]
                assert sorted(together) == sorted(expected[task])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_a_resumed_stream_goes_on_at_the_very_next_batch(done, num_workers):
    whole = list(chain(*epochs(loader_of(), 4)))
    loader = loader_of(num_workers)
    seen = 0
    while seen < done:
        seen += len(plain(islice(iter(loader), min(3, done - seen))))
    state = loader.state_dict()

    resumed = loader_of(num_workers)
    resumed.load_state_dict(state)
    # a trainer asks for what is left of its epoch, and goes on with the next
    left = 3 - done % 3
    assert plain(islice(iter(resumed), left)) == whole[done : done + left]
    assert plain(resumed) == whole[done + left : done + left + 3]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_resumed_stream_has_what_a_limited_epoch_needs(limit):
    """A trainer's limit is not known here: from any step there is a whole epoch to take."""
    whole = list(chain(*epochs(loader_of(), 4)))
    loader = loader_of()
    for done in range(0, 6, limit):
        resumed = loader_of()
        resumed.load_state_dict(loader.state_dict())
        assert plain(islice(iter(resumed), limit)) == whole[done : done + limit]
        plain(islice(iter(loader), limit))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing(num_workers):
    assert epochs(loader_of(num_workers), 2) == epochs(loader_of(), 2)


def test_the_data_module_gives_the_stream_of_its_seed():
    tasks = {"a": TaskData({s: numbers(6, 100 * i) for i, s in enumerate(STAGES)}, kind="tensors")}
    data = MergeDataModule(tasks, batch_size=3, seed=5)
    data.setup()
    (steps,) = epochs(data.train_dataloader(), 1)
    assert [steps] == epochs(loader_of(a=6, batch_size=3, seed=5), 1)


# ---- shares of an evaluation split ----------------------------------------------------------


def plain_shares(count):
    """What two processes get, two examples per batch."""
    whole = DataLoader(numbers(count), batch_size=2, collate_fn=collate)
    loaders = [ShareLoader(whole, rank, world=2) for rank in range(2)]
    return [[b["x"].tolist() if b else [] for b in loader] for loader in loaders]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("count", "world"), [(10, 2), (11, 2), (11, 3), (1, 1), (2, 4)])
def test_the_shares_of_a_split_hold_every_example_once(count, world, num_workers):
    seen, lengths = [], set()
    for rank in range(world):
        whole = DataLoader(numbers(count), 2, collate_fn=collate, num_workers=num_workers)
        loader = ShareLoader(whole, rank, world)
        batches = list(loader)
        assert len(batches) == len(loader) >= 1
        lengths.add(len(batches))
        seen += [x for batch in batches if batch for x in batch["x"].tolist()]
    assert sorted(seen) == list(range(count))
    assert len(lengths) == 1


def test_a_process_that_has_fewer_batches_gets_an_empty_one():
    assert plain_shares(9) == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], []]]
    assert plain_shares(1) == [[[0]], [[]]]


# ---- samples of a split ---------------------------------------------------------------------


def sampled(count, batches, num_workers=0):
    loader = DataLoader(numbers(count), 3, collate_fn=collate, num_workers=num_workers)
    return [batch["x"].tolist() for batch in sample_batches(loader, batches)]


@pytest.mark.parametrize("count", [12, 13, 40, 120, 1000])
def test_a_sample_takes_one_example_of_each_stretch_of_a_split(count):
    batches = sampled(count, 4)
    assert [len(batch) for batch in batches] == [3] * 4
    taken = sorted(chain(*batches))
    assert [i * count // 12 <= x < (i + 1) * count // 12 for i, x in enumerate(taken)] == [
        True
    ] * 12
    assert batches == sampled(count, 4, num_workers=1)
    # mixed: no batch lies in one half of the split
    assert all(min(batch) < count / 2 <= max(batch) for batch in batches)


def test_a_sample_of_classes_in_turn_has_several():
    """A fixed distance between the examples taken would find one class alone."""
    assert len({x % 10 for x in chain(*sampled(120, 4))}) > 4


@pytest.mark.parametrize("count", [0, 1, 2, 4, 7, 10])
def test_a_sample_of_a_small_split_is_all_of_it_in_even_batches(count):
    batches = sampled(count, 4)
    assert sorted(chain(*batches)) == list(range(count))
    sizes = {len(batch) for batch in batches}
    assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 16])
def test_even_batches_leave_nothing_out_and_no_example_alone(count, size):
    batches = even_batches(range(count), size)
    assert list(chain(*batches)) == list(range(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert max(sizes, default=0) <= max(size, 3 if size == 2 else 0)
    assert min(sizes, default=2) >= min(size, count, 2)
