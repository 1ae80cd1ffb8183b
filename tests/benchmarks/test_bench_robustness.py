"""Typing errors, and a suite whose unseen tasks have heads but no source."""

from __future__ import annotations

import json

import yaml

PROGRAM = "robustness"


def test_about_one_character_in_ten_is_mistyped_and_always_the_same_ones(bench):
    text = "quick " * 500
    found = bench.mistyped(text)
    assert found == bench.mistyped(text) != text
    assert bench.mistyped(text, 0.0) == text
    untouched = found.split().count("quick") / 500
    assert abs(untouched - 0.9**5) < 0.07  # three standard deviations


def test_unseen_tasks_have_heads_and_no_source(bench, tmp_path):
    def task(name):
        return {"data_files": {"test": str(tmp_path / f"s-seed3/data/{name}/test.jsonl")}}

    for name in "ab":
        for seed in (3, 4):
            folder = tmp_path / f"s-seed{seed}/data/{name}"
            folder.mkdir(parents=True)
            row = {"text": "some words and more", "label": seed}
            (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    tree = {
        "model": {"recipe": {"sources": {name: f"x/{name}" for name in "abc"}}},
        "data": {"tasks": {name: task(name) for name in "abc"}},
    }
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(tree))
    suite, others = bench.write_suite(path, ["c"], [3, 4], tmp_path)
    found = yaml.safe_load(suite.read_text())
    assert found["model"]["recipe"] == {
        "sources": {"a": "x/a", "b": "x/b"},
        "heads": {"c": "x/c"},
    }
    assert list(found["data"]["tasks"]) == ["a", "b"]
    unseen, mistyped = (yaml.safe_load(others[n].read_text()) for n in ("unseen", "mistyped"))
    assert unseen == {"data": {"tasks": {"c": task("c")}}}
    place = mistyped["data"]["tasks"]["a"]["data_files"]["test"]
    assert place == str(tmp_path / "s-seed3/data/a/mistyped.jsonl")
    for seed in (3, 4):
        rows = (tmp_path / f"s-seed{seed}/data/b/mistyped.jsonl").read_text()
        assert json.loads(rows)["label"] == seed
