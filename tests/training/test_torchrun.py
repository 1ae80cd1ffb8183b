"""`torchrun` starts the processes of a fit; another number of processes continues it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradmerge.cli.main import main
from tiny import write_yaml

RUN = """
import sys
from gradmerge.cli.main import main
from gradmerge.engine import plan

plan.SMALLEST_SHARED = 1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.nightly
@pytest.mark.usefixtures("own_folder")
def test_one_process_continues_what_two_have_begun(world, tmp_path):
    """Two processes divide sources and batches; the end is that of one process from the start."""

    def options(place: str, devices: int, steps: int) -> str:
        trainer = {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "max_steps": steps,
            "logger": False,
            "default_root_dir": place,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": place, "filename": "step-{step}", "save_last": True},
                }
            ],
        }
        model = {"source_shards": 0}
        data = {"batch_size": 2 // devices}
        parts = {"trainer": trainer, "model": model, "data": data}
        return write_yaml(tmp_path / f"{place}-{devices}.yaml", world, parts)

    assert not main(["fit", "--config", options("alone", 1, 6)])
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-endpoint", "localhost:0", "--rdzv-backend", "c10d"]
    done = subprocess.run(
        [*command, "run.py", "fit", "--config", options("both", 2, 3)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = options("both", 1, 6)
    assert not main(["fit", "--config", again, "--ckpt_path", "both/last.ckpt"])
    want, got = (
        torch.load(Path(place) / "last.ckpt", weights_only=True)["state_dict"]
        for place in ("alone", "both")
    )
    assert any((value - 0.3).abs().max() > 1e-3 for value in want.values())
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)
