"""Searches over one opened merge, scored on the selection split."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from gradmerge.coefficients import AbstractInit
from gradmerge.common.errors import ConfigError
from gradmerge.common.progress import Progress
from gradmerge.common.spec import from_plain, modernise, to_plain
from gradmerge.engine.merged import MergedModel
from gradmerge.search import AbstractSearch
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule
from gradmerge.training.run import quiet


def set_coefficients(merged: MergedModel, init: AbstractInit) -> None:
    """Write an init's coefficients into a merged model.

    Raises:
        ConfigError: the link cannot represent them.
    """
    with torch.no_grad():
        for key, value in merged.plan.initial_raw(init).items():
            merged.raw[key].copy_(value)


@dataclass
class Trial:
    """Coefficients that were tried, with their scores."""

    init: AbstractInit
    average: Mapping[str, float]
    """Means over tasks of the scores and the loss, by name."""


@dataclass
class Scorer:
    """Scores of the selection split as a function of coefficients; `test` alone reads the other.

    Examples are prepared once, and one merged model takes all coefficients in turn.
    """

    module: MergeModule
    data: MergeDataModule
    trials: list[Trial] = field(default_factory=list)
    """All trials, in order."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the trainer, such as `accelerator` (default: cpu)."""

    def __post_init__(self) -> None:
        """Create a silent trainer."""
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        silent: dict[str, Any] = dict.fromkeys(off, False)
        with quiet(logging.ERROR):
            own = {"accelerator": "cpu", **self.options, "devices": 1, **silent}
            self._trainer = lightning.Trainer(**own)

    def score(self) -> dict[str, dict[str, float]]:
        """Return all scores of the current coefficients: by task, and `average`."""
        self._trainer.validate(self.module, datamodule=self.data, verbose=False)
        return self.module.results["selection"]

    def test(self) -> dict[str, dict[str, float]]:
        """Return the scores of the current coefficients on the test split, which others leave."""
        self._trainer.test(self.module, datamodule=self.data, verbose=False)
        return self.module.results["test"]

    def try_out(self, init: AbstractInit, metric: str) -> float:
        """Set coefficients and return their score, with the sign that makes higher better.

        Raises:
            ConfigError: the tasks have no such score.
        """
        set_coefficients(self.module.merged, init)
        average = self.score()["average"]
        self.trials.append(Trial(init, dict(average)))
        score = self.module.score
        name = "loss" if metric == "loss" else score.name
        if name not in average:
            raise ConfigError(
                f"the selection split has no {name}, which the search optimises (it has "
                f"{', '.join(average) or 'no score'}). Tasks need labels."
            )
        value = average[name]
        if math.isnan(value):
            return -math.inf
        return value if name == score.name and score.higher_is_better else -value

    def search(self, search: AbstractSearch) -> tuple[AbstractInit, dict[str, Any]]:
        """Run a search and set its choice; return that, and all trials as plain data."""
        recipe = self.module.recipe
        sources = self.module.merged.plan.source_names
        scores: list[float] = []
        name = type(search).__name__

        with Progress(f"search, {name}", search.count(len(sources)), "merges") as progress:

            def score(init: AbstractInit) -> float:
                scores.append(self.try_out(init, search.metric))
                progress.advance(note=f"best {abs(max(scores)):.4f}")
                return scores[-1]

            chosen = search.run(recipe.init, sources, score)
        if scores and max(scores) == -math.inf:
            raise ConfigError(
                f"{name}: none of {len(scores)} merges has a score, all are NaN "
                "on the selection split. Look for NaN in the sources, or use smaller coefficients."
            )
        set_coefficients(self.module.merged, chosen)
        return chosen, {
            "search": to_plain(search),
            "chosen": to_plain(chosen),
            "trials": [
                {"init": to_plain(trial.init), "selection": dict(trial.average)}
                for trial in self.trials
            ],
        }


# Environment variable from which processes started by a trainer read the search's result.
_FOUND = "GRADMERGE_SEARCH"


class SearchedStart(lightning.Callback):
    """Starts a fit at the coefficients that a search chooses.

    The choice becomes the recipe's init, so that regularisers measure from it. All trials and the
    choice are recorded in the run's provenance (`search`), in its checkpoints and in its logs
    (`search/...`, one line per trial). A fit that resumes from a checkpoint does not search again.

    Args:
        search: to run on the selection split.
    """

    def __init__(self, search: AbstractSearch) -> None:
        self.search = search
        self.found: dict[str, Any] | None = None
        self._new = False

    def run(self, module: MergeModule, data: MergeDataModule) -> None:
        """Search before the trainer starts; a process started by a trainer reads the result."""
        known = os.environ.get(_FOUND)
        if known is not None and os.environ.get("LOCAL_RANK", "0") != "0":
            self.found = json.loads(known)
        else:
            _, self.found = Scorer(module, data).search(self.search)
            os.environ[_FOUND] = json.dumps(self.found)
        self._new = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found, self._new = modernise(state_dict["found"]), False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Set the coefficients, in all processes to the first one's choice."""
        if self.found is None:
            return
        self.found = trainer.strategy.broadcast(self.found)
        assert self.found is not None
        chosen = from_plain(self.found["chosen"], pl_module.allow_modules)
        pl_module.start_at(chosen)
        if self._new:
            set_coefficients(pl_module.merged, chosen)
            pl_module.results.clear()
            rank_zero_info(f"search: the fit starts at {chosen}")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Record the search and log its trials."""
        if self.found is None:
            return
        pl_module.merged.state.run["search"] = self.found
        if not self._new:
            return
        for logger in trainer.loggers:
            for number, trial in enumerate(self.found["trials"]):
                scores = {f"search/{name}": value for name, value in trial["selection"].items()}
                logger.log_metrics({"search/trial": float(number), **scores}, step=0)
