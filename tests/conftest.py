"""Fixtures that the tests of several rooms share."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["GRADMERGE_FIGURES"] = "off"  # drawing takes longer than most fits here

import pytest
import torch

if not torch.cuda.is_available():
    # before Triton is imported: its kernels run on the CPU then (tests/operators/test_triton.py)
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from torch import Tensor, nn

from architectures import ARCHITECTURES
from processes import disk as disk
from programs import bench as bench
from tiny import close_wandb_run

transformers.logging.set_verbosity_error()


@pytest.fixture
def family() -> Callable[..., tuple[list[nn.Module], dict[str, Tensor]]]:
    """Models of one architecture with weights near one another, and a batch for them."""

    def make(
        name: str, count: int = 3, dtype: torch.dtype = torch.float64
    ) -> tuple[list[nn.Module], dict[str, Tensor]]:
        torch.manual_seed(0)
        build, batch = ARCHITECTURES[name]
        first = build().to(dtype).eval()
        models = [first]
        for _ in range(count - 1):
            other = copy.deepcopy(first)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            models.append(other)
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in batch().items()
        }
        return models, inputs

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny text classifiers, data and a configuration, as the command line takes them."""
    from tiny import text_world

    return text_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs go to the test's own folder; no test talks to W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradmerge"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, as they are for users."""
    monkeypatch.delenv("GRADMERGE_FIGURES")


@pytest.fixture(autouse=True)
def _no_run_left_open() -> Iterator[None]:
    """No test logs to the W&B run of another."""
    yield
    close_wandb_run()


@pytest.fixture(scope="module")
def small_collections() -> Iterator[None]:
    """Keep existing objects out of garbage collections, for drivers that collect after each block:
    beside tiny blocks, searching everything that was imported would take most of the time.
    """
    from layerwise_jobs import frozen

    with frozen():
        yield
