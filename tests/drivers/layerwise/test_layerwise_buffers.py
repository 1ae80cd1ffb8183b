"""BatchNorm statistics in a layer-wise merge, and tensors without a gradient."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradmerge.coefficients import Column, Element, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.drivers import LayerWise
from gradmerge.drivers.layerwise import job as layers
from layerwise_jobs import ADAM, SGD, batched, data_of, job_of, raw_of
from tiny import build, recipe_of, relatives

pytestmark = pytest.mark.usefixtures("small_collections")


def test_batch_norm_statistics_are_those_of_a_fit_with_the_same_coefficients(tmp_path):
    from gradmerge import MergeModule
    from gradmerge.coefficients import FromFile

    models = batched()
    data = data_of("x", count=9, dtype=torch.float32, batch_size=3)
    job = job_of(tmp_path, recipe_of(models, coefficients=Column()), data, ADAM)
    folder = LayerWise(epochs=2).run(job)
    init = FromFile(str(folder / "coefficients.st"))
    module = MergeModule(recipe_of(models, coefficients=Column(), init=init))
    fresh = data_of("x", count=9, dtype=torch.float32, batch_size=3)
    fresh.attach(module.merged)
    fresh.setup()
    module.take_tasks(fresh.tasks)
    module.refresh_buffers(fresh)
    found = load_file(folder / "model.safetensors")
    for name, value in module.merged.network_buffers.values().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def batched_reference(models, data, steps, optimiser, start):
    """Coefficients of `Batched`'s blocks and of what follows: batch statistics while learning,
    pooled ones after.
    """
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
            got = [block(x, scales[k], place, theta, lambda _: ()) for k, x in enumerate(x1)]
            sum(((a - b) ** 2).mean() for a, b in zip(got, x2, strict=True)).backward()
            chosen.step()
        for name in names:
            c[name] = c[name].detach()
        get = (f"{place}.linear.weight", f"{place}.linear.bias")
        found = pooled([nn.functional.linear(x, *map(theta, get)) for x in x1])
        given = partial(lambda found, _: found, found)
        x1 = [block(x, scales[k], place, theta, given) for k, x in enumerate(x1)]

    def end(x, get, *statistics):
        return nn.functional.linear(
            norm(x, "last", get, *statistics), get("head.weight"), get("head.bias")
        )

    x2 = [end(x, experts[k].get, *own(k, "last")) for k, x in enumerate(x2)]
    names = ["last.weight", "last.bias", "head.weight", "head.bias"]
    for name in names:
        shape = (2, *base[name].shape)
        c[name] = torch.full(shape, start, dtype=torch.float64).requires_grad_()
    chosen = optimiser([c[name] for name in names])
    for _ in range(steps):
        chosen.zero_grad()
        pairs = zip(x1, x2, strict=True)
        sum(((end(x, theta) - y) ** 2).mean() for x, y in pairs).backward()
        chosen.step()
    return {name: value.detach() for name, value in c.items()}


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
