"""A search as the start of gradient training: it runs on the selection split before the fit."""

from __future__ import annotations

import json
import os
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_info

from gradmerge.data import MergeDataModule
from gradmerge.evaluation import Selection, set_coefficients
from gradmerge.module import MergeModule
from gradmerge.search import AbstractSearch
from gradmerge.spec import from_plain

# What processes that a trainer starts read instead of searching once more.
_FOUND = "GRADMERGE_SEARCH"


class SearchedStart(lightning.Callback):
    """Starts a fit at the coefficients that a search has chosen.

    The choice becomes the recipe's init, so that regularisers measure from it. All trials and the
    choice stand in the run's provenance (`search`), in its checkpoints, and in its logs
    (`search/...`, one line a trial). A fit that goes on from a checkpoint does not search again.

    Args:
        search: runs on the selection split.
    """

    def __init__(self, search: AbstractSearch) -> None:
        self.search = search
        self.found: dict[str, Any] | None = None
        self._new = False

    def run(self, module: MergeModule, data: MergeDataModule) -> None:
        """Search, before the trainer starts; in a process that a trainer started, take over."""
        known = os.environ.get(_FOUND)
        if known is not None and os.environ.get("LOCAL_RANK", "0") != "0":
            self.found = json.loads(known)
        else:
            _, self.found = Selection(module, data).search(self.search)
            os.environ[_FOUND] = json.dumps(self.found)
        self._new = True

    def state_dict(self) -> dict[str, Any]:
        """What was found."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was found."""
        self.found, self._new = state_dict["found"], False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Set the coefficients, the first process's choice in all of them."""
        if self.found is None:
            return
        self.found = trainer.strategy.broadcast(self.found)
        assert self.found is not None
        chosen = from_plain(self.found["chosen"])
        pl_module.start_at(chosen)
        if self._new:
            set_coefficients(pl_module.merged, chosen)
            pl_module.results.clear()
            rank_zero_info(f"search: the fit starts at {chosen}")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Record the search, and log its trials."""
        if self.found is None:
            return
        pl_module.merged.plan.run["search"] = self.found
        if not self._new:
            return
        for logger in trainer.loggers:
            for number, trial in enumerate(self.found["trials"]):
                scores = {f"search/{name}": value for name, value in trial["selection"].items()}
                logger.log_metrics({"search/trial": float(number), **scores}, step=0)
