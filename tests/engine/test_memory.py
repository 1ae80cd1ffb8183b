"""The pool of blocks that one layer's merged weights after another live in."""

from __future__ import annotations

import copy
import gc
import pickle
import platform

import pytest
import torch

from gradmerge import MergedModel, Recipe
from gradmerge.common.memory import BlockPool, release_freed_memory
from gradmerge.engine.autograd import checksums

SIZE = 1 << 16


def idle_bytes(pool: BlockPool) -> int:
    return sum(len(block) for blocks in pool._idle.values() for block in blocks)


def test_a_block_is_reused_once_its_last_tensor_is_dead():
    pool = BlockPool([SIZE] * 3)
    first = pool.empty((256, 256), torch.float32).fill_(1)
    address = first.data_ptr()
    row = first[3]
    del first
    second = pool.empty((SIZE,), torch.float32).fill_(2)
    assert second.data_ptr() != address, "a view of the first still lives"
    assert (row == 1).all()
    del row
    third = pool.empty((SIZE,), torch.float32)
    assert third.data_ptr() == address
    assert (second == 2).all()


def test_at_most_one_block_a_size_stays_idle():
    pool = BlockPool([SIZE] * 3 + [2 * SIZE] * 3)
    held = [pool.empty((size,), torch.float32) for size in (SIZE, SIZE, SIZE, 2 * SIZE, 2 * SIZE)]
    assert idle_bytes(pool) == 0
    del held
    assert idle_bytes(pool) == 4 * 3 * SIZE


def test_sizes_that_come_seldom_and_small_ones_are_not_held():
    pool = BlockPool([SIZE] * 2 + [10] * 3)
    for size in (SIZE, 10):
        assert pool.empty((size,), torch.float32).shape == (size,)
    assert not pool._idle


def test_tensors_outlive_their_pool():
    pool = BlockPool([SIZE] * 3)
    tensor = pool.empty((SIZE,), torch.float32).fill_(3)
    del pool
    gc.collect()
    assert (tensor == 3).all()


def layers(dtype: torch.dtype = torch.float32) -> Recipe:
    torch.manual_seed(0)
    base, a, b = (
        torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4))).to(dtype)
        for _ in range(3)
    )
    return Recipe(sources={"a": a, "b": b}, base=base)


def test_a_weight_that_a_caller_keeps_is_not_written_over():
    """Streamed: the tensor that a module hands out belongs to whoever holds it."""
    merged = MergedModel(layers(), memory="streamed")
    with torch.no_grad():
        kept = merged.skeleton[0].weight
        before = kept.clone()
        for _ in range(2):
            merged(torch.ones(1, 256))
    assert torch.equal(kept, before)
    assert idle_bytes(merged._blocks) == 4 * 256 * 256


def test_gradients_over_reused_blocks_equal_those_of_resident_memory():
    found = []
    inputs = [torch.full((3, 256), value, dtype=torch.float64) for value in (1.0, 2.0)]
    for memory in ("resident", "streamed"):
        merged = MergedModel(layers(torch.float64), memory=memory, dtype=torch.float64)
        losses = [lambda m=merged, x=x: m(x).square().mean() for x in inputs]
        loss, _ = merged.accumulate(losses)
        loss.backward()
        found.append((loss.detach(), merged.raw["tensor"].grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_copy_of_a_used_model_has_blocks_and_references_of_its_own(memory):
    merged = MergedModel(layers(), memory=memory)
    inputs = torch.ones(1, 256)
    expected = merged(inputs).detach()
    for other in (copy.deepcopy(merged._saved._live), copy.deepcopy(merged._blocks)):
        assert not vars(other).get("_entries", None)
        assert not vars(other).get("_idle", None)
    again = pickle.loads(pickle.dumps(merged._blocks))
    assert again._repeated == merged._blocks._repeated
    torch.testing.assert_close(merged(inputs).detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("grad", [True, False])
def test_coefficients_written_through_data_are_noticed(memory, grad):
    """Averaging of weights and some optimisers write so; it leaves no trace in the version."""
    merged = MergedModel(layers(), memory=memory)
    inputs = torch.ones(1, 256)
    raw = merged.raw["tensor"]
    with torch.set_grad_enabled(grad):
        before = merged(inputs).detach()
        raw.data.copy_(raw.data + 0.1 * torch.arange(8.0).view(2, 4))
        after = merged(inputs).detach()
        swapped = raw.data.clone()
        swapped[0, 1], swapped[0, 2] = raw.data[0, 2], raw.data[0, 1]
        raw.data.copy_(swapped)
        last = merged(inputs).detach()
    assert not torch.equal(before, after)
    assert not torch.equal(after, last)
    fresh = MergedModel(layers(), memory=memory)
    fresh.raw["tensor"].data.copy_(swapped)
    torch.testing.assert_close(fresh(inputs).detach(), last, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023, 1024, 1026, 5000, 5001])
def test_a_checksum_is_a_weighted_sum_of_all_words(size):
    """Odd factors, none twice: in Python's integers, modulo 2^64. Odd sizes go word by word."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    words = values.view(torch.int32 if size % 2 else torch.int64).tolist()
    expected = sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**64
    assert [found % 2**64 for found in checksums([values])] == [expected]


def test_a_checksum_of_a_view_takes_any_offset_and_order():
    values = torch.arange(3_000.0)
    assert checksums([values[1:]]) == checksums([values[1:].clone()])
    assert checksums([values[1:-1]]) != checksums([values[:-2]])
    matrix = values.view(50, 60)
    assert checksums([matrix.T]) == checksums([matrix.T.contiguous()]) != checksums([matrix])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_glibc_takes_the_release_of_freed_memory():
    assert release_freed_memory()
