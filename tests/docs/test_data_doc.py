"""The guide on data: every example file takes part in a fit; its columns are those of the code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from gradmerge import Generation, MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.cli import main
from gradmerge.coefficients import Tensor
from gradmerge.training.kinds import KINDS
from gradmerge.training.monitors import NAMES
from kinds import CASES, folders
from tiny import SPLITS, trainer_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "data.md").read_text()
_FOUND = re.findall(
    r"^### `(\w+)`\n\n```json\n(.*?)\n```\n\n```yaml\n(.*?)\n```", PAGE, re.M | re.S
)
SECTIONS = {kind: rows for kind, rows, _ in _FOUND}
TASKS = {kind: task for kind, _, task in _FOUND}
NETWORKS = {"causal_lm": "text per row", "tensors": "text per row"}


def words_of(value):
    """All words of the texts in a row."""
    if isinstance(value, str):
        return value.split()
    if isinstance(value, dict):
        value = list(value.values())
    return [word for each in value for word in words_of(each)] if isinstance(value, list) else []


def test_every_kind_has_an_example_of_two_lines():
    assert set(SECTIONS) == set(TASKS) == set(KINDS)
    assert all(len(example.splitlines()) == 2 for example in SECTIONS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_every_kind_takes_part_in_a_fit(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in SECTIONS[kind].splitlines()]
    described = yaml.safe_load(TASKS[kind])
    if "data_files" in described:
        Path(described["data_files"]).write_text(SECTIONS[kind])
    else:
        folder = Path(described["path"])
        folder.mkdir()
        (folder / "metadata.jsonl").write_text(SECTIONS[kind])
        for i, row in enumerate(rows):
            Image.new("RGB", (8, 8), (50 * i, 90, 200)).save(folder / row["file_name"])
    if "generation" in described:
        described["generation"] = Generation(**described["generation"])
    assert described["kind"] == kind
    case = CASES[NETWORKS.get(kind, kind)]
    used = dict.fromkeys([*words_of(rows), *words_of(described), "assistant", "user", "system"])
    words = [*used, *(f"w{i}" for i in range(40))]
    paths = folders(tmp_path, case, words)
    task = TaskData(**described, splits=dict.fromkeys(SPLITS, "train"))
    data = MergeDataModule({"a": task}, batch_size=2, check_disjoint=False)
    sources = {name: paths[name] for name in "ab"}
    module = MergeModule(Recipe(sources, base=paths["base"], coefficients=Tensor()))
    before = {key: raw.detach().clone() for key, raw in module.merged.raw.items()}
    trainer_of(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert any(not before[key].equal(raw) for key, raw in module.merged.raw.items())
    scores = module.results["selection"]["a"]
    measure = next(m for m, names in NAMES.items() if set(names) <= set(scores))
    assert f"`{NAMES[measure][0]}`" in PAGE
    if "generation" in described:
        assert 0 <= scores["exact_match"] <= 1


def test_the_columns_are_those_of_the_code():
    for kind, found in KINDS.items():
        (row,) = re.findall(rf"^\| \[`{kind}`\]\(#{kind}\) \|(.*)$", PAGE, re.MULTILINE)
        for roles, mark in ((found.roles, ":"), (found.optional, " (optional):")):
            for role, names in roles.items():
                assert f"{role}{mark} {', '.join(f'`{name}`' for name in names)}" in row, kind


def test_python_examples_run(tmp_path):
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "data.md", "exec"), {})


def test_a_chat_with_generated_texts_is_fitted_from_a_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judging.py").write_text("def is_short(text, row):\n    return len(text) < 800\n")
    rows = [json.loads(line) for line in SECTIONS["chat"].splitlines()]
    Path("chat.jsonl").write_text(SECTIONS["chat"])
    paths = folders(tmp_path, CASES["chat"], [*dict.fromkeys(words_of(rows))])
    task = {**yaml.safe_load(TASKS["chat"]), "splits": dict.fromkeys(SPLITS, "train")}
    task["generation"] |= {"check": "judging.is_short", "metrics": ["rouge"]}
    config = {
        "model": {"recipe": {"base": paths["base"], "sources": {k: paths[k] for k in "ab"}}},
        "data": {"tasks": {"a": task}, "batch_size": 2, "check_disjoint": False},
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "selection/average/passed", "dirpath": "kept"},
                }
            ],
        },
    }
    Path("learn.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(["fit", "--config", "learn.yaml"]))
    assert stopped.value.code != 0
    assert "--allow_modules judging" in capsys.readouterr().err
    assert not Path("kept").exists()
    assert main(["fit", "--config", "learn.yaml", "--allow_modules", "judging"]) == 0
    assert list(Path("kept").glob("*.ckpt"))
