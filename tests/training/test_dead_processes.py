"""A fit in two processes, of which one dies: the other ends, and says why."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny import write_yaml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs signals")]

RUN = """
import os, signal, sys
from pathlib import Path
from gradmerge.cli.main import main
from gradmerge.training.module import MergeModule

folder, rank = Path(sys.argv[-2]), sys.argv[-1]
(folder / f"pid{os.environ.get('LOCAL_RANK', '0')}").write_text(str(os.getpid()))
step = MergeModule.training_step

def dies(module, batch, index):
    if str(module.global_rank) == rank and module.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(module, batch, index)

MergeModule.training_step = dies
sys.exit(main(["fit", "--config", str(folder / "fit.yaml")]))
"""


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[:1]


@pytest.mark.nightly
@pytest.mark.parametrize("rank", ["1", "0"])
def test_the_other_process_ends_too(world, tmp_path, rank):
    options = {"devices": 2, "strategy": "ddp", "max_steps": 1000, "logger": False}
    options["default_root_dir"] = str(tmp_path / "outputs")
    write_yaml(tmp_path / "fit.yaml", world, {"trainer": options})
    (tmp_path / "run.py").write_text(RUN)
    log = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "run.py", str(tmp_path), rank]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)
        assert process.wait(timeout=240) != 0
    other = int((tmp_path / "pid1").read_text())
    for _ in range(120):
        if not is_alive(other):
            break
        time.sleep(1)
    assert not is_alive(other)
    text = log.read_text()
    assert "another process of this fit has ended" in text or "has died" in text
