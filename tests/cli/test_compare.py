"""`gradmerge compare` on a tiny suite, in this process."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

from commands import fails
from gradmerge import MergedModel, Recipe, export_merged
from gradmerge.cli import main
from gradmerge.cli.compare import workers
from gradmerge.cli.compare.bench import Bench
from gradmerge.cli.compare.learned import LearnedRunner
from gradmerge.cli.compare.methods import BOUND, SCALE, Axis, Method, Suite
from gradmerge.cli.compare.static import StaticRunner
from gradmerge.cli.compare.work import Work
from gradmerge.coefficients import Constant, Model, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.operators import DisjointMean
from gradmerge.preprocess import Trim
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"
TENSOR, TIES, REGMEAN, GREEDY = (
    str(CONFIGS / name)
    for name in (
        "methods/tensor.yaml",
        "static/ties.yaml",
        "static/regmean.yaml",
        "static/greedy_soup.yaml",
    )
)
STEPS = {"trainer": {"val_check_interval": 2, "check_val_every_n_epoch": None}}
OPTIONS = ["--trials", "2", "--workers", "0", "--resamples", "100"]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """A finished comparison: its folder, its suite, and its results."""
    root = tmp_path_factory.mktemp("compared")
    suite = write(root / "suite.yaml", world, STEPS)
    before = Path.cwd()
    os.chdir(root)
    try:
        folder = f"mine={world['model']['recipe']['sources']['b']}"
        more = [TENSOR, TIES, REGMEAN, GREEDY, folder, "--examples", "3", "--ensemble", *OPTIONS]
        more += ["--also", short(root, world), f"new={untrained(root, world)}"]
        assert main(["compare", suite, *more, "--output", "out"]) == 0
    finally:
        os.chdir(before)
    return root / "out", suite, json.loads((root / "out/results.json").read_text())


def short(root, world):
    """Write test data of task `a` that are the first five texts."""
    path = root / "short.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of_test(world, "a")[:5]))
    tasks = {"a": {"data_files": {"test": str(path)}}}
    return write(root / "short.yaml", {"data": {"tasks": tasks}})


def untrained(root, world):
    """Write test data of a task without a source: the texts of `b`."""
    tasks = {"c": world["data"]["tasks"]["b"]}
    return write(root / "untrained.yaml", {"data": {"tasks": tasks}})


def rows_of_test(world, task):
    text = Path(world["data"]["tasks"][task]["data_files"]["test"]).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_choices_are_scored_on_other_data_too(compared, world):
    folder, _, found = compared
    first, second = found["others"]["short"], found["others"]["new"]
    assert (first["tasks"], second["tasks"]) == (["a"], ["c"])
    assert {one["name"] for one in second["rows"]} == {one["name"] for one in found["rows"][:-1]}
    for one in second["rows"]:
        name = one["name"]
        assert record(second, name)["test"]["c"] == record(found, name)["test"]["b"]
    for name, weights in BUILT_IN.items():
        expected = accuracy([averaged(world, weights)], world, "a", 5)
        assert score_of(first, name, "a") == pytest.approx(expected)
    assert score_of(first, BOUND, "a") == score_of(first, "expert a", "a")
    assert row(first, "tensor")["interval"]["difference"] == pytest.approx(
        score_of(first, "tensor", "a") - score_of(first, "task_arithmetic", "a")
    )
    assert "On short, accuracy:" in (folder / "table.md").read_text()
    lines = list(csv.DictReader((folder / "table.csv").open()))
    assert {line["data"] for line in lines} == {"test", "short", "new"}


def row(found, name):
    return next(row for row in found["rows"] if row["name"] == name)


def record(found, name):
    return row(found, name)["seeds"]["0"]


def test_every_row_is_there_and_in_every_file(compared):
    folder, _, found = compared
    names = ["base", "expert a", "expert b", "uniform average", "ensemble"]
    methods = {"task_arithmetic", "tensor", "ties", "regmean", "greedy_soup", "mine"}
    listed = [row["name"] for row in found["rows"]]
    assert listed[:5] == names
    assert set(listed[5:-1]) == methods
    assert listed[-1] == BOUND
    table = (folder / "table.md").read_text()
    assert all(f"| {name}" in table for name in listed)
    assert "| task_arithmetic (reference) |" in table
    lines = list(csv.DictReader((folder / "table.csv").open()))
    scores = {(line["method"], line["task"], line["metric"], line["examples"]) for line in lines}
    assert {(name, "a", "accuracy", "") for name in listed} <= scores
    assert ("tensor", "average", "accuracy", "3") in scores
    page = (folder / "report.html").read_text()
    assert all(name in page for name in listed)


def test_built_in_rows_score_as_transformers_scores_them(compared, world, tmp_path, capsys):
    _, _, found = compared
    recipe = world["model"]["recipe"]
    data = write(tmp_path / "data.yaml", {"data": world["data"]})
    scored = ["test", "--config", data, "--model", recipe["sources"]["b"]]
    assert main([*scored, "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 0
    assert average(capsys) == pytest.approx(score_of(found, "expert b", "average"), abs=1e-4)
    sources = networks_of(world)
    for name, weights in BUILT_IN.items():
        network = averaged(world, weights)
        for task in "ab":
            assert accuracy([network], world, task) == pytest.approx(score_of(found, name, task))
    for task in "ab":
        expected = accuracy(sources[1:], world, task)
        assert score_of(found, "ensemble", task) == pytest.approx(expected)
    assert record(found, "mine")["test"] == record(found, "expert b")["test"]
    own = record(found, BOUND)["test"]
    assert own["a"] == record(found, "expert a")["test"]["a"]
    assert own["b"] == record(found, "expert b")["test"]["b"]
    mean = (own["a"]["accuracy"] + own["b"]["accuracy"]) / 2
    assert own["average"]["accuracy"] == pytest.approx(mean)


BUILT_IN = {
    "base": (1, 0, 0),
    "expert a": (0, 1, 0),
    "expert b": (0, 0, 1),
    "uniform average": (0, 0.5, 0.5),
}
"""Weights of base and sources."""


def places(world):
    recipe = world["model"]["recipe"]
    return [recipe["base"], *recipe["sources"].values()]


def networks_of(world):
    return [transformers.BertForSequenceClassification.from_pretrained(p) for p in places(world)]


def averaged(world, weights):
    """A network whose parameters are sums of those of base and sources."""
    network, *networks = (networks_of(world)[0], *networks_of(world))
    with torch.no_grad():
        for own, *parts in zip(*(n.parameters() for n in (network, *networks)), strict=True):
            own.copy_(sum(w * part for w, part in zip(weights, parts, strict=True)))
    return network


def accuracy(networks, world, task, count=None):
    """The share of test texts whose most likely class, by the mean probability, is right."""
    rows = rows_of_test(world, task)[:count]
    tokenizer = transformers.AutoTokenizer.from_pretrained(places(world)[0])
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        likely = sum(one.eval()(**inputs).logits.softmax(-1) for one in networks).argmax(-1)
    return sum(int(k) == row["label"] for k, row in zip(likely, rows, strict=True)) / len(rows)


def score_of(found, name, task):
    return record(found, name)["test"][task]["accuracy"]


def trials_of(folder, method):
    place = folder / "jobs/seed0" / method
    found = [json.loads(path.read_text()) for path in place.glob("trial-*.json")]
    return [trial for trial in found if trial["examples"] is None]


@pytest.mark.parametrize("method", ["task_arithmetic", "tensor", "ties", "regmean"])
def test_the_best_trial_on_selection_is_tested(compared, method):
    folder, _, found = compared
    trials = trials_of(folder, method)
    assert 2 <= len(trials) == record(found, method)["trials"] <= 5
    assert len({trial["value"] for trial in trials}) == len(trials)
    chosen = record(found, method)
    best = max(trial["selection"]["accuracy"] for trial in trials)
    assert chosen["selection"]["accuracy"] == pytest.approx(best, abs=1e-6)
    assert chosen["key"] in {trial["key"] for trial in trials}


def average(capsys):
    """The average that `gradmerge test` has printed last."""
    lines = capsys.readouterr().out.splitlines()
    return float(next(line.split()[1] for line in reversed(lines) if line.startswith("average")))


def test_a_choice_is_scored_on_test_as_by_hand(compared, world, capsys):
    """The learned checkpoint by `gradmerge test`, the closed form as an exported folder."""
    folder, _, found = compared
    learned = record(found, "tensor")
    assert learned["trainable"] > 0
    assert learned["labels"]
    checkpoint = folder / "jobs/seed0/tensor" / learned["checkpoint"]
    files = ["--config", str(folder / "suites/seed0.yaml"), "--config", TENSOR]
    assert main(["test", *files, "--ckpt_path", str(checkpoint)]) == 0
    assert average(capsys) == pytest.approx(learned["test"]["average"]["accuracy"], abs=1e-4)

    ties = record(found, "ties")
    assert ties["label"] == f"scale {ties['value']:g}", "ratios alone count: its own scale is tuned"
    recipe = Recipe(
        dict(world["model"]["recipe"]["sources"]),
        world["model"]["recipe"]["base"],
        preprocess=[Trim(density=0.2)],
        operator=DisjointMean(scale=ties["value"]),
        coefficients=Model(),
        init=Uniform(),
    )
    export_merged(MergedModel(recipe), "merged")
    network = transformers.BertForSequenceClassification.from_pretrained("merged")
    for task in "ab":
        assert accuracy([network], world, task) == pytest.approx(score_of(found, "ties", task))


def test_statistics_are_collected_once_and_counted(compared):
    folder, _, found = compared
    assert len([p for p in (folder / "statistics/seed0").iterdir() if p.is_dir()]) == 1
    assert record(found, "regmean")["adaptation"] == 12
    assert record(found, "greedy_soup")["tried"] == 3
    assert record(found, "greedy_soup")["trials"] == 3
    curve = found["curves"]["tensor"]["3"]["seeds"]["0"]
    assert curve["adaptation"] == 6
    assert curve["value"] == record(found, "tensor")["value"]


def test_a_finished_comparison_is_read_and_a_lost_job_is_run_again(
    compared, tmp_path, monkeypatch, capsys
):
    folder, suite, found = compared
    own = shutil.copytree(folder, tmp_path / "out")
    ran = []
    for kind in (StaticRunner, LearnedRunner):

        def run(self, trial, inner=kind.run):
            ran.append((self._work.method.name, trial.value))
            inner(self, trial)

        monkeypatch.setattr(kind, "run", run)
    again = ["compare", suite, TENSOR, TIES, *OPTIONS, "--output", str(own)]
    assert main(again) == 0
    assert ran == []
    assert "6 methods and seeds are on record" not in capsys.readouterr().err
    lost = next(p for p in (own / "jobs/seed0/ties").glob("trial-*.json"))
    value = json.loads(lost.read_text())["value"]
    lost.write_text(lost.read_text()[:20])  # of a run that was killed on a full disk
    assert main(again) == 0
    assert ran == [("ties", value)]
    new = json.loads((own / "results.json").read_text())
    assert record(new, "ties")["test"] == record(found, "ties")["test"]
    assert main([*again, "--metric", "macro-f1"]) == 2
    assert "no row has 'macro-f1' (choose from" in capsys.readouterr().err
    assert main([*again, "--metric", "macro_f1"]) == 0
    assert json.loads((own / "results.json").read_text())["metric"] == "macro_f1"
    assert main([*again, "--metric", "calibration_error"]) == 0
    assert "No intervals: calibration error is not known" in (own / "table.md").read_text()
    # another setting of one method is another job, and leaves the others alone
    ran.clear()
    assert main([*again[:-2], "--tune", "ties:recipe.operator.scale=[0.9]", *again[-2:]]) == 0
    assert ran == [("ties", 0.9)]


def test_a_merge_has_a_size_though_its_first_tensors_are_the_same_in_all_sources():
    first, *heads = (torch.nn.Linear(3, n) for n in (3, 2, 2))
    sources = {f"s{i}": torch.nn.Sequential(first, head) for i, head in enumerate(heads)}
    runner = StaticRunner.__new__(StaticRunner)
    recipe = Recipe(sources=sources, origin="mean", init=Constant([1.0, 0.5]))
    runner.module = SimpleNamespace(merged=MergedModel(recipe))
    assert runner._has_size()


def test_a_failure_is_in_the_table_and_in_the_status_and_costs_no_other_method(
    world, tmp_path, capsys
):
    suite = write(tmp_path / "suite.yaml", world, STEPS)
    broken = write(tmp_path / "broken.yaml", {"recipe": {"private": ["^nowhere"]}})
    one = ["--seeds", "0", "1", "--tune_seeds", "first", *OPTIONS]
    status = main(["compare", suite, broken, "--output", "out", "--trials", "1", *one])
    said = capsys.readouterr()
    assert status == 3, said.err
    assert "**broken, seed 0, has failed**" in said.out
    found = json.loads(Path("out/results.json").read_text())
    assert set(row(found, "task_arithmetic")["seeds"]) == {"0", "1"}
    values = {one["value"] for one in row(found, "task_arithmetic")["seeds"].values()}
    assert len(values) == 1, "chosen on the first seed"
    assert row(found, "task_arithmetic")["seeds"]["1"]["trials"] == 1


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--trials", "0"], ["--trials: expected at least 1, got 0"]),
        (["nowhere.yaml", TIES, TIES], ["nowhere.yaml: expected a YAML file", "got 3 of this one"]),
        (["--reference", "tie", "--seeds", "-1"], ["Did you mean 'ties'?", "--seeds: expected"]),
        (["--tune", "ties:x", "tis:y=[1]"], ["METHOD:option=", "unknown method 'tis'"]),
        (["--tune", "ties:recipe.operator.scal=[1]"], ["ties: ", "Did you mean"]),
        (["--seeds", "0", "7"], ["suite.yaml, seed 7: ", "seed7"]),
        (["--outputs", "x"], ["unrecognized arguments: --outputs", "gradmerge compare --help"]),
    ],
)
def test_mistakes_are_found_before_any_work_and_together(
    world, tmp_path, capsys, arguments, messages
):
    root = Path(world["model"]["recipe"]["base"]).parent
    home = shutil.copytree(root, tmp_path / "seed0")
    text = yaml.safe_dump(world).replace(str(root), str(home))
    (tmp_path / "suite.yaml").write_text(text)
    message = fails(["compare", "suite.yaml", TIES, *arguments, "--output", "out"], capsys)
    assert all(part in message for part in messages), message
    assert not Path("out").exists()


def test_another_folder_is_not_written_to(world, tmp_path, capsys):
    suite = write(tmp_path / "suite.yaml", world)
    Path("mine").mkdir()
    Path("mine/file").touch()
    message = fails(["compare", suite, TIES, "--output", "mine"], capsys)
    assert "expected a new folder or that of an earlier comparison" in message


def test_ladders_grow_at_their_edges_alone():
    axis = Axis.around("optimizer.init_args.lr", 0.05, 5)
    assert axis.values == (0.005, 0.016, 0.05, 0.16, 0.5)
    assert axis.beyond(0.05) is None
    assert axis.beyond(0.5) == pytest.approx(1.6)
    assert axis.beyond(0.005) == pytest.approx(0.0016)
    assert Axis.around("model.learning_rate", 1e-3, 2).values == (0.00032, 0.001)
    assert Axis.around(SCALE, 1.0, 5).values == (0.12, 0.25, 0.5, 1.0, 2.0)
    assert Axis.around(SCALE, 1.0, 3).values == (0.5, 1.0, 2.0)
    assert Axis.around(SCALE, 1.0, 2).values == (0.5, 1.0)
    assert Axis.around(SCALE, 1.0, 1).values == (1.0,)
    dense = Axis.around(SCALE, 1.0, 12).values
    assert len(dense) == 12
    assert dense[0] < 0.14
    assert dense[-1] > 2
    assert 1.0 in dense
    assert Axis("recipe.rank", (2, 4, 8)).beyond(8) == 16
    assert Axis("recipe.rank", (2, 4, 8)).beyond(2) == 1
    assert Axis("model.recipe.init", ("Uniform", "Constant")).beyond("Constant") is None


def test_a_schedule_is_scaled_with_its_rate(world, tmp_path):
    schedule = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    schedule["init_args"] = {"T_max": 4, "eta_min": 0.003}
    suite = write(tmp_path / "suite.yaml", world, {"lr_scheduler": schedule})
    method = Method.read(TENSOR)
    axis = method.tuned_by(suite, 3)
    assert axis.option == "optimizer.init_args.lr"
    assert method.options(suite, axis, 0.5)[1] == "--lr_scheduler.init_args.eta_min=0.03"


def test_seeds_are_in_all_paths_of_a_suite(tmp_path):
    path = write(
        tmp_path / "suite.yaml",
        {
            "seed_everything": 3,
            "model": {"recipe": {"sources": {"a": "x/seed3/a", "b": "x/seed31/b"}}},
            "data": {"tasks": {"t": {"path": "json", "data_files": "x-seed3.json"}}},
        },
    )
    found = Suite.read(path).seeded(12)
    assert found["model"]["recipe"]["sources"] == {"a": "x/seed12/a", "b": "x/seed31/b"}
    assert found["data"]["tasks"]["t"]["data_files"] == "x-seed12.json"
    assert (found["seed_everything"], found["data"]["seed"]) == (12, 12)


class Curve:
    """A runner whose best rate is given; some rates fail."""

    def __init__(self, best, broken=()):
        self.best, self.broken, self.tested = best, broken, []

    def prepare(self, value):
        if value in self.broken:
            raise ConfigError(f"no {value}")

    def run(self, trial):
        score = -abs(math.log(trial.value / self.best)) + (trial.examples or 0)
        trial.selection, trial.score = {"accuracy": score}, "accuracy"

    def scored(self, trial, other):
        self.tested.append((trial.value, trial.examples))
        return {"average": {"accuracy": 1.0}}, {}


@pytest.fixture
def bench_of(world, tmp_path, monkeypatch):
    def make(curve, **more):
        suite = write(tmp_path / "suite.yaml", world)
        work = Work(0, Method.read(TENSOR), suite, {}, str(tmp_path), 3, **more)
        monkeypatch.setattr(Bench, "runner", curve)
        monkeypatch.setattr(Bench, "_scored", lambda _, *given: curve.scored(*given))
        bench = Bench(work, lambda *_: None)
        return bench, lambda name: json.loads((work.place / name).read_text())

    return make


def test_the_grid_is_widened_until_the_best_is_inside_and_no_further_than_three(bench_of):
    for best, value, wider, edge in (
        (0.05, 0.05, 0, False),
        (1.2, 1.6, 3, False),
        (99, 5.0, 3, True),
    ):
        bench, read = bench_of(Curve(best))
        (name,) = bench.run()
        found = read(name)
        assert found["value"] == value
        assert (found["trials"], found["wider"], found["edge"]) == (3 + wider, wider, edge)
        shutil.rmtree(bench.work.place)


def test_a_value_that_fails_costs_no_other_and_all_of_them_the_method(bench_of):
    bench, read = bench_of(Curve(0.05, broken=(0.16,)))
    (name,) = bench.run()
    assert read(name)["value"] == 0.05
    shutil.rmtree(bench.work.place)
    bench, _ = bench_of(Curve(0.05, broken=(0.016, 0.05, 0.16)))
    with pytest.raises(ConfigError, match=r"none of 3 trials has a score. The last: no 0\.05"):
        bench.run()


def test_curves_take_the_chosen_value_or_are_tuned_themselves(bench_of):
    curve = Curve(0.016)
    bench_of(curve, sizes=(2, 8))[0].run()
    assert curve.tested == [(0.016, None), (0.016, 2), (0.016, 8)]
    curve = Curve(0.05)
    bench, read = bench_of(curve, sizes=(4,), tune_examples=True)
    assert read(bench.run()[1])["trials"] == 3


def test_a_process_that_dies_fails_its_own_method_alone(monkeypatch):
    class Process:
        exitcode = -9

        def is_alive(self):
            return False

        def join(self, *_):
            pass

        terminate = join

    def start(threads):
        ours, theirs = workers.get_context("spawn").Pipe()
        started.append(theirs)
        if len(started) == 1:
            theirs.close()
        else:
            theirs.send(("trial", "half", 1.0))
            theirs.send(("end", ["final.json"], ""))
        return workers._Worker(Process(), ours)

    started, said = [], []
    monkeypatch.setattr(workers, "_start", start)
    found = list(workers.run_in_processes(["first", "second"], 1, lambda *told: said.append(told)))
    assert found[0][:2] == ("first", None)
    assert "has died (status -9)" in found[0][2]
    assert found[1] == ("second", ["final.json"], "")
    assert said == [("second", "half", 1.0)]
