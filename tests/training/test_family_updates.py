"""Updates of the learned families as they ship, against their formulas in plain torch.

Recipe, objective, optimiser, schedule, clipping and the factor on the logits are those of the file
in configs/methods. Two steps of a fit in float64 are compared with merged weights written out,
losses typed from the papers, autograd, and the optimiser by its published form.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, layer_norm

from gradmerge import MergeModule, Recipe
from gradmerge.cli.fit import MergeCLI
from gradmerge.cli.main import register
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.objectives import Objective
from tiny import build, relatives, trainer_of, vectors

CLASSES = 5
STEPS = 2
METHODS = Path(__file__).parents[2] / "configs" / "methods"


class Network(nn.Module):
    """Two linear layers and a norm; its matrices and the norm have a multiple of five entries."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh())


NAMES = [f"{layer}.{kind}" for layer in ("body", "norm", "head") for kind in ("weight", "bias")]
MATRICES = ["body.weight", "head.weight"]


# ---- what ships -----------------------------------------------------------------------------


def shipped(name, changes=()):
    """The parts of a configuration, as the command line's parser reads them.

    Args:
        name: of the file.
        changes: values that take the place of the file's, by path with `/`.
    """
    register()
    given = yaml.safe_load((METHODS / f"{name}.yaml").read_text())
    for path, value in dict(changes).items():
        place = given
        *parents, last = path.split("/")
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    model = given["model"]
    recipe = {**model["recipe"], "sources": {"a": "later", "b": "later"}}
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(Objective, "objective")
    parser.add_optimizer_args((torch.optim.Optimizer,), "optimizer")
    parser.add_lr_scheduler_args((torch.optim.lr_scheduler.LRScheduler,), "lr_scheduler")
    values = {"recipe": recipe, "objective": model["objective"], "optimizer": given["optimizer"]}
    if "lr_scheduler" in given:
        values["lr_scheduler"] = given["lr_scheduler"]
    parsed = parser.parse_object(values)
    found = parser.instantiate_classes(parsed)
    return SimpleNamespace(
        recipe=found.recipe,
        objective=found.objective,
        optimizer=parsed.optimizer,
        scheduler=parsed.lr_scheduler,
        clip=given.get("trainer", {}).get("gradient_clip_val"),
        scale=model.get("logit_scale"),
    )


def data():
    """Two tasks, the same batches each time."""
    found = vectors(classes=CLASSES)
    for task in found.tasks.values():
        for row in (row for split in task.path.values() for row in split):
            row["x"] = row["x"].double()
    return found


def learned(parts, path, sources, base=None):
    """A module that has taken two steps, and the raw coefficients that it started from."""
    recipe = replace(parts.recipe, sources=dict(zip("ab", sources, strict=True)), base=base)
    module = MergeModule(recipe, parts.objective, dtype="float64", logit_scale=parts.scale)
    start = by_name(module)

    def optimisers():
        optimiser = instantiate_class((module.parameters(),), parts.optimizer)
        rates = parts.scheduler and instantiate_class(optimiser, parts.scheduler)
        return MergeCLI.configure_optimizers(module, optimiser, rates)

    module.configure_optimizers = optimisers
    trainer = trainer_of(
        path,
        max_steps=STEPS,
        gradient_clip_val=parts.clip,
        precision="64-true",
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data())
    assert trainer.global_step == STEPS
    return module, start


def by_name(module):
    """A copy of the raw coefficients of each tensor."""
    plan, raw = module.merged.plan, module.merged.raw
    return {n: plan.z(n, raw).detach().clone() for n in NAMES if n not in plan.fixed}


# ---- what the papers say --------------------------------------------------------------------


def weights(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def run(model, theta, batch):
    return functional_call(model, theta, (batch["x"],))


def supervised(model, theta, batches, scale=1.0):
    """Cross-entropy, a mean over tasks."""
    losses = [cross_entropy(scale * run(model, theta, b), b["labels"]) for b in batches.values()]
    return sum(losses) / len(losses)


def entropy(model, theta, batches):
    """`H(p) / log C`, a mean over tasks."""
    total = 0.0
    for batch in batches.values():
        p = torch.softmax(run(model, theta, batch), dim=-1)
        total = total - (p * torch.log(p)).sum(dim=1).mean() / math.log(CLASSES)
    return total / len(batches)


def distilled(model, theta, batches, sources, t):
    """`T^2 KL(own source || merged)` at temperature T, a mean over tasks."""
    total = 0.0
    for source, batch in zip(sources, batches.values(), strict=True):
        p = torch.softmax(run(model, weights(source), batch) / t, dim=-1)
        q = torch.softmax(run(model, theta, batch) / t, dim=-1)
        total = total + t * t * (p * (p / q).log()).sum(dim=1).mean()
    return total / len(batches)


def descend(start, loss, optimiser, clip=None, rates=(1.0, 1.0), rho=None, size=torch.ones_like):
    """Two steps from `start`.

    Args:
        start: leaves by name.
        loss: of the leaves and the batches by task.
        optimiser: of a list of leaves.
        clip: largest norm of all gradients together.
        rates: factors on the learning rate, step by step.
        rho: of a sharpness-aware step: the gradient is taken at `z + rho s^2 g / |s g|`.
        size: gives s of a leaf.
    """
    z = {name: value.clone().requires_grad_() for name, value in start.items()}
    leaves = list(z.values())
    optimiser = optimiser(leaves)
    rate = optimiser.param_groups[0]["lr"]
    batches_of = data()
    batches_of.setup()
    stream = iter(batches_of.train_dataloader())
    for factor in rates:
        batches = next(stream)
        grads = torch.autograd.grad(loss(z, batches), leaves)
        if rho is not None:
            sizes = [size(leaf.detach()) for leaf in leaves]
            length = sum((s * g).square().sum() for s, g in zip(sizes, grads, strict=True)).sqrt()
            up = {
                name: (leaf.detach() + rho * s**2 * g / max(length, 1e-99)).requires_grad_()
                for (name, leaf), s, g in zip(z.items(), sizes, grads, strict=True)
            }
            grads = torch.autograd.grad(loss(up, batches), list(up.values()))
        if clip is not None:
            length = float(sum((g * g).sum() for g in grads).sqrt())
            # torch adds 1e-6 to the norm
            grads = [g * min(1.0, clip / (length + 1e-6)) for g in grads]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = g
        optimiser.param_groups[0]["lr"] = factor * rate
        optimiser.step()
    return {name: leaf.detach() for name, leaf in z.items()}


def assert_updated(module, start, expected):
    """The update is the formula's to float64's rounding, and no coefficient stayed."""
    found = by_name(module)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value != start[name]).any(), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12, msg=name)


def assert_starts(start, value):
    """Every raw number, which is kept in float32."""
    for name, raw in start.items():
        torch.testing.assert_close(raw, torch.full_like(raw, value), rtol=1e-7, atol=0, msg=name)


def furthest(one, other):
    """The largest difference of two updates."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def models():
    """A base and two sources in float64, whose differences float32 holds exactly."""
    found = [model.double() for model in relatives(build(Network))]
    with torch.no_grad():
        for parameter in (p for model in found for p in model.parameters()):
            parameter.copy_((parameter * 2**12).round() / 2**12)
    return found


def task_vectors(models):
    base, a, b = map(weights, models)
    return {n: torch.stack([a[n] - base[n], b[n] - base[n]]) for n in NAMES}


def by_tensor(origin, directions, link=lambda z: z):
    """`theta = A + sum_k link(z)_k B_k`, a coefficient per tensor."""

    def merge(z):
        return {
            n: origin[n] + torch.einsum("k,k...->...", link(z[n]), directions[n]) for n in NAMES
        }

    return merge


# ---- families -------------------------------------------------------------------------------


def cosine(step):
    """The factor on aTLAS's rate 1e-3, which falls to 1e-4 over the steps of a fit."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2


@pytest.mark.parametrize("p", [None, 1, 2])
def test_atlas(models, tmp_path, p):
    changes = {}
    if p:
        lp = {"class_path": "Lp", "init_args": {"p": p, "weight": 0.5}}
        changes["model/objective/regularisers"] = [lp]
    clip = 1.0
    if p == 1:  # one that gradients reach
        changes["trainer/gradient_clip_val"] = clip = 0.1
    if p == 2:  # away from zero, where the root has no slope
        changes["model/recipe/init/init_args/value"] = 0.25
    module, start = learned(shipped("atlas", changes), tmp_path, models[1:], models[0])
    assert_starts(start, 0.25 if p == 2 else 0.0)
    merge = by_tensor(weights(models[0]), task_vectors(models))

    def loss(z, batches):
        total = supervised(models[0], merge(z), batches)
        if p:
            norms = [(z[n].abs() ** p).sum() ** (1 / p) for n in NAMES]
            total = total + 0.5 * sum(norms) / len(norms)
        return total

    adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    rates = cosine(0), cosine(1)
    expected = descend(start, loss, adam, clip=clip, rates=rates)
    assert_updated(module, start, expected)
    free = descend(start, loss, adam, rates=rates)
    assert (furthest(free, expected) > 1e-6) == (p == 1)


def test_supermerge(models, tmp_path):
    module, start = learned(shipped("supermerge"), tmp_path, models[1:], models[0])
    assert_starts(start, math.atanh(0.1))
    merge = by_tensor(weights(models[0]), task_vectors(models), torch.tanh)

    def loss(z, batches):
        return supervised(models[0], merge(z), batches)

    adam = partial(torch.optim.Adam, lr=0.03)
    assert_updated(module, start, descend(start, loss, adam))


def clamped(z):
    return torch.clamp(z, 0, 1)


def split_by_ties(directions):
    """The largest fifth of each task vector, where it has the sign of their sum."""
    found = {}
    for name, tau in directions.items():
        kept = max(1, tau[0].numel() // 5)
        least = tau.abs().flatten(1).sort(dim=1, descending=True).values[:, kept - 1]
        trimmed = torch.where(tau.abs() >= least.view(2, *[1] * (tau.dim() - 1)), tau, 0.0)
        assert trimmed[0].count_nonzero() == kept
        sign = trimmed.sum(dim=0).sign()
        found[name] = torch.where(trimmed.sign() == torch.where(sign == 0, 1.0, sign), trimmed, 0.0)
    return found


@pytest.mark.parametrize("name", ["adamerging", "adamerging_pp"])
def test_adamerging(models, tmp_path, name):
    module, start = learned(shipped(name), tmp_path, models[1:], models[0])
    assert_starts(start, 0.3)
    directions = task_vectors(models)
    if name == "adamerging_pp":
        directions = split_by_ties(directions)
    merge = by_tensor(weights(models[0]), directions, clamped)

    def loss(z, batches):
        return entropy(models[0], merge(z), batches)

    adam = partial(torch.optim.Adam, lr=1e-3)
    assert_updated(module, start, descend(start, loss, adam))


def test_samerging(models, tmp_path):
    """From 0 the first step has nothing to perturb; the second is perturbed by what it moved."""
    module, start = learned(shipped("samerging"), tmp_path, models[1:], models[0])
    assert_starts(start, 0.0)
    merge = by_tensor(weights(models[0]), task_vectors(models))

    def loss(z, batches):
        return distilled(models[0], merge(z), batches, models[1:], 2.0)

    adam = partial(torch.optim.Adam, lr=1e-3, weight_decay=5e-4)
    expected = descend(start, loss, adam, rho=0.07, size=torch.abs)
    assert_updated(module, start, expected)
    assert furthest(descend(start, loss, adam), expected) > 1e-9


@pytest.mark.parametrize("name", ["expert_merging", "expert_merging_pp"])
def test_expert_merging(models, tmp_path, name):
    """The network has no blocks: the outputs of two of its layers take their place."""
    terms = yaml.safe_load((METHODS / f"{name}.yaml").read_text())["model"]["objective"]["terms"]
    terms[1]["init_args"]["layers"] = ["^body$", "^norm$"]
    parts = shipped(name, {"model/objective/terms": terms})
    module, start = learned(parts, tmp_path, models[1:], models[0])
    assert_starts(start, 0.1)
    directions = task_vectors(models)
    if name == "expert_merging_pp":
        sizes = {n: float(d.abs().sum()) for n, d in directions.items()}
        counts = {n: max(1, int(1.2 * 6 * s / sum(sizes.values()))) for n, s in sizes.items()}
        assert {n: raw.shape[1] if raw.dim() > 1 else 1 for n, raw in start.items()} == counts
        assert sorted(counts.values())[-1] == 3
    origin = weights(models[0])

    def merge(z):
        found = {}
        for n in NAMES:
            rows, runs = len(origin[n]), z[n].reshape(2, -1)
            own = runs[:, [i * runs.shape[1] // rows for i in range(rows)]]
            found[n] = origin[n] + torch.einsum("ki,ki...->i...", own, directions[n])
        return found

    def hidden(theta, x):
        body = x @ theta["body.weight"].T + theta["body.bias"]
        return [body, layer_norm(body, (10,), theta["norm.weight"], theta["norm.bias"])]

    def loss(z, batches):
        theta, total = merge(z), 0.0
        for source, batch in zip(models[1:], batches.values(), strict=True):
            pairs = zip(hidden(theta, batch["x"]), hidden(weights(source), batch["x"]), strict=True)
            total = total + 0.1 * sum((a - b).square().mean() for a, b in pairs) / 2 / 2
        every = torch.cat([(value - start[n]).abs().flatten() for n, value in z.items()])
        return total + distilled(models[0], theta, batches, models[1:], 1.0) + 0.4 * every.mean()

    rates = [1.0, 1.0]
    expected = descend(start, loss, partial(torch.optim.Adam, lr=0.01), parts.clip, rates)
    assert_updated(module, start, expected)


def test_learned_soup(models, tmp_path):
    module, start = learned(shipped("learned_soup"), tmp_path, models[1:], models[0])
    for raw in start.values():
        assert torch.equal(raw.softmax(dim=0), torch.full_like(raw, 0.5))
    a, b = map(weights, models[1:])
    whole = {n: torch.stack([a[n], b[n]]) for n in NAMES}
    merge = by_tensor(
        {n: torch.zeros_like(a[n]) for n in NAMES}, whole, lambda z: z.exp() / z.exp().sum()
    )

    def loss(z, batches):
        return supervised(models[0], merge(z), batches, z["log scale"].exp())

    adam = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.0)
    leaves = {**start, "log scale": torch.zeros((), dtype=torch.float64)}
    expected = descend(leaves, loss, adam)
    scale = expected.pop("log scale")
    assert scale.abs() > 1e-3
    torch.testing.assert_close(module.logit_scale.log_scale.detach(), scale, rtol=0, atol=1e-12)
    assert_updated(module, start, expected)


@pytest.mark.parametrize("clip", [0.25, 0.01])
def test_dam(models, tmp_path, clip):
    """As shipped (weight and clip are a quarter of the published, for the loss is a mean over the
    suites' four tasks, there a sum), and with a clip that gradients reach.
    """
    parts = shipped("dam", {} if clip == 0.25 else {"trainer/gradient_clip_val": clip})
    assert parts.clip == clip
    module, start = learned(parts, tmp_path, models[1:], models[0])
    assert_starts(start, 0.5)
    shapes = {"body.weight": (2, 6), "body.bias": (2,), "head.weight": (2, 10), "head.bias": (2,)}
    assert {name: tuple(raw.shape) for name, raw in start.items()} == shapes
    a, b = map(weights, models[1:])

    def loss(z, batches):
        theta = {n: (a[n] + b[n]) / 2 for n in ("norm.weight", "norm.bias")}
        for n in MATRICES:
            theta[n] = a[n] @ z[n][0].diag() + b[n] @ z[n][1].diag()
        for n in ("body.bias", "head.bias"):
            theta[n] = z[n][0] * a[n] + z[n][1] * b[n]
        cosines = [z[n][0] @ z[n][1] / (z[n][0].norm() * z[n][1].norm()) for n in MATRICES]
        kl = distilled(models[0], theta, batches, models[1:], 2.0)
        return kl + 0.01 / 4 * sum(cosines)

    adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    expected = descend(start, loss, adam, clip=clip)
    assert_updated(module, start, expected)
    assert (furthest(descend(start, loss, adam), expected) > 1e-6) == (clip < 0.25)


@pytest.mark.parametrize("anchor", ["base", "mean"])
def test_adarank(models, tmp_path, anchor):
    """Over the base as shipped; over the mean (CART) with a rate at which masks change."""
    changes, scale, rate = {}, 0.3, 1e-3
    if anchor == "mean":
        scale, rate = 2.3, 0.08
        changes = {
            "model/recipe/origin": "mean",
            "model/recipe/coefficients/init_args/start": scale,
            "model/recipe/init/init_args/factor": scale,
            "model/recipe/init/init_args/inner/init_args/share": 0.4,
            "optimizer/init_args/lr": rate,
        }
    module, start = learned(shipped("adarank", changes), tmp_path, models[1:], models[0])
    base, *sources = map(weights, models)
    origin = base
    if anchor == "mean":
        origin = {n: (sources[0][n] + sources[1][n]) / 2 for n in NAMES}
    components = {
        n: [torch.linalg.svd(source[n] - origin[n], full_matrices=False) for source in sources]
        for n in MATRICES
    }
    assert list(start) == NAMES
    for name, raw in start.items():
        typed = torch.full((2,), scale, dtype=torch.float64)
        if name in MATRICES:
            ranks = raw.shape[1] - 1
            kept = 2 if anchor == "mean" else ranks  # two fifths of 6 and of 5
            masks = torch.where(torch.arange(ranks) < kept, 0.1, -0.1).double()
            typed = torch.cat([typed[:, None], masks.expand(2, -1)], dim=1)
        torch.testing.assert_close(raw, typed, rtol=1e-7, atol=0)

    def loss(z, batches):
        theta = {}
        for n in set(NAMES) - set(MATRICES):
            theta[n] = origin[n] + sum(
                w * (s[n] - origin[n]) for w, s in zip(z[n], sources, strict=True)
            )
        for n in MATRICES:
            soft = torch.sigmoid(z[n][:, 1:] / 10.0)
            hard = (soft > 0.5).double()
            mask = hard + soft - soft.detach()
            theta[n] = origin[n] + sum(
                w * (u @ torch.diag(m * s) @ vh)
                for w, m, (u, s, vh) in zip(z[n][:, 0], mask, components[n], strict=True)
            )
        return entropy(models[0], theta, batches)

    adam = partial(torch.optim.Adam, lr=rate)
    expected = descend(start, loss, adam)
    changed = [n for n in MATRICES if ((expected[n] > 0) != (start[n] > 0))[:, 1:].any()]
    assert bool(changed) == (anchor == "mean")
    assert_updated(module, start, expected)


# ---- NP Merge: two networks that share no initialisation ------------------------------------


@pytest.fixture
def pair():
    """A, B with its units in another order, and B in the order of A."""
    first = build(Network).double()
    twin = relatives(first, 2, scale=0.1)[1]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    other = build(Network).double()
    with torch.no_grad():
        for module, given in ((other.body, twin.body), (other.norm, twin.norm)):
            module.weight.copy_(given.weight[order])
            module.bias.copy_(given.bias[order])
        other.head.weight.copy_(twin.head.weight[:, order])
        other.head.bias.copy_(twin.head.bias)
    return first, other, twin


def test_np_merge(pair, tmp_path):
    first, other, twin = pair
    module, start = learned(shipped("np_merge"), tmp_path, [first, other])
    assert_starts(start, 0.0)
    a, b = weights(first), weights(twin)
    assert {name: raw.shape for name, raw in start.items()} == {n: (1, *a[n].shape) for n in NAMES}

    def loss(z, batches):
        alpha = {n: 1 / (1 + torch.exp(-z[n][0])) for n in NAMES}
        theta = {n: alpha[n] * a[n] + (1 - alpha[n]) * b[n] for n in NAMES}
        return supervised(first, theta, batches)

    adam = partial(torch.optim.Adam, lr=0.03)
    assert_updated(module, start, descend(start, loss, adam))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_np_merge_starts_at_the_average_of_the_aligned_networks(pair, dtype):
    first, other, twin = (model.to(dtype) for model in pair)
    recipe = replace(shipped("np_merge").recipe, sources={"a": first, "b": other})
    plan = open_plan(recipe, first)
    raw = {key: torch.zeros_like(value) for key, value in plan.initial_raw().items()}
    a, b = weights(first), weights(twin)
    for name in NAMES:
        came, average = FitState(plan, raw).materialise(name), (a[name] + b[name]) / 2
        assert came.dtype == dtype
        if dtype == torch.float64:
            assert torch.equal(came, average), name
        up = torch.nextafter(average, torch.full_like(average, math.inf))
        assert ((came - average).abs() <= up - average).all(), name
