"""The benchmark of methods: which files it compares, and by which command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradmerge.cli
from gradmerge.cli.compare.command import parser
from gradmerge.cli.compare.methods import read_methods, with_axes
from gradmerge.cli.main import learn
from tiny import write_yaml

PROGRAM = "methods"
PAGES = Path(__file__).parents[2] / "docs" / "benchmarks"


@pytest.fixture
def command(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    """The options of the command that the program runs; nothing is built or compared."""
    given: list[list[str]] = []
    monkeypatch.setattr(bench.harness, "build_suite", lambda *_, **__: None)
    monkeypatch.setattr(gradmerge.cli, "main", lambda arguments: given.append(arguments) or 0)

    def run(*arguments: str) -> Any:
        output = ["--output", str(tmp_path / "out"), "--seeds", "3", "4"]
        monkeypatch.setattr("sys.argv", ["methods.py", *arguments, *output])
        assert bench.main() == 0
        name, *options = given.pop()
        assert name == "compare"
        return parser().parse_args(options)

    return run


def listed(page: str, start: str) -> set[str]:
    text = (PAGES / page).read_text().partition(start)[2].partition("\nFor comparison")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text.partition("\n## ")[0], re.MULTILINE))


def test_every_static_method_of_the_page_is_compared_with_twelve_scales(
    command: Callable[..., Any],
) -> None:
    given = command("static", "vision")
    assert (given.seeds, given.trials, given.metric) == ([3, 4], 12, "accuracy")
    assert "vision-seed3/base" in Path(given.suite).read_text()
    methods, problems = read_methods(given.methods)
    assert not problems
    assert not any(method.learns for method in methods)
    names = {method.name for method in methods}
    assert len(listed("static.md", "## Scores")) > 30
    assert listed("static.md", "## Scores") <= names
    assert not names & {"rebasin", "last_checkpoints", "m3_draws", "task_arithmetic_tuned"}


def test_learned_methods_have_the_same_steps_schedule_and_rates(
    command: Callable[..., Any],
) -> None:
    given = command("learned", "vision")
    methods, problems = read_methods(given.methods)
    methods, wrong = with_axes(methods, given.tune)
    assert not problems + wrong
    names = {method.name for method in methods}
    page = {re.sub("[ ,]+", "_", name) for name in listed("learned.md", "## Images")}
    renamed = {
        "adarank_marginal_from_the_mean": "adarank_cart",
        "adarank_masks_alone": "adarank_masks",
    }
    assert len(page) > 15
    assert {renamed.get(name, name) for name in page} <= names
    suite = Path(given.suite)
    for method in methods:
        if not method.learns:
            continue
        tree = method.tree(str(suite))
        assert tree["trainer"]["max_steps"] == 100, method.name
        assert tree["lr_scheduler"]["class_path"].endswith("CosineDecay"), method.name
        assert method.axis.values == (0.01, 0.03, 0.1), method.name
        if "driver" in tree:
            assert tree["driver"]["init_args"]["steps"] == 100
    assert not {m for m in command("learned", "lm").methods if "entropy" in m}


@pytest.mark.usefixtures("own_folder")
def test_variants_change_what_they_say(
    bench: ModuleType, world: dict[str, Any], tmp_path: Path
) -> None:
    suite = write_yaml(tmp_path / "suite.yaml", world)

    def opened(name: str) -> Any:
        files = [suite, *map(str, bench.COMBINED[name])]
        arguments = [word for file in files for word in ("--config", file)]
        return learn([*arguments, "--trainer.logger=false"], run=False, opens=False).model.keywords

    cart = opened("adarank_cart")
    assert cart["recipe"].origin == "mean"
    assert (cart["recipe"].coefficients.start, cart["recipe"].init.factor) == (2.3, 2.3)
    assert cart["recipe"].init.inner.share == 0.16
    assert cart["recipe"].coefficients.inner.temperature == 10.0, "as in the method's file"
    assert cart["objective"].terms[0].marginal == 1.0
    masks = opened("adarank_masks")["recipe"]
    assert (masks.operator.scale, masks.coefficients.start) == (0.3, 0.1)
    assert list(masks.frozen.values()) == [1.0]
