"""A tiny world for the command line: folders, data files and a configuration of both."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers

from tiny import SPLITS, relatives, save_family, sentences


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders of a tiny text classifier, files of two tasks, and a configuration of both."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            num_labels=3,
        )
    )
    paths = save_family(root, relatives(model, scale=0.2))
    tasks = {}
    for i, task in enumerate("ab"):
        files = {}
        for j, split in enumerate(SPLITS):
            rows = [{"text": t, "label": k % 3} for k, t in enumerate(sentences(10 * i + j, 6))]
            path = root / f"{task}-{split}.json"
            path.write_text("\n".join(json.dumps(row) for row in rows))
            files[split] = str(path)
        tasks[task] = {"path": "json", "kind": "text_classification", "data_files": files}
    return {
        "model": {"recipe": {"base": paths["base"], "sources": {k: paths[k] for k in "ab"}}},
        "data": {"tasks": tasks, "batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Outputs go to the test's own folder; no test talks to W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradmerge"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("WANDB_MODE", "disabled")
