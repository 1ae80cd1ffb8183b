"""Names of the scores that a fit logs, which callbacks and schedules may watch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain

from gradmerge.common.errors import ConfigError, nearest

NAMES: Mapping[str, tuple[str, ...]] = {
    "language": ("perplexity", "bits_per_byte"),
    "classes": ("accuracy", "macro_f1", "calibration_error"),
    "masked": ("accuracy", "perplexity"),
    "spans": ("span_f1", "exact_match"),
    "pairs": ("accuracy",),
    "similarity": ("spearman", "squared_error"),
}
"""Scores by kind of measure (`gradmerge.engine.reading.Measure`)."""

GENERATED = ("exact_match", "rouge1", "rouge2", "rougeL", "passed")
"""Scores of generated texts."""


def scores_of(measures: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the scores of some kinds of measures, with those of generated texts."""
    found = dict.fromkeys(chain(*(NAMES[measure] for measure in measures)))
    return (*found, *GENERATED) if "language" in measures else tuple(found)


def score_names(
    tasks: Iterable[str], scores: Collection[str] | None = None, several: bool = False
) -> list[str]:
    """Return the names of all scores.

    Args:
        tasks: names of the tasks.
        scores: names of the scores that the network's predictions may have; None if that is not
            known yet.
        several: True for several fits of some tasks each, which have only the averages in common.
    """
    possible = (*(scores_of(NAMES) if scores is None else scores), "loss", "normalised")
    found = ["train/loss", "selection/loss", "train/penalty", "train/logit_scale"]
    own = [] if several else list(tasks)
    found += [f"train/{task}/loss" for task in own]
    for task in (*own, "average"):
        found += [f"selection/{task}/{score}" for score in possible]
    return list(dict.fromkeys(found))


def require_monitor(owner: str, monitor: str, known: Collection[str]) -> None:
    """Reject a score that a fit does not log.

    Args:
        owner: callback or schedule that watches it.
        monitor: name of the score.
        known: names of all scores.

    Raises:
        ConfigError: it is unknown.
    """
    # learning rates, which LearningRateMonitor logs
    if monitor not in known and not monitor.startswith("lr-"):
        raise ConfigError(
            f"{owner}: expected a score that the fit logs as its monitor, got {monitor!r}."
            f"{nearest(monitor, known)}\nCommon ones: selection/loss, selection/average/accuracy "
            "(classes), selection/average/bits_per_byte (texts)."
        )
