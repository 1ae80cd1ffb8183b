"""The README's examples and commands are run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ARCHITECTURES
from gradmerge.cli import main
from gradmerge.cli.main import COMMANDS, USAGE
from tiny import relatives, sentences, word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def model_folders(tmp_path, monkeypatch):
    """The folders that the examples name, tiny."""
    models = relatives(ARCHITECTURES["llama"][0](), 3, scale=0.05)
    for name, model in zip(("base", "code", "plays"), models, strict=True):
        folder = tmp_path / "models" / name
        model.save_pretrained(folder)
        word_tokenizer(folder)
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("code", "plays")):
        rows = [json.dumps({"text": text}) for text in sentences(i, 60, length=300)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def test_python_example(model_folders):
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 16
    example = example.replace(
        "max_steps=60, val_check_interval=20", "max_steps=2, val_check_interval=2"
    )
    exec(compile(example, "README.md", "exec"), {})
    model = AutoModelForCausalLM.from_pretrained("merged")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert model(**tokenizer("w1 w2", return_tensors="pt")).logits.shape[-1] == model.vocab_size


def test_yaml_example(model_folders):
    (example,) = blocks("yaml")
    config = yaml.safe_load(example)
    config["trainer"]["max_steps"] = 2
    config["trainer"]["default_root_dir"] = "outputs"
    Path("merge.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "merge.yaml"]) == 0
    assert AutoModelForCausalLM.from_pretrained("merged").dtype.itemsize == 2


def test_commands_are_those_of_the_program():
    named = set(re.findall(r"`gradmerge (\w+)", README)) | set(
        re.findall(r"gradmerge (\w+) --", README)
    )
    assert named == set(COMMANDS)
    assert all(command in USAGE for command in COMMANDS)


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    lost = [t for t in targets if "://" not in t and not (ROOT / page).parent.joinpath(t).exists()]
    assert not lost


def test_named_files_exist():
    for path in re.findall(r"(?:configs|scripts)/[\w/]+\.(?:yaml|sh|py)", README):
        assert (ROOT / path).is_file(), path
