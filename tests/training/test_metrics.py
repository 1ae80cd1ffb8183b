"""Scores against scikit-learn, scipy and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score

from gradmerge.training.measures import ACCURACY, BITS_PER_BYTE, SCORES
from gradmerge.training.monitors import NAMES
from gradmerge.training.scores import TaskScores, normalised


def predictions(rows=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    logits[range(rows), labels] += 1.5
    return logits, labels


def in_batches(logits, labels, size=64, task="t", measure="classes"):
    scores = TaskScores()
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        scores.update(task, logits[part], labels[part], measure)
    return scores.compute()[task]


def test_accuracy_and_macro_f1_equal_scikit_learn_over_batches():
    logits, labels = predictions()
    found = in_batches(logits, labels, measure="classes")
    chosen = logits.argmax(dim=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, chosen), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, chosen, average="macro"), abs=1e-6)
    assert 0.3 < found["accuracy"] < 0.95


@pytest.mark.parametrize("small", [False, True])
def test_calibration_error_equals_its_definition_over_fifteen_bins(small):
    logits, labels = predictions()
    if small:  # all in [0, 1], as probabilities are
        logits = logits.sigmoid()
    confidence, chosen = (x.numpy() for x in logits.softmax(dim=1).max(dim=1))
    right = chosen == labels.numpy()
    edges = numpy.linspace(0, 1, 16)
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = in_batches(logits, labels, measure="classes")
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-5)


def test_perplexity_and_bits_a_byte_of_uniform_predictions():
    logits, labels = torch.zeros(50, 8), torch.arange(50) % 8
    scores = TaskScores()
    scores.update("t", logits[:30], labels[:30], measure="language", bytes_per_token=4.0)
    scores.update("t", logits[30:], labels[30:], measure="language", bytes_per_token=4.0)
    found = scores.compute()["t"]
    assert found["perplexity"] == pytest.approx(8, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(3 / 4, rel=1e-6)


def test_perplexity_and_bits_a_byte_weigh_batches_by_their_tokens():
    logits, labels = predictions(70)
    nats = -torch.log_softmax(logits.double(), dim=1)[range(70), labels]
    scores = TaskScores()
    scores.update("t", logits[:60], labels[:60], measure="language", bytes_per_token=3.0)
    scores.update("t", logits[60:], labels[60:], measure="language", bytes_per_token=5.0)
    found = scores.compute()["t"]
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    expected = nats.sum().item() / math.log(2) / (60 * 3 + 10 * 5)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_weighed_by_rows_and_tasks_are_kept_apart():
    scores = TaskScores()
    scores.update_loss("a", torch.tensor(1.0), 30)
    scores.update_loss("a", torch.tensor(4.0), 10)
    scores.update_loss("b", torch.tensor(7.0), 5)
    logits, labels = predictions(20)
    scores.update("a", logits, labels)
    found = scores.compute()
    assert found["a"]["loss"] == pytest.approx(1.75)
    assert found["b"] == {"loss": pytest.approx(7.0)}
    assert set(found["a"]) == {"accuracy", "macro_f1", "calibration_error", "loss"}


@pytest.mark.parametrize("measure", ["classes", "language"])
def test_rows_without_a_label_do_not_count(measure):
    logits, labels = predictions(60)
    hidden = labels.clone()
    hidden[10:30] = -100
    scores = TaskScores()
    for start in range(0, 60, 15):  # all of the second batch's labels are missing
        scores.update("t", logits[start : start + 15], hidden[start : start + 15], measure)
    expected = TaskScores()
    kept = hidden != -100
    expected.update("t", logits[kept], labels[kept], measure)
    assert scores.compute()["t"] == pytest.approx(expected.compute()["t"], rel=1e-6)
    without = TaskScores()
    without.update("t", logits, torch.full_like(labels, -100), measure)
    assert without.compute() == {}


def test_tasks_may_differ_in_their_number_of_classes():
    scores = TaskScores()
    for task, classes in (("a", 3), ("b", 7)):
        logits, labels = predictions(classes=classes, seed=classes)
        scores.update(task, logits, labels)
        expected = accuracy_score(labels, logits.argmax(dim=1))
        assert scores.compute()[task]["accuracy"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("measure", sorted(SCORES))
def test_every_measure_has_the_scores_that_are_named(measure):
    rows = 6
    logits, labels = predictions(rows, classes=rows)
    if measure == "similarity":
        logits, labels = logits[:, :1], torch.rand(rows)
    scores = TaskScores()
    scores.update("t", logits, labels, measure)
    assert set(scores.compute()["t"]) == set(NAMES[measure])
    assert scores.score("t").name in NAMES[measure]


def test_scores_of_answers_count_exact_spans_and_common_tokens():
    # predicted and wanted (start, end): equal, two of three tokens in common, apart, reversed
    found = [(1, 3), (2, 4), (0, 1), (5, 2)]
    wanted = [(1, 3), (1, 3), (4, 6), (2, 5)]
    logits = torch.eye(8)[torch.tensor(found).flatten()]
    scores = TaskScores()
    for half in (slice(0, 4), slice(4, 8)):
        scores.update("t", logits[half], torch.tensor(wanted).flatten()[half], "spans")
    result = scores.compute()["t"]
    assert result["exact_match"] == pytest.approx(1 / 4)
    assert result["span_f1"] == pytest.approx((1 + 2 / 3) / 4)


def test_scores_of_similarities_equal_scipy_over_batches():
    generator = torch.Generator().manual_seed(3)
    wanted = torch.rand(40, generator=generator)
    found = wanted + 0.3 * torch.randn(40, generator=generator)
    result = in_batches(found[:, None], wanted, size=15, measure="similarity")
    assert result["spearman"] == pytest.approx(spearmanr(found, wanted).statistic, abs=1e-5)
    assert result["squared_error"] == pytest.approx((found - wanted).square().mean().item())


def test_normalised_is_one_for_the_expert_and_above_one_when_better():
    assert normalised(ACCURACY, 0.9, 0.9) == 1
    assert normalised(ACCURACY, 0.6, 0.8) == pytest.approx(0.75)
    assert normalised(BITS_PER_BYTE, 2.0, 1.0) == pytest.approx(0.5)
    assert normalised(BITS_PER_BYTE, 0.5, 1.0) == pytest.approx(2.0)
    assert math.isnan(normalised(ACCURACY, 0.5, 0.0))
