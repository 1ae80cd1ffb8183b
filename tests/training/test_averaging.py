"""Copies of a merge, and callbacks that average its coefficients over the steps."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gradmerge import MergedModel, MergeModule
from gradmerge.coefficients import (
    Column,
    Component,
    Constant,
    Element,
    HardMask,
    Sigmoid,
    Tensor,
)
from gradmerge.operators import Components
from gradmerge.preprocess import ElectSign, RandomDrop, Trim
from gradmerge.training.callbacks import ExportAtEnd
from tiny import (
    Normalised,
    build,
    module_of,
    plain_statistics,
    raws,
    recipe_of,
    relatives,
    save_family,
    trainer_of,
    vectors,
)

KINDS = {
    "tensor": {"coefficients": Tensor()},
    "element": {"coefficients": Sigmoid(Element())},
    "ties": {"coefficients": Column(), "preprocess": [Trim(0.5), ElectSign()]},
    "dare": {"preprocess": [RandomDrop(0.5)]},
}
MEMORY = pytest.mark.parametrize("memory", ["resident", "streamed"])


def gradients(merged, x):
    """Output and gradients of a loss."""
    merged.zero_grad()
    out = merged(x=x)
    out.square().sum().backward()
    return out.detach(), {key: raw.grad.clone() for key, raw in merged.raw.items()}


@MEMORY
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_coefficients_of_its_own_and_shares_what_is_frozen(kind, memory):
    merged = MergedModel(recipe_of(relatives(build()), **KINDS[kind]), memory=memory)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    before = gradients(merged, x)
    other = copy.deepcopy(merged)
    torch.testing.assert_close(gradients(other, x), before, rtol=0, atol=0)
    with torch.no_grad():
        for raw in other.raw.values():
            raw.add_(0.5)
    torch.testing.assert_close(gradients(merged, x), before, rtol=0, atol=0)
    moved = gradients(other, x)
    assert not torch.allclose(moved[0], before[0], atol=1e-3)
    with torch.no_grad():
        for raw in merged.raw.values():
            raw.add_(0.5)
    torch.testing.assert_close(gradients(merged, x), moved, rtol=0, atol=0)
    assert other.plan is merged.plan
    assert other.state is not merged.state
    assert other.skeleton is not merged.skeleton


def test_a_copy_keeps_tensors_of_its_own_fixed():
    merged = MergedModel(recipe_of(relatives(build())))
    other = copy.deepcopy(merged)
    other.fix(["body.bias"], 0.0)
    assert "body.bias" in other.state.learned or "body.bias" in other.state.fixed
    assert other.state.fixed == {"body.bias": 0.0}
    assert merged.state.fixed == {}
    x = torch.ones(1, 6)
    assert not torch.allclose(merged(x=x), other(x=x), atol=1e-4)


def tied_llama():
    """Four heads of queries, two of keys and values."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def test_a_copy_of_a_transformer_from_files(tmp_path):
    """Grouped queries, tied embeddings; sources are mapped once for both."""
    models = relatives(tied_llama(), 3)
    paths = save_family(tmp_path, models)
    module = module_of([paths["base"], paths["a"], paths["b"]], score_experts=False)
    other = copy.deepcopy(module)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            other.merged(input_ids=tokens).logits, module.merged(input_ids=tokens).logits
        )
        other.merged.raw["tensor"].mul_(2)
        came = module.merged(input_ids=tokens).logits
        assert not torch.allclose(other.merged(input_ids=tokens).logits, came, atol=1e-4)
    assert other.merged.plan.sources["a"] is module.merged.plan.sources["a"]


class Recorder(lightning.Callback):
    """Coefficients after each step and at the end of each epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(raws(module)["tensor"])

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(raws(module)["tensor"])


def prepared(data):
    """A data module that no trainer has set up."""
    data.setup()
    return data


def exponential(decay):
    """An average whose newest member counts 1 - decay."""
    return lambda average, new, _: decay * average + (1 - decay) * new


@MEMORY
def test_an_exponential_average_of_coefficients_is_validated_saved_and_exported(tmp_path, memory):
    """BatchNorm statistics, scores and weights are all of the average."""
    models, data = relatives(build(Normalised)), vectors()
    module = module_of(models, memory=memory, learning_rate=0.3)
    recorder, best = Recorder(), ModelCheckpoint(tmp_path, monitor="selection/loss", filename="b")
    callbacks = [
        WeightAveraging(avg_fn=exponential(0.8)),
        recorder,
        best,
        ExportAtEnd(str(tmp_path / "merged")),
    ]
    trainer = trainer_of(tmp_path, max_steps=6, check_val_every_n_epoch=2, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    # the callback's average begins with the first step's coefficients
    average = recorder.steps[0]
    for step in recorder.steps[1:]:
        average = 0.8 * average + 0.2 * step
    assert not torch.allclose(average, recorder.steps[-1], atol=1e-2)
    saved = torch.load(best.best_model_path, weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["merged.raw.tensor"], average)
    torch.testing.assert_close(raws(module)["tensor"], average)

    own = module_of(models)
    with torch.no_grad():
        own.merged.raw["tensor"].copy_(average)
    expected = plain_statistics(own, models, data)
    for name in ("running_mean", "running_var"):
        wanted = getattr(expected, name)
        torch.testing.assert_close(saved["gradmerge"]["buffers"][f"norm.{name}"], wanted)
    trainer_of(tmp_path).validate(own, datamodule=data, verbose=False)
    came = saved["gradmerge"]["results"]["selection"]["average"]["loss"]
    assert came == pytest.approx(own.results["selection"]["average"]["loss"], rel=1e-5)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, wanted in own.merged.plan.tensors.items():
        assert written[name].shape == wanted.shape
        torch.testing.assert_close(written[name], own.merged.state.materialise(name))
    torch.testing.assert_close(written["norm.running_mean"], expected.running_mean)


def test_a_checkpoint_of_the_average_leaves_training_as_it_is(tmp_path):
    """Saving at every step changes no step, and a run that goes on ends where one run would;
    statistics are of the coefficients that they are saved with.
    """

    def run(folder, steps, callbacks=(), **options):
        module = module_of(relatives(build(Normalised)), learning_rate=0.3)
        own = [WeightAveraging(avg_fn=exponential(0.8)), *callbacks]
        trainer = trainer_of(tmp_path / folder, max_steps=steps, callbacks=own)
        trainer.fit(module, datamodule=vectors(), **options)
        return raws(module)["tensor"]

    every = ModelCheckpoint(tmp_path / "states", every_n_train_steps=1, save_top_k=-1)
    plain, saving = run("plain", 6), run("saving", 6, [every])
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)
    path = next((tmp_path / "states").glob("*step=3.ckpt"))
    saved, own = torch.load(path, weights_only=True), module_of(relatives(build(Normalised)))
    own.load_state_dict(saved["state_dict"])
    expected = plain_statistics(own, relatives(build(Normalised)), prepared(vectors()))
    found = saved["gradmerge"]["buffers"]
    torch.testing.assert_close(found["norm.running_mean"], expected.running_mean)
    torch.testing.assert_close(found["norm.running_var"], expected.running_var)
    gone_on = run("on", 6, ckpt_path=path, weights_only=True)
    torch.testing.assert_close(gone_on, plain, rtol=1e-6, atol=1e-7)


@MEMORY
def test_a_stochastic_average_is_the_mean_over_epochs(tmp_path, memory):
    """With BatchNorm: the statistics of the export are of the mean, too."""
    models, data = relatives(build(Normalised)), vectors()
    module = module_of(models, memory=memory, learning_rate=0.3)
    recorder = Recorder()
    callbacks = [
        recorder,
        StochasticWeightAveraging(swa_lrs=0.2, swa_epoch_start=2, annealing_epochs=1),
        ExportAtEnd(str(tmp_path / "merged")),
    ]
    options = {"max_steps": -1, "max_epochs": 4, "limit_train_batches": 2}
    trainer = trainer_of(tmp_path, callbacks=callbacks, enable_checkpointing=False, **options)
    trainer.fit(module, datamodule=data)
    # as each epoch from the second on begins
    mean = torch.stack(recorder.epochs[:-1]).mean(dim=0)
    torch.testing.assert_close(raws(module)["tensor"], mean)
    assert not torch.allclose(mean, recorder.epochs[-1], atol=1e-3)
    expected = plain_statistics(module, models, data)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(written["norm.running_mean"], expected.running_mean)
    torch.testing.assert_close(written["norm.running_var"], expected.running_var)


def test_statistics_follow_coefficients_that_are_written_through_data(tmp_path):
    """Such writes leave no trace in a tensor's version."""
    models, data = relatives(build(Normalised)), vectors()
    module = module_of(models)
    trainer_of(tmp_path).validate(module, datamodule=data, verbose=False)
    module.merged.raw["tensor"].data.add_(0.5)
    module.refresh_buffers(data)
    expected = plain_statistics(module, models, data)
    found = module.merged.network_buffers.values()
    torch.testing.assert_close(found["norm.running_mean"], expected.running_mean)
    torch.testing.assert_close(found["norm.running_var"], expected.running_var)


def test_a_copy_shares_decompositions():
    """AdaRank's: as large as the sources."""
    factors = {"coefficients": HardMask(Component()), "operator": Components()}
    recipe = recipe_of(relatives(build()), init=Constant(1.0), **factors)
    module = MergeModule(recipe, score_experts=False)
    x = torch.ones(2, 6)
    expected = module.merged(x=x)
    other = copy.deepcopy(module)
    torch.testing.assert_close(other.merged(x=x), expected, rtol=0, atol=0)
    facts = module.merged.plan._facts
    assert facts
    assert other.merged.plan._facts is facts
