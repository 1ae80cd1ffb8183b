"""Benchmarks of lm-evaluation-harness during a fit."""

from __future__ import annotations

from typing import Any

import lightning

from gradmerge.common.ranges import require_ranges
from gradmerge.training.harness import (
    Evaluation,
    Harness,
    Scores,
    require_language_model,
)


class EvaluateEvery(lightning.Callback):
    """Run benchmarks of lm-evaluation-harness on the merge after every n-th validation of a fit.

    Scores are logged as `eval/TASK/METRIC`, which other callbacks may monitor, and are kept in the
    checkpoint for model card and provenance. The fit learns the same with and without it. The other
    processes of a fit on several devices wait for the first.

    Args:
        tasks: tasks or groups of tasks, separated by commas.
        every_n_validations: run after every n-th validation.
        limit: maximum number of examples per task. Scores on a part show the trend, and are no
            benchmark results.
        include_path: folder of task files (YAML) of one's own. Such files can run code, so the
            command line wants `--allow_modules lm_eval` for it.
        num_fewshot: number of solved examples in each prompt. Default: as the task says.
        batch_size: number of examples per batch.
        apply_chat_template: ask through the tokenizer's chat template.
        head: task whose head is used, if heads are private. Default: the first.
    """

    def __init__(
        self,
        tasks: str | list[str],
        every_n_validations: int = 1,
        limit: int | None = 100,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
        head: str | None = None,
    ) -> None:
        require_ranges(EvaluateEvery, {"every_n_validations": every_n_validations})
        self.harness = Harness(
            tasks, include_path, num_fewshot, limit, batch_size, apply_chat_template
        )
        self.every_n_validations = every_n_validations
        self.head = head
        self._count = 0

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Reject unknown tasks and networks that are no language models before training."""
        if stage == "fit" and hasattr(pl_module, "merged"):
            require_language_model(type(pl_module.merged.skeleton).__name__, "EvaluateEvery")
            _ = self.harness.loaded

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Evaluate and log, except in the sanity check and outside of a fit."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not hasattr(pl_module, "merged"):
            return  # a driver's module, which learns only a part of the merge
        pl_module.results.pop(self.harness.stage, None)  # of earlier coefficients
        self._count += 1
        if (self._count - 1) % self.every_n_validations:
            return
        scores: Scores | None = None
        if trainer.is_global_zero:
            from gradmerge.training.harness_model import MergedLM  # needs lm-eval

            size = self.harness.batch_size
            model = MergedLM(pl_module.merged, head=self.head, quiet=True, batch_size=size)
            scores = self.harness.run(model).scores
        scores = trainer.strategy.broadcast(scores)
        pl_module.results[self.harness.stage] = scores
        for name, value in Evaluation("", scores or {}, {}, {}).logged.items():
            pl_module.log(name, value)
            pl_module.history.add(name, trainer.global_step, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations, for a fit that is resumed."""
        return {"count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._count = int(state_dict.get("count", 0))
