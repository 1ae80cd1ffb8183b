"""Choice of a rate and the table of the benchmark of learned methods."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = "learned"


def _result(selection: float, loss: float, **more: Any) -> dict[str, Any]:
    scores = {"digits": 0.5, "animals": 0.7, "average": 0.6}
    found = {"selection": selection, "loss": loss, "labels": True, "score": 0.6, "test": scores}
    cost = {"coefficients": 1_200, "examples": 512, "seconds": 9.6, "memory": 2.1e6, "rate": 0.1}
    return {**found, **cost, **more}


@pytest.mark.parametrize(
    ("suite", "labels", "best"),
    [("vision", True, 0.03), ("lm", True, 0.01), ("vision", False, 0.1), ("lm", False, 0.1)],
)
def test_the_rate_is_the_best_by_score_or_without_labels_by_loss(
    bench: ModuleType, suite: str, labels: bool, best: float
) -> None:
    trials = {0.01: _result(0.5, 3.0), 0.03: _result(0.7, 2.0), 0.1: _result(0.6, 1.0)}
    trials[0.3] = _result(float("nan"), float("nan"))  # diverged
    assert bench.best_of(suite, {r: {**t, "labels": labels} for r, t in trials.items()}) == best


def test_a_finished_fit_is_read_from_the_cache(bench: ModuleType, tmp_path: Path) -> None:
    for rate, selection in ((0.01, 0.4), (0.03, 0.9)):
        job = bench.Job("vision", 3, "tensor", rate, tmp_path / "suites")
        kept = tmp_path / "learned" / f"{job.key}.json"
        bench.harness.write_json(kept, _result(selection, 1.0))
    first = bench.Job("vision", 3, "tensor", 0.01, tmp_path / "suites")
    job, found = bench.tuned(first, (0.01, 0.03))
    assert job.rate == 0.03
    assert found["selection"] == 0.9


def test_the_table_has_the_best_first_and_the_last_task_apart(bench: ModuleType) -> None:
    found = {
        "column": {3: _result(0.6, 1.0, score=0.5), 4: _result(0.6, 1.0, score=0.7, rate=0.03)},
        "m3": {3: _result(0.6, 1.0, score=0.9, labels=False, examples=0)},
    }
    head, rule, first, second = bench.render("vision", found, apart=True).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == 10
    assert first.startswith("| `m3` | 0.900 | 0.500 | 0.700 | - |")
    assert second.startswith("| `column` | 0.600 ± 0.141 | 0.500 | 0.700 | 0.1, 0.03 | 1,200 |")
    assert "| none; selection labels |" in first
    assert "| 512, labels | 10 | 2 |" in second
    assert bench.render("lm", found).splitlines()[2].startswith("| `column`")  # lower is better
