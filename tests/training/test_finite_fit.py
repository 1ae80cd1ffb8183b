"""A fit stops at the first number that is not finite, and keeps what was good."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from gradmerge import MergeModule
from gradmerge.common.errors import ConfigError, NonFiniteError, SourceError
from gradmerge.training.callbacks import ExportAtEnd
from tiny import Perceptron, build, module_of, raws, recipe_of, relatives, trainer_of, vectors


class Exploding(Perceptron):
    """Its output is NaN from the n-th call in training on."""

    calls = -1

    def forward(self, x):
        if torch.is_grad_enabled():
            self.calls += 1
        return super().forward(x) * (math.nan if self.calls >= 4 else 1.0)


class Steep(nn.Module):
    """A finite loss whose gradient is infinite."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        return self.body(x) + (self.body.weight - self.body.weight.detach()).square().sum().sqrt()


class Kept(ModelCheckpoint):
    """All states that were saved, in order."""

    def __init__(self, path):
        super().__init__(path, save_last=True, save_top_k=-1, every_n_train_steps=1)


def stopped(path, module, message, error=NonFiniteError, **options):
    """Fit until it stops with a message; return the last checkpoint."""
    options.setdefault("max_steps", 6)
    callbacks = [Kept(path / "kept"), ExportAtEnd(str(path / "merged"))]
    trainer = trainer_of(path, callbacks=callbacks, **options)
    with pytest.raises(error, match=message):
        trainer.fit(module, datamodule=vectors())
    assert not (path / "merged").exists()
    last = path / "kept" / "last.ckpt"
    return torch.load(last, weights_only=True) if last.exists() else None


def test_a_loss_that_becomes_nan(tmp_path):
    module = MergeModule(recipe_of(relatives(build())), module=build(Exploding))
    last = stopped(tmp_path, module, r"step 3: expected finite losses, got a \(nan\)")
    assert last["global_step"] == 2
    for key, value in raws(module).items():
        assert torch.equal(last["state_dict"][f"merged.raw.{key}"], value)
        assert value.isfinite().all()


def test_a_gradient_that_is_nan(tmp_path):
    module = MergeModule(recipe_of(relatives(build(Steep))), learning_rate=0.1)
    message = "step 1: expected finite gradients, got NaN or infinity for merged.raw.tensor"
    assert stopped(tmp_path, module, message) is None
    assert all(value.isfinite().all() for value in raws(module).values())


class Leaping(torch.optim.SGD):
    """Writes infinity at the second step."""

    count = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.count += 1
        if self.count == 2:
            self.param_groups[0]["params"][0][0] = math.inf
        return loss


def test_an_optimiser_that_leaps(tmp_path):
    module = module_of(relatives(build()))
    module.configure_optimizers = lambda: Leaping(module.parameters(), lr=0.1)
    last = stopped(tmp_path, module, "step [23]: expected finite numbers from the optimiser")
    assert last["global_step"] == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_no_checkpoint_holds_nan(tmp_path):
    module = module_of(relatives(build()))
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=vectors())
    with torch.no_grad():
        next(iter(module.merged.raw.values()))[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"coefficients: .* for body.weight"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_a_gradient_scaler_goes_on(tmp_path):
    """It skips steps whose gradients overflow at its first scale of 65536."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = module_of(relatives(build()))
    trainer = trainer_of(tmp_path, plugins=[plugin], max_steps=100)
    trainer.fit(module, datamodule=vectors())
    assert scaler.get_scale() < 2.0**120
    assert all(value.isfinite().all() for value in raws(module).values())


def test_sources_that_change_stop_it(tmp_path):
    from safetensors.torch import save_file

    from gradmerge import Recipe

    for name, model in zip(("base", "a", "b"), relatives(build()), strict=True):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")}
    module = MergeModule(Recipe({"a": files["a"], "b": files["b"]}, files["base"]), module=build())
    inner, count = module.training_step, []

    def step(batch, batch_idx):
        count.append(batch_idx)
        if len(count) == 3:
            save_file(relatives(build())[0].state_dict(), files["a"])
        return inner(batch, batch_idx)

    module.training_step = step
    last = stopped(tmp_path, module, r"changed while.*a.safetensors", SourceError)
    assert last["global_step"] == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_options_of_python(value):
    from gradmerge.coefficients import Constant
    from gradmerge.objectives import L2ToInit, Objective

    with pytest.raises(ConfigError, match=rf"init.value: {value}"):
        recipe_of(relatives(build()), init=Constant(value))
    with pytest.raises(ConfigError, match=r"init.value\[1\]: .*frozen..: "):
        recipe_of(relatives(build()), init=Constant([0.1, value]), frozen={"x": value})
    with pytest.raises(ConfigError, match=r"regularisers\[0\].weight"):
        Objective(regularisers=[L2ToInit(value)])
    with pytest.raises(ConfigError, match="learning_rate"):
        MergeModule(recipe_of(relatives(build())), learning_rate=value)
