"""The layer-wise driver resumes bitwise; activations beyond the memory bound go to files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradmerge.coefficients import Element
from gradmerge.drivers import LayerWise
from gradmerge.drivers.layerwise import job as layers
from gradmerge.drivers.layerwise.activations import ActivationStore
from layerwise_jobs import (
    ADAM,
    BLOCKS,
    STOP,
    data_of,
    deep,
    job_of,
    llama,
    network_of,
    raw_of,
    same,
)
from tiny import recipe_of, relatives, save_family

pytestmark = pytest.mark.usefixtures("small_collections")


def run_of(folder, models, kind, activation_memory=4.0, batch_size=3):
    recipe = recipe_of(models, coefficients=Element())
    job = job_of(folder, recipe, data_of(kind, count=7, dtype=torch.float32), ADAM)
    driver = LayerWise(epochs=2, batch_size=batch_size, activation_memory=activation_memory)
    return job, driver


@pytest.mark.parametrize("name", ["stack", "bert"])
def test_a_stopped_run_resumes_with_the_first_unfinished_block(name, tmp_path, monkeypatch):
    models, kind, _ = network_of(name, torch.float32)
    whole, driver = run_of(tmp_path / "whole", models, kind)
    expected = driver.run(whole)
    fitted = []
    plain = layers.Layers._fit

    def counted(self, number, *arguments):
        fitted.append(number)
        return plain(self, number, *arguments)

    monkeypatch.setattr(layers.Layers, "_fit", counted)
    last = 2 if name == "stack" else 1

    def stopped(self, batch, batch_idx):
        if self.number == last and batch_idx == 1:
            raise KeyError("stopped")
        return step(self, batch, batch_idx)

    step = layers.BlockModule.training_step
    with monkeypatch.context() as patch:
        patch.setattr(layers.BlockModule, "training_step", stopped)
        with pytest.raises(KeyError, match="stopped"):
            driver.run(run_of(tmp_path / "parts", models, kind)[0])
    before = list(fitted)
    job, _ = run_of(tmp_path / "parts", models, kind)
    found = driver.run(job)
    assert before[-1] == last
    rest = [last, last + 1]  # and what follows the last block
    assert fitted[len(before) :] == rest, "finished blocks are not learned again"
    assert same(raw_of(job), raw_of(whole))
    for file in ("coefficients.st", "model.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()
    again, _ = run_of(tmp_path / "parts", models, kind)
    assert driver.run(again) == found
    assert len(fitted) == len(before) + 2, "a finished job is not run again"


def test_spilled_activations_give_the_same_coefficients(tmp_path, monkeypatch):
    models, kind, _ = network_of("bert", torch.float32)
    held, driver = run_of(tmp_path / "held", models, kind)
    driver.run(held)
    spilled = []
    put = ActivationStore.put

    def watched(self, name, tensor):
        put(self, name, tensor)
        spilled.append((self.held, self.spilled))

    monkeypatch.setattr(ActivationStore, "put", watched)
    job, driver = run_of(tmp_path / "spilled", models, kind, activation_memory=1e-6)
    driver.run(job)
    assert max(in_memory for in_memory, _ in spilled) <= 1e-6 * 2**30
    assert max(on_disk for _, on_disk in spilled) > 4_000
    assert same(raw_of(job), raw_of(held))
    assert {path.name for path in job.folder.iterdir()} == {
        path.name for path in held.folder.iterdir()
    }


def test_activations_are_replaced_where_they_are(tmp_path):
    kept = ActivationStore(tmp_path, limit=100)
    kept.put("small", torch.arange(20.0))
    kept.put("large", torch.arange(30.0).view(5, 6))
    assert (kept.held, kept.spilled) == (80, 120)
    mapped = kept.get("large")
    kept.put("large", torch.ones(5, 6))
    assert bool((mapped == 1).all()), "the same place"
    kept.put("small", torch.ones(26))
    assert (kept.held, kept.spilled) == (0, 224), "a tensor that grows is counted again"
    kept.put("large", torch.zeros(2))
    assert (kept.held, kept.spilled) == (8, 104)
    torch.testing.assert_close(kept.get("small"), torch.ones(26), rtol=0, atol=0)
    assert not list(tmp_path.iterdir()), "a killed run leaves no files"
    kept.clear()
    assert (kept.held, kept.spilled) == (0, 0)


def test_equal_constants_are_kept_once(tmp_path):
    kept = ActivationStore(tmp_path, limit=2**20)
    mask = torch.tensor([[True, False], [True, True]])
    found = [kept.constant(tensor) for tensor in (mask, mask.clone(), mask[:1].expand(2, 2))]
    assert found[0] is found[1] is not found[2]
    assert kept.held == 8
    others = [kept.constant(t) for t in (mask.int(), mask.flatten(), mask.to(torch.uint8))]
    assert len({*found, *others}) == 5, "dtype and shape tell constants apart"
    assert torch.equal(found[2], torch.tensor([[True, False], [True, False]]))


KILLED = f"""
import os, signal
from pathlib import Path
from gradmerge.drivers.layerwise import block
import layerwise_jobs as t

step = block.BlockModule.training_step
def killed(self, batch, batch_idx):
    if self.number == {STOP} and self.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
block.BlockModule.training_step = killed
with t.frozen():
    job, driver = t.deep(Path("job"), Path("models"))
    driver.run(job)
"""


@pytest.mark.nightly
def test_a_killed_merge_of_24_blocks_resumes_to_the_same_coefficients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the job is the same by the same paths
    small = {"hidden_size": 8, "intermediate_size": 8}
    family = relatives(llama(BLOCKS, **small), 3, 0.1)
    save_family(tmp_path / "models", family, tokenizer=False)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, capture_output=True
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    job, driver = deep(Path("job"), Path("models"))
    steps = job.folder / "steps"
    names = [f"block-{number:03d}" for number in range(BLOCKS)]
    assert sorted(path.parent.name for path in steps.glob("*/step.json")) == names[:STOP]
    written = {name: (steps / name / "raw.safetensors").stat().st_mtime_ns for name in names[:STOP]}
    found = driver.run(job)
    whole, driver = deep(Path("whole"), Path("models"))
    expected = driver.run(whole)
    for name, time in written.items():
        assert (steps / name / "raw.safetensors").stat().st_mtime_ns == time, name
    coefficients = raw_of(whole)
    assert len(coefficients) == 9 * BLOCKS
    assert sum(not bool((z == 0.3).all()) for z in coefficients.values()) > 8 * BLOCKS
    assert same(raw_of(job), coefficients)
    for file in ("coefficients.st", "model.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()
