"""Tiny versions of the folders that README and guides name."""

from __future__ import annotations

import json
from pathlib import Path

from architectures import ARCHITECTURES
from tiny import relatives, sentences, word_tokenizer


def make_example_folders(root: Path) -> None:
    """Write models/{base,code,plays}, run/checkpoint-{1..5}, data/{code,plays}.jsonl, and an empty
    folder for an earlier merge.
    """
    (root / "merged-earlier").mkdir()
    models = relatives(ARCHITECTURES["llama"][0](), 3, scale=0.05)
    for name, model in zip(("base", "code", "plays"), models, strict=True):
        folder = root / "models" / name
        model.save_pretrained(folder)
        word_tokenizer(folder)
    for step, model in enumerate(relatives(models[0], 5, scale=0.05), 1):
        model.save_pretrained(root / f"run/checkpoint-{step}")
    (root / "data").mkdir()
    for i, name in enumerate(("code", "plays")):
        rows = [json.dumps({"text": text}) for text in sentences(i, 60, length=300)]
        (root / "data" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
