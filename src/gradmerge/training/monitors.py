"""Names of the scores that a fit logs, which callbacks and schedules may watch."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gradmerge.common.errors import ConfigError, nearest

_LANGUAGE = ("loss", "perplexity", "bits_per_byte", "normalised")
_CLASSES = ("loss", "accuracy", "macro_f1", "calibration_error", "normalised")


def score_names(
    tasks: Iterable[str], causal: bool | None = None, several: bool = False
) -> list[str]:
    """Return the names of all scores.

    Args:
        tasks: names of the tasks.
        causal: True if the network predicts the next token; None if that is not known yet.
        several: True for several fits of some tasks each, which have only the averages in common.
    """
    scores = {True: _LANGUAGE, False: _CLASSES, None: (*_LANGUAGE, *_CLASSES)}[causal]
    found = ["train/loss", "selection/loss", "train/penalty", "train/logit_scale"]
    own = [] if several else list(tasks)
    found += [f"train/{task}/loss" for task in own]
    for task in (*own, "average"):
        found += [f"selection/{task}/{score}" for score in scores]
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
