"""Metrics of rows of logits and labels, by what a network predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanSquaredError, SpearmanCorrCoef

from gradmerge.engine.reading import Measure


@dataclass(frozen=True)
class Score:
    """Metric by which a task is judged."""

    name: str
    higher_is_better: bool


ACCURACY = Score("accuracy", True)
BITS_PER_BYTE = Score("bits_per_byte", False)

SCORES: Mapping[Measure, Score] = {
    "language": BITS_PER_BYTE,
    "classes": ACCURACY,
    "masked": ACCURACY,
    "spans": Score("span_f1", True),
    "pairs": ACCURACY,
    "similarity": Score("spearman", True),
}


def build_metrics(measure: Measure, num_classes: int) -> MetricCollection:
    """Return the metrics of rows, each updated with logits `[rows, classes]` and labels."""
    found: dict[str, Metric | MetricCollection] = {}
    if measure == "language":
        found = {"language": _Language()}
    elif measure == "masked":
        accuracy = MulticlassAccuracy(num_classes, average="micro")
        found = {"accuracy": accuracy, "language": _Language(per_byte=False)}
    elif measure == "spans":
        found = {"spans": _Spans()}
    elif measure == "pairs":
        found = {"pairs": _Nearest()}
    elif measure == "similarity":
        found = {"spearman": _Spearman(), "squared_error": _SquaredError()}
    else:
        found = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": _CalibrationError(num_classes, n_bins=15),
        }
    return MetricCollection(found, compute_groups=False)


class _CalibrationError(MulticlassCalibrationError):
    """Calibration error of logits: torchmetrics mistakes logits within [0, 1] for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits `[rows, classes]` and labels `[rows]`."""
        super().update(preds.softmax(dim=-1), target)


class _Spearman(SpearmanCorrCoef):
    """Rank correlation of predicted and wanted similarities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions `[rows, 1]` and targets `[rows]`."""
        super().update(preds.flatten(), target.to(preds.dtype))


class _SquaredError(MeanSquaredError):
    """Mean squared difference of predicted and wanted similarities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions `[rows, 1]` and targets `[rows]`."""
        super().update(preds.flatten(), target.to(preds.dtype))


class _Sums(Metric):
    """Base class of metrics that are quotients of sums over rows."""

    full_state_update = False

    def _sums(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")


class _Language(_Sums):
    """Perplexity per token, and bits per byte, which is comparable between tokenizers."""

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, per_byte: bool = True) -> None:
        super().__init__()
        self.per_byte = per_byte
        self._sums("nats", "tokens", "bytes")

    def update(self, logits: Tensor, labels: Tensor, bytes_per_token: float = 1.0) -> None:
        """Add logits `[rows, vocab]` and labels `[rows]`."""
        self.nats += functional.cross_entropy(logits, labels, reduction="sum").double()
        self.tokens += len(labels)
        self.bytes += len(labels) * bytes_per_token

    def compute(self) -> dict[str, Tensor]:
        """Return perplexity and bits per byte."""
        found = {"perplexity": (self.nats / self.tokens).exp()}
        if self.per_byte:
            found["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        return found


class _Spans(_Sums):
    """Share of answers found exactly, and mean F1 of the tokens of answers.

        F1 = 2 |predicted and wanted| / (|predicted| + |wanted|)

    The predicted span goes from the likeliest start to the likeliest end; it is empty if they are
    in the wrong order.
    """

    exact: Tensor
    overlap: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._sums("exact", "overlap", "count")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits `[2 * examples, positions]`, of starts and ends in turn, and labels."""
        exact, overlap = span_overlap(logits, labels)
        self.exact += exact.sum()
        self.overlap += overlap.sum()
        self.count += len(exact)

    def compute(self) -> dict[str, Tensor]:
        """Return both means."""
        return {"span_f1": self.overlap / self.count, "exact_match": self.exact / self.count}


def span_overlap(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each answer is found exactly, and F1 of its tokens, both `[examples]`.

    Args:
        logits: `[2 * examples, positions]`, of starts and ends in turn.
        labels: `[2 * examples]`.
    """
    found, wanted = logits.argmax(dim=-1).view(-1, 2), labels.view(-1, 2)
    first = torch.maximum(found[:, 0], wanted[:, 0])
    last = torch.minimum(found[:, 1], wanted[:, 1])
    both = (last - first + 1).clamp_min(0)
    sizes = sum((span[:, 1] - span[:, 0] + 1).clamp_min(0) for span in (found, wanted))
    return (found == wanted).all(dim=1), (2 * both / sizes).double()


class _Nearest(_Sums):
    """Share of texts whose own partner is the nearest of the batch."""

    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._sums("right", "count")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add similarities `[pairs, pairs]` and labels `[pairs]`."""
        self.right += (logits.argmax(dim=-1) == labels).sum()
        self.count += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """Return the share."""
        return {"accuracy": self.right / self.count}
