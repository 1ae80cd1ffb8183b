"""Terms that compare with sources, against formulas written out row by row, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from gradmerge.common.errors import ConfigError
from gradmerge.objectives import (
    CrossEntropy,
    HardLabels,
    HiddenStates,
    KLToSource,
    L1ToInit,
    Leading,
    Objective,
    Predictions,
    Wanted,
)
from gradmerge.objectives.base import outermost


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(logits, teacher):
    return Predictions(logits, teacher=teacher)


# ---- the most probable classes ----------------------------------------------------------------


def buckets(teacher, merged, k, t):
    """T^2 KL over the teacher's k most probable classes and one of all others, row by row."""
    total = 0.0
    for p, q in zip((teacher / t).softmax(-1), (merged / t).softmax(-1), strict=True):
        order = sorted(range(len(p)), key=lambda j: -float(p[j]))
        groups = [[j] for j in order[:k]] + [order[k:]] * (k < len(p))
        for group in groups:
            a, b = sum(p[j] for j in group), sum(q[j] for j in group)
            total = total + a * (a.log() - b.log())
    return t * t * total / len(teacher)


@pytest.mark.parametrize(("k", "t"), [(1, 1.0), (3, 2.0), (4, 0.7), (5, 2.0), (50, 2.0)])
def test_leading_classes_and_the_rest_are_matched_as_buckets(k, t):
    teacher = 3 * draw(6, 5)
    own, plain = ((3 * draw(6, 5, seed=1)).requires_grad_() for _ in range(2))
    loss, expected = KLToSource(1.0, t, k).loss(of(own, teacher)), buckets(teacher, plain, k, t)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, gradient = (torch.autograd.grad(a, b)[0] for a, b in ((loss, own), (expected, plain)))
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
    full = KLToSource(1.0, t).loss(of(own, teacher))
    if k >= 4:  # a rest of one class is that class
        torch.testing.assert_close(loss, full, rtol=1e-12, atol=0)
    else:
        assert loss < full * (1 - 1e-3)


def test_leading_classes_of_float32_keep_its_digits():
    teacher, logits = 3 * draw(6, 5), 3 * draw(6, 5, seed=1)
    found = []
    for dtype in (torch.float32, torch.float64):
        own = logits.to(dtype).requires_grad_()
        loss = KLToSource(1.0, 1.0, 2).loss(of(own, teacher.to(dtype)))
        found.append((loss, torch.autograd.grad(3 * loss, own)[0]))
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1].double(), found[1][1], rtol=1e-4, atol=1e-6)


def test_a_rest_without_probability_is_finite():
    """A sure teacher leaves 0 in float64; a sure network, the logarithm of next to nothing."""
    teacher, own = torch.zeros(2, 4).double(), torch.zeros(2, 4).double()
    teacher[:, 1], own[:, 1] = 2000, 5000
    own.requires_grad_()
    loss = KLToSource(1.0, 1.0, 1).loss(of(own, teacher))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, own)[0].isfinite().all()


def test_outputs_that_were_kept_give_the_same_losses_as_logits():
    teacher, logits = 3 * draw(6, 5), draw(6, 5, seed=1)
    for term in (KLToSource(top_k=2), HardLabels()):
        ((count, temperature),) = term.wanted.leading
        kept = {(count, temperature): Leading.of(teacher, count, temperature)}
        without = Predictions(logits, leading=kept)
        assert torch.equal(term.loss(without), term.loss(of(logits, teacher)))


@pytest.mark.parametrize("k", [0, -1])
def test_a_number_of_classes_below_one_is_refused(k):
    with pytest.raises(ConfigError, match=r"KLToSource.top_k: expected at least 1, got"):
        KLToSource(top_k=k)


def test_an_objective_wants_what_any_of_its_terms_wants():
    layers = [HiddenStates(layers=("a",)), HiddenStates(layers=("b",))]
    terms = [KLToSource(top_k=4), HardLabels(), *layers]
    expected = Wanted(False, frozenset({(4, 2.0), (1, 1.0)}), ("a", "b"))
    assert Objective(terms).wanted == expected
    assert Objective([*terms, KLToSource()]).wanted == replace(expected, logits=True)
    assert Objective([]).wanted == Wanted()
    for term in terms:  # evaluation must not give them some rows at a time
        assert term.needs_teacher
        assert not Objective([CrossEntropy(), term]).adds_over_rows


# ---- hard labels ------------------------------------------------------------------------------


def test_hard_labels_drop_rows_on_which_the_merged_network_disagrees_and_is_surer():
    teacher, logits = draw(40, 4), 2 * draw(40, 4, seed=1)
    kept, total = 0, 0.0
    own = logits.clone().requires_grad_()
    for p, q in zip(teacher.softmax(-1), own.softmax(-1), strict=True):
        disagrees, surer = p.argmax() != q.argmax(), q.max() > p.max()
        if not (disagrees and surer):
            kept, total = kept + 1, total - q[p.argmax()].log()
    assert 5 < kept < 35
    got = HardLabels().loss(of(leaf := logits.clone().requires_grad_(), teacher))
    torch.testing.assert_close(got, total / kept, rtol=1e-12, atol=0)
    found, expected = torch.autograd.grad(got, leaf)[0], torch.autograd.grad(total / kept, own)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    every = HardLabels(filtered=False).loss(of(logits, teacher))
    plain = functional.cross_entropy(logits, teacher.argmax(-1))
    torch.testing.assert_close(every, plain, rtol=1e-12, atol=0)


def test_hard_labels_without_a_kept_row_are_zero_with_zero_gradient():
    teacher, logits = draw(3, 4), (-50 * draw(3, 4)).requires_grad_()
    loss = HardLabels().loss(of(logits, teacher))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    assert HardLabels(filtered=False).loss(of(logits, teacher)) > 1


# ---- hidden states ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_hidden_states_are_compared_layer_by_layer(reduce):
    own = {"h.0": draw(6, 3).requires_grad_(), "h.1": draw(2, 5).requires_grad_(), "x": draw(1, 1)}
    teacher = {"h.0": draw(6, 3, seed=1), "h.1": draw(2, 5, seed=2), "x": draw(1, 1, seed=3)}
    predictions = Predictions(draw(2, 3), hidden=own, teacher_hidden=teacher)
    term = HiddenStates(reduce=reduce)
    squares = [(own[n] - teacher[n]).square() for n in ("h.0", "h.1")]
    if reduce == "mean":
        expected = sum(s.mean() for s in squares) / 2
    else:
        expected = sum(s.sum() / len(s) for s in squares)
    loss = term.loss(predictions)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = [own["h.0"], own["h.1"]]
    for a, b in zip(*(torch.autograd.grad(v, leaves) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_of_blocks_within_blocks_the_outer_ones_count():
    names = ["t5.block.0", "t5.block.0.layer.0", "t5.block.0.layer.1", "t5.block.1", "t5.norm"]
    assert outermost(HiddenStates().layers, names) == ["t5.block.0", "t5.block.1"]
    assert outermost([r"layer\.1$"], names) == ["t5.block.0.layer.1"]
    assert outermost([r"block\.0", r"layer\.1$"], names) == ["t5.block.0", "t5.block.0.layer.1"]
    assert outermost(["none"], names) == []


# ---- distance from the start ------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_distance_from_the_start_is_that_of_all_coefficients(reduce):
    now, start = {"a": draw(2, 3), "b": draw(2, seed=1)}, {"a": draw(2, 3, seed=2), "b": draw(2)}
    pairs = [zip(now[n].flatten(), start[n].flatten(), strict=True) for n in now]
    distances = [abs(float(x - y)) for pair in pairs for x, y in pair]
    expected = math.fsum(distances) / (len(distances) if reduce == "mean" else 1)
    got = L1ToInit(reduce=reduce).penalty(now, start)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    assert L1ToInit().penalty(start, start).item() == 0
