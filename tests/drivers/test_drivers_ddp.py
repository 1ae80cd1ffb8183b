"""Drivers and searched starts in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny

RUN = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import torch
from lightning.pytorch.callbacks import Checkpoint
from gradmerge.coefficients import Constant
from gradmerge.drivers import Job, Pairwise
from gradmerge.search import AbstractSearch
from gradmerge.training.search import SearchedStart
from folds import recipe_of
from tiny import build, module_of, relatives, trainer_of, vectors

folder, devices = Path(sys.argv[2]), int(sys.argv[3])
ddp = {"devices": 2, "strategy": "ddp"} if devices > 1 else {}
rank = os.environ.get("LOCAL_RANK", "0")

def data(tasks):
    return vectors(tasks, batch_size=4 // devices, check_disjoint=False)

class ByRank(AbstractSearch):
    metric = "loss"
    def run(self, start, sources, score):
        return Constant(0.2 + int(rank))

search = SearchedStart(ByRank())
module = module_of(learning_rate=0.0)
os.environ.pop("GRADMERGE_SEARCH", None)  # as where each process was started by another launcher
search.run(module, data("ab"))
trainer_of(folder, max_steps=1, callbacks=[search], **ddp).fit(module, datamodule=data("ab"))
torch.save(module.merged.raw["tensor"].detach(), folder / f"start{rank}.pt")

def make(place, more, overrides):
    return trainer_of(place, callbacks=list(more), **{**ddp, **overrides})

recipe = recipe_of(relatives(build(), 4))
job = Job(recipe, data("abc"), folder, make, {"learning_rate": 0.3})
driver = Pairwise(every_n_steps=1)
print(driver.run(job))
"""


@pytest.mark.slow
def test_two_processes_fold_as_one_does_and_start_alike(tmp_path):
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        script = folder / "run.py"  # a launcher starts its other process by the file's name
        script.write_text(RUN)
        tests = str(Path(tiny.__file__).parent)
        done = subprocess.run(
            [sys.executable, str(script), tests, str(folder), str(devices)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_file(folder / "merged/coefficients.st"))
        starts = [torch.load(folder / f"start{rank}.pt") for rank in range(devices)]
        assert all(torch.equal(start, torch.full((2, 4), 0.2)) for start in starts)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0]["body.weight"], torch.tensor([2 / 3, 1 / 3]), atol=1e-2)
