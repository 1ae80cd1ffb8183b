"""Work of a step at the widths of 8 billion parameters and four sources, traced without numbers.

Four of the 32 layers are traced: all layers are alike.
"""

from __future__ import annotations

import json
import struct
from functools import partial

import pytest
import torch
import transformers

from gradmerge import Recipe
from gradmerge.coefficients import Column
from gradmerge.engine.opening import Opening
from gradmerge.objectives import Objective
from gradmerge.training.data import MergeDataModule
from gradmerge.training.examples import TaskData
from gradmerge.training.planned import Fit, Setting, estimate

SOURCES = "abcd"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of Llama 3.1 8B, four layers in bfloat16, with holes in place of weights."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(config)
    header, end = {}, 0
    for name, parameter in network.state_dict().items():
        start, end = end, end + 2 * parameter.numel()
        shape = list(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = {}
    for name in ["base", *SOURCES]:
        folder = tmp_path_factory.mktemp(name)
        config.save_pretrained(folder)
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        found[name] = str(folder)
    return found, end // 2


def test_four_tasks_in_step_merge_each_tensor_twice_at_most_and_contract_once(places):
    folders, size = places
    assert size == 2 * 128256 * 4096 + 4096 + 4 * 218_112_000
    base = folders["base"]
    opening = Opening(Recipe({s: folders[s] for s in SOURCES}, base, coefficients=Column()))
    tasks = {s: TaskData("unread", "causal_lm", max_length=16, source=s) for s in SOURCES}
    adam, cpu = partial(torch.optim.Adam, lr=0.1), torch.device("cpu")
    data = MergeDataModule(tasks, batch_size=1)
    fit = Fit(data, Objective(), torch.bfloat16, adam, cpu, tasks_at_once=len(tasks))
    found = estimate(opening, fit, Setting("streamed", activation_checkpointing=True))
    embedding = 128256 * 4096  # its backward needs no weight
    assert found.contracted == size
    assert found.merged <= 2 * size - embedding
    # each merge, and the contraction, read the base and four sources in two bytes a weight
    assert found.read == 5 * 2 * (found.merged + found.contracted)
    assert found.parts["merged"] < 2 * 2 * embedding, "about one tensor at a time"
