"""Ranges of the numbers that a fit takes, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.finite import require_finite_options

_LARGEST = 2**31 - 1
_BATCH = 2**20


def require_batches(
    batch_size: int = 1,
    eval_batch_size: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
    labels_per_task: int | Mapping[str, int] | None = None,
    labelled_share: float = 0.0,
) -> None:
    """Reject sizes of batches, numbers of workers and labels, shares and seeds out of range.

    Raises:
        ConfigError: one is.
    """
    for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
        require(size is None or 1 <= size <= _BATCH, f"data.{name}", f"1 to {_BATCH}", size)
    most = max(64, 4 * (os.cpu_count() or 1))
    require(0 <= num_workers <= most, "data.num_workers", f"0 to {most}", num_workers)
    require(0 <= seed <= _LARGEST, "data.seed", f"0 to {_LARGEST}", seed)
    by_task = labels_per_task if isinstance(labels_per_task, Mapping) else {"": labels_per_task}
    for task, count in by_task.items():
        option = f"data.labels_per_task{f'.{task}' if task else ''}"
        require(count is None or count >= 0, option, "0 labels or more", count)
    require(0 <= labelled_share <= 1, "data.labelled_share", "a share from 0 to 1", labelled_share)


def require_learning(
    learning_rate: float = 0.0,
    logit_scale: float | None = None,
    private_learning_rate: float | None = None,
) -> None:
    """Reject a learning rate or a first scale of logits that is negative, NaN or infinite.

    Raises:
        ConfigError: one is.
    """
    rates = {"learning_rate": learning_rate, "private_learning_rate": private_learning_rate}
    require_finite_options({**rates, "logit_scale": logit_scale})
    for name, rate in rates.items():
        require(rate is None or rate >= 0, name, "at least 0", rate)


def require_noise_on_coefficients(noisy: Iterable[object], coefficients: Iterable[object]) -> None:
    """Reject noise on parameters other than coefficients.

    Raises:
        ConfigError: an optimiser adds noise to other parameters, too.
    """
    own = {id(parameter) for parameter in coefficients}
    others = sum(id(parameter) not in own for parameter in noisy)
    if others:
        raise ConfigError(
            f"LogisticNoise: expected coefficients alone, got {others} other parameters (trained "
            "per task, or logit_scale), to which noise would be added.\nGive what is trained per "
            "task a rate of its own (model.private_learning_rate), and leave out logit_scale."
        )
