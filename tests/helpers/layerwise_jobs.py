"""Networks, data and jobs that the tests of the layer-wise driver share."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from gradmerge import MergeDataModule, Recipe, TaskData
from gradmerge.coefficients import Constant, Element
from gradmerge.drivers import Job, LayerWise
from networks import seeded
from tiny import SPLITS, build, relatives


@contextmanager
def frozen():
    """Keep existing objects out of garbage collections (see the fixture `small_collections`)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Stack(nn.Module):
    """A stem, blocks of different widths in a ModuleList, and a head; one block has no weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 5)
        first = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.blocks = nn.ModuleList([first, nn.Tanh(), nn.Sequential(nn.Linear(7, 4), nn.Tanh())])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.stem(x).tanh()
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Narrow(Stack):
    """Two blocks with weights, one after the other."""

    def __init__(self):
        super().__init__()
        first, _, last = self.blocks
        self.blocks = nn.ModuleList([first, last])


class Batched(nn.Module):
    """Blocks with BatchNorm, one before them and one after; a block returns a dictionary."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, scale, *, x):
            return {"hidden": x + self.norm(self.linear(x)).relu() * scale, "other": None}

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        scale = x.abs().mean()
        x = self.first(x)
        for block in self.blocks:
            x = block(scale, x=x)["hidden"]
        return self.head(self.last(x))


def llama(layers=3, **options):
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": 1}
    return seeded(transformers.LlamaForCausalLM, **sizes, **ends, **options)


def bert():
    kind = transformers.BertForSequenceClassification
    return seeded(kind, max_position_embeddings=16, num_labels=3)


def vit():
    return seeded(transformers.ViTForImageClassification, num_labels=3)


def examples(kind, seed, count):
    """Inputs of each kind of network, of different lengths where there are tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        if kind in ("x", "input"):
            found.append({kind: torch.randn(6, generator=generator, dtype=torch.float64)})
        elif kind == "pixel_values":
            image = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
            found.append({"pixel_values": image})
        else:
            length = 4 + i % 3 if kind == "padded" else 6
            tokens = torch.randint(3, 32, (length,), generator=generator)
            mask = {"attention_mask": torch.ones(length, dtype=torch.long)}
            found.append({"input_ids": tokens, **(mask if kind == "padded" else {})})
    return found


def data_of(kind="x", count=4, tasks="ab", dtype=torch.float64, **options):
    described = {}
    for i, task in enumerate(tasks):
        path = {}
        for j, split in enumerate(SPLITS):
            path[split] = [
                {k: v.to(dtype) if v.is_floating_point() else v for k, v in example.items()}
                for example in examples(kind, 100 * i + j, count)
            ]
        described[task] = TaskData(path=path, kind="tensors")
    return MergeDataModule(described, **{"batch_size": 8, **options})


def job_of(folder, recipe, data, optimiser=None, logger=None, **options):
    def make_trainer(folder, callbacks, overrides):
        settings = {
            "default_root_dir": folder,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False if logger is None else logger(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
        }
        return lightning.Trainer(**{**settings, **overrides})

    def optimise(module):
        module.configure_optimizers = lambda: optimiser(module.parameters())

    said = []
    job = Job(
        recipe,
        data,
        Path(folder),
        make_trainer,
        options=options,
        optimise=optimise if optimiser else None,
        say=said.append,
    )
    job.said = said
    return job


def raw_of(job):
    """All raw coefficients that a job wrote, by slot."""
    found = {}
    for path in sorted((job.folder / "steps").glob("*/raw.safetensors")):
        found.update(load_file(path))
    return found


NETWORKS = {
    "stack": (Stack, "x", ["blocks.0", "blocks.1", "blocks.2"]),
    "llama": (llama, "tokens", [f"model.layers.{i}" for i in range(3)]),
    "bert": (bert, "padded", [f"bert.encoder.layer.{i}" for i in range(2)]),
    "vit": (vit, "pixel_values", [f"vit.layers.{i}" for i in range(2)]),
}
ADAM, SGD = partial(torch.optim.Adam, lr=0.02), partial(torch.optim.SGD, lr=1.0)


def network_of(name, dtype, num=2):
    make, kind, names = NETWORKS[name]
    first = (build(make) if make is Stack else make()).to(dtype)
    return relatives(first, 1 + num, 0.1), kind, names


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def batched(num=2):
    torch.manual_seed(0)
    return relatives(Batched(), 1 + num, 0.2)


BLOCKS, STOP = 24, 17


def deep(folder, models):
    """A Llama of 24 blocks, of which each is learned in two steps."""
    sources = {name: str(models / name) for name in "ab"}
    options = {"coefficients": Element(), "init": Constant(0.3)}
    recipe = Recipe(sources, base=str(models / "base"), **options)
    data = data_of("tokens", dtype=torch.float32)
    return job_of(folder, recipe, data, ADAM), LayerWise(steps=2)
