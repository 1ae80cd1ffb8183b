"""Choice of a rate and the table of the benchmark of drivers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = "drivers"


def _result(selection: float, **more: Any) -> dict[str, Any]:
    scores = {"digits": 0.5, "animals": 0.7, "average": 0.6}
    found = {"selection": selection, "score": 0.6, "test": scores, "examples": 512, "rate": 0.1}
    return {**found, "coefficients": 1_200, "seconds": 9.6, "memory": 2.1e6, **more}


@pytest.mark.parametrize(("suite", "best"), [("vision", 0.03), ("lm", 0.01)])
def test_the_rate_is_the_best_by_score(bench: ModuleType, suite: str, best: float) -> None:
    trials = {0.01: _result(0.5), 0.03: _result(0.7), 0.1: _result(0.6)}
    trials[0.3] = _result(float("nan"))  # diverged
    assert bench.best_of(suite, trials) == best


def test_a_finished_fit_is_read_from_the_cache(bench: ModuleType, tmp_path: Path) -> None:
    for rate, selection in ((0.01, 0.4), (0.03, 0.9)):
        job = bench.Job("vision", 3, "tensor", rate, tmp_path / "suites")
        bench.harness.write_json(tmp_path / "drivers" / f"{job.key}.json", _result(selection))
    first = bench.Job("vision", 3, "tensor", 0.01, tmp_path / "suites")
    job, found = bench.tuned(first, (0.01, 0.03))
    assert job.rate == 0.03
    assert found["selection"] == 0.9


def test_the_table_has_the_best_first_and_the_last_task_apart(bench: ModuleType) -> None:
    found = {
        "tree": {3: _result(0.6, score=0.5), 4: _result(0.6, score=0.7, rate=0.03)},
        "pairwise": {3: _result(0.6, score=0.9)},
    }
    head, rule, first, second = bench.render("vision", found).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == 10
    assert first.startswith("| `pairwise` | 0.900 | 0.500 | 0.700 | 0.1 |")
    assert second.startswith("| `tree` | 0.600 ± 0.141 | 0.500 | 0.700 | 0.1, 0.03 | 1,200 | 512 |")
    assert bench.render("lm", found).splitlines()[2].startswith("| `tree`")  # lower is better
