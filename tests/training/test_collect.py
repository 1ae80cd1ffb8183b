"""Statistics of running sources, and merges by them, against explicit activations and autograd."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradmerge import MergeDataModule, Recipe, TaskData
from gradmerge.calibration.observers import input_rows, output_rows
from gradmerge.coefficients import Constant, Model
from gradmerge.common.errors import ConfigError, FingerprintError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.preprocess import FisherScale, MaTS, RegMean, Trim
from gradmerge.sources.collected import SourceStatistics
from gradmerge.training.collect import collect
from tiny import SPLITS, Perceptron, build, examples, recipe_of, relatives, vectors

EXACT = {"damping": 0.0, "normalise": False, "off_diagonal": 1.0}
ONES = {"coefficients": Model(), "init": Constant(1.0)}


def merged_by(path, models, data, *steps, **options):
    """Collect, merge, and give all merged tensors."""
    recipe = recipe_of(models, preprocess=list(steps), **{**ONES, **options})
    folder = collect(recipe, data, path / "statistics", overwrite=True)
    plan = open_plan(replace(recipe, statistics=str(folder)))
    raw = plan.initial_raw()
    return {name: FitState(plan, raw).materialise(name) for name in plan.tensors}


def batch_of(data, task):
    """A task's whole adaptation split as one batch."""
    rows = data.tasks[task].path["adaptation"]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def solved(every, weights):
    """`(sum G_k)^-1 sum G_k W_k` for weights `[out, in]`, float64."""
    grams = [x.double().T @ x.double() for x in every]
    right = sum(g @ w.double().T for g, w in zip(grams, weights, strict=True))
    return torch.linalg.solve(sum(grams), right).T.float()


def close(got, expected, **options):
    torch.testing.assert_close(got, expected, **{"atol": 2e-5, "rtol": 2e-5, **options})


# ---- rows of layers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 6),
        nn.Conv1d(4, 6, 3, padding=2, stride=2, groups=2),
        nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 8, 1, stride=2, groups=4, bias=False),
    ],
    ids=["linear", "conv1d", "conv2d", "circular", "pointwise"],
)
def test_rows_times_the_weight_are_the_layers_outputs(layer):
    torch.manual_seed(0)
    dims = {nn.Linear: (3, 5, 4), nn.Conv1d: (3, 4, 9), nn.Conv2d: (3, 4, 9, 8)}[type(layer)]
    x = torch.randn(dims)
    outputs = layer(x)
    bias = 0 if layer.bias is None else layer.bias.view(-1, *(1,) * (x.dim() - 2))
    if isinstance(layer, nn.Linear):
        bias = layer.bias
    rows = input_rows(layer, x, None)
    weight = layer.weight.reshape(len(rows), -1, rows.shape[-1])
    torch.testing.assert_close(rows @ weight.mT, output_rows(layer, outputs - bias, None))


def test_rows_of_padding_are_left_out():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = input_rows(nn.Linear(4, 2), x, mask)
    assert torch.equal(rows[0], torch.stack([x[0, 0], x[0, 1], x[1, 0]]))
    one_a_batch = torch.randn(2, 4)
    assert torch.equal(input_rows(nn.Linear(4, 2), one_a_batch, mask)[0], one_a_batch)


class Standardised(nn.Conv1d):
    """Standardises its weight, as BiT's convolutions do."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2), keepdim=True)
        return self._conv_forward(x, weight / weight.std(), self.bias)


class Odd(nn.Module):
    """A layer that is not linear in its weight before one that is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Standardised(1, 2, 3), nn.Conv1d(2, 3, 4)

    def forward(self, x):
        return self.second(self.first(x[:, None]).tanh())[..., 0]


@pytest.mark.parametrize("activations", ["source", "merged"])
def test_layers_that_change_their_weight_are_averaged_and_named(tmp_path, activations):
    models, data = relatives(build(Odd)), vectors(count=40)
    recipe = recipe_of(models, preprocess=[RegMean(activations=activations)], **ONES)
    lines = []
    folder = collect(recipe, data, tmp_path / "s", report=lines.append)
    assert lines[:2] == [
        "a: Gram matrices of 1 of 4 tensors from 40 examples",
        "1 layers change their weight before use and are averaged: first.weight",
    ]
    plan = open_plan(replace(recipe, statistics=str(folder)))
    got = FitState.start(plan).materialise("first.weight")
    close(got, (models[1].first.weight + models[2].first.weight) / 2)


# ---- RegMean --------------------------------------------------------------------------------


def test_regmean_of_two_layers_is_the_closed_form_on_explicit_activations(tmp_path):
    models, data = relatives(build()), vectors(count=40)
    got = merged_by(tmp_path, models, data, RegMean(**EXACT))
    a, b = models[1:]
    with torch.no_grad():
        first = [batch_of(data, task)["x"] for task in "ab"]
        second = [model.body(x).tanh() for model, x in zip((a, b), first, strict=True)]
        close(got["body.weight"], solved(first, [a.body.weight, b.body.weight]))
        close(got["head.weight"], solved(second, [a.head.weight, b.head.weight]))
        close(got["body.bias"], (a.body.bias + b.body.bias) / 2)


@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
def test_regmean_is_the_same_from_any_origin(tmp_path, origin):
    models, data = relatives(build()), vectors(count=40)
    got = merged_by(tmp_path, models, data, RegMean(), origin=origin)
    close(got["head.weight"], merged_by(tmp_path, models, data, RegMean())["head.weight"])


def token_data(tasks, padded):
    """Token sequences, of different length where they are padded, with labels."""
    described = {}
    for i, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(i)
        rows = []
        for j in range(8):
            length = 3 + j % 4 if padded else 6
            ids = torch.randint(32, (length,), generator=generator)
            mask = torch.ones(length, dtype=torch.long)
            rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(j % 2)})
            if not padded:
                rows[-1]["labels"] = ids
        # one example a split tells them apart; only adaptation is run
        others = dict.fromkeys(SPLITS[1:], rows[:1])
        described[task] = TaskData(path={"adaptation": rows, **others}, kind="tensors")
    options = {"batch_size": 4, "eval_batch_size": 4, "check_disjoint": False}
    return MergeDataModule(described, **options)


def inputs_of(model, name, data, task):
    """Return the inputs of a module of a real network, without rows of padding."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in data.tasks[task].path["adaptation"]:
            model(input_ids=row["input_ids"][None])
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


@pytest.mark.parametrize(
    ("family_name", "padded", "linear", "transposed"),
    [
        ("bert", True, "bert.encoder.layer.1.output.dense", False),
        ("gpt2", False, "transformer.h.1.mlp.c_fc", True),
        ("llama", False, "lm_head", False),
    ],
)
def test_regmean_of_transformers_networks(
    tmp_path, family, family_name, padded, linear, transposed
):
    models, _ = family(family_name, dtype=torch.float32)
    data = token_data("ab", padded)
    got = merged_by(tmp_path, models, data, RegMean(damping=1e-4, normalise=True))
    every, weights = [], []
    for model, task in zip(models[1:], "ab", strict=True):
        x = inputs_of(model, linear, data, task).double()
        gram = x.T @ x / len(x)
        every.append(0.9 * gram + 0.1 * torch.diag(gram.diag()))
        weight = model.get_submodule(linear).weight.double()
        weights.append(weight if transposed else weight.T)
    damping = 1e-4 * sum(gram.diag().mean() for gram in every) / 2
    every = [gram + damping * torch.eye(len(gram)) for gram in every]
    right = sum(g @ w for g, w in zip(every, weights, strict=True))
    expected = torch.linalg.solve(sum(every), right).float()
    close(got[f"{linear}.weight"], expected if transposed else expected.T)


@pytest.mark.parametrize("family_name", ["gpt2", "llama-tied"])
def test_a_weight_tied_to_an_embedding_is_averaged(tmp_path, family, family_name):
    models, _ = family(family_name, dtype=torch.float32)
    got = merged_by(tmp_path, models, token_data("ab", False), RegMean())
    name = next(name for name in got if name.endswith(("wte.weight", "embed_tokens.weight")))
    a, b = (model.get_parameter(name) for model in models[1:])
    close(got[name], (a + b) / 2)
    assert "lm_head.weight" not in got


def test_one_source_is_itself_and_equal_data_give_the_average(tmp_path):
    models = relatives(build(), count=2)
    steps = [RegMean(), RegMean(activations="merged"), FisherScale(), MaTS(statistic="kfac")]
    for step in steps:
        got = merged_by(tmp_path, models, vectors("a"), step)
        for name, tensor in got.items():
            close(tensor, models[1].get_parameter(name), msg=f"{step} {name}")
    twice = relatives(build())
    data = vectors()
    data.tasks["b"] = data.tasks["a"]
    got = merged_by(tmp_path, twice, data, RegMean())
    close(got["body.weight"], (twice[1].body.weight + twice[2].body.weight) / 2)


# ---- RegMean++ ------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(6, 3)

    def forward(self, x):
        return self.only(x)


class Blocks(nn.Module):
    """A stem, blocks of two layers, and a head; each block counts its calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(5, 7), "down": nn.Linear(7, 5)}) for _ in range(2)
        )
        for i, inner in enumerate(self.blocks):
            self.blocks[i] = Block(inner["up"], inner["down"])
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Block(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def test_regmean_pp_of_one_layer_is_regmean(tmp_path):
    models, data = relatives(build(OneLayer)), vectors(count=40)
    plain = merged_by(tmp_path, models, data, RegMean())
    through = merged_by(tmp_path, models, data, RegMean(activations="merged"))
    assert all(torch.equal(plain[name], through[name]) for name in plain)


def test_regmean_pp_takes_inputs_from_the_blocks_merged_before(tmp_path):
    models, data = relatives(build(Blocks)), vectors(count=60)
    got = merged_by(tmp_path, models, data, RegMean(**EXACT, activations="merged"))
    sources = models[1:]
    whole = copy.deepcopy(sources[0])
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(sum(source.get_parameter(name) for source in sources) / 2)
        hidden = [batch_of(data, task)["x"] for task in "ab"]

        def merge(place, every):
            layers = [source.get_submodule(place) for source in sources]
            merged = solved(every, [layer.weight for layer in layers])
            whole.get_submodule(place).weight.copy_(merged)

        merge("stem", hidden)
        hidden = [whole.stem(x) for x in hidden]
        for i in range(2):
            # within a block the source's own weights and biases
            inner = [s.blocks[i].up(x).tanh() for s, x in zip(sources, hidden, strict=True)]
            merge(f"blocks.{i}.up", hidden)
            merge(f"blocks.{i}.down", inner)
            hidden = [whole.blocks[i](x) for x in hidden]
        merge("head", hidden)
        for name, parameter in whole.named_parameters():
            close(got[name], parameter, atol=1e-4, rtol=1e-4, msg=name)
    apart = merged_by(tmp_path, models, data, RegMean(**EXACT))
    assert not torch.allclose(apart["head.weight"], got["head.weight"], atol=1e-3)


def test_a_pass_ends_with_the_block_that_it_is_for(tmp_path, monkeypatch):
    """Stem, two blocks and head are four stages; the head runs in its own and in the trace."""
    calls = {"stem": 0, "head": 0}
    forward = Blocks.forward

    def counting(self, x):
        calls["stem"] += 1
        out = forward(self, x)
        calls["head"] += 1
        return out

    monkeypatch.setattr(Blocks, "forward", counting)
    recipe = recipe_of(relatives(build(Blocks)), preprocess=[RegMean(activations="merged")])
    collect(recipe, vectors(count=8, eval_batch_size=8), tmp_path / "s")
    assert calls == {"stem": 1 + 4 * 2, "head": 1}  # the pass of the head's stage ends in it


# ---- Fisher and K-FAC -----------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients_of_single_examples(tmp_path):
    models, data = relatives(build()), vectors(count=10)
    step = FisherScale(labels="data", normalise=False)
    folder = collect(recipe_of(models, preprocess=[step]), data, tmp_path / "s")
    found = SourceStatistics(folder)
    for task, model in zip("ab", models[1:], strict=True):
        squares = {name: 0 for name, _ in model.named_parameters()}
        batch = batch_of(data, task)
        for x, label in zip(batch["x"], batch["labels"], strict=True):
            model.zero_grad()
            functional.cross_entropy(model(x[None]), label[None]).backward()
            for name, parameter in model.named_parameters():
                squares[name] = squares[name] + parameter.grad.square() / 10
        norm = torch.cat([s.flatten() for s in squares.values()]).norm()
        for name, square in squares.items():
            got = found.read("fisher", task, name)
            torch.testing.assert_close(got.values["fisher"], square, atol=1e-7, rtol=1e-4)
            assert got.norm == pytest.approx(float(norm), rel=1e-4)


def repeated(count, batch=8):
    """One example many times: draws of its label are all that differs."""
    rows = [examples(3, 1)[0]] * count
    described = {"a": TaskData(path=dict.fromkeys(SPLITS, rows), kind="tensors")}
    return MergeDataModule(described, eval_batch_size=batch, check_disjoint=False)


@pytest.mark.parametrize(("per", "count"), [("example", 600), ("batch", 4000)])
def test_drawn_labels_give_the_fisher_information(tmp_path, per, count):
    """The exact one is a sum over classes, `sum_y p(y) g_y^2`."""
    model = relatives(build(), count=2)[1]
    step = FisherScale(per=per)
    recipe = Recipe({"a": model}, preprocess=[step])
    found = SourceStatistics(collect(recipe, repeated(count), tmp_path / "s"))
    x = repeated(1).tasks["a"].path["adaptation"][0]["x"][None]
    chances = model(x).softmax(dim=1)[0].detach()
    exact = 0
    for y, chance in enumerate(chances):
        model.zero_grad()
        functional.cross_entropy(model(x), torch.tensor([y])).backward()
        exact = exact + chance * model.head.weight.grad.square()
    got = found.read("fisher", "a", "head.weight").values["fisher"]
    # 600 draws: a relative error of about 1 / sqrt(600 p) an entry
    assert float((got - exact).norm() / exact.norm()) < 0.15


def test_kfac_is_of_inputs_and_of_the_gradients_of_outputs(tmp_path):
    model = relatives(build(), count=2)[1]
    step = MaTS(statistic="kfac")
    recipe = Recipe({"a": model}, preprocess=[step])
    found = SourceStatistics(collect(recipe, repeated(2000, 100), tmp_path / "s"))
    x = repeated(1).tasks["a"].path["adaptation"][0]["x"]
    with torch.no_grad():
        hidden = model.body(x).tanh()
        chances = model.head(hidden).softmax(dim=0)
    head, body = (found.read("kfac", "a", f"{n}.weight").values for n in ("head", "body"))
    torch.testing.assert_close(body["input"][0] / 2000, torch.outer(x, x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        head["input"][0] / 2000, torch.outer(hidden, hidden), atol=1e-4, rtol=1e-4
    )
    covariance = torch.diag(chances) - torch.outer(chances, chances)  # of p - onehot(y)
    assert float((head["output"][0] - covariance).norm() / covariance.norm()) < 0.1
    # with the same draws the body's gradients are the head's through the chain rule
    chain = model.head.weight.detach() * (1 - hidden.square())
    expected = chain.T @ head["output"][0] @ chain
    torch.testing.assert_close(body["output"][0], expected, atol=1e-5, rtol=1e-4)


def test_sources_run_with_their_own_heads(tmp_path):
    models = [build(Perceptron, classes=c) for c in (2, 3, 5)]
    with torch.no_grad():
        for i, model in enumerate(models):
            model.body.weight.mul_(1 + 0.1 * i)
    data = vectors(count=12, classes=2)
    step = FisherScale(labels="data")
    recipe = recipe_of(models, preprocess=[step], private=["^head"], **ONES)
    folder = collect(recipe, data, tmp_path / "s")
    assert set(
        SourceStatistics(folder).index["collected"]["fisher"]["sources"]["b"]["tensors"]
    ) == {
        "body.weight",
        "body.bias",
    }
    batch = batch_of(data, "b")
    square = 0
    for x, label in zip(batch["x"], batch["labels"], strict=True):
        models[2].zero_grad()
        functional.cross_entropy(models[2](x[None]), label[None]).backward()
        square = square + models[2].body.weight.grad.square() / 12
    got = SourceStatistics(folder).read("fisher", "b", "body.weight").values["fisher"]
    torch.testing.assert_close(got, square, atol=1e-7, rtol=1e-4)


# ---- what is kept, and what is refused ------------------------------------------------------


def test_statistics_say_what_they_are_of_and_are_refused_for_anything_else(tmp_path):
    models, data = relatives(build()), vectors()
    recipe = recipe_of(models, preprocess=[RegMean()])
    with pytest.raises(
        ConfigError, match="expected the folder that RegMean needs, with the sources' statistics"
    ):
        open_plan(recipe)
    folder = collect(recipe, data, tmp_path / "s")
    kept = replace(recipe, statistics=str(folder))
    open_plan(kept)
    index = json.loads((folder / "statistics.json").read_text())
    assert index["data"]["tasks"].keys() == {"a", "b"}
    assert index["collected"]["gram"]["sources"]["a"]["examples"] == 12
    with pytest.raises(ConfigError, match="exists; give another folder"):
        collect(recipe, data, folder)
    open_plan(replace(kept, preprocess=[RegMean(off_diagonal=0.5)]))  # the same matrices serve
    with pytest.raises(ConfigError, match="holds gram, expected fisher; collect again"):
        open_plan(replace(kept, preprocess=[FisherScale()]))
    with pytest.raises(ConfigError, match="activations source, the recipe says activations merged"):
        open_plan(replace(kept, preprocess=[RegMean(activations="merged")]))
    other = {**kept.sources, "b": relatives(build(), scale=0.1)[2]}
    with pytest.raises(FingerprintError, match="is of other weights of b"):
        open_plan(replace(kept, sources=other))
    with pytest.raises(ConfigError, match="has none of c"):
        open_plan(replace(kept, sources={**kept.sources, "c": models[0]}))
    with pytest.raises(ConfigError, match=r"holds no statistics\.json"):
        open_plan(replace(kept, statistics=str(tmp_path / "absent")))
    (folder / "gram-1.safetensors").write_bytes(b"cut")
    plan = open_plan(kept)
    with pytest.raises(ConfigError, match=r"gram-1\.safetensors cannot be read"):
        FitState.start(plan).materialise("body.weight")


@pytest.mark.parametrize(
    ("steps", "tasks", "message"),
    [
        ([Trim()], "ab", "no step of this recipe needs statistics"),
        ([RegMean()], "a", "no task belongs to the sources b"),
        ([Trim(), RegMean(activations="merged")], "ab", "must be the first step"),
        ([FisherScale(), FisherScale(seed=1)], "ab", "collected in different ways"),
    ],
)
def test_what_cannot_be_collected_is_refused(tmp_path, steps, tasks, message):
    recipe = recipe_of(relatives(build()), preprocess=steps)
    with pytest.raises(ConfigError, match=message):
        collect(recipe, vectors(tasks), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_by_statistics_is_the_start_of_a_learned_one(tmp_path):
    """Gradients of coefficients on B'_k, against finite differences."""
    from gradmerge import MergedModel

    models, data = relatives(build()), vectors(count=40)
    recipe = recipe_of(models, preprocess=[RegMean()], **ONES)
    folder = collect(recipe, data, tmp_path / "s")
    merged = MergedModel(replace(recipe, statistics=str(folder)))
    x = batch_of(data, "a")["x"]
    loss = merged(x).square().mean()
    loss.backward()
    (raw,) = merged.raw.values()
    step = 1e-2
    for k in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                raw[k] += sign * step
                values.append(merged(x).square().mean().item())
                raw[k] -= sign * step
        assert raw.grad[k].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)
