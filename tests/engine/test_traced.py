"""Bytes and work of a program on tensors without numbers, against sizes counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gradmerge.common.memory import BlockPool
from gradmerge.engine.traced import Heap, Trace, TracedBlocks, fake_mode, tracing

MB = 1 << 20


def test_saved_activations_and_their_gradients_are_counted_by_hand():
    fake, trace = fake_mode(), Trace()
    rows, width = 64, 128
    with fake:
        weights = [torch.zeros(width, width, requires_grad=True) for _ in range(2)]
        x = torch.zeros(rows, width)
    trace.hold([*weights, x], "sources")
    with tracing(fake, trace):
        # sigmoid keeps its output and a product its input; the sum is a number
        loss = (torch.sigmoid(x @ weights[0]) @ weights[1]).sum()
        held = 4 * (2 * width * width + rows * width)
        activation = 4 * rows * width
        # the products themselves are freed once they are used, the last when the sum is there
        assert trace.peaks["cpu"].size == held + 2 * activation + 4
        loss.backward()
    assert trace.flops == 2 * rows * width * width * (2 + 3)  # x needs no gradient
    with tracing(fake, trace):
        del loss
        for weight in weights:
            weight.grad = None
        marker = torch.zeros(1000)
    # nothing but what was held is alive
    assert trace.log[-1][1] == marker.nbytes
    live = {}
    for number, size in trace.log:
        live[number] = size
    assert sum(live.values()) == held + marker.nbytes


def test_questions_about_numbers_are_answered_and_masks_keep_everything():
    fake, trace = fake_mode(), Trace()
    with tracing(fake, trace):
        mask = torch.ones(2, 3) > 0
        values = torch.zeros(2, 3, 5)
        assert bool(mask.all())
        assert torch.equal(values, values)
        assert values[mask].shape == (6, 5)
        assert mask.nonzero().shape == (6, 2)
        assert values.masked_select(values > 0).shape == (30,)
        assert mask.sum().item() == 1


def test_mapped_tensors_take_nothing_and_copies_of_them_do():
    fake, trace = fake_mode(), Trace()
    with tracing(fake, trace):
        stored = trace.mapped(torch.zeros(256, dtype=torch.bfloat16))
        wide = stored.float()
    assert trace.peaks["cpu"].size == max(stored.nbytes, wide.nbytes)
    assert Heap(1 << 30).peak_of(trace.log[2:]) == pytest.approx(wide.nbytes, abs=32)


def test_a_pool_keeps_one_idle_block_per_size():
    fake, trace = fake_mode(), Trace()
    pool = TracedBlocks(trace, BlockPool([1 << 20] * 3))
    with tracing(fake, trace):
        with trace.counting("merged"):
            both = [pool.empty((1 << 20,), torch.float32) for _ in range(2)]
        assert trace.peaks["cpu"].parts == {"merged": 8 * MB}
        both.clear()  # one of 4 MB stays idle, and is lent again
        with trace.counting("merged"):
            again = pool.empty((1 << 20,), torch.float32)
        beside = torch.zeros(1 << 20)
    assert trace.peaks["cpu"].size == 8 * MB
    assert len(again) == len(beside)


def test_freed_blocks_of_the_heap_stay_by_default():
    # 2 MB, mapped by itself, is the threshold once it is freed: what follows lies in the heap
    log = [(0, 2 * MB), (0, 0), *((i, MB) for i in range(1, 9)), *((i, 0) for i in range(1, 9))]
    log += [(9, 40 * MB)]  # always mapped
    assert Heap().peak_of(log) == pytest.approx((8 + 40) * MB, rel=1e-4)
    assert Heap(MB // 2).peak_of(log) == pytest.approx(40 * MB, rel=1e-4)


def test_gaps_are_filled_by_the_blocks_that_they_hold():
    kib = 1 << 10
    log = [(0, 64 * kib), (1, 32 * kib), (2, 64 * kib), (3, kib), (0, 0), (2, 0)]
    # the freed first block holds a smaller one; nothing holds one larger than both gaps
    assert Heap(MB).peak_of([*log, (4, 48 * kib)]) == pytest.approx(161 * kib, rel=1e-2)
    assert Heap(MB).peak_of([*log, (4, 96 * kib)]) == pytest.approx(257 * kib, rel=1e-2)


def test_the_traced_step_of_a_loss_is_that_of_a_real_one():
    """Sizes at every allocation against torch's own storages, recorded by the same operations."""

    def run() -> None:
        weight = torch.ones(32, 16, requires_grad=True)
        logits = torch.ones(8, 16) @ weight.T
        functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).backward()

    real, fake = Trace(), Trace()
    with torch.autograd.set_multithreading_enabled(False), real:
        run()
    with tracing(fake_mode(), fake):
        run()
    assert [size for _, size in real.log] == [size for _, size in fake.log]
    assert real.peaks["cpu"].size == fake.peaks["cpu"].size > 0
