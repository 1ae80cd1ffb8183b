"""Two processes that share each global batch learn what one process learns."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny

RUN = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from gradmerge import MergeModule
from gradmerge.engine import plan
from gradmerge.training.callbacks import CoefficientLogger, ExportAtEnd
from gradmerge.objectives import CrossEntropy, KLToSource, L2ToInit, Objective
from tiny import Perceptron, build, recipe_of, relatives, trainer_of, vectors

folder, devices = Path(sys.argv[2]), int(sys.argv[3])
memory, _, shared = sys.argv[4].partition("-")
plan.SMALLEST_SHARED = 1
objective = Objective([CrossEntropy(), KLToSource(0.5)], [L2ToInit()], {"a": 2.0})
recipe = recipe_of(relatives(build(Perceptron, extra=True)))
shards = 0 if shared else 1
place = "device" if shared else "auto"
module = MergeModule(recipe, objective, memory=memory, source_shards=shards, placement=place)
module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
divided = []
trainer = trainer_of(
    folder,
    devices=devices,
    strategy="ddp" if devices > 1 else "auto",
    max_steps=7,
    logger=CSVLogger(folder, name="logs", version=0),
    callbacks=[
        CoefficientLogger(),
        ModelCheckpoint(folder / "checkpoints", "best", monitor="selection/loss", mode="max"),
        ExportAtEnd(str(folder / "merged")),
        LambdaCallback(on_train_start=lambda *_: divided.append(module.merged.plan.is_shared)),
    ],
)
data = vectors(batch_size=4 // devices, count=12, eval_batch_size=3)
trainer.fit(module, datamodule=data)
best = trainer.checkpoint_callback.best_model_score
trainer.validate(module, datamodule=data, verbose=False)
rank = trainer.global_rank
torch.save(module.merged.raw["tensor"].detach(), folder / f"raw{rank}.pt")
(folder / f"found{rank}.json").write_text(json.dumps({
    "fixed": module.merged.state.fixed,
    "divided": divided,
    "best": float(best),
    "loss": float(trainer.callback_metrics["selection/loss"]),
    "accuracy": module.results["selection"]["a"]["accuracy"],
}))
"""

# Shares of evaluation splits that are uneven, of one example, without a label, and empty.
SCORES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gradmerge.engine import plan
from gradmerge.objectives import CrossEntropy, Entropy, Objective
from tiny import module_of, trainer_of, vectors, relatives, build

folder, devices = Path(sys.argv[2]), int(sys.argv[3])
term, _, shared = sys.argv[4].partition("-")
plan.SMALLEST_SHARED = 1
data = vectors("abc", batch_size=4 // devices, count=9, eval_batch_size=2)
splits = [data.tasks[task].path for task in "abc"]
for i, row in enumerate(splits[1]["selection"]):
    if i % 2:  # all that the second process has
        row["labels"] = torch.tensor(-100)
splits[2]["selection"] = splits[2]["selection"][:1]
for split in splits:
    split["test"] = split["test"][:1]
term = {"CrossEntropy": CrossEntropy, "Entropy": Entropy}[term]()
shards = 0 if shared else 1
module = module_of(relatives(build(), 4), Objective([term]), source_shards=shards)
module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = trainer_of(folder, **options, max_steps=3, num_sanity_val_steps=1)
trainer.fit(module, datamodule=data)
found = {"fit": module.results["selection"]}
trainer.validate(module, datamodule=data, verbose=False)
trainer.test(module, datamodule=data, verbose=False)
(folder / f"found{trainer.global_rank}.json").write_text(json.dumps({**found, **module.results}))
"""

# Losses that are no mean of the processes' own means: of unequal numbers of rows, and of a mean.
MEANS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gradmerge.objectives import CrossEntropy, Entropy, Objective
from tiny import build, module_of, relatives, trainer_of, vectors

folder, devices = Path(sys.argv[2]), int(sys.argv[3])
memory, name = sys.argv[4].split("-")
term = {"CrossEntropy": CrossEntropy(label_smoothing=0.1), "Entropy": Entropy(marginal=1.0)}[name]
data = vectors(batch_size=4 // devices, count=12)
for task in data.tasks.values():
    for i, row in enumerate(task.path["adaptation"]):
        if i % 5 in (0, 1, 3):
            row["labels"] = torch.tensor(-100)
module = module_of(relatives(build()), Objective([term], task_weights={"a": 2.0}), memory=memory)
module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = trainer_of(folder, **options, max_steps=7, limit_val_batches=0)
trainer.fit(module, datamodule=data)
losses = [float(trainer.callback_metrics[f"train/{key}"]) for key in ("loss", "a/loss", "b/loss")]
torch.save(
    {"raw": module.merged.raw["tensor"].detach(), "losses": torch.tensor(losses)},
    folder / f"found{trainer.global_rank}.pt",
)
"""

# Heads and adapters of each task, two of which share a source.
PRIVATE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gradmerge import TaskData
from gradmerge.objectives import CrossEntropy, KLToSource, Objective
from tiny import build, module_of, relatives, trainer_of, vectors

folder, devices, memory = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
data = vectors(("one", "two", "three"), batch_size=4 // devices, count=12)
for name, source in {"one": "a", "two": "a", "three": "b"}.items():
    data.tasks[name] = TaskData(data.tasks[name].path, kind="tensors", source=source)
parts = {"private": ["^head"], "trained": ["^head"], "adapters": {"^body": 2}}
objective = Objective([CrossEntropy(), KLToSource(0.5)])
module = module_of(relatives(build()), objective, memory=memory, **parts)
module.configure_optimizers = lambda: torch.optim.SGD(module.parameter_groups(), lr=0.5)
module.take_tasks(data.tasks)
start = {name: value.detach().clone() for name, value in module.named_parameters()}
options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = trainer_of(folder, **options, max_steps=5)
trainer.fit(module, datamodule=data)
found = {name: value.detach() for name, value in module.named_parameters()}
scores = torch.tensor(module.results["selection"]["average"]["loss"])
found = {"start": start, "end": {**found, "selection loss": scores}}
torch.save(found, folder / f"found{trainer.global_rank}.pt")
"""

# Masks that are drawn anew in each step.
NOISE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gradmerge.coefficients import ConcreteMask, Constant, Element, Shared
from gradmerge.optimisers import LogisticNoise
from tiny import module_of, raws, trainer_of, vectors

folder, devices = Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(devices + int(torch.distributed.is_initialized()))  # counts for nothing
module = module_of(coefficients=Shared(ConcreteMask(Element())), init=Constant(0.3))
module.configure_optimizers = lambda: LogisticNoise(module.parameters(), lr=20.0, base="SGD")
start = raws(module)
options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = trainer_of(folder, **options, max_steps=5, limit_val_batches=0)
trainer.fit(module, datamodule=vectors(batch_size=4 // devices, count=12))
torch.save({"start": start, "end": raws(module)}, folder / f"found{trainer.global_rank}.pt")
"""

# Every split of seven rows over two processes, also of none at all: losses and gradients.
TERMS = """
import os, sys
from pathlib import Path
import torch
from torch import distributed
from gradmerge.objectives import CrossEntropy, Entropy, HardLabels, HiddenStates, KLToEnsemble
from gradmerge.objectives import KLToSource, Predictions

folder, world, rank = Path(sys.argv[2]), 2, int(os.environ["RANK"])
distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
generator = torch.Generator().manual_seed(3)
logits, teacher = (3 * torch.randn(7, 5, generator=generator).double() for _ in range(2))
logits[:, 4] -= 900  # a class whose probability is zero in float64
labels = torch.tensor([0, -100, 2, -100, -100, 3, 1])
terms = [CrossEntropy(), CrossEntropy(label_smoothing=0.3), Entropy(), Entropy(marginal=1.0)]
terms += [KLToSource(), KLToSource(top_k=2), KLToEnsemble(), HardLabels()]
for term in [*terms, HiddenStates(layers=("x",)), HiddenStates(layers=("x",), reduce="sum")]:
    for cut, stop in ((4, 7), (5, 7), (7, 7), (0, 7), (1, 5), (0, 0)):
        def predictions(rows, shared):
            leaf = logits[rows].clone().requires_grad_()
            each = torch.stack([teacher, -teacher, logits])[:, rows]
            states = {"hidden": {"x": leaf}, "teacher_hidden": {"x": teacher[rows]}}
            return leaf, Predictions(leaf, labels[rows], teacher[rows], shared, each, **states)
        whole, alone = predictions(slice(0, stop), False)
        expected = term.loss(alone)
        expected.backward()
        own = slice(0, cut) if rank == 0 else slice(cut, stop)
        leaf, mine = predictions(own, True)
        loss = term.loss(mine)
        loss.backward()
        case = f"{term}, {cut} of {stop}"
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14, msg=case)
        # what averaging over processes makes of it
        torch.testing.assert_close(
            leaf.grad / world, whole.grad[own], rtol=1e-11, atol=1e-15, msg=case
        )
(folder / f"passed{rank}").touch()
distributed.barrier()  # as below
distributed.destroy_process_group()
"""


# Two gradients a step, a prior measured at the start, and a parameter that is no coefficient.
SHARP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gradmerge.objectives import CrossEntropy, FisherToInit, Objective
from gradmerge.optimisers import SAM
from tiny import Perceptron, build, module_of, relatives, trainer_of, vectors

folder, devices, memory = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
objective = Objective([CrossEntropy()], [FisherToInit(0.5, batches=2)], {"a": 2.0})
models = relatives(build(Perceptron, extra=True))
module = module_of(models, objective, logit_scale=2.0, memory=memory)
sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
module.configure_optimizers = lambda: SAM(module.parameters(), lr=0.3, rho=0.3, base=sgd)
options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = trainer_of(folder, **options, max_steps=5, limit_val_batches=0, gradient_clip_val=1.0)
trainer.fit(module, datamodule=vectors(batch_size=4 // devices, count=12))
found = {
    "raw": module.merged.raw["tensor"].detach(),
    "importance": module.regularisation.importance["tensor"],
    "scale": module.logit_scale.log_scale.detach(),
}
torch.save(found, folder / f"found{trainer.global_rank}.pt")
"""

# Coefficients whose gradients are not a tensor's own numbers: of decomposed directions, and of one
# number for two sources, of which the second is read in another order.
FACTORS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gradmerge import MergeModule, Recipe
from gradmerge.alignment import WeightMatching
from gradmerge.coefficients import Complement, Component, Constant, Element, HardMask, Sigmoid
from gradmerge.coefficients import Uniform
from gradmerge.objectives import CrossEntropy, Objective
from gradmerge.operators import Components
from tiny import Perceptron, build, relatives, trainer_of, vectors

folder, devices, option = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
first = build()
if option == "component":
    base, a, b = relatives(first)
    factors = {"coefficients": HardMask(Component()), "operator": Components(0.3)}
    recipe = Recipe({"a": a, "b": b}, base=base, init=Constant(1.0), **factors)
    rate = 300.0  # masks change, and no number comes nearer to its threshold than 0.009
else:
    other = Perceptron()  # of weights drawn after those of the first
    factors = {"coefficients": Complement(Sigmoid(Element())), "alignment": WeightMatching()}
    recipe = Recipe({"a": first, "b": other}, origin="zero", init=Uniform(), **factors)
    rate = 10.0
module = MergeModule(recipe, Objective([CrossEntropy()], task_weights={"a": 2.0}))
module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=rate)
options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
trainer = trainer_of(folder, **options, max_steps=5, limit_val_batches=0)
start = {key: value.detach().clone() for key, value in module.merged.raw.items()}
trainer.fit(module, datamodule=vectors(batch_size=4 // devices, count=12))
raw = {key: value.detach() for key, value in module.merged.raw.items()}
order = module.merged.plan.order
maps = {} if order is None else {str(key): value for key, value in order.maps["b"].items()}
found = {"start": start, "raw": raw, "maps": maps}
torch.save(found, folder / f"found{trainer.global_rank}.pt")
"""


# Two processes run all scripts in turn: to start them takes longer than the scripts do.
GROUP = """
import json, runpy, sys
from torch import distributed
for given in json.loads(sys.argv[1]):
    sys.argv = given
    runpy.run_path(given[0])
# else the group's threads end in whatever order the two processes do, now and then in an abort
distributed.barrier()
distributed.destroy_process_group()
"""


def arguments(folder, devices, option, script):
    """The script, written to `folder`, and what it is called with."""
    folder.mkdir()
    path = folder / "run.py"
    path.write_text(script)
    return [str(path), str(Path(tiny.__file__).parent), str(folder), str(devices), option]


def run_in_two(tmp_path, scripts):
    """Run scripts in a group of two processes."""
    path = tmp_path / "group.py"
    path.write_text(GROUP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    group |= {"NODE_RANK": "0", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, str(path), json.dumps(scripts)]
    wait_for(
        subprocess.Popen(
            command,
            env={**os.environ, **group, "LOCAL_RANK": str(rank), "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )


def wait_for(processes):
    for process in list(processes):
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]


def compare(tmp_path, monkeypatch, script, options, others=None):
    """Run a script with each option in one process and in two; yield option and both folders.

    Other scripts, by option, are run in the same two processes.
    """
    given = {
        option: [arguments(tmp_path / f"{option}-{n}", n, option, own) for n in (1, 2)]
        for option, own in {**dict.fromkeys(options, script), **(others or {})}.items()
    }
    for alone, _ in given.values():
        monkeypatch.setattr(sys, "argv", alone)
        runpy.run_path(alone[0])
    run_in_two(tmp_path, [both for _, both in given.values()])
    for option in given:
        yield option, tmp_path / f"{option}-1", tmp_path / f"{option}-2"


def results(folder, devices):
    """Coefficients and what else is known, of each process."""
    return [
        (torch.load(folder / f"raw{i}.pt"), json.loads((folder / f"found{i}.json").read_text()))
        for i in range(devices)
    ]


@pytest.mark.usefixtures("figures")
@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    options = ("resident", "streamed", "resident-shared", "streamed-shared")
    for memory, one, two in compare(tmp_path, monkeypatch, RUN, options):
        ((alone, found),) = results(one, 1)
        assert (alone - 0.3).abs().max() > 1e-2, memory
        both = results(two, 2)
        for raw, other in both:
            assert other["divided"] == [memory.endswith("shared")]
            torch.testing.assert_close(raw, alone, rtol=0, atol=1e-6, msg=memory)
            assert other["fixed"] == found["fixed"] == {"extra.weight": 0.0, "extra.bias": 0.0}
            for name in ("best", "loss", "accuracy"):
                assert other[name] == pytest.approx(found[name], rel=1e-5), (memory, name)
        assert torch.equal(both[0][0], both[1][0]), memory
        assert (two / "merged" / "model.safetensors").is_file()
        assert (two / "logs" / "version_0" / "coefficients.png").is_file()


def require_same(one, two, part, count):
    """Parameters have moved, by the same in one process and in both of two."""
    alone = torch.load(one / "found0.pt")
    own = [name for name in alone["start"] if part in name]
    assert len(own) == count
    moved = {name: (alone["end"][name] - alone["start"][name]).abs().max() for name in own}
    assert min(moved.values()) > 1e-2, moved
    both = [torch.load(two / f"found{rank}.pt") for rank in range(2)]
    for found in both:
        torch.testing.assert_close(found["end"], alone["end"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(both[0]["end"][name], both[1]["end"][name]) for name in own)


@pytest.mark.slow
def test_two_processes_take_means_over_the_rows_of_both_and_train_parts_and_masks(
    tmp_path, monkeypatch
):
    options = ("resident-CrossEntropy", "resident-Entropy", "streamed-Entropy")
    others = {"streamed": PRIVATE, "noise": NOISE}
    for option, one, two in compare(tmp_path, monkeypatch, MEANS, options, others):
        if option in others:
            # head.weight, head.bias, B and A of each task; a mask of each of four tensors
            require_same(one, two, *{"streamed": ("private", 12), "noise": ("", 4)}[option])
            continue
        alone = torch.load(one / "found0.pt")
        assert (alone["raw"] - 0.3).abs().max() > 1e-2, option
        for rank in range(2):
            found = torch.load(two / f"found{rank}.pt")
            for name, tolerances in (("raw", (0, 1e-6)), ("losses", (1e-5, 1e-6))):
                rtol, atol = tolerances
                torch.testing.assert_close(
                    found[name], alone[name], rtol=rtol, atol=atol, msg=option
                )


@pytest.mark.nightly
def test_sharp_steps_priors_and_scales_of_two_processes_are_those_of_one(tmp_path, monkeypatch):
    for memory, one, two in compare(tmp_path, monkeypatch, SHARP, ("resident", "streamed")):
        alone = torch.load(one / "found0.pt")
        assert (alone["raw"] - 0.3).abs().max() > 1e-2, memory
        both = [torch.load(two / f"found{rank}.pt") for rank in range(2)]
        for found in both:
            for name, value in alone.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=name)
        assert all(torch.equal(both[0][name], both[1][name]) for name in alone), memory


@pytest.mark.nightly
def test_two_processes_learn_masks_of_components_and_aligned_weights(tmp_path, monkeypatch):
    for option, one, two in compare(tmp_path, monkeypatch, FACTORS, ("component", "aligned")):
        alone = torch.load(one / "found0.pt")
        start, raw = alone["start"], alone["raw"]
        assert max((raw[key] - start[key]).abs().max() for key in raw) > 0.1, option
        if option == "component":
            assert (raw["body/weight"] < 0).sum() == 4  # all start at 0.1
        else:
            (order,) = alone["maps"].values()
            assert not torch.equal(order, torch.arange(8))
        both = [torch.load(two / f"found{rank}.pt") for rank in range(2)]
        for found in both:
            for key, value in raw.items():
                torch.testing.assert_close(found["raw"][key], value, rtol=1e-5, atol=2e-6, msg=key)
            for key, order in alone["maps"].items():
                assert torch.equal(found["maps"][key], order)
        assert all(torch.equal(both[0]["raw"][key], both[1]["raw"][key]) for key in raw), option


@pytest.mark.slow
def test_terms_of_two_processes_are_those_of_all_their_rows(tmp_path):
    command = [sys.executable, *arguments(tmp_path / "both", 2, "", TERMS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    wait_for(
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    )
    assert all((tmp_path / "both" / f"passed{rank}").is_file() for rank in range(2))


@pytest.mark.slow
def test_every_evaluation_example_counts_once_in_two_processes(tmp_path, monkeypatch):
    options = ("CrossEntropy", "Entropy", "Entropy-shared")
    for _, one, two in compare(tmp_path, monkeypatch, SCORES, options):
        alone = json.loads((one / "found0.json").read_text())
        assert list(alone) == ["fit", "selection", "test"]
        assert all(set(found) == {"a", "b", "c", "average"} for found in alone.values())
        for rank in range(2):
            found = json.loads((two / f"found{rank}.json").read_text())
            for split, tasks in alone.items():
                for task, values in tasks.items():
                    own = found[split][task]
                    assert own == pytest.approx(values, rel=1e-4, nan_ok=True), (split, task)
