"""Scores and coefficients that a layer-wise merge logs, next to those of its export."""

from __future__ import annotations

import copy
import csv
import json
import math
import weakref
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from folds import tensors
from gradmerge import Recipe, merge
from gradmerge.alignment import CCA, ActivationMatching, OptimalTransport, WeightMatching
from gradmerge.coefficients import Column, Element, Mixup, Tensor, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.drivers import Job, LayerWise
from gradmerge.drivers.layerwise import job as layers
from gradmerge.drivers.layerwise.chain import BlockChain
from gradmerge.drivers.layerwise.job import require_permuted
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.provenance import mean_coefficients
from gradmerge.finalisers import DepthRescale
from gradmerge.objectives import HiddenStates, KLToEnsemble, KLToSource
from gradmerge.training.callbacks import CoefficientLogger
from gradmerge.training.logs import CSVLogger
from gradmerge.training.measures import ACCURACY, BITS_PER_BYTE
from layerwise_jobs import ADAM, Batched, batched, data_of, job_of, network_of
from tiny import recipe_of, relatives

pytestmark = pytest.mark.usefixtures("small_collections")


def labelled(data, kind):
    """The same examples with labels: classes, or the tokens themselves."""
    for task in data.tasks.values():
        for split in task.path.values():
            for number, example in enumerate(split):
                own = example["input_ids"] if kind == "tokens" else torch.tensor(number % 3)
                example["labels"] = own
    return data


def logged_job(folder, recipe, data, logger=True, settings=None, **options):
    """A job with a CSV logger and a logger of coefficients, as the command line adds them."""
    job = job_of(folder, recipe, data, ADAM, **options)

    def make(place, callbacks, overrides):
        own = {
            "default_root_dir": place,
            "accelerator": "cpu",
            "devices": 1,
            "logger": [CSVLogger(place, name="logs")] if logger else False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "callbacks": [*callbacks, CoefficientLogger()],
            **(settings or {}),
        }
        return lightning.Trainer(**{**own, **overrides})

    job.make_trainer = make
    return job


def logs(folder):
    """Names -> (step, value), of the one file of metrics below a folder."""
    (path,) = Path(folder).rglob("metrics.csv")
    found = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def table(path):
    with Path(path).open() as file:
        return list(csv.reader(file))


def logits_of(network, data, task):
    """Logits and labels of a task's selection split, padded as one batch, by plain torch."""
    examples = data.tasks[task].path["selection"]
    inputs = {
        key: torch.stack([e[key] for e in examples])
        if key == "labels" and not examples[0][key].dim()
        else torch.nn.utils.rnn.pad_sequence([e[key] for e in examples], True)
        for key in examples[0]
    }
    labels = inputs.pop("labels", None)
    network.eval()
    with torch.no_grad():
        output = network(**inputs)
    return getattr(output, "logits", output), labels


def of_export(folder, network, task):
    """The network with the weights of an exported folder, and of a task's own head."""
    own = folder / "tasks" / task
    state = tensors(own if own.is_dir() else folder)
    own = copy.deepcopy(network)
    lost, unknown = own.load_state_dict(state, strict=False)
    assert not unknown
    assert all(name.endswith("num_batches_tracked") for name in lost)
    return own


def scores_of(logits, labels, causal):
    """Loss and score by their definitions."""
    if causal:
        nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        score = float(nats) / math.log(2)
        return {"loss": float(nats), "perplexity": math.exp(nats), "bits_per_byte": score}
    accuracy = float((logits.argmax(dim=1) == labels).double().mean())
    return {"loss": float(functional.cross_entropy(logits, labels)), "accuracy": accuracy}


CASES = {
    "bert": {"private": ["classifier", "bert.pooler"], "init": Mixup(per="element", seed=3)},
    "llama": {"finalisers": [DepthRescale(0.5, 1.0)]},
    "batched": {},
}


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("name", CASES)
def test_the_scores_of_a_merge_are_those_of_its_export_and_are_logged_as_a_fit_does(name, tmp_path):
    if name == "batched":
        models, kind = batched(), "x"
    else:
        models, kind, _ = network_of(name, torch.float32)
    causal = kind == "tokens"
    data = labelled(data_of(kind, count=9, dtype=torch.float32), kind)
    recipe = recipe_of(models, **{"coefficients": Element(), **CASES[name]})
    job = logged_job(tmp_path, recipe, data)
    folder = LayerWise(steps=2).run(job)

    provenance = json.loads((folder / "provenance.json").read_text())
    found = provenance["results"]["selection"]
    losses = []
    for number, task in enumerate("ab", 1):
        expected = scores_of(*logits_of(of_export(folder, models[0], task), data, task), causal)
        expert = scores_of(*logits_of(models[number], data, task), causal)
        judged = BITS_PER_BYTE if causal else ACCURACY
        own, its = expected[judged.name], expert[judged.name]
        wanted = (its / own if causal else own / its) if its else math.nan
        assert found[task]["normalised"] == pytest.approx(wanted, rel=1e-5, nan_ok=True)
        for score, value in expected.items():
            assert found[task][score] == pytest.approx(value, rel=1e-5), (task, score)
        losses.append(expected["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert found["average"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert "selection" in (folder / "README.md").read_text()

    got = logs(tmp_path)
    # that of the start, which a merge without learning has
    if name != "batched":
        merge(recipe, tmp_path / "start")
        for task in "ab":
            logits = logits_of(of_export(tmp_path / "start", models[0], task), data, task)
            for score, value in scores_of(*logits, causal).items():
                assert got[f"selection/{task}/{score}"][0] == (0, pytest.approx(value, rel=1e-5))
    last = 2 * len(provenance["driver"]["blocks"])
    for task in "ab":
        for score, value in found[task].items():
            *starts, (step, given) = got[f"selection/{task}/{score}"]
            assert len(starts) <= (name != "batched")
            assert (step, given) == (last, pytest.approx(value, rel=1e-5, nan_ok=True))
    end = last, pytest.approx(found["average"]["loss"], rel=1e-5)
    assert got["selection/loss"][-1] == end
    steps = [step for step, _ in got["selection/loss"]]
    assert steps == [last] if name == "batched" else [0, last]
    plan = open_plan(recipe)
    start = mean_coefficients(FitState.start(plan))
    if name == "bert":
        assert len(set(start.values())) == 2
    for source, value in start.items():
        assert got[f"init/{source}"] == [(0, pytest.approx(value, rel=1e-6))]
    assert provenance["run"]["initial_coefficients"] == pytest.approx(start, rel=1e-6)

    (path,) = tmp_path.rglob("coefficients.csv")
    head, *rows = table(path)
    assert head == ["step", "tensor", "a", "b"]
    learned = load_file(folder / "coefficients.st")
    assert [row[1] for row in rows] == plan.learned
    for step, tensor, *values in rows:
        means = learned[tensor].reshape(2, -1).mean(dim=1).tolist()
        assert int(step) == last
        assert [float(value) for value in values] == pytest.approx(means, rel=1e-4)
    assert path.with_name("coefficients.png").is_file()


def test_the_scored_loss_is_that_of_the_configured_objective_where_the_data_allow(tmp_path):
    models, kind, _ = network_of("stack", torch.float32)
    private = recipe_of(models, coefficients=Tensor(), private=["head"])
    recipe = recipe_of(models, coefficients=Tensor())

    def run(name, data, given=recipe, settings=None, **options):
        job = logged_job(tmp_path / name, given, data, settings=settings, **options)
        folder = LayerWise(steps=1).run(job)
        found = json.loads((folder / "provenance.json").read_text())["results"]
        if not found:
            assert not any(key.startswith("selection/") for key in logs(tmp_path / name))
        return folder, found.get("selection")

    data = data_of(kind, dtype=torch.float32)
    folder, found = run("teacher", data, objective=KLToSource(temperature=1.0))
    for number, task in enumerate("ab", 1):
        merged, _ = logits_of(of_export(folder, models[0], task), data, task)
        expert, _ = logits_of(models[number], data, task)
        p = expert.log_softmax(dim=1)
        expected = (p.exp() * (p - merged.log_softmax(dim=1))).sum(dim=1).mean()
        assert found[task] == {"loss": pytest.approx(float(expected), rel=1e-4)}
    assert run("no labels", data)[1] is None
    data = labelled(data_of(kind, dtype=torch.float32), kind)
    assert run("switched off", data, settings={"limit_val_batches": 0})[1] is None
    scores = run("no experts", data, score_experts=False)[1]
    assert "accuracy" in scores["a"]
    assert "normalised" not in scores["a"]
    scores = run("heads", data, private, objective=KLToEnsemble())[1]
    assert "accuracy" in scores["a"]
    assert "loss" not in scores["a"], "sources without a common head have no ensemble"
    scores = run("hidden", data, objective=HiddenStates())[1]
    assert "accuracy" in scores["a"]
    assert "loss" not in scores["a"], "blocks pass one by one, not the whole network"


def test_the_trainer_may_limit_the_batches_that_are_scored(tmp_path):
    models, kind, _ = network_of("stack", torch.float32)

    def losses(limit):
        data = labelled(data_of(kind, dtype=torch.float32), kind)
        data.eval_batch_size = 2
        settings = {"limit_val_batches": limit}
        recipe = recipe_of(models, coefficients=Tensor())
        job = logged_job(tmp_path / str(limit), recipe, data, settings=settings)
        folder = LayerWise(steps=1).run(job)
        found = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
        return [found[task]["loss"] for task in "ab"]

    whole, first, half, tenth = (losses(limit) for limit in (1.0, 1, 0.5, 0.1))
    assert first == half == tenth, "one of two batches"
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in zip(whole, first, strict=True))


def test_a_network_without_logits_is_merged_and_not_scored(tmp_path):
    class Hidden(Batched):
        def forward(self, x):
            return x[:, None, None].expand(-1, 2, 2, -1) * super().forward(x).sum()

    torch.manual_seed(0)
    data = labelled(data_of("x", dtype=torch.float32), "x")
    recipe = recipe_of(relatives(Hidden(), 3, 0.2), coefficients=Tensor())
    job = logged_job(tmp_path, recipe, data, objective=KLToSource())
    folder = LayerWise(steps=1).run(job)
    assert json.loads((folder / "provenance.json").read_text())["results"] == {}
    assert "not scored: the network gives no logits" in job.said


@pytest.mark.parametrize("size", [100, 2])
def test_scoring_merges_each_block_once_and_holds_no_more_than_one(tmp_path, monkeypatch, size):
    models, kind, names = network_of("llama", torch.float32)
    data = labelled(data_of(kind, dtype=torch.float32), kind)
    data.eval_batch_size = size
    alive, counts, merged = [], [], []
    theta = BlockChain.theta

    def watched(self, name, finished=False):
        if not finished:
            return theta(self, name)
        counts.append(sum(ref() is not None for ref in alive))
        merged.append(name)
        found = theta(self, name, finished)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(BlockChain, "theta", watched)
    recipe = recipe_of(models, coefficients=Element())
    folder = LayerWise(steps=1).run(logged_job(tmp_path, recipe, data, score_start=False))
    tensors = open_plan(recipe).tensors
    blocks = [[n for n in tensors if n.startswith(f"{block}.")] for block in names]
    within = [name for block in blocks for name in block]
    assert sorted(name for name in merged if name in within) == sorted(within)
    batches = sum(-(-len(task.path["selection"]) // size) for task in data.tasks.values())
    assert batches == 2 if size == 100 else batches > 2
    # what is outside of blocks: before them once (embeddings), and again where a batch ends
    outside = len(tensors) - len(within)
    assert len(merged) == len(within) + 1 + batches * outside
    assert max(counts) <= max(map(len, blocks))
    monkeypatch.undo()
    scores = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
    assert set(scores) == {*data.tasks, "average"}


# ---- resuming ------------------------------------------------------------------------------------


def test_a_stopped_and_resumed_run_logs_the_same_as_a_whole_one(tmp_path, monkeypatch):
    models, kind, _ = network_of("stack", torch.float32)
    recipe = recipe_of(models, coefficients=Column(), init=Mixup(per="element", seed=1))

    def run(name):
        data = labelled(data_of(kind, dtype=torch.float32), kind)
        return LayerWise(steps=2).run(logged_job(tmp_path / name, recipe, data))

    def stop(place, name, match):
        def stopped(*_, **__):
            raise KeyError(match)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            with pytest.raises(KeyError, match=match):
                run("parts")

    whole = run("whole")
    plain = layers.Layers._fit_block

    def second(self, number, *arguments):
        if number == 2:
            raise KeyError("in a block")
        return plain(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Layers, "_fit_block", second)
        with pytest.raises(KeyError, match="in a block"):
            run("parts")
    stop(layers, "score", "in the scores")
    stop(Job, "export", "in the export")
    found = run("parts")
    for file in ("coefficients.st", "model.safetensors"):
        assert (found / file).read_bytes() == (whole / file).read_bytes()
    said = [json.loads((folder / "provenance.json").read_text()) for folder in (whole, found)]
    assert said[0]["results"] == said[1]["results"] != {}
    starts = [of["run"]["initial_coefficients"] for of in said]
    assert starts[0] == starts[1]
    # all in one folder: each line once, although the third run scored and the fourth exported
    (folder,) = (tmp_path / "parts/driver/logs").iterdir()
    assert logs(tmp_path / "parts") == logs(tmp_path / "whole")
    (path,) = (tmp_path / "whole").rglob("coefficients.csv")
    assert table(path) == table(folder / "coefficients.csv")


def test_coefficients_are_written_once_where_all_runs_share_a_folder(tmp_path, monkeypatch):
    models, kind, _ = network_of("stack", torch.float32)
    recipe = recipe_of(models, coefficients=Tensor())
    data = partial(data_of, kind, dtype=torch.float32)

    def stopped(*_, **__):
        raise KeyError("in the export")

    with monkeypatch.context() as patch:
        patch.setattr(Job, "export", stopped)
        with pytest.raises(KeyError, match="in the export"):
            LayerWise(steps=1).run(logged_job(tmp_path, recipe, data(), logger=False))
    before = table(tmp_path / "driver/coefficients.csv")
    LayerWise(steps=1).run(logged_job(tmp_path, recipe, data(), logger=False))
    assert table(tmp_path / "driver/coefficients.csv") == before
    assert len(before) == 1 + len(open_plan(recipe).tensors)


# ---- alignments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alignment", [CCA(), OptimalTransport(), OptimalTransport(ground="weights")]
)
def test_an_alignment_that_mixes_units_is_rejected_before_anything_is_opened(
    alignment, tmp_path, monkeypatch
):
    models, kind, _ = network_of("stack", torch.float64)
    recipe = recipe_of(models, alignment=alignment, origin="zero", statistics="statistics")
    job = job_of(tmp_path / "job", recipe, data_of(kind), dtype="float64")
    monkeypatch.setattr(layers, "open_plan", lambda *_: pytest.fail("opened"))
    name = type(alignment).__name__
    with pytest.raises(ConfigError, match=f"{name} may mix units.* Take WeightMatching"):
        LayerWise(steps=1).run(job)
    assert not job.folder.exists()


def test_an_alignment_that_permutes_is_accepted(tmp_path):
    """The target is then the expert itself, in the new order of units: the first loss of a merge of
    equal experts is zero.
    """
    models, kind, _ = network_of("stack", torch.float64)
    require_permuted(ActivationMatching())
    for alignment in (WeightMatching(), OptimalTransport(ground="weights", regularisation=0.0)):
        sources = {"a": models[1], "b": _shuffled(models[1])}
        recipe = Recipe(
            sources,
            origin="zero",
            coefficients=Element(),
            alignment=alignment,
            init=Uniform(),
        )
        plan = open_plan(recipe)
        require_permuted(alignment, plan)
        assert plan.order is not None
        moved = [
            n
            for n in plan.tensors
            if not torch.equal(plan.read("b", n), sources["b"].state_dict()[n])
        ]
        assert moved
        job = job_of(tmp_path / type(alignment).__name__, recipe, data_of(kind), dtype="float64")
        folder = LayerWise(steps=1).run(job)
        blocks = json.loads((folder / "provenance.json").read_text())["driver"]["blocks"]
        assert max(block["first_loss"] for block in blocks) < 1e-12


def _shuffled(model):
    """The same function with the units of its stem and first block in another order."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    stem, first, last = other.stem, other.blocks[0][0], other.blocks[2][0]
    with torch.no_grad():
        for writes, reads in ((stem, first), (first, last)):
            order = torch.randperm(len(writes.bias), generator=generator)
            writes.weight.copy_(writes.weight[order])
            writes.bias.copy_(writes.bias[order])
            reads.weight.copy_(reads.weight[:, order])
    return other


def test_a_map_that_mixes_is_found_in_the_opened_sources(tmp_path):
    """A user's own alignment may declare too little."""
    models, kind, _ = network_of("stack", torch.float64)

    class Silent(OptimalTransport):
        mixes_units = False

    recipe = recipe_of(models, alignment=Silent(ground="weights"), origin="zero")
    job = job_of(tmp_path / "job", recipe, data_of(kind), dtype="float64")
    with pytest.raises(ConfigError, match="Silent mixes units of b, expected one that permutes"):
        LayerWise(steps=1).run(job)
