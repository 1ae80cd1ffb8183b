"""The README's examples and commands run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from example_folders import make_example_folders
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradmerge.cli import main
from gradmerge.cli.main import COMMANDS, USAGE

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def model_folders(tmp_path, monkeypatch):
    make_example_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 110


def test_python_example(model_folders):
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 16
    steps, fewer = "max_steps=60, val_check_interval=20", "max_steps=2, val_check_interval=2"
    assert steps in example
    exec(compile(example.replace(steps, fewer), "README.md", "exec"), {})
    model = AutoModelForCausalLM.from_pretrained("merged-from-python")
    tokenizer = AutoTokenizer.from_pretrained("merged-from-python")
    assert model(**tokenizer("w1 w2", return_tensors="pt")).logits.shape[-1] == model.vocab_size


@pytest.mark.parametrize("command", ["learn", "merge"])
def test_the_commands_for_two_checkpoints(model_folders, command):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    (line,) = [line for line in commands if line.startswith(f"gradmerge {command} ")]
    quick = ["--steps", "2", "--max_length", "16"] if command == "learn" else []
    assert main([*shlex.split(line)[1:], *quick]) == 0
    assert AutoModelForCausalLM.from_pretrained("merged").num_parameters() > 0


def test_commands_are_those_of_the_program():
    named = set(re.findall(r"`gradmerge (\w+)", README))
    assert named == set(COMMANDS)
    assert all(command in USAGE for command in COMMANDS)


def test_named_files_exist():
    for path in re.findall(r"(?:configs|scripts)/[\w/]+\.(?:yaml|sh|py)", README):
        assert (ROOT / path).is_file(), path
