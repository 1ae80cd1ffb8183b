"""Two processes that share each global batch learn what one process learns."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from gradmerge import MergeModule
from gradmerge.callbacks import CoefficientLogger, ExportAtEnd
from gradmerge.objectives import CrossEntropy, KLToSource, L2ToInit, Objective
from tiny import Perceptron, build, recipe_of, relatives, trainer_of, vectors

folder, devices, memory = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
objective = Objective([CrossEntropy(), KLToSource(0.5)], [L2ToInit()], {"a": 2.0})
recipe = recipe_of(relatives(build(Perceptron, extra=True)))
module = MergeModule(recipe, objective, memory=memory)
module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
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
    ],
)
data = vectors(batch_size=4 // devices, count=12, eval_batch_size=3)
trainer.fit(module, datamodule=data)
best = trainer.checkpoint_callback.best_model_score
trainer.validate(module, datamodule=data, verbose=False)
rank = trainer.global_rank
torch.save(module.merged.raw["tensor"].detach(), folder / f"raw{rank}.pt")
(folder / f"found{rank}.json").write_text(json.dumps({
    "fixed": module.merged.plan.fixed,
    "best": float(best),
    "loss": float(trainer.callback_metrics["selection/loss"]),
    "accuracy": module.results["selection"]["a"]["accuracy"],
}))
"""


def arguments(folder, devices, memory):
    """The script, written to `folder`, and what it is called with."""
    folder.mkdir()
    script = folder / "run.py"  # a launcher starts its other processes by the file's name
    script.write_text(RUN)
    return [str(script), str(Path(__file__).parent.parent), str(folder), str(devices), memory]


def results(folder, devices):
    """Coefficients and what else is known, of each process."""
    return [
        (torch.load(folder / f"raw{i}.pt"), json.loads((folder / f"found{i}.json").read_text()))
        for i in range(devices)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_two_processes_learn_what_one_does(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(sys, "argv", arguments(tmp_path / "one", 1, memory))
    runpy.run_path(sys.argv[0])
    ((alone, found),) = results(tmp_path / "one", 1)
    assert (alone - 0.3).abs().max() > 1e-2
    done = subprocess.run(
        [sys.executable, *arguments(tmp_path / "two", 2, memory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    both = results(tmp_path / "two", 2)
    for raw, other in both:
        torch.testing.assert_close(raw, alone, rtol=0, atol=1e-6)
        assert other["fixed"] == found["fixed"] == {"extra.weight": 0.0, "extra.bias": 0.0}
        for name in ("best", "loss", "accuracy"):
            assert other[name] == pytest.approx(found[name], rel=1e-5), name
    assert torch.equal(both[0][0], both[1][0])
    assert (tmp_path / "two" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "two" / "logs" / "version_0" / "coefficients.png").is_file()
