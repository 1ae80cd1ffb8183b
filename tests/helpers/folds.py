"""Jobs of two-at-a-time merges for the tests of drivers."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from gradmerge import TaskData
from gradmerge.drivers import Job
from gradmerge.drivers.fold import FoldedRecipe
from tiny import (
    SPLITS,
    build,
    examples,
    relatives,
    trainer_of,
    vectors,
)

NAMES = "abcdef"


def recipe_of(models, **options):
    """Base and sources `a`, `b`, ..., to be merged two at a time."""
    sources = dict(zip(NAMES, models[1:], strict=False))
    return FoldedRecipe(sources, base=models[0], **options)


def job_of(root, models, data=None, learning_rate=0.0, callbacks=(), recipe=None, **options):
    """A job whose trainers take four steps and keep the best of two validations."""
    recipe = recipe or recipe_of(models)

    def make(folder, more, overrides):
        best = ModelCheckpoint(folder / "best", "best", monitor="selection/loss")
        first = [c for c in more if not isinstance(c, Checkpoint)]
        rest = [c for c in more if isinstance(c, Checkpoint)]
        own = {"max_steps": 5, "val_check_interval": 2, "check_val_every_n_epoch": None}
        every = [*first, *callbacks, best, *rest]
        return trainer_of(folder, callbacks=every, **{**own, **overrides})

    output = options.pop("output", None)
    return Job(
        recipe,
        data or vectors(tuple(recipe.sources), check_disjoint=False),
        Path(root),
        make,
        {"learning_rate": learning_rate, **options},
        output,
    )


def average(models):
    states = [model.state_dict() for model in models]
    return {name: torch.stack([s[name].double() for s in states]).mean(dim=0) for name in states[0]}


def tensors(folder):
    """The weights of a folder, of one file or of shards."""
    return {n: t for file in folder.glob("model*.safetensors") for n, t in load_file(file).items()}


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())["driver"]


def assert_equal(folder, expected, tolerance=1e-6):
    found = tensors(folder)
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=tolerance, atol=tolerance, msg=name
        )


def of_several_classes(count=3):
    """Experts with heads of 3, 4, 5... classes, and data of as many."""
    models = relatives(build(), count + 1)
    for i, model in enumerate(models[1:]):
        torch.manual_seed(i)
        model.head = nn.Linear(8, 3 + i)
    tasks = {}
    for i, name in enumerate(NAMES[:count]):
        splits = {s: examples(100 * i + j, 12, 3 + i) for j, s in enumerate(SPLITS)}
        tasks[name] = TaskData(path=splits, kind="tensors")
    data = vectors("abc", check_disjoint=False)
    data.tasks = tasks
    return models, data


class Kill(lightning.Callback):
    """Raises at a hook and optimiser step of the n-th fit."""

    def __init__(self, fit, hook, step):
        self.fit, self.step, self.fits = fit, step, 0
        setattr(self, hook, self.raise_)

    def on_fit_start(self, trainer, pl_module):
        self.fits += 1

    def raise_(self, trainer, *_):
        if self.fits == self.fit and trainer.global_step == self.step and trainer.state.fn == "fit":
            raise RuntimeError("killed")


def files(folder):
    """Time of change and content of everything below a folder."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
