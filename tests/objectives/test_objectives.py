"""Terms and regularisers against torch.distributions and formulas written out again, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradmerge.common.errors import ConfigError
from gradmerge.engine.reading import NEXT_TOKEN
from gradmerge.objectives import (
    L1,
    CrossEntropy,
    Entropy,
    FisherToInit,
    HardLabels,
    KLToEnsemble,
    KLToSource,
    L2ToInit,
    Lp,
    Objective,
    Overlap,
    Predictions,
    Similarity,
    next_token_rows,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(rows, classes, seed=1):
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))


# ---- cross-entropy --------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_is_the_negative_log_probability_of_a_smoothed_target(smoothing):
    logits, labels = 3 * draw(9, 5), labels_of(9, 5)
    target = torch.full((9, 5), smoothing / 5, dtype=torch.float64)
    target[range(9), labels] += 1 - smoothing
    expected = -(target * Categorical(logits=logits).logits).sum(dim=1).mean()
    got = CrossEntropy(label_smoothing=smoothing).loss(Predictions(logits, labels))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_rows_without_a_label_leave_cross_entropy_as_if_they_were_not_there(smoothing):
    term = CrossEntropy(label_smoothing=smoothing)
    logits, labels = draw(9, 5).requires_grad_(), labels_of(9, 5)
    labels[[1, 4, 8]] = -100
    kept = labels != -100
    got = term.loss(Predictions(logits, labels))
    expected = term.loss(Predictions(logits[kept], labels[kept]))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(got, logits)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).all()


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize(
    "term",
    [
        CrossEntropy(),
        CrossEntropy(label_smoothing=0.3),
        Entropy(marginal=0.5),
        KLToSource(),
        KLToSource(top_k=2),
        HardLabels(),
    ],
)
def test_a_batch_with_nothing_to_predict_gives_zero_with_zero_gradient(term, rows):
    """Rows of a classifier keep their -100; those of a language model are cut out."""
    if rows and not term.needs_labels:
        rows = 0
    network = draw(5, 3).requires_grad_()
    labels = torch.full((rows,), -100)
    loss = term.loss(Predictions(draw(rows, 5) @ network, labels, draw(rows, 3, seed=2)))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, network)
    assert (gradient == 0).all()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5])
def test_cross_entropy_refuses_a_smoothing_outside_of_its_range(smoothing):
    with pytest.raises(ConfigError, match=r"label_smoothing: expected a share in \[0, 1\), got"):
        CrossEntropy(label_smoothing=smoothing)


# ---- rows -----------------------------------------------------------------------------------


def test_classification_rows_pass_unchanged():
    logits, labels = draw(4, 3), labels_of(4, 3)
    rows, kept_labels, keep = next_token_rows(logits, labels, torch.ones(4, 6), shift=False)
    assert rows is logits
    assert kept_labels is labels
    assert keep is None


def test_causal_rows_are_shifted_by_one():
    logits, ids = draw(2, 5, 7), labels_of(10, 7).view(2, 5)
    rows, labels, _ = next_token_rows(logits, ids, None, shift=True)
    expected = [(logits[b, t], ids[b, t + 1]) for b in range(2) for t in range(4)]
    assert torch.equal(rows, torch.stack([row for row, _ in expected]))
    assert torch.equal(labels, torch.stack([label for _, label in expected]))


def test_minus_100_and_padding_are_left_out_for_labels_and_teacher_alike():
    logits, ids = draw(2, 5, 7), labels_of(10, 7).view(2, 5)
    ids[0, 2] = -100
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    rows, labels, keep = next_token_rows(logits, ids, mask, shift=True)
    wanted = [
        (b, t) for b in range(2) for t in range(4) if ids[b, t + 1] != -100 and mask[b, t + 1] == 1
    ]
    assert len(wanted) == 5
    assert torch.equal(rows, torch.stack([logits[b, t] for b, t in wanted]))
    assert torch.equal(labels, torch.stack([ids[b, t + 1] for b, t in wanted]))
    assert keep.sum() == 5


def test_padding_is_left_out_without_labels_too():
    logits, mask = draw(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows, labels, _ = next_token_rows(logits, None, mask, shift=False)
    assert labels is None
    assert torch.equal(rows, torch.cat([logits[0], logits[1, :2]]))


def test_only_rows_that_are_kept_are_copied():
    """A vocabulary is large: neither logits nor their gradient are widened or copied as a whole."""

    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            places = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in places:
                made.append(out.untyped_storage().nbytes())
            return out

    logits = draw(2, 50, 64).to(torch.bfloat16).requires_grad_()
    ids = torch.full((2, 50), -100)
    ids[:, -2:] = 3
    whole = logits.untyped_storage().nbytes()
    with Sizes():
        rows, labels, _ = NEXT_TOKEN.rows(logits, {"labels": ids}, torch.nn.Identity())
        loss = CrossEntropy().loss(Predictions(rows, labels))
        assert max(made) < whole // 4
        (gradient,) = torch.autograd.grad(loss, logits)
    assert max(made) == whole
    assert rows.dtype == torch.float32
    expected = torch.zeros(2, 50, 64)
    wide = logits.detach().float()[:, -3:-1]
    expected[:, -3:-1] = (wide.softmax(-1) - functional.one_hot(ids[:, -2:], 64)) / 4
    torch.testing.assert_close(gradient, expected.bfloat16(), rtol=1e-2, atol=1e-4)


def test_causal_cross_entropy_equals_the_reference_network_s_own_loss(family):
    models, inputs = family("llama", count=1)
    labels = inputs["input_ids"].clone()
    labels[0, 3] = -100
    output = models[0](**inputs, labels=labels)
    rows, kept, _ = next_token_rows(output.logits, labels, None, shift=True)
    got = CrossEntropy().loss(Predictions(rows, kept))
    # transformers computes its loss in float32
    torch.testing.assert_close(got, output.loss.double(), rtol=1e-6, atol=0)


def test_logits_of_another_rank_are_refused():
    with pytest.raises(ConfigError, match=r"expected logits of shape .* got \(2, 3, 4, 5\)"):
        next_token_rows(torch.zeros(2, 3, 4, 5), None, None, shift=False)


# ---- entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_entropy_is_one_for_uniform_and_zero_for_certain_predictions(classes):
    uniform = Entropy().loss(Predictions(torch.full((3, classes), 4.0, dtype=torch.float64)))
    torch.testing.assert_close(uniform, torch.ones_like(uniform), rtol=1e-12, atol=0)
    certain = torch.zeros(3, classes, dtype=torch.float64)
    certain[:, 1] = 1e4
    assert Entropy().loss(Predictions(certain)) == 0


def test_entropy_equals_that_of_the_distribution_over_log_classes():
    logits = 2 * draw(8, 6)
    expected = Categorical(logits=logits).entropy().mean() / math.log(6)
    got = Entropy().loss(Predictions(logits))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30, 3e38])
@pytest.mark.parametrize("marginal", [0.0, 1.0])
def test_entropy_has_finite_gradients_at_extreme_logits(scale, marginal):
    logits = (draw(6, 5).sign() * scale).float().requires_grad_()
    loss = Entropy(marginal=marginal).loss(Predictions(logits))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_marginal_entropy_equals_that_of_the_mean_prediction():
    logits = 2 * draw(8, 6)
    each = Categorical(logits=logits).entropy().mean()
    whole = Categorical(probs=logits.softmax(dim=1).mean(dim=0)).entropy()
    got = Entropy(marginal=0.7).loss(Predictions(logits))
    torch.testing.assert_close(got, (each - 0.7 * whole) / math.log(6), rtol=1e-10, atol=0)


def test_marginal_entropy_prefers_varied_predictions_to_one_class_for_all():
    collapsed, varied = torch.zeros(4, 4), 30 * torch.eye(4)
    collapsed[:, 0] = 30
    plain, marginal = Entropy(), Entropy(marginal=1.0)
    assert abs(plain.loss(Predictions(collapsed)) - plain.loss(Predictions(varied))) < 1e-6
    gap = marginal.loss(Predictions(collapsed)) - marginal.loss(Predictions(varied))
    assert abs(gap - 1) < 1e-5


# ---- distillation ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_divergence_equals_torch_distributions_times_temperature_squared(temperature):
    student, teacher = 3 * draw(7, 5), 3 * draw(7, 5, seed=2)
    expected = kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    ).mean()
    term = KLToSource(temperature=temperature)
    got = term.loss(Predictions(student, teacher=teacher))
    torch.testing.assert_close(got, temperature**2 * expected, rtol=1e-10, atol=0)


def test_divergence_is_zero_with_zero_gradient_for_equal_predictions():
    logits = (50 * draw(7, 5)).requires_grad_()
    loss = KLToSource().loss(Predictions(logits, teacher=logits.detach()))
    loss.backward()
    assert abs(loss) < 1e-12
    assert logits.grad.abs().max() < 1e-12


def test_divergence_s_gradient_does_not_shrink_with_the_temperature():
    """The factor T^2 ensures this: at high T the loss tends to the squared distance of logits."""
    student, teacher = draw(7, 5).requires_grad_(), draw(7, 5, seed=2)
    KLToSource(temperature=1e3).loss(Predictions(student, teacher=teacher)).backward()
    difference = (student - teacher).detach()
    centred = difference - difference.mean(dim=1, keepdim=True)
    torch.testing.assert_close(student.grad, centred / 5 / 7, rtol=0, atol=1e-3)


def test_divergence_is_a_mean_over_rows_however_they_are_cut_and_padded():
    """DAM's own code divides the batch's mean by tokens again, which depends on the cut."""
    student, teacher = 3 * draw(2, 6, 5), 3 * draw(2, 6, 5, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])

    def loss(logits, expert, mask):
        rows = [next_token_rows(each, None, mask, True)[0] for each in (logits, expert)]
        return KLToSource().loss(Predictions(rows[0], teacher=rows[1])), len(rows[0])

    whole, count = loss(student, teacher, mask)
    halves = [loss(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert [rows for _, rows in halves] == [5, 1]
    expected = sum(value * rows for value, rows in halves) / count
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=0)
    short = loss(student[1:, :2], teacher[1:, :2], mask[1:, :2])
    torch.testing.assert_close(short[0], halves[1][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_the_ensemble_s_divergence_equals_torch_distributions_of_mean_probabilities(temperature):
    student = (3 * draw(7, 5)).requires_grad_()
    sources = torch.stack([3 * draw(7, 5, seed=seed) for seed in (2, 3, 4)])
    mean = Categorical(probs=(sources / temperature).softmax(dim=-1).mean(dim=0))
    expected = kl_divergence(mean, Categorical(logits=student / temperature)).mean()
    got = KLToEnsemble(temperature=temperature).loss(Predictions(student, ensemble=sources))
    torch.testing.assert_close(got, temperature**2 * expected, rtol=1e-10, atol=0)
    # its gradient is the mean of the gradients of distilling each source alone
    each = KLToSource(temperature=temperature)
    alone = [each.loss(Predictions(student, teacher=source)) for source in sources]
    (gradient,) = torch.autograd.grad(got, student)
    (expected,) = torch.autograd.grad(torch.stack(alone).mean(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_the_ensemble_is_not_what_the_mean_of_logits_would_give():
    sources = torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]).double()
    mean = sources.softmax(dim=-1).mean(dim=0).log()
    assert abs(KLToEnsemble(temperature=1.0).loss(Predictions(mean, ensemble=sources))) < 1e-12
    wrong = Predictions(sources.mean(dim=0), ensemble=sources)
    assert KLToEnsemble(temperature=1.0).loss(wrong) > 0.01


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_divergence_refuses_a_temperature_that_is_not_positive(temperature):
    for term in (KLToSource, KLToEnsemble):
        with pytest.raises(ConfigError, match=f"{term.__name__}.temperature: expected a positive"):
            term(temperature=temperature)


# ---- regularisers ---------------------------------------------------------------------------


COEFFICIENTS = {"x": draw(3, 4), "y": draw(3), "z": draw(3, 2, 2, seed=4)}
START = {"x": draw(3, 4, seed=5), "y": draw(3, seed=6), "z": draw(3, 2, 2, seed=7)}


def test_l1_is_the_mean_magnitude_over_all_coefficients():
    numbers = [v for c in COEFFICIENTS.values() for v in c.flatten().tolist()]
    expected = sum(abs(v) for v in numbers) / len(numbers)
    assert L1().penalty(COEFFICIENTS, START).item() == pytest.approx(expected, rel=1e-12)


def test_l2_is_the_mean_squared_move_from_the_start():
    now = [v for c in COEFFICIENTS.values() for v in c.flatten().tolist()]
    then = [v for c in START.values() for v in c.flatten().tolist()]
    expected = sum((a - b) ** 2 for a, b in zip(now, then, strict=True)) / len(now)
    assert L2ToInit().penalty(COEFFICIENTS, START).item() == pytest.approx(expected, rel=1e-12)
    assert L2ToInit().penalty(START, START) == 0


def pairs():
    """Each tensor with more than one coefficient per source, each pair of sources."""
    for name in ("x", "z"):
        rows = COEFFICIENTS[name].flatten(1).tolist()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            yield rows[a], rows[b]


def test_similarity_is_the_mean_cosine_of_pairs():
    def cosine(a, b):
        return sum(map(float.__mul__, a, b)) / math.hypot(*a) / math.hypot(*b)

    found = [cosine(a, b) for a, b in pairs()]
    expected = sum(found) / len(found)
    assert Similarity().penalty(COEFFICIENTS, START).item() == pytest.approx(expected, rel=1e-10)


def test_overlap_is_the_mean_sum_of_smaller_magnitudes():
    found = [sum(min(abs(x), abs(y)) for x, y in zip(a, b, strict=True)) for a, b in pairs()]
    expected = sum(found) / len(found)
    assert Overlap().penalty(COEFFICIENTS, START).item() == pytest.approx(expected, rel=1e-12)


def published_dam(divergences, coefficients, similarity=0.01, overlap=0.0):
    """The loss of DAM's code: sums over data sets and layers, a mean over pairs alone."""
    total = sum(divergences)
    for c in coefficients.values():
        if c.dim() == 1:
            continue  # biases do not count
        cosines, smaller = [], []
        for a, b in ((0, 1), (0, 2), (1, 2)):
            x, y = c[a].flatten(), c[b].flatten()
            cosines.append(x @ y / (x.norm() * y.norm()))
            smaller.append(torch.where(x.abs() < y.abs(), x.abs(), y.abs()).sum())
        total = total + similarity * sum(cosines) / 3 + overlap * sum(smaller) / 3
    return total


@pytest.mark.parametrize(
    ("regulariser", "weights"),
    [
        (Similarity(weight=0.01 / 4, reduce="sum"), {}),
        (Overlap(weight=1e-3 / 4, reduce="sum"), {"similarity": 0.0, "overlap": 1e-3}),
    ],
)
def test_a_sum_over_tensors_is_the_published_loss_of_dam_over_the_number_of_tasks(
    regulariser, weights
):
    """Acceptance: value and gradient, by float64 autograd."""
    objective = Objective([CrossEntropy()], [regulariser])
    shares = [objective.share(task, "abcd") for task in "abcd"]
    leaves = [{n: c.clone().requires_grad_() for n, c in COEFFICIENTS.items()} for _ in range(2)]
    found = [
        [(c.square().sum() * (i + 1)).sin() for i, c in enumerate(own.values())] for own in leaves
    ]
    found = [[*losses, losses[0] * losses[1]] for losses in found]  # four divergences
    ours = sum(s * loss for s, loss in zip(shares, found[0], strict=True))
    ours = ours + objective.penalty(leaves[0], START)
    theirs = published_dam(found[1], leaves[1], **weights) / 4
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    for name, leaf in leaves[0].items():
        torch.testing.assert_close(leaf.grad, leaves[1][name].grad, rtol=1e-10, atol=1e-14)
    mean = replace(regulariser, reduce="mean").penalty(COEFFICIENTS, START)
    total = regulariser.penalty(COEFFICIENTS, START)
    torch.testing.assert_close(total, 2 * mean, rtol=1e-12, atol=0)  # x and z


@pytest.mark.parametrize(("kind", "count"), [(L1, 27), (L2ToInit, 27), (FisherToInit, 27), (Lp, 9)])
def test_the_other_penalties_can_sum_instead_of_averaging(kind, count):
    more = (COEFFICIENTS,) if kind is FisherToInit else ()
    mean = kind().penalty(COEFFICIENTS, START, *more)
    total = kind(reduce="sum").penalty(COEFFICIENTS, START, *more)
    assert total.item() == pytest.approx(count * mean.item(), rel=1e-12)
    with pytest.raises(
        ConfigError, match=f"{kind.__name__}.reduce: expected mean or sum, got 'max'"
    ):
        kind(reduce="max")


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("kind", [Similarity, Overlap])
def test_pairwise_penalties_of_single_numbers_are_a_differentiable_zero(kind, reduce):
    coefficient = draw(2).requires_grad_()
    penalty = kind(reduce=reduce).penalty({"x": coefficient}, {"x": coefficient.detach()})
    penalty.backward()
    assert penalty == 0
    assert torch.equal(coefficient.grad, torch.zeros(2, dtype=torch.float64))


# ---- the sum --------------------------------------------------------------------------------


def test_loss_and_penalty_are_weighted_sums():
    objective = Objective(
        [CrossEntropy(weight=2.0), Entropy(weight=0.5)], [L1(weight=3.0), L2ToInit(weight=0.25)]
    )
    predictions = Predictions(draw(6, 4), labels_of(6, 4))
    expected = 2 * CrossEntropy().loss(predictions) + 0.5 * Entropy().loss(predictions)
    torch.testing.assert_close(objective.loss(predictions), expected, rtol=1e-12, atol=0)
    l1, l2 = L1().penalty(COEFFICIENTS, START), L2ToInit().penalty(COEFFICIENTS, START)
    got = objective.penalty(COEFFICIENTS, START)
    torch.testing.assert_close(got, 3 * l1 + 0.25 * l2, rtol=1e-12, atol=0)


def test_task_weights_are_normalised_over_the_tasks_of_a_step():
    objective = Objective(task_weights={"a": 3.0, "c": 0.0})
    assert objective.share("a", ["a", "b"]) == pytest.approx(0.75)
    assert objective.share("b", ["a", "b"]) == pytest.approx(0.25)
    assert objective.share("c", ["a", "b", "c"]) == 0
    assert sum(objective.share(t, "abc") for t in "abc") == pytest.approx(1)
    assert objective.share("c", ["c"]) == 0


def test_the_loss_is_a_mean_of_labelled_rows_where_a_term_needs_labels():
    unlabelled, labels = draw(4, 3), torch.tensor([0, -100, 2, -100])
    assert Objective([Entropy(), CrossEntropy()]).rows(Predictions(unlabelled, labels)) == 2
    assert Objective([CrossEntropy()]).rows(Predictions(unlabelled)) == 0
    assert Objective([Entropy()]).rows(Predictions(unlabelled, labels)) == 4


def test_an_objective_knows_the_needs_of_its_terms():
    plain = Objective([Entropy()])
    both = Objective([CrossEntropy(), KLToSource()])
    assert (plain.needs_labels, plain.needs_teacher) == (False, False)
    assert (both.needs_labels, both.needs_teacher) == (True, True)
    assert [o.needs_ensemble for o in (both, Objective([KLToEnsemble()]))] == [False, True]
    assert not Objective([KLToEnsemble()]).needs_teacher


def test_an_unknown_task_in_the_weights_names_the_nearest():
    objective = Objective(task_weights={"svnh": 2.0})
    with pytest.raises(ConfigError, match=r"unknown task 'svnh' .*Did you mean 'svhn'\?"):
        objective.require_tasks(["mnist", "svhn"])
    Objective(task_weights={"svhn": 2.0}).require_tasks(["mnist", "svhn"])


def test_an_objective_without_terms_is_cross_entropy():
    assert Objective() == Objective([CrossEntropy()])
    assert Objective(task_weights={"a": 2.0}).terms == [CrossEntropy()]


def test_negative_task_weights_are_refused():
    with pytest.raises(ConfigError, match="must not be negative: b"):
        Objective(task_weights={"a": 1.0, "b": -1.0})


def test_task_weights_that_leave_nothing_to_learn_are_refused():
    objective = Objective(task_weights={"a": 0.0, "b": 0.0})
    objective.require_tasks(["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"every task here has weight 0 \(a, b\)"):
        objective.require_tasks(["a", "b"])
