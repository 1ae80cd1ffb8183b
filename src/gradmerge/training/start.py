"""Scores of the start: the selection split before the first step of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng


def score_start(trainer: Any, module: Any) -> None:
    """Score the selection split at the coefficients that a fit starts with, and log it as step 0.

    The names are those of later validations, so that curves begin here. Callbacks are not called:
    nothing is saved or stopped by this score. What the trainer limits (`limit_val_batches`) is
    limited here, and a fit that scores nothing, has resumed, or is a `fast_dev_run` has no start.
    """
    if trainer.global_step or trainer.fast_dev_run or not trainer.enable_validation:
        return
    with isolate_rng():  # the fit itself draws as without it
        module.eval()
        module.on_validation_epoch_start()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for number, batch in _batches(trainer):
                module.validation_step(batch, 0, number)
        values = module.finish_start()
        module.train()
    for logger in trainer.loggers:
        logger.log_metrics(values, step=0)


def _batches(trainer: Any) -> Iterator[tuple[int, Any]]:
    """Yield the placed batches of the validation loaders with the numbers of these."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None:
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    for number, loader in enumerate(loop._combined_loader.flattened):
        limit = trainer.num_val_batches[number]
        for batch in islice(loader, None if math.isinf(limit) else int(limit)):
            converted = trainer.precision_plugin.convert_input(batch)
            yield number, trainer.strategy.batch_to_device(converted, dataloader_idx=number)
