"""The layer-wise driver against references that materialise everything, and its resuming."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
import transformers
import wandb
from lightning.pytorch.loggers import WandbLogger
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gradmerge import MergeDataModule, Recipe, TaskData
from gradmerge.coefficients import (
    Clamp,
    Column,
    Constant,
    Element,
    Group,
    Mixup,
    Model,
    Softmax,
    Tensor,
    Uniform,
)
from gradmerge.drivers import Job, LayerWise, Output
from gradmerge.drivers.layerwise import job as layers
from gradmerge.drivers.layerwise.block import MergedBlock
from gradmerge.drivers.layerwise.blocks import find_blocks
from gradmerge.drivers.layerwise.cache import Activations
from gradmerge.drivers.layerwise.chain import Chain
from gradmerge.drivers.wandb import finish_wandb_run
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError
from gradmerge.finalisers import REPAIR
from gradmerge.objectives import L1, CrossEntropy, KLToSource, Objective
from gradmerge.optimisers import SAM
from gradmerge.spec import to_plain
from networks import seeded
from tiny import SPLITS, build, recipe_of, relatives, save_family


@contextmanager
def frozen():
    """Nothing that is there already is looked at when a block's garbage is collected: beside such
    small blocks, searching all that was imported twice a block would be most of the time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def small_collections():
    """See `frozen`."""
    with frozen():
        yield


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


# ---- the reference: everything in memory, plain torch -------------------------------------------


def reference(models, names, data, steps, optimiser, start):
    """Coefficients `[sources, *shape]` of every tensor, block by block, by plain autograd."""
    base, *experts = [dict(model.named_parameters()) for model in models]
    network = models[0]
    batches = [
        {
            key: nn.utils.rnn.pad_sequence([e[key] for e in split["adaptation"]], True)
            for key in split["adaptation"][0]
        }
        for split in (task.path for task in data.tasks.values())
    ]
    num = len(experts)

    def theta(c):
        return {
            name: base[name].detach()
            + sum(c[name][k] * (experts[k][name] - base[name]).detach() for k in range(num))
            for name in base
        }

    def output_of(block, parameters, inputs):
        taken = []

        def take(module, args, output):
            taken.append(output[0] if isinstance(output, tuple) else output)

        handle = network.get_submodule(block).register_forward_hook(take)
        functional_call(network, parameters, (), inputs)
        handle.remove()
        return taken[0]

    c = {
        name: torch.full((num, *value.shape), start, dtype=value.dtype)
        for name, value in base.items()
    }
    history = []
    for block in names:
        own = [name for name in base if name.startswith(f"{block}.")]
        if not own:
            continue
        targets = [
            output_of(block, experts[k], inputs).detach() for k, inputs in enumerate(batches)
        ]
        for name in own:
            c[name].requires_grad_()
        chosen = optimiser([c[name] for name in own])
        for _ in range(steps):
            chosen.zero_grad()
            total = 0.0
            for inputs, target in zip(batches, targets, strict=True):
                came = output_of(block, theta(c), inputs)
                if "attention_mask" in inputs:
                    keep = inputs["attention_mask"].bool()
                    came, target = came[keep], target[keep]
                total = total + ((came - target) ** 2).sum() / came.numel()
            total.backward()
            history.append(float(total.detach()))
            chosen.step()
        for name in own:
            c[name] = c[name].detach()
    return c, history


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


@pytest.mark.parametrize(
    ("dtype", "optimiser", "steps", "tolerance"),
    [
        (torch.float64, SGD, 1, 1e-10),
        (torch.float64, ADAM, 3, 1e-10),
        (torch.float32, SGD, 3, 1e-6),
    ],
    ids=["first gradient", "Adam", "float32"],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_coefficients_are_those_of_a_plain_implementation(
    name, dtype, optimiser, steps, tolerance, tmp_path
):
    models, kind, names = network_of(name, dtype)
    data = data_of(kind, dtype=dtype)
    recipe = recipe_of(models, coefficients=Element())
    job = job_of(tmp_path, recipe, data, optimiser, dtype=str(dtype).removeprefix("torch."))
    LayerWise(steps=steps).run(job)
    start = float(torch.tensor(0.3))  # a merge starts from float32
    expected, history = reference(models, names, data, steps, optimiser, start)
    assert history[steps - 1] < history[0] or steps == 1
    found = raw_of(job)
    learned = [n for n in expected if any(n.startswith(f"{block}.") for block in names)]
    assert {key.replace("/", ".") for key in found} == set(learned)
    moved = 0.0
    for key in learned:
        own = found[key.replace(".", "/")]
        assert own.dtype == dtype
        torch.testing.assert_close(own, expected[key], rtol=0, atol=tolerance)
        moved = max(moved, float((own - 0.3).abs().max()))
    assert moved > 1e-4, "something must have been learned for this to mean anything"


def sam(models, names, data, rate, rho):
    """Coefficients after one step of SAM (arXiv 2010.01412, equation 2) on each block's loss:
    `c - rate grad L(c + rho grad L(c) / |grad L(c)|)`, the norm over all of a block.
    """
    base, *experts = [{n: p.detach() for n, p in m.named_parameters()} for m in models]
    network = models[0]
    batches = [torch.stack([e["x"] for e in t.path["adaptation"]]) for t in data.tasks.values()]
    start = float(torch.tensor(0.3))
    c = {n: torch.full((2, *v.shape), start, dtype=v.dtype) for n, v in base.items()}

    def output_of(block, parameters, x):
        taken = []
        hook = network.get_submodule(block).register_forward_hook(lambda *a: taken.append(a[2]))
        functional_call(network, parameters, (x,))
        hook.remove()
        return taken[0]

    for block in names:
        own = [name for name in base if name.startswith(f"{block}.")]
        targets = [output_of(block, experts[k], x) for k, x in enumerate(batches)]

        def gradients(at, own=own, block=block, targets=targets):
            z = {n: v.clone().requires_grad_(n in own) for n, v in at.items()}
            theta = {
                n: base[n] + sum(z[n][k] * (experts[k][n] - base[n]) for k in (0, 1)) for n in base
            }
            came = [output_of(block, theta, x) for x in batches]
            loss = sum(((a - b) ** 2).mean() for a, b in zip(came, targets, strict=True))
            return dict(zip(own, torch.autograd.grad(loss, [z[n] for n in own]), strict=True))

        plain = gradients(c)
        norm = torch.sqrt(sum(g.square().sum() for g in plain.values()))
        uphill = {n: v + rho * plain[n] / norm if n in own else v for n, v in c.items()}
        c |= {n: c[n] - rate * g for n, g in gradients(uphill).items()}
    return c


def test_a_step_of_sam_in_each_block_is_the_paper_s(tmp_path):
    models = relatives(build(Narrow).double(), 3, 0.5)
    data, rate, rho = data_of(), 0.5, 0.5
    names = ["blocks.0", "blocks.1"]
    optimiser = partial(SAM, lr=rate, rho=rho, base="torch.optim.SGD")
    recipe = recipe_of(models, coefficients=Element())
    job = job_of(tmp_path, recipe, data, optimiser, dtype="float64")
    LayerWise(steps=1).run(job)
    found = raw_of(job)
    expected = sam(models, names, data, rate, rho)
    flat = sam(models, names, data, rate, 0.0)
    assert {key.replace("/", ".") for key in found} == {n for n in flat if n.startswith("blocks.")}
    apart = 0.0
    for key, value in found.items():
        name = key.replace("/", ".")
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
        apart = max(apart, float((value - flat[name]).abs().max()))
    assert apart > 1e-4, "a plain step must be another for this to mean anything"


class Checkpointed(nn.Module):
    """A block that uses one weight four times, twice within checkpoints of a kind, or of none."""

    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(5, 5), reentrant

    def forward(self, x):
        x = self._used(x)
        for _ in range(2):
            kind = {"use_reentrant": self.reentrant}
            x = self._used(x) if self.reentrant is None else checkpoint(self._used, x, **kind)
        return self._used(x)

    def _used(self, x):
        return self.linear(x).tanh()


@pytest.mark.parametrize("reentrant", [True, False])
def test_weights_that_backward_asks_for_again_get_their_whole_gradient(reentrant, tmp_path):
    found = []
    for way in (None, reentrant):
        network = build(Narrow)
        torch.manual_seed(1)
        network.blocks = nn.ModuleList([Checkpointed(way), nn.Linear(5, 4)])
        recipe = recipe_of(relatives(network.double(), 3), coefficients=Element())
        job = job_of(tmp_path / str(way), recipe, data_of(), SGD, dtype="float64")
        LayerWise(steps=3).run(job)
        found.append(raw_of(job))
    assert found[0].keys() == found[1].keys()
    moved = {name: float((value - 0.3).abs().max()) for name, value in found[0].items()}
    assert max(moved.values()) > 1e-3, moved
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


def test_no_merged_weight_outlives_its_last_gradient(tmp_path, monkeypatch):
    models, kind, _ = network_of("llama", torch.float32)
    job = job_of(tmp_path, recipe_of(models, coefficients=Element()), data_of(kind))
    made, held = [], []
    accumulate, contract = MergedBlock.accumulate, Plan.contract

    def begun(block, *given):
        made.append(block)
        return accumulate(block, *given)

    def noted(plan, name, grad, raw):
        held.append(len(made[-1]._theta))
        return contract(plan, name, grad, raw)

    monkeypatch.setattr(MergedBlock, "accumulate", begun)
    monkeypatch.setattr(Plan, "contract", noted)
    LayerWise(steps=1).run(job)
    assert len(made) == 3
    assert held == list(range(8, -1, -1)) * 3, "of nine tensors, one less at each contraction"


@pytest.mark.parametrize(
    ("coefficients", "init"),
    [
        (Tensor(), Constant(0.3)),
        (Column(), Mixup(per="element", seed=3)),
        (Clamp(Group((r"blocks\.\d+\.",))), Constant(0.4)),
        (Softmax(Element()), Uniform()),
    ],
    ids=["Tensor", "Column", "Group", "Softmax"],
)
def test_any_granularity_and_link_starts_as_the_recipe_does_and_lowers_the_loss(
    coefficients, init, tmp_path
):
    models, kind, _ = network_of("stack", torch.float64)
    recipe = recipe_of(models, coefficients=coefficients, init=init)
    job = job_of(tmp_path, recipe, data_of(kind), ADAM, dtype="float64")
    folder = LayerWise(steps=8).run(job)
    blocks = json.loads((folder / "provenance.json").read_text())["driver"]["blocks"]
    assert [block["loss"] < block["first_loss"] for block in blocks] == [True, False, True]
    plan = open_plan(recipe)
    start, found = plan.initial_raw(), load_file(folder / "coefficients.safetensors")
    for name in plan.tensors:
        before = plan.coefficient(name, start)
        same = torch.equal(found[name], before.float())
        assert same != name.startswith("blocks."), name


def test_one_source_at_coefficient_one_has_no_loss_at_all(tmp_path):
    models, kind, _ = network_of("bert", torch.float32, num=1)
    recipe = recipe_of(models, coefficients=Element(), init=Constant(1.0))
    job = job_of(tmp_path, recipe, data_of(kind, tasks="a"), partial(torch.optim.SGD, lr=1.0))
    folder = LayerWise(steps=2).run(job)
    blocks = json.loads((folder / "provenance.json").read_text())["driver"]["blocks"]
    assert [(block["first_loss"], block["loss"]) for block in blocks] == [(0.0, 0.0)] * 2
    assert all(bool((z == 1).all()) for z in raw_of(job).values())


def test_the_export_is_the_merged_network_and_says_what_it_is(tmp_path):
    models, kind, names = network_of("llama", torch.float32)
    paths = save_family(tmp_path / "models", models, tokenizer=False)
    recipe = Recipe(
        {name: paths[name] for name in "ab"},
        base=paths["base"],
        coefficients=Element(),
        init=Constant(0.3),
    )
    data = data_of(kind)
    folder = LayerWise(steps=3).run(job_of(tmp_path / "run", recipe, data, ADAM))
    coefficients = load_file(folder / "coefficients.safetensors")
    base, *experts = [dict(model.named_parameters()) for model in models]
    theta = {
        name: base[name]
        + sum(coefficients[name][k] * (experts[k][name] - base[name]) for k in (0, 1))
        for name in base
    }
    tokens = torch.arange(3, 15).view(2, 6)
    expected = functional_call(models[0], theta, (), {"input_ids": tokens}).logits
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    moved = [name for name, c in coefficients.items() if not bool((c == 0.3).all())]
    assert {
        name.split(".self_attn")[0].split(".mlp")[0].split(".input")[0].split(".post")[0]
        for name in moved
    } == set(names)
    provenance = json.loads((folder / "provenance.json").read_text())
    kept = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert sorted(provenance["driver"]["kept_at_start"]) == sorted(kept)
    assert [block["name"] for block in provenance["driver"]["blocks"]] == names
    assert provenance["run"]["optimizers"][0]["class_path"] == "torch.optim.adam.Adam"


def test_blocks_may_be_named_and_those_of_a_sequential_network_are_its_members(tmp_path):
    torch.manual_seed(0)
    members = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)]
    models = relatives(nn.Sequential(OrderedDict(zip("abcde", members, strict=True))), scale=0.1)
    for driver, kept in (
        (LayerWise(steps=2), set()),
        (LayerWise(steps=2, blocks=["[c-d]"]), {"a", "e"}),
    ):
        data = data_of("input", dtype=torch.float32)
        job = job_of(
            tmp_path / str(len(kept)), recipe_of(models, coefficients=Element()), data, ADAM
        )
        folder = driver.run(job)
        coefficients = load_file(folder / "coefficients.safetensors")
        still = {name[0] for name, c in coefficients.items() if bool((c == 0.3).all())}
        assert still == kept


@pytest.mark.parametrize("name", ["", "mine"])
def test_all_blocks_log_to_one_run_of_w_and_b(tmp_path, monkeypatch, name):
    """A run that ends with the first block's trainer refuses what the second logs."""
    for variable, value in {
        "MODE": "offline",
        "SILENT": "true",
        "RUN_GROUP": "",
        "NAME": name,
    }.items():
        monkeypatch.setenv(f"WANDB_{variable}", value)
    torch.manual_seed(0)
    recipe = recipe_of(relatives(build(Stack), 3), coefficients=Tensor())
    logger = partial(WandbLogger, project="gradmerge", save_dir=tmp_path, offline=True)
    job = job_of(tmp_path / "job", recipe, data_of(dtype=torch.float32), ADAM, lambda _: [logger()])
    job.output = Output(str(tmp_path / "out"), log_artifact=True)
    logged, log = [], wandb.sdk.wandb_run.Run.log_artifact

    def noted(run, artifact):
        logged.append((run.name, artifact))
        return log(run, artifact)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log_artifact", noted)
    LayerWise(steps=2).run(job)
    finish_wandb_run()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    ((came, artifact),) = logged
    assert came == (name or "job")
    assert artifact.name.startswith("merged-model")
    assert "model.safetensors" in artifact.manifest.entries


# ---- resuming, spilling --------------------------------------------------------------------------


def run_of(folder, models, kind, activation_memory=4.0, batch_size=3):
    recipe = recipe_of(models, coefficients=Element())
    job = job_of(folder, recipe, data_of(kind, count=7, dtype=torch.float32), ADAM)
    driver = LayerWise(epochs=2, batch_size=batch_size, activation_memory=activation_memory)
    return job, driver


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["stack", "bert"])
def test_a_run_that_stopped_goes_on_with_the_first_unfinished_block(name, tmp_path, monkeypatch):
    models, kind, _ = network_of(name, torch.float32)
    whole, driver = run_of(tmp_path / "whole", models, kind)
    expected = driver.run(whole)
    fitted = []
    plain = layers.Layers._fit

    def counted(self, number, *arguments):
        fitted.append(number)
        return plain(self, number, *arguments)

    monkeypatch.setattr(layers.Layers, "_fit", counted)
    last = 2 if name == "stack" else 1

    def stopped(self, batch, batch_idx):
        if self.block.number == last and batch_idx == 1:
            raise KeyError("stopped")
        return step(self, batch, batch_idx)

    step = layers.BlockModule.training_step
    with monkeypatch.context() as patch:
        patch.setattr(layers.BlockModule, "training_step", stopped)
        with pytest.raises(KeyError, match="stopped"):
            driver.run(run_of(tmp_path / "parts", models, kind)[0])
    before = list(fitted)
    job, _ = run_of(tmp_path / "parts", models, kind)
    found = driver.run(job)
    assert before[-1] == last
    assert fitted[len(before) :] == [last], "finished blocks are not learned again"
    assert same(raw_of(job), raw_of(whole))
    for file in ("coefficients.safetensors", "model.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()
    again, _ = run_of(tmp_path / "parts", models, kind)
    assert driver.run(again) == found
    assert len(fitted) == len(before) + 1, "a finished job is not run again"


def test_spilled_activations_give_the_same_coefficients(tmp_path, monkeypatch):
    models, kind, _ = network_of("bert", torch.float32)
    held, driver = run_of(tmp_path / "held", models, kind)
    driver.run(held)
    spilled = []
    put = Activations.put

    def watched(self, name, tensor):
        put(self, name, tensor)
        spilled.append((self.held, self.spilled))

    monkeypatch.setattr(Activations, "put", watched)
    job, driver = run_of(tmp_path / "spilled", models, kind, activation_memory=1e-6)
    driver.run(job)
    assert max(in_memory for in_memory, _ in spilled) <= 1e-6 * 2**30
    assert max(on_disk for _, on_disk in spilled) > 4_000
    assert same(raw_of(job), raw_of(held))
    assert not (job.folder / "activations").exists()


def test_activations_are_replaced_where_they_are(tmp_path):
    kept = Activations(tmp_path / "scratch", limit=100)
    kept.put("small", torch.arange(20.0))
    kept.put("large", torch.arange(30.0).view(5, 6))
    assert (kept.held, kept.spilled) == (80, 120)
    mapped = kept.get("large")
    kept.put("large", torch.ones(5, 6))
    assert bool((mapped == 1).all()), "the same place"
    kept.put("small", torch.ones(26))
    assert (kept.held, kept.spilled) == (0, 224), "what grows is counted anew"
    kept.put("large", torch.zeros(2))
    assert (kept.held, kept.spilled) == (8, 104)
    torch.testing.assert_close(kept.get("small"), torch.ones(26), rtol=0, atol=0)
    kept.close()
    assert not (tmp_path / "scratch").exists()


# ---- buffers, private tensors, tensors without a gradient ----------------------------------------


def batched(num=2):
    torch.manual_seed(0)
    return relatives(Batched(), 1 + num, 0.2)


def test_batch_norm_statistics_are_those_of_a_fit_with_the_same_coefficients(tmp_path):
    from gradmerge import MergeModule
    from gradmerge.coefficients import FromFile

    models = batched()
    data = data_of("x", count=9, dtype=torch.float32, batch_size=3)
    job = job_of(tmp_path, recipe_of(models, coefficients=Column()), data, ADAM)
    folder = LayerWise(epochs=2).run(job)
    init = FromFile(str(folder / "coefficients.safetensors"))
    module = MergeModule(recipe_of(models, coefficients=Column(), init=init))
    fresh = data_of("x", count=9, dtype=torch.float32, batch_size=3)
    fresh.attach(module.merged)
    fresh.setup()
    module.take_tasks(fresh.tasks)
    module.refresh_buffers(fresh)
    found = load_file(folder / "model.safetensors")
    for name, value in module.merged.statistics.values().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def batched_reference(models, data, steps, optimiser, start):
    """Coefficients of `Batched`'s blocks: batch statistics while learning, pooled ones after."""
    base, *experts = [dict(model.state_dict()) for model in models]
    inputs = [torch.stack([e["x"] for e in t.path["adaptation"]]) for t in data.tasks.values()]
    c = {}

    def theta(name):
        given = c.get(name, torch.full((2, *base[name].shape), start, dtype=torch.float64))
        return base[name] + sum(given[k] * (experts[k][name] - base[name]) for k in (0, 1))

    def norm(x, place, get, mean=None, var=None):
        weight, bias = get(f"{place}.weight"), get(f"{place}.bias")
        return nn.functional.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, 1e-5)

    def block(x, scale, place, get, statistics):
        linear = nn.functional.linear(x, get(f"{place}.linear.weight"), get(f"{place}.linear.bias"))
        return x + norm(linear, f"{place}.norm", get, *statistics(linear)).relu() * scale

    def own(k, place, _=None):
        return experts[k][f"{place}.running_mean"], experts[k][f"{place}.running_var"]

    def pooled(rows):
        every = torch.cat(rows)
        return every.mean(dim=0), every.var(dim=0)

    scales = [x.abs().mean() for x in inputs]
    x1 = [norm(x, "first", theta, *pooled(inputs)) for x in inputs]
    x2 = [norm(x, "first", experts[k].get, *own(k, "first")) for k, x in enumerate(inputs)]
    for place in ("blocks.0", "blocks.1"):
        x2 = [
            block(x, scales[k], place, experts[k].get, partial(own, k, f"{place}.norm"))
            for k, x in enumerate(x2)
        ]
        for part in ("linear.weight", "linear.bias", "norm.weight", "norm.bias"):
            shape = (2, *base[f"{place}.{part}"].shape)
            c[f"{place}.{part}"] = torch.full(shape, start, dtype=torch.float64).requires_grad_()
        names = [name for name in c if name.startswith(place)]
        chosen = optimiser([c[name] for name in names])
        for _ in range(steps):
            chosen.zero_grad()
            came = [block(x, scales[k], place, theta, lambda _: ()) for k, x in enumerate(x1)]
            sum(((a - b) ** 2).mean() for a, b in zip(came, x2, strict=True)).backward()
            chosen.step()
        for name in names:
            c[name] = c[name].detach()
        get = (f"{place}.linear.weight", f"{place}.linear.bias")
        found = pooled([nn.functional.linear(x, *map(theta, get)) for x in x1])
        given = partial(lambda found, _: found, found)
        x1 = [block(x, scales[k], place, theta, given) for k, x in enumerate(x1)]
    return c


def test_blocks_with_batch_norm_are_learned_on_batch_statistics(tmp_path):
    models = [model.double() for model in batched()]
    data = data_of("x", count=9, batch_size=9)
    recipe = recipe_of(models, coefficients=Element())
    # a bias before BatchNorm has no gradient but rounding, of which Adam would make steps
    job = job_of(tmp_path, recipe, data, SGD, dtype="float64")
    LayerWise(steps=4).run(job)
    expected = batched_reference(models, data, 4, SGD, float(torch.tensor(0.3)))
    assert max(float((value - 0.3).abs().max()) for value in expected.values()) > 0.01
    found = {k: v for k, v in raw_of(job).items() if not k.startswith("buffer:")}
    assert {key.replace("/", ".") for key in found} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name.replace(".", "/")], value, rtol=0, atol=1e-10)


def test_no_batch_has_one_example_alone_of_which_batch_norm_knows_nothing(tmp_path):
    recipe = recipe_of(batched(), coefficients=Column())

    def run(name, count, size):
        data = data_of("x", count=count, dtype=torch.float32, batch_size=size)
        job = job_of(tmp_path / name, recipe, data)
        LayerWise(epochs=1).run(job)
        return json.loads((job.folder / "steps/block-000/step.json").read_text())["result"]

    assert run("nine", 9, 4)["steps"] == 3, "three batches of three, not 4, 4 and 1"
    assert run("pairs", 3, 2)["steps"] == 1
    for name, count, size in (("ones", 4, 1), ("one", 1, 4)):
        with pytest.raises(ConfigError, match=r"first: BatchNorm takes .* shape \(1, 6\)"):
            run(name, count, size)


def test_a_tensor_without_a_gradient_is_set_by_the_rule_also_after_a_stop(tmp_path, monkeypatch):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.spare = nn.Linear(5, 5), nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x).tanh()

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.blocks = nn.ModuleList([First(), First()])

        def forward(self, x):
            hidden = self.stem(x)
            for block in self.blocks:
                hidden = block(hidden)
            return self.head(hidden)

    models = relatives(build(Spare))
    recipe = recipe_of(models, coefficients=Tensor())

    def job():
        return job_of(tmp_path, recipe, data_of(dtype=torch.float32), ADAM)

    with monkeypatch.context() as patch:
        plain = layers.Layers._fit

        def stopped(self, number, *arguments):
            if number == 1:
                raise KeyError("stopped")
            return plain(self, number, *arguments)

        patch.setattr(layers.Layers, "_fit", stopped)
        with (
            pytest.warns(UserWarning, match=r"2 tensors of blocks\.0 got no gradient"),
            pytest.raises(KeyError, match="stopped"),
        ):
            LayerWise(steps=2).run(job())
    with pytest.warns(UserWarning, match=r"2 tensors of blocks\.1 got no gradient"):
        folder = LayerWise(steps=2).run(job())
    provenance = json.loads((folder / "provenance.json").read_text())
    spare = {f"blocks.{i}.spare.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert provenance["fixed"] == dict.fromkeys(spare, 0.0)
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], models[0].state_dict()[name]) for name in spare)


def test_each_task_has_its_own_head(tmp_path):
    models, kind, _ = network_of("bert", torch.float32)
    recipe = recipe_of(models, coefficients=Tensor(), private=["classifier", "bert.pooler"])
    job = job_of(tmp_path, recipe, data_of(kind), ADAM)
    folder = LayerWise(steps=2).run(job)
    heads = [load_file(folder / "tasks" / t / "head.safetensors") for t in "ab"]
    for head, model in zip(heads, models[1:], strict=True):
        own = model.state_dict()
        assert head
        assert all(torch.equal(value, own[name]) for name, value in head.items())


# ---- networks ------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
REAL = {
    "GPT2LMHeadModel": {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "Gemma3ForCausalLM": {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},
    "MixtralForCausalLM": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2},
    "DebertaV2ForSequenceClassification": {
        **SMALL,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "layer_type": "basic",
    },
    "AlbertForSequenceClassification": {**SMALL, "embedding_size": 8},
    "T5EncoderModel": {"vocab_size": 32, "d_model": 16, "d_ff": 24, "num_layers": 2, "d_kv": 4},
}
NO_CHAIN = {
    "AlbertForSequenceClassification": r"albert_layer_groups\.0 runs 2 times in one pass",
    "T5EncoderModel": r"args\[2\] of encoder\.block\.1 depends on what the blocks before",
}


@pytest.mark.parametrize("name", REAL)
def test_real_networks_are_found_to_be_chains_or_not(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    models = relatives(kind(kind.config_class(**REAL[name])), 2, 0.1)
    plan = open_plan(recipe_of(models))
    blocks = find_blocks(plan)
    assert len(blocks) == (1 if name.startswith("Albert") else 2)
    chain = Chain(plan, blocks, torch.float32, torch.device("cpu"))
    if "Image" in name:
        inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    else:
        mask = torch.tensor([[1] * 7 + [0] * 2])
        inputs = {"input_ids": torch.randint(3, 32, (1, 9)), "attention_mask": mask}
    if name in NO_CHAIN:
        with pytest.raises(ConfigError, match=NO_CHAIN[name]):
            chain.verify(inputs, "a")
    else:
        assert chain.verify(inputs, "a") <= 1e-6


# ---- refusals ------------------------------------------------------------------------------------


class Chained(nn.Module):
    """Two blocks and one way of not being a chain."""

    def __init__(self, how=""):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList([nn.Bilinear(6, 6, 6), nn.Bilinear(6, 6, 6)])
        if how == "tied":
            self.blocks[1].weight = self.blocks[0].weight
        if how == "several":
            self.others = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        beside = x
        for block in self.blocks:
            for _ in range(2 if self.how == "twice" else 1):
                came = block(x, beside)
                beside = came.relu() if self.how == "beside" else beside
                x = came + x if self.how == "between" else came
        return x


REFUSED = {
    "several": "got several",
    "tied": r"blocks\.0\.weight is tied",
    "twice": r"blocks\.0 runs 2 times",
    "between": r"no argument of blocks\.1 .* is what the block before returned",
    "beside": r"args\[1\] of blocks\.1 depends on what the blocks before it computed",
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_no_chain_is_refused_by_name(how, tmp_path):
    torch.manual_seed(0)
    recipe = recipe_of(relatives(Chained(how)), coefficients=Element())
    with pytest.raises(ConfigError, match=REFUSED[how]):
        LayerWise(steps=1).run(job_of(tmp_path, recipe, data_of(dtype=torch.float32), ADAM))


@pytest.mark.parametrize(
    ("driver", "recipe", "message"),
    [
        ({"blocks": ["block"]}, {}, "matches the whole name of no module .* Did you mean 'blocks'"),
        ({"blocks": [r"blocks\.\d", r"blocks\.0\.0"]}, {}, "lies within the block"),
        ({}, {"coefficients": Model()}, "share a coefficient"),
        ({}, {"coefficients": Group((r"\.weight",))}, "share a coefficient"),
        ({}, {"frozen": {r"^blocks\.": 0.3}}, "hold no tensor whose coefficients are learned"),
    ],
)
def test_what_cannot_be_learned_block_by_block_is_refused(driver, recipe, message, tmp_path):
    models, kind, _ = network_of("stack", torch.float32)
    job = job_of(tmp_path, recipe_of(models, **{"coefficients": Tensor(), **recipe}), data_of(kind))
    with pytest.raises(ConfigError, match=message):
        LayerWise(steps=1, **driver).run(job)
    assert not job.folder.exists(), "the corrected job is another"


def test_other_refusals(tmp_path):
    models, kind, _ = network_of("stack", torch.float32)
    with pytest.raises(ConfigError, match=r"blocks: '\[bad' is no regular expression"):
        LayerWise(blocks=["[bad"])
    job = job_of(tmp_path / "r", recipe_of(models, finalisers=[REPAIR()]), data_of(kind))
    with pytest.raises(ConfigError, match="REPAIR takes passes of the whole merged network"):
        LayerWise().run(job)
    assert not (tmp_path / "r").exists() or not list((tmp_path / "r").rglob("job.json"))
    with pytest.raises(ConfigError, match="steps: expected at least 1, got 0"):
        LayerWise(steps=0)
    with pytest.raises(ConfigError, match="activation_memory: expected GiB"):
        LayerWise(activation_memory=-1)
    recipe = recipe_of(models)
    job = job_of(tmp_path / "a", recipe, data_of(kind), activation_checkpointing=True)
    with pytest.raises(ConfigError, match="activation_checkpointing recomputes"):
        LayerWise().run(job)
    with pytest.raises(ConfigError, match="tasks name no source: c -> c"):
        LayerWise().run(job_of(tmp_path / "b", recipe, data_of(kind, tasks="ac")))
    perceptrons = recipe_of(relatives(build()))
    with pytest.raises(ConfigError, match=r"in one nn\.ModuleList, got none"):
        LayerWise().run(job_of(tmp_path / "c", perceptrons, data_of(kind)))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32,
            d_model=8,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            d_kv=4,
            decoder_start_token_id=0,
        )
    )
    with pytest.raises(ConfigError, match="is an encoder with a decoder"):
        LayerWise().run(job_of(tmp_path / "d", recipe_of(relatives(t5)), data_of("tokens")))


def test_a_loss_of_one_s_own_is_refused_and_terms_are_said_to_be_unused(tmp_path):
    models, kind, _ = network_of("stack", torch.float32)
    recipe = recipe_of(models)
    refused = (
        ({"objective": Objective(regularisers=[L1(0.1)])}, r"objective\.regularisers .* \['L1'\]"),
        ({"objective": to_plain(Objective(task_weights={"a": 2.0}))}, "task_weights .*'a': 2"),
        ({"logit_scale": 2.0}, "logit_scale changes the loss of a fit, got 2.0.*logit_scale null"),
    )
    for options, message in refused:
        with pytest.raises(ConfigError, match=f"LayerWise: .*{message}"):
            LayerWise().run(job_of(tmp_path / "refused", recipe, data_of(kind), **options))
    assert not (tmp_path / "refused").exists()
    data = data_of(kind, dtype=torch.float32)
    line = "objective KLToSource: not used, each block is matched to the experts' own"
    for given in (KLToSource(), Objective([KLToSource()]), None, Objective([CrossEntropy()])):
        job = job_of(tmp_path / type(given).__name__ / str(given), recipe, data, objective=given)
        LayerWise(steps=1).run(job)
        assert (line in job.said) == ("KLToSource" in str(given))


# ---- 24 blocks -----------------------------------------------------------------------------------

BLOCKS, STOP = 24, 17
KILLED = f"""
import os, signal
from pathlib import Path
from gradmerge.drivers.layerwise import block
import test_layerwise as t

step = block.BlockModule.training_step
def killed(self, batch, batch_idx):
    if self.block.number == {STOP} and self.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
block.BlockModule.training_step = killed
with t.frozen():
    job, driver = t.deep(Path("job"), Path("models"))
    driver.run(job)
"""


def deep(folder, models):
    """A Llama of 24 blocks, of which each is learned in two steps."""
    sources = {name: str(models / name) for name in "ab"}
    options = {"coefficients": Element(), "init": Constant(0.3)}
    recipe = Recipe(sources, base=str(models / "base"), **options)
    data = data_of("tokens", dtype=torch.float32)
    return job_of(folder, recipe, data, ADAM), LayerWise(steps=2)


def test_a_killed_merge_of_24_blocks_goes_on_to_the_same_coefficients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the job is the same by the same paths
    small = {"hidden_size": 8, "intermediate_size": 8}
    family = relatives(llama(BLOCKS, **small), 3, 0.1)
    save_family(tmp_path / "models", family, tokenizer=False)
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, capture_output=True
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    job, driver = deep(Path("job"), Path("models"))
    steps = job.folder / "steps"
    names = [f"block-{number:03d}" for number in range(BLOCKS)]
    assert sorted(path.parent.name for path in steps.glob("*/step.json")) == names[:STOP]
    written = {name: (steps / name / "raw.safetensors").stat().st_mtime_ns for name in names[:STOP]}
    found = driver.run(job)
    whole, driver = deep(Path("whole"), Path("models"))
    expected = driver.run(whole)
    for name, time in written.items():
        assert (steps / name / "raw.safetensors").stat().st_mtime_ns == time, name
    coefficients = raw_of(whole)
    assert len(coefficients) == 9 * BLOCKS
    assert sum(not bool((z == 0.3).all()) for z in coefficients.values()) > 8 * BLOCKS
    assert same(raw_of(job), coefficients)
    for file in ("coefficients.safetensors", "model.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()
