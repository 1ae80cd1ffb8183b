"""Chunks: contiguous runs of rows whose number follows what the sources change."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from gradmerge import MergedModel
from gradmerge.coefficients import Chunks, Clamp, Constant, FromFile, Row, Tanh, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_merged
from tiny import build, recipe_of, relatives

NAMES = ["body.weight", "body.bias", "head.weight", "head.bias"]


def networks():
    """Sources that change the body by 3 and 1 in every entry, and a bias of the head by 4."""
    base, a, b = (model.double() for model in relatives(build(), scale=0.0))
    with torch.no_grad():
        a.body.weight += 3
        b.body.weight -= 1
        b.head.bias[0] += 4
        b.body.bias += 1e-3
        a.head.weight -= 1e-4
    return base, a, b


def counts(coefficients, models=None):
    plan = open_plan(recipe_of(models or networks(), coefficients=coefficients))
    slots = plan.layout.slots
    assert {s.kind for s in slots.values() if s.shape} <= {"axis"}
    return {name: slots[name].shape[0] if slots[name].shape else 1 for name in NAMES}


def expected(importance, budget, power):
    shares = [importance[name] ** power for name in NAMES]
    rows = {"body.weight": 8, "body.bias": 8, "head.weight": 3, "head.bias": 3}
    return {
        name: min(rows[name], max(1, math.floor(budget * 4 * share / sum(shares))))
        for name, share in zip(NAMES, shares, strict=True)
    }


# sums of |B_k| over entries and sources
PLAIN = {"body.weight": 4 * 48, "body.bias": 8e-3, "head.weight": 24e-4, "head.bias": 4.0}


@pytest.mark.parametrize(("budget", "power"), [(1.2, 1.0), (1.2, 0.5), (30.0, 0.5), (4.9, 0.0)])
def test_runs_are_shared_out_by_importance(budget, power):
    found = counts(Chunks(budget, power))
    assert found == expected(PLAIN, budget, power)
    if power == 0:  # the same for all, if the tensor has as many rows
        assert found == {"body.weight": 4, "body.bias": 4, "head.weight": 3, "head.bias": 3}


def test_a_single_number_is_one_run():
    values = [torch.nn.Parameter(torch.tensor(i)) for i in (1.0, 2.0, 4.0)]
    scale = [torch.nn.ParameterDict({"s": value}) for value in values]
    plan = open_plan(recipe_of(scale, coefficients=Chunks(3.0)))
    assert plan.layout.slots["s"].shape == ()


def test_the_same_importance_gives_the_same_whole_number():
    models = [model.double() for model in relatives(build(), scale=0.0)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.1 / parameter.numel())
    assert counts(Chunks(2.0), models) == dict.fromkeys(NAMES, 2)


def test_coefficients_of_a_first_merge_weigh_the_sources(tmp_path):
    models = networks()
    first = MergedModel(recipe_of(models, coefficients=Tensor()), dtype=torch.float64)
    with torch.no_grad():
        # body.weight loses its larger source, by a sign that does not count
        first.raw["tensor"].copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0], [-0.25, 1.0, 1.0, 2.0]]))
    export_merged(first, tmp_path / "first")
    weighed = {"body.weight": 0.25 * 48, "body.bias": 8e-3, "head.weight": 24e-4, "head.bias": 8.0}
    for wrapped in (Chunks(3.0, 1.0, str(tmp_path / "first")), None):
        chunks = wrapped or Clamp(Chunks(3.0, 1.0, str(tmp_path / "first" / "coefficients.st")))
        assert counts(chunks) == expected(weighed, 3.0, 1.0)
    assert expected(weighed, 3.0, 1.0) != expected(PLAIN, 3.0, 1.0)


def test_a_tensor_that_the_first_merge_did_not_learn_has_one_run(tmp_path):
    path = tmp_path / "coefficients.st"
    save_file({"head.bias": torch.tensor([[1.0], [1.0]])}, path, {"sources": '["a", "b"]'})
    found = counts(Chunks(1.0, 1.0, str(path)))
    assert found == {"body.weight": 1, "body.bias": 1, "head.weight": 1, "head.bias": 3}
    save_file({"head.bias": torch.ones(2, 1)}, path, {"sources": '["a", "c"]'})
    with pytest.raises(
        ConfigError, match=r"Chunks.first: .* is for the sources \['a', 'c'\], this merge has"
    ):
        counts(Chunks(1.0, 1.0, str(path)))
    with pytest.raises(ConfigError, match=r"Chunks.first: .*none: no such file"):
        counts(Chunks(first=str(tmp_path / "none")))


def by_row(z, rows):
    """A coefficient per row: runs are equal to within one row."""
    return z[:, [i * z.shape[1] // rows for i in range(rows)]]


@pytest.mark.parametrize("link", [lambda inner: inner, Tanh], ids=["plain", "tanh"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_runs_of_rows_are_merged_with_their_own_coefficient(tmp_path, memory, link):
    models = networks()
    chunks = link(Chunks(3.0, 0.0))
    recipe = recipe_of(models, coefficients=chunks, init=Constant(0.3))
    merged = MergedModel(recipe, memory=memory, dtype=torch.float64)
    assert merged.plan.layout.slots["body.weight"].shape == (3,)
    assert by_row(torch.arange(3)[None], 8).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for raw in merged.raw.values():
            raw.copy_(torch.randn(raw.shape, generator=generator))
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    merged(x).square().sum().backward()

    leaves = {key: value.detach().clone().requires_grad_() for key, value in merged.raw.items()}
    weights = {}
    for name in NAMES:
        base, a, b = (dict(m.named_parameters())[name].detach() for m in models)
        z = leaves[name.replace(".", "/")]
        c = by_row(z.tanh() if link is Tanh else z, len(base))
        both = torch.stack([a - base, b - base])
        weights[name] = base + (c.view(2, -1, *[1] * (base.dim() - 1)) * both).sum(dim=0)
        found = FitState(merged.plan, merged.raw).materialise(name)
        torch.testing.assert_close(found, weights[name].detach(), rtol=0, atol=1e-12, msg=name)
    functional_call(models[0], weights, (x,)).square().sum().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(merged.raw[key].grad, leaf.grad, rtol=1e-9, atol=1e-9, msg=key)

    export_merged(merged, tmp_path / "merged")
    start = FromFile(str(tmp_path / "merged"))
    again = open_plan(recipe_of(models, coefficients=chunks, init=start)).initial_raw()
    for key, raw in merged.raw.items():
        torch.testing.assert_close(again[key].double(), raw.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ConfigError, match=r"run over axis 0 in runs, those of this merge over axis"
    ):
        open_plan(recipe_of(models, coefficients=Row(), init=start)).initial_raw()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"budget": 0.0}, "budget: expected a positive"), ({"power": -1.0}, "power: expected at lea")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=f"Chunks.{message}"):
        Chunks(**options)
