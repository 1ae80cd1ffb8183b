"""Alignments on data over whole networks: planted orders are found, functions stay."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, logits_of
from gradmerge import MergeDataModule, Recipe, TaskData
from gradmerge.alignment import CCA, ActivationMatching, LinearMap, OptimalTransport
from gradmerge.alignment.align import traced_spec
from gradmerge.alignment.mixing import kept_apart
from gradmerge.alignment.symmetry.spec import same_maps
from gradmerge.coefficients import Model, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.preprocess import RegMean
from gradmerge.sources.skeleton import Network
from gradmerge.training.collect import collect
from permutations import invert_all
from tiny import SPLITS


class Residual(nn.Module):
    """Convolutions with BatchNorm around a shortcut, a pool, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm_one = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two, self.norm_two = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values):
        x = self.norm(self.stem(pixel_values)).relu()
        inner = self.norm_one(self.one(x)).relu()
        x = (x + self.norm_two(self.two(inner))).relu()
        return self.head(x.mean(dim=(2, 3)))


class Deep(nn.Module):
    """Three linear layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu())


class Gated(nn.Module):
    """A gate from another layer, the halves of one layer, and a function of one tensor."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.halves, self.own, self.head = nn.Linear(6, 14), nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.down(self.up(x) * nn.functional.silu(self.gate(x)))
        x = self.own(nn.functional.glu(self.halves(x)))
        return self.head(x * x.sigmoid())


NETWORKS = ["deep", "residual", "llama", "vit", "bert", "gpt2"]


def network(name, seed=0):
    """A network with weights and statistics of order one, so that no two units are alike."""
    torch.manual_seed(seed)
    own = {"deep": Deep, "residual": Residual, "gated": Gated}
    model = (own[name] if name in own else ARCHITECTURES[name][0])().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for buffer, tensor in model.named_buffers():
            if buffer.endswith(("running_mean", "running_var")):
                tensor.add_(torch.rand_like(tensor))
    return model


def rows_of(name, count, seed):
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor(0)
    if name in ("deep", "gated"):
        return [{"x": torch.randn(6, generator=generator), "labels": label} for _ in range(count)]
    if name in ("residual", "vit"):
        images = torch.randn(count, 3, 8, 8, generator=generator)
        return [{"pixel_values": image, "labels": label} for image in images]
    tokens = torch.randint(32, (count, 6), generator=generator)
    wanted = [label] * count if name == "bert" else tokens
    return [{"input_ids": t, "labels": own} for t, own in zip(tokens, wanted, strict=True)]


def data_of(name, tasks="a", count=24):
    described = {
        task: TaskData(
            path={s: rows_of(name, count, 10 * i + j) for j, s in enumerate(SPLITS)}, kind="tensors"
        )
        for i, task in enumerate(tasks)
    }
    return MergeDataModule(described, batch_size=8, eval_batch_size=8, check_disjoint=False)


def mapped(model, spec, maps):
    """A copy of a network with its units mapped."""
    other = copy.deepcopy(model)
    tensors = {n: spec.apply(maps, n, t).clone() for n, t in model.state_dict().items()}
    other.load_state_dict(tensors)
    return other.eval()


def outputs(model, data):
    """What a network gives for all adaptation data."""
    rows = [row for task in data.tasks.values() for row in task.path["adaptation"]]
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}
    with torch.no_grad():
        return logits_of(model(**inputs))


def opened(path, models, method, data, **options):
    """Collect, and open the aligned merge; names are those of a module in memory."""
    recipe = Recipe(
        dict(zip("abcd", models, strict=False)),
        alignment=method,
        coefficients=Model(),
        init=Uniform(),
        **options,
    )
    folder = collect(recipe, data, path / "statistics", overwrite=True, module=models[0])
    return open_plan(replace(recipe, statistics=str(folder)), models[0])


def read(plan, source, model):
    """A source as the merge reads it, as a network."""
    checkpoint, other = plan.sources[source], copy.deepcopy(model)
    names = set(checkpoint.infos)
    tensors = {n: checkpoint.read(n) for n in other.state_dict() if n in names}
    other.load_state_dict(tensors, strict=False)
    return other.eval()


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_order_is_found_and_the_source_computes_the_same(tmp_path, name, noise):
    first, data = network(name), data_of(name)
    spec = traced_spec(Network.bound(first, list(first.state_dict())))
    planted = spec.random(seed=1)
    near = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    second = mapped(near, spec, planted)
    torch.testing.assert_close(outputs(second, data), outputs(near, data), rtol=1e-5, atol=1e-5)
    plan = opened(tmp_path, [first, second], ActivationMatching(), data)
    found = plan.order.maps["b"]
    assert set(found) == {group.name for group in spec.groups.values() if group.places}
    assert set(found) == set(spec.groups)
    assert same_maps(found, invert_all(planted))
    aligned = read(plan, "b", first)
    torch.testing.assert_close(outputs(aligned, data), outputs(second, data), rtol=1e-5, atol=1e-5)
    for key, tensor in aligned.state_dict().items():
        assert torch.equal(tensor, near.state_dict()[key]), key
    if noise == 0:
        raw = plan.initial_raw()
        for key in plan.tensors:
            torch.testing.assert_close(
                FitState(plan, raw).materialise(key),
                first.state_dict()[key],
                rtol=0,
                atol=1e-7,
                msg=key,
            )


def test_three_networks_are_taken_to_a_named_reference_and_to_their_mean(tmp_path):
    first, data = network("deep"), data_of("deep", count=64)
    spec = traced_spec(Network.bound(first, list(first.state_dict())))
    models = [first, *(mapped(first, spec, spec.random(seed)) for seed in (1, 2))]
    for reference in ("b", "mean"):
        plan = opened(tmp_path, models, ActivationMatching(reference=reference), data)
        every = [read(plan, source, first).state_dict() for source in "abc"]
        for key, tensor in every[0].items():
            assert all(torch.equal(tensor, other[key]) for other in every[1:]), (reference, key)
        if reference == "b":
            assert all(torch.equal(t, models[1].state_dict()[k]) for k, t in every[0].items())


@pytest.mark.parametrize("name", ["residual", "vit"])
@pytest.mark.parametrize(
    "method", [CCA(gamma=1e-6), OptimalTransport(), OptimalTransport(ground="weights")]
)
def test_maps_that_mix_undo_planted_orders_and_spare_what_must_not_mix(tmp_path, name, method):
    first, data = network(name), data_of(name, count=48)
    spec = traced_spec(Network.bound(first, list(first.state_dict())))
    planted = spec.random(seed=1)
    second = mapped(first, spec, planted)
    if method.needs is None:
        recipe = Recipe({"a": first, "b": second}, alignment=method, init=Uniform())
        plan = open_plan(recipe, first)
    else:
        plan = opened(tmp_path, [first, second], method, data)
    for group, change in plan.order.maps["b"].items():
        assert isinstance(change, LinearMap) is (kept_apart(spec, group) is None), group
    mixed = [group for group in spec.groups if kept_apart(spec, group) is None]
    assert mixed == (list(spec.groups) if name == "residual" else [g for g in mixed if "mlp" in g])
    aligned = read(plan, "b", first)
    gap = (outputs(aligned, data) - outputs(first, data)).abs().max()
    spread = outputs(first, data).std()
    assert gap < (0.02 if isinstance(method, CCA) else 0.2) * spread, gap / spread


@pytest.mark.parametrize("method", [CCA(), OptimalTransport()])
def test_what_is_multiplied_keeps_a_permutation(tmp_path, method):
    """Two networks of their own: gates and what they gate are only permuted, and named."""
    models, data = [network("gated"), network("gated", seed=1)], data_of("gated", count=80)
    plan = opened(tmp_path, models, method, data)
    why = "its units are multiplied one by one with others"
    assert plan.order.report["permuted only"] == {"up": why, "halves.0": why}
    maps = plan.order.maps["b"]
    mixed = {group for group, change in maps.items() if isinstance(change, LinearMap)}
    assert mixed == {"down", "own"}
    aligned, x = read(plan, "b", models[0]), torch.randn(20, 6)
    inverse = maps["down"].matrix.float().inverse()
    with torch.no_grad():  # as far as the mixture behind the gate, which is linear
        hidden = aligned.down(aligned.up(x) * nn.functional.silu(aligned.gate(x)))
        wanted = models[1].down(models[1].up(x) * nn.functional.silu(models[1].gate(x)))
    torch.testing.assert_close(hidden @ inverse.mT, wanted, rtol=1e-3, atol=1e-3)


def test_a_linear_map_is_no_symmetry_of_a_network(tmp_path):
    """Two networks of their own: permutations keep the function, CCA's maps only nearly do."""
    models, data = [network("deep"), network("deep", seed=1)], data_of("deep", count=200)
    gaps = {}
    for method in (ActivationMatching(), CCA()):
        plan = opened(tmp_path, models, method, data)
        aligned = read(plan, "b", models[0])
        gap = (outputs(aligned, data) - outputs(models[1], data)).abs().max()
        gaps[type(method)] = float(gap / outputs(models[1], data).std())
    assert gaps[ActivationMatching] < 1e-5
    assert gaps[CCA] > 1e-2


def test_cca_brings_units_nearer_than_any_order_does(tmp_path):
    models, data = [network("deep"), network("deep", seed=1)], data_of("deep", count=200)
    inputs = torch.stack([row["x"] for row in data.tasks["a"].path["adaptation"]])
    with torch.no_grad():
        x, y = (model.one(inputs).double() for model in models)
    near = {}
    for method in (ActivationMatching(), CCA(gamma=1e-6)):
        change = opened(tmp_path, models, method, data).order.maps["b"]["one"]
        moved = y @ change.matrix.T if isinstance(change, LinearMap) else y[:, change]
        apart = (x - x.mean(0), moved - moved.mean(0))
        near[type(method)] = float(nn.functional.cosine_similarity(*apart, dim=0).mean())
    assert near[CCA] > near[ActivationMatching] + 0.1


def test_statistics_of_steps_are_of_the_same_order_or_refused(tmp_path):
    first, data = network("deep"), data_of("deep", tasks="ab")
    spec = traced_spec(Network.bound(first, list(first.state_dict())))
    second = mapped(first, spec, spec.random(seed=1))
    steps = {"preprocess": [RegMean()]}
    plain = Recipe({"a": first, "b": second}, **steps)
    folder = collect(plain, data, tmp_path / "plain", module=first)
    moved = replace(plain, alignment=OptimalTransport(ground="weights"), statistics=str(folder))
    with pytest.raises(ConfigError, match=r"gram statistics of .* units were in another order"):
        open_plan(moved, first)
    plan = opened(tmp_path, [first, second], ActivationMatching(), data, **steps)
    other = replace(plan.recipe, alignment=ActivationMatching(metric="covariance"))
    with pytest.raises(ConfigError, match=r"gram statistics of .* units were in another order"):
        open_plan(other, first)


def test_statistics_of_other_groups_are_refused(tmp_path):
    first, data = network("deep"), data_of("deep")
    plan = opened(tmp_path, [first, network("deep", 1)], ActivationMatching(), data)
    assert set(plan.order.maps["b"]) == {"one", "two"}
    folder = tmp_path / "statistics"
    text = (folder / "statistics.json").read_text()
    (folder / "statistics.json").write_text(text.replace('"module": "two"', '"module": "three"'))
    with pytest.raises(ConfigError, match="is of other groups of units: two"):
        open_plan(plan.recipe, first)
