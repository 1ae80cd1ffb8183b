"""Scores beside the trainer's validations: of a fit's start, and of its end on the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from gradmerge.common.progress import Progress


def score_start(trainer: Any, module: Any) -> None:
    """Score the selection split at the coefficients that a fit starts with, and log it as step 0.

    The names are those of later validations, so that curves begin here. Callbacks are not called:
    nothing is saved or stopped by this score. What the trainer limits (`limit_val_batches`) is
    limited here, and a fit that scores nothing, has resumed, or is a `fast_dev_run` has no start.
    """
    if trainer.global_step or trainer.fast_dev_run or not trainer.enable_validation:
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None:
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    loaders, limits = loop._combined_loader.flattened, trainer.num_val_batches
    values = _pass(trainer, module, loaders, limits, "the start", module.finish_start)
    module.train()
    for logger in trainer.loggers:
        logger.log_metrics(values, step=0)


def score_test(trainer: Any, module: Any) -> None:
    """Score the test split at the current coefficients, at the end of a fit, and log it."""
    loaders = trainer.datamodule.test_dataloader()
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    limit, before = trainer.limit_test_batches, trainer.state.stage
    limits = [limit if isinstance(limit, int) else math.ceil(limit * len(one)) for one in loaders]
    trainer.testing = True
    try:
        values = _pass(trainer, module, loaders, limits, "the test split", module.finish_test)
    finally:
        trainer.state.stage = before
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def _pass(
    trainer: Any,
    module: Any,
    loaders: Iterable[Any],
    limits: list[float],
    what: str,
    finish: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Give all batches to a module as the trainer's loops do, and return the scores of `finish`.

    Random states are afterwards as before.
    """
    module.eval()
    total = 0.0 if any(map(math.isinf, limits)) else sum(limits)
    with isolate_rng(), Progress(f"scoring {what}", total, "batches") as progress:
        module.on_validation_epoch_start()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for number, batch in _placed(trainer, loaders, limits):
                module.validation_step(batch, 0, number)
                progress.advance()
            return finish()


def _placed(trainer: Any, loaders: Iterable[Any], limits: list[float]) -> Iterator[tuple[int, Any]]:
    for number, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
        for batch in islice(loader, None if math.isinf(limit) else int(limit)):
            converted = trainer.precision_plugin.convert_input(batch)
            yield number, trainer.strategy.batch_to_device(converted, dataloader_idx=number)
