"""Scores of single examples, by which an evaluation can be resampled.

Means over examples are kept as quotients of sums. Of scores that are none (macro F1, rank
correlation) predictions and labels are kept, and the score is computed anew on each resample.
Perplexity, calibration error and the loss are not kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from gradmerge.engine.reading import Logits, Measure, reading_of
from gradmerge.objectives.base import UNLABELLED
from gradmerge.training.measures import span_overlap

Array = Any
"""numpy's arrays, whose types say nothing of their shapes."""


class AbstractExamples(ABC):
    """One score of a task, example by example."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of examples."""

    @abstractmethod
    def resampled(self, counts: Array) -> Array:
        """Return the score of each resample, `[resamples]`.

        Args:
            counts: how often each example was drawn, `[resamples, examples]`.
        """


@dataclass(frozen=True)
class Quotient(AbstractExamples):
    """`sum_i top_i / sum_i bottom_i`, for means over examples, tokens or bytes."""

    top: Array
    """`[examples]`, float64."""
    bottom: Array
    """`[examples]`, float64."""

    @property
    @override
    def count(self) -> int:
        return len(self.top)

    @override
    def resampled(self, counts: Array) -> Array:
        weights = counts.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ self.top) / (weights @ self.bottom)


@dataclass(frozen=True)
class MacroF1(AbstractExamples):
    """Mean over classes of `2 tp / (2 tp + fp + fn)`, of those that occur or are predicted."""

    owner: Array
    """Number of each row's example, `[rows]`."""
    prediction: Array
    """`[rows]`, whole numbers."""
    label: Array
    """`[rows]`, whole numbers."""

    @property
    @override
    def count(self) -> int:
        return int(self.owner.max()) + 1

    @override
    def resampled(self, counts: Array) -> Array:
        weights = counts.astype(np.float64)
        total, known = np.zeros(len(counts)), np.zeros(len(counts))
        for kind in np.union1d(self.prediction, self.label):
            found, wanted = self.prediction == kind, self.label == kind
            both, either = (self._by_example(rows) for rows in (found & wanted, found | wanted))
            hits, any_of = weights @ both, weights @ either
            present = any_of > 0
            # 2 tp + fp + fn = tp + (rows of either)
            total += np.divide(2 * hits, hits + any_of, out=np.zeros_like(hits), where=present)
            known += present
        return total / known

    def _by_example(self, rows: Array) -> Array:
        return np.bincount(self.owner, weights=rows, minlength=self.count)


@dataclass(frozen=True)
class RankCorrelation(AbstractExamples):
    """Spearman's rank correlation of predicted and wanted numbers."""

    prediction: Array
    """`[examples]`."""
    label: Array
    """`[examples]`."""

    @property
    @override
    def count(self) -> int:
        return len(self.prediction)

    @override
    def resampled(self, counts: Array) -> Array:
        from scipy.stats import rankdata

        found = np.empty(len(counts))
        for at, drawn in enumerate(counts):
            ranks = [rankdata(np.repeat(v, drawn)) for v in (self.prediction, self.label)]
            with np.errstate(invalid="ignore", divide="ignore"):
                found[at] = np.corrcoef(ranks)[0, 1]
        return found


KINDS: tuple[type[AbstractExamples], ...] = (Quotient, MacroF1, RankCorrelation)


class ExampleScores:
    """The scores of every example of an evaluation, collected batch by batch."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, list[Tensor]]] = {}
        self._measures: dict[str, Measure] = {}
        self._seen: dict[str, int] = {}
        self._generated: dict[str, dict[str, list[float]]] = {}

    def add(
        self,
        task: str,
        logits: Tensor,
        labels: Tensor,
        owners: Tensor,
        measure: Measure,
        bytes_per_token: float,
    ) -> None:
        """Add labelled rows.

        Args:
            task: the task.
            logits: `[rows, classes]`.
            labels: `[rows]`; rows without a label do not count.
            owners: number of each row's example within its batch, `[rows]`.
            measure: the kind of scores.
            bytes_per_token: bytes of text per row, for bits per byte.
        """
        labelled = labels != UNLABELLED
        if not bool(labelled.all()):
            logits, labels, owners = logits[labelled], labels[labelled], owners[labelled]
        if not len(labels):
            return
        self._measures[task] = measure
        found = _columns(logits, labels, measure, bytes_per_token)
        if measure == "spans":
            owners = owners[::2]
        found["owner"] = owners.to(labels.device) + self._seen.get(task, 0)
        kept = self._rows.setdefault(task, {name: [] for name in found})
        for name, values in found.items():
            kept[name].append(values.detach().double().cpu())

    def close_batch(self, task: str, examples: int) -> None:
        """Count the examples of a batch, all of whose rows were added."""
        self._seen[task] = self._seen.get(task, 0) + examples

    def add_generated(self, task: str, scores: Mapping[str, float]) -> None:
        """Add the scores of one generated text."""
        kept = self._generated.setdefault(task, {})
        for name, value in scores.items():
            kept.setdefault(name, []).append(float(value))

    def compute(self) -> dict[str, dict[str, AbstractExamples]]:
        """Return `{task: {metric: examples}}`."""
        found: dict[str, dict[str, AbstractExamples]] = {}
        for task, rows in self._rows.items():
            columns = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
            found[task] = _scores(columns, self._measures[task], self._seen[task])
        for task, scores in self._generated.items():
            own = {name: np.array(values) for name, values in scores.items()}
            more = {name: Quotient(values, np.ones(len(values))) for name, values in own.items()}
            found[task] = {**found.get(task, {}), **more}
        return found


def _columns(
    logits: Tensor, labels: Tensor, measure: Measure, bytes_per_token: float
) -> dict[str, Tensor]:
    """Return what is kept of each row; of spans, of each pair of rows."""
    one = torch.ones(len(labels), device=labels.device)
    if measure == "language":
        nats = functional.cross_entropy(logits, labels, reduction="none")
        return {"bits": nats / math.log(2), "bytes": one * bytes_per_token}
    if measure == "spans":
        exact, overlap = span_overlap(logits, labels)
        return {"exact_match": exact, "span_f1": overlap}
    if measure == "similarity":
        return {"prediction": logits.flatten(), "label": labels}
    predicted = logits.argmax(dim=-1)
    right = {"accuracy": (predicted == labels)}
    return {**right, "prediction": predicted, "label": labels} if measure == "classes" else right


def _scores(
    columns: Mapping[str, Array], measure: Measure, count: int
) -> dict[str, AbstractExamples]:
    owner = columns["owner"].astype(np.int64)

    def total(values: Array) -> Array:
        return np.bincount(owner, weights=values, minlength=count)

    if measure == "language":
        return {"bits_per_byte": Quotient(total(columns["bits"]), total(columns["bytes"]))}
    if measure == "similarity":
        return {"spearman": RankCorrelation(columns["prediction"], columns["label"])}
    ones = total(np.ones(len(owner)))
    named = ("exact_match", "span_f1", "accuracy")
    found: dict[str, AbstractExamples] = {
        name: Quotient(total(columns[name]), ones) for name in named if name in columns
    }
    if measure == "classes":
        classes = (columns[name].astype(np.int64) for name in ("prediction", "label"))
        found["macro_f1"] = MacroF1(owner, *classes)
    return found


def owners_of(network: nn.Module, batch: Mapping[str, Any], rows: int) -> tuple[Tensor, int]:
    """Return the number of each row's example within its batch, and the number of examples.

    Args:
        network: the network.
        batch: the batch.
        rows: number of its rows.
    """
    reading, labels = reading_of(network, batch), batch.get("labels")
    if isinstance(reading, Logits) and isinstance(labels, Tensor) and labels.dim() == 2:
        # numbers of examples in place of logits go the way that these go
        size = len(labels)
        numbers = torch.arange(size, dtype=torch.float64)[:, None, None]
        marks = numbers.expand(*labels.shape, 1).to(labels.device)
        return reading.rows(marks, batch, network)[0].flatten().long(), size
    size = rows // 2 if reading.measure(None) == "spans" else rows
    return torch.arange(size).repeat_interleave(rows // max(size, 1)), size


def to_arrays(found: Mapping[str, Mapping[str, AbstractExamples]]) -> dict[str, Array]:
    """Return scores of examples as arrays by name, for `numpy.savez`."""
    return {
        "|".join((task, metric, type(kept).__name__, field.name)): getattr(kept, field.name)
        for task, metrics in found.items()
        for metric, kept in metrics.items()
        for field in fields(kept)  # type: ignore[arg-type]
    }


def from_arrays(arrays: Mapping[str, Array]) -> dict[str, dict[str, AbstractExamples]]:
    """Return what `to_arrays` was given."""
    parts: dict[tuple[str, str, str], dict[str, Array]] = {}
    for name, values in arrays.items():
        task, metric, kind, field = name.rsplit("|", 3)
        parts.setdefault((task, metric, kind), {})[field] = values
    known = {kind.__name__: kind for kind in KINDS}
    found: dict[str, dict[str, AbstractExamples]] = {}
    for (task, metric, kind), given in parts.items():
        found.setdefault(task, {})[metric] = known[kind](**given)
    return found
