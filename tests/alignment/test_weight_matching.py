"""Weight matching, aligned views, and merges of aligned sources."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny
from gradmerge import MergedModel, Recipe
from gradmerge.alignment import Identity, WeightMatching
from gradmerge.alignment.align import align_sources, compared
from gradmerge.alignment.base import AlignmentContext
from gradmerge.alignment.symmetry.spec import LinearMap, Maps, PermutationSpec, same_maps
from gradmerge.alignment.views import AlignedView, original_of
from gradmerge.coefficients import Complement, Constant, Element, Sigmoid, Uniform
from gradmerge.common.errors import ConfigError, FingerprintError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.sources import Checkpoint, InMemory, Vocabulary
from gradmerge.sources.in_memory import persistent_tensors
from gradmerge.sources.skeleton import Network, strip_weights
from permutations import ResNet, Vgg, compose_all, llama, permuted, shaken, spec_of, vit


def opened(**modules: nn.Module) -> dict[str, Checkpoint]:
    return {name: InMemory(module).open() for name, module in modules.items()}


def context(spec: PermutationSpec, module: nn.Module, **modules: nn.Module) -> AlignmentContext:
    sources = opened(**modules)
    skeleton = strip_weights(module)
    network = Network.bound(skeleton, list(next(iter(sources.values())).infos))
    return AlignmentContext(spec, sources, compared(sources, network, ()), skeleton)


def noisy(module: nn.Module, scale: float, seed: int) -> nn.Module:
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(scale * tensor.std() * torch.randn(tensor.shape, generator=generator))
    return other


def mlp(seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    ).eval()


def network(kind: str) -> tuple[nn.Module, PermutationSpec]:
    torch.manual_seed(0)
    if kind == "mlp":
        return mlp(), spec_of(mlp())
    if kind == "vgg":
        net = shaken(Vgg())
        return net, spec_of(net, {"x": [1, 3, 8, 8]})
    if kind == "resnet":
        net = shaken(ResNet())
        return net, spec_of(net)
    net = llama("Llama")
    return net, spec_of(net)


# ---- the method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "vgg", "resnet", "llama"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_planted_permutation_is_recovered(kind: str, noise: float) -> None:
    net, spec = network(kind)
    planted = spec.random(1)
    other = noisy(permuted(net, spec, seed=1), noise, seed=5)
    found = WeightMatching(restarts=4).align(context(spec, net, a=net, b=other))
    assert same_maps(compose_all(planted, found.maps["b"]), {})
    values = found.objective["b"]
    assert all(later >= earlier for earlier, later in itertools.pairwise(values))


def test_the_objective_is_the_sum_of_inner_products() -> None:
    one, two = mlp(1), mlp(2)
    spec = spec_of(one)
    here = context(spec, one, a=one, b=two)
    found = WeightMatching().align(here)

    def inner(maps: Maps) -> float:
        pairs = zip(one.state_dict().items(), two.state_dict().values(), strict=True)
        return sum(
            float((x.double() * spec.apply(maps, name, y.double())).sum())
            for (name, x), y in pairs
            if name in spec.tensors
        )

    values = found.objective["b"]
    assert values[0] == pytest.approx(inner({}), rel=1e-12)
    assert values[-1] == pytest.approx(inner(found.maps["b"]), rel=1e-12)
    assert values[-1] > values[0]
    # a fixed point: no exchange of two units of one layer gains anything
    best = inner(found.maps["b"])
    for group, perm in found.maps["b"].items():
        for i in range(3):
            for j in range(i):
                swapped = perm.clone()
                swapped[[i, j]] = perm[[j, i]]
                assert inner({**found.maps["b"], group: swapped}) <= best + 1e-12


def test_restarts_keep_the_best_objective_and_seeds_reproduce() -> None:
    one, two = mlp(1), mlp(2)
    here = context(spec_of(one), one, a=one, b=two)
    alone = [WeightMatching(seed=s).align(here).objective["b"][-1] for s in range(4)]
    several = WeightMatching(restarts=3).align(here)
    assert several.objective["b"][-1] == max(alone)
    again = WeightMatching(restarts=3).align(here)
    assert same_maps(several.maps["b"], again.maps["b"], 0)


class Loop(nn.Module):
    """One weight whose rows and columns are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.loop = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(x + self.loop(x).tanh())


def test_a_group_on_both_axes_of_a_tensor_never_lowers_the_objective() -> None:
    torch.manual_seed(0)
    one, two = Loop(), Loop()
    with torch.no_grad():
        for net in (one, two):
            net.loop.weight.mul_(6)  # the quadratic part rules
    spec = spec_of(one)
    assert [g.size for g in spec.groups.values()] == [8]
    found = WeightMatching().align(context(spec, one, a=one, b=two))
    values = found.objective["b"]
    assert all(later >= earlier for earlier, later in itertools.pairwise(values))
    weights = zip(one.state_dict().items(), two.state_dict().values(), strict=True)
    inner = sum(
        float((x.double() * spec.apply(found.maps["b"], name, y.double())).sum())
        for (name, x), y in weights
        if name in spec.tensors
    )
    assert values[-1] == pytest.approx(inner, rel=1e-12)
    other = permuted(one, spec, seed=2)
    back = WeightMatching().align(context(spec, one, a=one, b=other))
    assert same_maps(compose_all(spec.random(2), back.maps["b"]), {})


def test_three_networks_meet_at_their_running_mean() -> None:
    net, spec = network("mlp")
    planted = {"b": spec.random(1), "c": spec.random(2)}
    sources = {
        "a": net,
        "b": noisy(permuted(net, spec, 1), 0.02, 3),
        "c": noisy(permuted(net, spec, 2), 0.02, 4),
    }
    found = WeightMatching(reference="mean").align(context(spec, net, **sources))
    assert found.report["reference"] == "mean"
    assert found.report["rounds"] >= 2  # the last one changed nothing
    for name, maps in planted.items():
        whole = compose_all(maps, found.maps[name])
        assert same_maps(whole, found.maps["a"])
    second = WeightMatching(reference="b").align(context(spec, net, **sources))
    assert second.maps["b"] == {}
    assert same_maps(second.maps["a"], planted["b"])
    with pytest.raises(ConfigError, match=r"expected a source or 'mean', got 'd'"):
        WeightMatching(reference="d").align(context(spec, net, **sources))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_iter: expected a positive number, got 0"):
        WeightMatching(max_iter=0)
    with pytest.raises(ConfigError, match="restarts: expected at least 0, got -1"):
        WeightMatching(restarts=-1)


def test_weights_that_are_not_finite_are_refused() -> None:
    one, two = mlp(1), mlp(2)
    with torch.no_grad():
        two[0].weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        WeightMatching().align(context(spec_of(one), one, a=one, b=two))


# ---- views --------------------------------------------------------------------------------------


def test_a_view_reads_permuted_tensors_and_keeps_them_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    net, spec = network("resnet")
    inner = InMemory(copy.deepcopy(net).bfloat16()).open()
    maps = spec.random(3)
    view = AlignedView(inner, spec, maps)
    expected = {name: spec.apply(maps, name, inner.read(name)) for name in inner.infos}
    assert any(not torch.equal(expected[n], inner.read(n)) for n in expected if "running" in n)
    for kept in (False, True):
        if kept:
            view.keep()
            monkeypatch.setattr(view, "form", None)
        for name, value in expected.items():
            assert torch.equal(view.read(name), value)
            assert view.read(name).dtype == inner.infos[name].dtype
    assert view.fingerprint() == inner.fingerprint()
    still = AlignedView(inner, spec, spec.identity())
    assert still.read("stem.weight").data_ptr() == inner.read("stem.weight").data_ptr()
    assert not list(tmp_path.iterdir()), "the files have no names"


# ---- in a recipe --------------------------------------------------------------------------------


def recipe(*modules: nn.Module, **options: Any) -> Recipe:
    sources = {name: InMemory(module) for name, module in zip("abc", modules, strict=False)}
    settings = {"init": Uniform(), "buffers": "mean", "alignment": WeightMatching(), **options}
    return Recipe(sources, **settings)  # type: ignore[arg-type]


def merged_state(recipe: Recipe) -> dict[str, torch.Tensor]:
    plan = open_plan(recipe)
    raw = plan.initial_raw()
    state = {name: FitState(plan, raw).materialise(name) for name in plan.tensors}
    return state | {name: plan.buffer(name) for name in plan.buffers}


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_the_average_of_two_orders_of_one_network_is_that_network(kind: str) -> None:
    net, spec = network(kind)
    state = merged_state(recipe(net, permuted(net, spec), alignment=WeightMatching(restarts=4)))
    for name, tensor in persistent_tensors(net).items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)
    plain = merged_state(recipe(net, permuted(net, spec), alignment=None))
    assert any((plain[n] - t).abs().max() > 0.1 for n, t in persistent_tensors(net).items())


@pytest.mark.parametrize("kind", ["qwen2", "vit"])
def test_an_export_of_aligned_transformers_computes_the_same(tmp_path: Path, kind: str) -> None:
    # transformers renames the tensors of a ViT as it loads them
    net = llama("Qwen2", tie_word_embeddings=True) if kind == "qwen2" else vit()
    spec = spec_of(net)
    paths = {}
    for name, module in {"a": net, "b": permuted(net, spec)}.items():
        module.save_pretrained(tmp_path / name)  # type: ignore[operator]
        paths[name] = str(tmp_path / name)
    plan = open_plan(Recipe(paths, init=Uniform(), alignment=WeightMatching(restarts=4)))
    folder = export_state(FitState.start(plan), tmp_path / "merged")
    merged = type(net).from_pretrained(folder).eval()  # type: ignore[attr-defined]
    inputs = torch.randint(3, 32, (2, 7)) if kind == "qwen2" else torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        one, two = net(inputs).logits, merged(inputs).logits
    assert float((one - two).abs().max()) <= 1e-6 * max(1.0, float(one.abs().max()))
    kept = json.loads((folder / "provenance.json").read_text())
    assert kept["alignment"]["method"] == "WeightMatching"
    assert 0 <= kept["alignment"]["output_changes_by"] <= 1e-8
    assert sorted(kept["alignment"]["groups"].values()) == sorted(
        group.size for group in spec.groups.values()
    )
    moved = kept["alignment"]["moved"]
    assert set(moved["a"]) == set()
    assert max(moved["b"].values()) > 0.5
    assert kept["alignment"]["objective"]["b"][-1] >= kept["alignment"]["objective"]["b"][0]
    assert kept["recipe"]["init_args"]["alignment"]["init_args"]["restarts"] == 4


def test_vocabularies_are_matched_before_units(tmp_path: Path) -> None:
    net = llama("Llama")
    spec = spec_of(net)
    paths = {}
    for name, module in {"a": net, "b": permuted(net, spec)}.items():
        module.save_pretrained(tmp_path / name)  # type: ignore[operator]
        tiny.word_tokenizer(tmp_path / name)
        paths[name] = str(tmp_path / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths["b"])
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(paths["b"])
    other = type(net).from_pretrained(paths["b"])  # type: ignore[attr-defined]
    other.resize_token_embeddings(33, mean_resizing=False)
    other.save_pretrained(paths["b"])
    options: dict[str, Any] = {"init": Uniform(), "tokenizer": Vocabulary("union")}
    plan = open_plan(Recipe(paths, alignment=WeightMatching(restarts=4), **options))
    assert plan.tokens is not None
    assert plan.tokens.size == 33
    for name in plan.tensors:
        one, two = plan.read("a", name), plan.read("b", name)
        assert one.shape == two.shape
        torch.testing.assert_close(one[:32], two[:32], rtol=0, atol=1e-6)


class Headed(nn.Module):
    def __init__(self, labels: int) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def test_a_private_head_follows_the_units_that_it_reads() -> None:
    torch.manual_seed(0)
    one, two = Headed(3), Headed(5)
    with torch.no_grad():
        two.body.weight.copy_(one.body.weight.flip(0))
        two.body.bias.copy_(one.body.bias.flip(0))
    plan = open_plan(recipe(one, two, private=["^head"]))
    assert torch.equal(plan.read("b", "body.weight"), one.body.weight)
    assert torch.equal(plan.read("b", "head.weight"), two.head.weight.flip(1))
    assert torch.equal(plan.read("b", "head.bias"), two.head.bias)
    x = torch.randn(4, 6)
    body = (x @ plan.read("b", "body.weight").T + plan.read("b", "body.bias")).relu()
    head = body @ plan.read("b", "head.weight").T + plan.read("b", "head.bias")
    torch.testing.assert_close(head, two(x), rtol=1e-5, atol=1e-6)


def test_a_head_of_other_names_cannot_follow() -> None:
    class Other(Headed):
        def __init__(self) -> None:
            super().__init__(3)
            self.head2 = nn.Linear(8, 2)

    with pytest.raises(ConfigError, match=r"source b .*private tensors that the network does not"):
        open_plan(recipe(Headed(3), Other(), private=["^head"]))


def test_a_base_is_refused_because_its_units_stay() -> None:
    net = mlp()
    with pytest.raises(ConfigError, match="differences would compare other units"):
        recipe(net, net, base=InMemory(net))
    with pytest.raises(
        ConfigError, match="buffers: WeightMatching needs recompute or mean, got origin"
    ):
        recipe(net, net, base=InMemory(net), origin="zero", buffers="origin")
    recipe(net, net, base=InMemory(net), alignment=Identity())
    plan = open_plan(recipe(net, mlp(1), base=InMemory(mlp(2)), origin="mean"))
    assert plan.order is not None


def test_a_network_is_needed_unless_the_specification_is_written() -> None:
    one, two = mlp(1), mlp(2)
    states = [InMemory(dict(net.state_dict())) for net in (one, two)]
    with pytest.raises(ConfigError, match=r"(?s)WeightMatching traces the network .*hand-written"):
        open_plan(Recipe({"a": states[0], "b": states[1]}, alignment=WeightMatching()))
    written = {
        "tensors": {
            "0.weight": ["first"],
            "0.bias": ["first"],
            "2.weight": ["second", "first"],
            "2.bias": ["second"],
            "4.weight": [None, "second"],
        }
    }
    plan = open_plan(
        Recipe({"a": states[0], "b": states[1]}, alignment=WeightMatching(spec=written))
    )
    traced = open_plan(recipe(one, two))
    for name in plan.tensors:
        assert torch.equal(plan.read("b", name), traced.read("b", name))


def test_coefficients_belong_to_the_order_of_units() -> None:
    one, two = mlp(1), mlp(2)
    first = open_plan(recipe(one, two))
    assert first.fingerprints["(units)"] == open_plan(recipe(one, two)).fingerprints["(units)"]
    with pytest.raises(FingerprintError, match=r"other weights of: \(units\)"):
        open_plan(recipe(one, two, alignment=WeightMatching(reference="b"))).require_fingerprints(
            first.fingerprints
        )


def test_mergekit_cannot_express_an_alignment() -> None:
    from gradmerge.mergekit.writer import mergekit_yaml

    plan = open_plan(recipe(mlp(1), mlp(2)))
    with pytest.raises(ConfigError, match="alignment: the sources' units are in another order"):
        mergekit_yaml(FitState.start(plan))


def test_identity_leaves_sources_as_they_are() -> None:
    net = mlp()
    views, order = align_sources(Identity(), opened(a=net, b=net), PermutationSpec({}, {}))
    assert not any(isinstance(view, AlignedView) for view in views.values())
    assert order.maps == {"a": {}, "b": {}}
    assert open_plan(recipe(net, net, alignment=Identity())).order is None


def test_elements_of_aligned_sources_learn(tmp_path: Path) -> None:
    """NP Merge: a coefficient per weight between aligned networks, through the trainer."""
    torch.manual_seed(1)
    models = [tiny.build(), tiny.Perceptron()]
    options = {
        "alignment": WeightMatching(),
        "coefficients": Complement(Sigmoid(Element())),
        "init": Constant(0.5),
    }
    from gradmerge import MergeModule
    from gradmerge.objectives import CrossEntropy, Objective

    sources = dict(zip("ab", models, strict=True))
    module = MergeModule(
        Recipe({k: InMemory(v) for k, v in sources.items()}, **options),  # type: ignore[arg-type]
        Objective([CrossEntropy()]),
    )
    before = tiny.raws(module)
    trainer = tiny.trainer_of(tmp_path)
    trainer.fit(module, datamodule=tiny.vectors())
    assert module.merged.plan.order is not None
    assert all(not torch.equal(before[k], v) for k, v in tiny.raws(module).items())


def test_experts_run_as_they_are_where_units_are_mixed() -> None:
    """A teacher read through a mixing map would compute something else than the source."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)) for _ in range(2))
    spec = spec_of(a)
    (group,) = spec.groups
    matrix = torch.randn(7, 7, dtype=torch.float64) + 3 * torch.eye(7, dtype=torch.float64)
    maps = {group: LinearMap(matrix, torch.linalg.inv(matrix))}
    plan = open_plan(Recipe({"a": a, "b": b}, init=Uniform()))
    view = AlignedView(plan.sources["b"], spec, maps)
    plan.sources["b"] = plan.serving["b"] = view
    merged = MergedModel(plan)
    x = torch.randn(4, 5)
    with merged.as_source("b", own=True):
        torch.testing.assert_close(merged(x), b(x).detach(), rtol=0, atol=1e-6)
    with merged.as_source("b"):
        assert (merged(x) - b(x)).abs().max() > 0.01
    order = {group: torch.randperm(7)}
    permuted = AlignedView(view.inner, spec, order)
    assert original_of(permuted) is permuted
    assert original_of(view) is view.inner
