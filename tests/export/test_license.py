"""Licenses of merges: the strictest of the sources', or a warning; cards by huggingface_hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from gradmerge import Recipe, merge
from gradmerge.cli import main
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.export.license import License, read_license, strictest
from tiny import relatives, save_family


@pytest.fixture
def family(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    monkeypatch.chdir(tmp_path)
    return save_family(tmp_path / "models", relatives(transformers.GPT2LMHeadModel(config)))


def state(paths, **licenses):
    for name, license in licenses.items():
        data = license if isinstance(license, dict) else {"license": license}
        Path(paths[name], "README.md").write_text(f"---\n{yaml.safe_dump(data)}---\n# Model\n")


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (("mit", "apache-2.0", "mit"), "apache-2.0"),
        (("mit", "mit", "cc-by-4.0"), "cc-by-4.0"),
        (("apache-2.0", "llama3.1", "llama3.1"), "llama3.1"),
        (("apache-2.0", "gpl-3.0", "mit"), "gpl-3.0"),
        (("gemma", "llama3.1", "mit"), "conflict: base has gemma, a has llama3.1"),
        (("gpl-3.0", "cc-by-nc-4.0", "mit"), "conflict: base has gpl-3.0, a has cc-by-nc-4.0"),
        (("cc-by-nc-nd-4.0", "mit", "mit"), "no derivatives are allowed by a license of base has"),
        (("mit", None, None), "the model cards of a, b state none"),
    ],
)
def test_the_strictest_license_or_a_warning(stated, expected):
    found = strictest(
        {n: s and License(s) for n, s in zip(("base", "a", "b"), stated, strict=True)}
    )
    if " " in expected:
        assert found.license is None
        assert expected in found.warning
    else:
        assert (str(found.license), found.warning) == (expected, None)


def test_the_license_is_in_card_and_provenance(family, capsys):
    other = {"license": "other", "license_name": "qwen", "license_link": "https://a.org/LICENSE"}
    state(family, base=other, a="mit", b="apache-2.0")
    sources = json.dumps({"a": family["a"], "b": family["b"]})
    command = ["merge", "--recipe.sources", sources, "--recipe.base", family["base"]]
    assert main([*command, "--output", "out"]) == 0
    assert capsys.readouterr().err == ""
    card = ModelCard.load("out/README.md")
    assert {key: card.data.get(key) for key in other} == other
    assert "| a | mit |" in card.text
    assert json.loads(Path("out/provenance.json").read_text())["license"] == {"id": "qwen (other)"}
    assert read_license(Path("out")) == License("other", "qwen", "https://a.org/LICENSE")
    state(family, b="gemma")
    assert main([*command, "--output", "warned"]) == 0
    warning = "license: the sources' licenses conflict: base has qwen (other), b has gemma"
    assert f"gradmerge: warning {warning}" in capsys.readouterr().err
    card = ModelCard.load("warned/README.md")
    assert card.data.license is None
    assert "**Not settled**: the sources' licenses conflict" in card.text


@pytest.mark.parametrize(
    "text",
    [
        "# No metadata", "---\nlicense: [mit, gpl-3.0]\n---\n", "---\nlicense: other\n---\n",
        "---\nlicense: unknown\n---\n", "---\n: {\n---\n", "---\nlicense: 5\n---\n", "\xff---\n",
        "---\n" + "a: " + "[" * 200 + "\n---\n", "---\n- a\n---\n", "---\nmodel-index: 5\n---\n",
    ],
)  # fmt: skip
def test_cards_that_state_none(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode("latin1"))
    assert read_license(tmp_path) is None


def test_scores_survive_the_round_trip_of_the_hub(family):
    """Metadata as the hub reads it: model-index to results and back."""
    plan = open_plan(Recipe({"a": family["a"], "b": family["b"]}), with_skeleton=False)
    results = {"test": {"a": {"accuracy": 0.75, "loss": 0.5}, "b": {"accuracy": 0.25}}}
    folder = export_state(FitState.start(plan), "merged", results=results)
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    name, found = model_index_to_eval_results(front["model-index"])
    assert name == "merged"
    scores = {(r.dataset_split, r.dataset_name, r.metric_type): r.metric_value for r in found}
    assert scores == {
        (stage, task, metric): value
        for stage, tasks in results.items()
        for task, values in tasks.items()
        for metric, value in values.items()
    }
    assert all(result.task_type == front["pipeline_tag"] for result in found)


def test_folders_with_modules_belong_to_sentence_transformers(family):
    for name in "ab":
        Path(family[name], "modules.json").write_text("[]")
    card = ModelCard.load(merge(Recipe({"a": family["a"], "b": family["b"]}), "out") / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
