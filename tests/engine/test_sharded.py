"""Processes that divide the sources among themselves learn what one process learns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharded_cases import gradients

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from torch import distributed
from gradmerge.engine import plan
from sharded_cases import CASES, FEW, flaw, gradients

folder = Path(sys.argv[2])
plan.SMALLEST_SHARED = 1
distributed.init_process_group("gloo")
rank, count = distributed.get_rank(), distributed.get_world_size()
names = list(CASES) if count == 2 else FEW
found = {name: gradients(name, rank, count) for name in names}
found["flaw"] = flaw()
torch.save(found, folder / f"found{rank}.pt")
"""


def launch(code: str, folder: Path, ranks: int, *arguments: str) -> None:
    """Run code in processes of one group, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "run.py"
    script.write_text(code)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    helpers = str(Path(__file__).parents[1] / "helpers")
    children = [
        subprocess.Popen(
            [sys.executable, str(script), helpers, str(folder), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == 0, output


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.nightly)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    launch(RUN, folder, request.param)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(request.param)]


def test_gradients_equal_those_of_one_process(ranks):
    for name in ranks[0].keys() - {"flaw"}:
        want = gradients(name, None, len(ranks))
        for found in ranks:
            for key, value in want["grads"].items():
                torch.testing.assert_close(found[name]["grads"][key], value, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[name]["loss"], want["loss"], rtol=1e-6, atol=1e-7)


def test_each_process_merges_its_share_of_the_rows(ranks):
    for name in ("Tensor resident", "Element resident", "Row streamed"):
        shares = [found[name]["share"] for found in ranks]
        assert max(shares) / sum(shares) < 1.3 / len(ranks)
        if name.endswith("resident") and len(ranks) == 2:  # some have too few rows for four
            assert sum(shares) == pytest.approx(1.0)  # one merge of each learned tensor


def test_all_processes_report_what_one_has_found_in_a_source(ranks):
    for found in ranks:
        assert "expected finite weights" in found["flaw"]
        assert "body.weight: 1 of 78" in found["flaw"]


def test_what_moves_does_not_depend_on_the_number_of_sources(ranks):
    for found in ranks:
        assert found["Tensor resident"]["moved"] == found["five sources"]["moved"] > 0
