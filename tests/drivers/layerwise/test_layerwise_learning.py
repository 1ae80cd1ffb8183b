"""The layer-wise driver against references that materialise everything."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gradmerge.coefficients import (
    Clamp,
    Column,
    Constant,
    Element,
    Group,
    Mixup,
    Softmax,
    Tensor,
    Uniform,
)
from gradmerge.drivers import LayerWise
from gradmerge.engine.leaves import Leaves
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.optimisers import SAM
from layerwise_jobs import ADAM, NETWORKS, SGD, Narrow, data_of, job_of, network_of, raw_of
from tiny import build, recipe_of, relatives

pytestmark = pytest.mark.usefixtures("small_collections")


AFTER = ("head", "lm_head", "model.norm", "bert.pooler", "classifier", "vit.layernorm")
"""What follows the blocks of `NETWORKS`."""


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
        if block is None:
            output = functional_call(network, parameters, (), inputs)
            return getattr(output, "logits", output)

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
    for block in [*names, None]:
        # at last what follows the blocks, by what the network gives out
        own = [n for n in base if (n.startswith(AFTER) if block is None else n.startswith(block))]
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
                got = output_of(block, theta(c), inputs)
                if "attention_mask" in inputs and block is not None:
                    keep = inputs["attention_mask"].bool()
                    got, target = got[keep], target[keep]
                total = total + ((got - target) ** 2).sum() / got.numel()
            total.backward()
            history.append(float(total.detach()))
            chosen.step()
        for name in own:
            c[name] = c[name].detach()
    return c, history


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
    learned = [n for n in expected if n.startswith((*(f"{block}." for block in names), *AFTER))]
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

    for block in [*names, "head"]:
        own = [name for name in base if name.startswith(f"{block}.")]
        targets = [output_of(block, experts[k], x) for k, x in enumerate(batches)]

        def gradients(at, own=own, block=block, targets=targets):
            z = {n: v.clone().requires_grad_(n in own) for n, v in at.items()}
            theta = {
                n: base[n] + sum(z[n][k] * (experts[k][n] - base[n]) for k in (0, 1)) for n in base
            }
            got = [output_of(block, theta, x) for x in batches]
            loss = sum(((a - b) ** 2).mean() for a, b in zip(got, targets, strict=True))
            return dict(zip(own, torch.autograd.grad(loss, [z[n] for n in own]), strict=True))

        plain = gradients(c)
        norm = torch.sqrt(sum(g.square().sum() for g in plain.values()))
        uphill = {n: v + rho * plain[n] / norm if n in own else v for n, v in c.items()}
        c |= {n: c[n] - rate * g for n, g in gradients(uphill).items()}
    return c


def test_a_step_of_sam_in_each_block_follows_the_paper(tmp_path):
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
    assert {key.replace("/", ".") for key in found} == set(flat) - {"stem.weight", "stem.bias"}
    apart = 0.0
    for key, value in found.items():
        name = key.replace("/", ".")
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
        apart = max(apart, float((value - flat[name]).abs().max()))
    assert apart > 1e-4, "a plain step must differ for this to mean anything"


class Checkpointed(nn.Module):
    """A block that uses one weight four times, twice of them within activation checkpoints."""

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
    accumulate, contract = Leaves.accumulate, Plan.contract

    def begun(leaves, *given):
        made.append(leaves)
        return accumulate(leaves, *given)

    def noted(plan, *given):
        held.append(len(made[-1]))
        return contract(plan, *given)

    monkeypatch.setattr(Leaves, "accumulate", begun)
    monkeypatch.setattr(Plan, "contract", noted)
    LayerWise(steps=1).run(job)
    assert len(made) == 4
    # of nine tensors in a block, and two after the last, one less at each contraction
    assert held == list(range(8, -1, -1)) * 3 + [1, 0]


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
    # stem and head share the one coefficient of Group outside of blocks
    tied = isinstance(coefficients, Clamp)
    lower = [block["loss"] < block["first_loss"] for block in blocks]
    assert lower == [True, False, True, *([] if tied else [True])]
    assert any("head.weight, head.bias: not learned" in line for line in job.said) == tied
    plan = open_plan(recipe)
    start, found = plan.initial_raw(), load_file(folder / "coefficients.st")
    for name in plan.tensors:
        before = FitState(plan, start).coefficient(name)
        same = torch.equal(found[name], before.float())
        assert same != name.startswith(("blocks.",) if tied else ("blocks.", "head.")), name


def test_one_source_at_coefficient_one_has_no_loss_at_all(tmp_path):
    models, kind, _ = network_of("bert", torch.float32, num=1)
    recipe = recipe_of(models, coefficients=Element(), init=Constant(1.0))
    job = job_of(tmp_path, recipe, data_of(kind, tasks="a"), partial(torch.optim.SGD, lr=1.0))
    folder = LayerWise(steps=2).run(job)
    blocks = json.loads((folder / "provenance.json").read_text())["driver"]["blocks"]
    assert [(block["first_loss"], block["loss"]) for block in blocks] == [(0.0, 0.0)] * 3
    assert all(bool((z == 1).all()) for z in raw_of(job).values())
