"""Scores against scikit-learn, scipy and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from gradmerge.training.scores import (
    ACCURACY,
    BITS_PER_BYTE,
    TaskScores,
    build_metrics,
    normalised,
)


def predictions(rows=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    logits[range(rows), labels] += 1.5
    return logits, labels


def in_batches(logits, labels, size=64, task="t", **options):
    scores = TaskScores(**options)
    for start in range(0, len(labels), size):
        scores.update(task, logits[start : start + size], labels[start : start + size])
    return scores.compute()[task]


def test_accuracy_and_macro_f1_equal_scikit_learn_over_batches():
    logits, labels = predictions()
    found = in_batches(logits, labels, causal=False)
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
    found = in_batches(logits, labels, causal=False)
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-5)


def test_perplexity_and_bits_a_byte_of_uniform_predictions():
    logits, labels = torch.zeros(50, 8), torch.arange(50) % 8
    scores = TaskScores(causal=True)
    scores.update("t", logits[:30], labels[:30], bytes_per_token=4.0)
    scores.update("t", logits[30:], labels[30:], bytes_per_token=4.0)
    found = scores.compute()["t"]
    assert found["perplexity"] == pytest.approx(8, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(3 / 4, rel=1e-6)


def test_perplexity_and_bits_a_byte_weigh_batches_by_their_tokens():
    logits, labels = predictions(70)
    nats = -torch.log_softmax(logits.double(), dim=1)[range(70), labels]
    scores = TaskScores(causal=True)
    scores.update("t", logits[:60], labels[:60], bytes_per_token=3.0)
    scores.update("t", logits[60:], labels[60:], bytes_per_token=5.0)
    found = scores.compute()["t"]
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    expected = nats.sum().item() / math.log(2) / (60 * 3 + 10 * 5)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_weighed_by_rows_and_tasks_are_kept_apart():
    scores = TaskScores(causal=False)
    scores.update_loss("a", torch.tensor(1.0), 30)
    scores.update_loss("a", torch.tensor(4.0), 10)
    scores.update_loss("b", torch.tensor(7.0), 5)
    logits, labels = predictions(20)
    scores.update("a", logits, labels)
    found = scores.compute()
    assert found["a"]["loss"] == pytest.approx(1.75)
    assert found["b"] == {"loss": pytest.approx(7.0)}
    assert set(found["a"]) == {"accuracy", "macro_f1", "calibration_error", "loss"}


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_label_do_not_count(causal):
    logits, labels = predictions(60)
    hidden = labels.clone()
    hidden[10:30] = -100
    scores = TaskScores(causal)
    for start in range(0, 60, 15):  # all of the second batch's labels are missing
        scores.update("t", logits[start : start + 15], hidden[start : start + 15])
    expected = TaskScores(causal)
    kept = hidden != -100
    expected.update("t", logits[kept], labels[kept])
    assert scores.compute()["t"] == pytest.approx(expected.compute()["t"], rel=1e-6)
    without = TaskScores(causal)
    without.update("t", logits, torch.full_like(labels, -100))
    assert without.compute() == {}


def test_tasks_may_differ_in_their_number_of_classes():
    scores = TaskScores(causal=False)
    for task, classes in (("a", 3), ("b", 7)):
        logits, labels = predictions(classes=classes, seed=classes)
        scores.update(task, logits, labels)
        expected = accuracy_score(labels, logits.argmax(dim=1))
        assert scores.compute()[task]["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_the_score_of_a_task_is_accuracy_or_bits_a_byte():
    assert build_metrics(False, 4)[1] is ACCURACY
    assert build_metrics(True, 4)[1] is BITS_PER_BYTE
    assert TaskScores(True).score.name in build_metrics(True, 4)[0]["language"].compute()


def test_normalised_is_one_for_the_expert_and_above_one_when_better():
    assert normalised(ACCURACY, 0.9, 0.9) == 1
    assert normalised(ACCURACY, 0.6, 0.8) == pytest.approx(0.75)
    assert normalised(BITS_PER_BYTE, 2.0, 1.0) == pytest.approx(0.5)
    assert normalised(BITS_PER_BYTE, 0.5, 1.0) == pytest.approx(2.0)
    assert math.isnan(normalised(ACCURACY, 0.5, 0.0))
