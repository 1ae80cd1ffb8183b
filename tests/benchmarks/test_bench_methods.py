"""The benchmark of static methods: which files it compares, and by which command."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import gradmerge.cli
from gradmerge.cli.compare.command import parser
from gradmerge.cli.compare.methods import read_methods

PROGRAM = "methods"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "static.md"


@pytest.fixture
def commands(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that the program runs; nothing is built or compared."""
    given: list[list[str]] = []
    monkeypatch.setattr(bench.harness, "build_suite", lambda *_, **__: None)
    monkeypatch.setattr(gradmerge.cli, "main", lambda arguments: given.append(arguments) or 0)
    output = ["--output", str(tmp_path / "out"), "--seeds", "3", "4"]
    monkeypatch.setattr("sys.argv", ["methods.py", "vision", *output])
    assert bench.main() == 0
    return given


def test_every_static_method_of_the_page_is_compared_with_twelve_scales(
    commands: list[list[str]],
) -> None:
    ((name, *arguments),) = commands
    assert name == "compare"
    given = parser().parse_args(arguments)
    assert (given.seeds, given.trials, given.metric) == ([3, 4], 12, "accuracy")
    assert "vision-seed3/base" in Path(given.suite).read_text()
    methods, problems = read_methods(given.methods)
    assert not problems
    names = {method.name for method in methods}
    table = PAGE.read_text().partition("## Scores")[2].partition("\nFor comparison")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert len(listed) > 30
    assert listed <= names
    assert not names & {"rebasin", "last_checkpoints", "m3_draws", "task_arithmetic_tuned"}
