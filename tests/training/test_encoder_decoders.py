"""Encoder-decoders from data to a folder that plain transformers loads and generates with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Constant
from gradmerge.export.folder import export_merged
from gradmerge.objectives import CrossEntropy, Objective
from kinds import CASES, folders, task_of
from networks import seeded
from tiny import relatives, save_family, trainer_of

_SMALL: dict[str, Any] = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = CASES["seq2seq"]
BART = replace(
    T5,
    network=lambda **o: seeded(
        transformers.BartForConditionalGeneration,
        **{**_SMALL, "max_position_embeddings": 32, "forced_eos_token_id": None, **o},
    ),
)


def fitted(tmp_path, paths, tasks):
    """The merge after two steps, its folder as transformers loads it, and a batch."""
    recipe = Recipe({n: paths[n] for n in "ab"}, base=paths["base"], init=Constant(0.3))
    module = MergeModule(recipe, Objective([CrossEntropy()]))
    data = MergeDataModule(tasks, batch_size=2)
    trainer_of(tmp_path, max_steps=2).fit(module, datamodule=data)
    assert (module.merged.raw["tensor"] != 0.3).any()
    out = export_merged(module.merged, tmp_path / "out")
    kind = type(module.merged.skeleton).__name__
    loaded = getattr(transformers, kind).from_pretrained(out, dtype=torch.float32).eval()
    return module.merged.eval(), loaded


@pytest.mark.parametrize("case", [T5, BART], ids=["t5", "bart"])
def test_texts_to_texts(tmp_path, case):
    paths = folders(tmp_path / "models", case)
    merged, loaded = fitted(tmp_path, paths, {n: task_of(case, i) for i, n in enumerate("ab")})
    batch = {
        "input_ids": torch.arange(4, 12).view(2, 4),
        "decoder_input_ids": torch.arange(3, 9).view(2, 3),
    }
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, loaded(**batch).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("w1 w2", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3).shape[0] == 1


def test_sounds_to_texts(tmp_path):
    network = seeded(
        transformers.WhisperForConditionalGeneration,
        **_SMALL,
        vocab_size=32,
        num_mel_bins=4,
        max_source_positions=8,
        max_target_positions=8,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    paths = save_family(tmp_path / "models", relatives(network, scale=0.2), tokenizer=False)
    generator = torch.Generator().manual_seed(0)

    def example() -> dict[str, torch.Tensor]:
        sounds = torch.randn(4, 16, generator=generator)
        labels = torch.randint(3, 32, (5,), generator=generator)
        before = torch.cat([torch.tensor([2]), labels[:-1]])
        return {"input_features": sounds, "decoder_input_ids": before, "labels": labels}

    stages = ("adaptation", "selection", "test")
    tasks = {
        name: TaskData(path={s: [example() for _ in range(4)] for s in stages}, kind="tensors")
        for name in "ab"
    }
    merged, loaded = fitted(tmp_path, paths, tasks)
    batch = {
        "input_features": torch.stack([example()["input_features"] for _ in range(2)]),
        "decoder_input_ids": torch.arange(3, 9).view(2, 3),
    }
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, loaded(**batch).logits)
