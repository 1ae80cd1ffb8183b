"""A merge computes in the dtypes that transformers loads a model in."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from families import batch_of, families, family_of
from gradmerge import MergedModel, MergeModule
from gradmerge.engine.outputs import rows_of
from tiny import Normalised, build, examples, recipe_of, relatives, trainer_of, vectors

# Batch statistics, a table of positions in a buffer, a router in float32, and rotary frequencies.
CASTS = {
    "ResNetForImageClassification": "IMAGE_CLASSIFICATION",
    "MobileNetV2ForImageClassification": "IMAGE_CLASSIFICATION",
    "EfficientNetForImageClassification": "IMAGE_CLASSIFICATION",
    "MobileViTForImageClassification": "IMAGE_CLASSIFICATION",
    "SegformerForSemanticSegmentation": "SEMANTIC_SEGMENTATION",
    "M2M100ForConditionalGeneration": "SEQ_TO_SEQ_CAUSAL_LM",
    "SwitchTransformersForConditionalGeneration": "SEQ_TO_SEQ_CAUSAL_LM",
    "T5ForConditionalGeneration": "SEQ_TO_SEQ_CAUSAL_LM",
    "LlamaForCausalLM": "CAUSAL_LM",
}


def logits_of(network, batch):
    with torch.no_grad():
        return network(**batch).logits


def as_transformers_loads(network, merged, path, dtype):
    """The network with the merged weights, written to a folder and loaded in a dtype."""
    state, binding = network.state_dict(), merged.plan.binding
    for key in merged.plan.tensors:
        theta = merged.state.materialise(key, merged.dtype_of(key))
        state.update(dict.fromkeys(binding.parameters.get(key, ()), theta))
    values = merged.network_buffers.values()
    state.update({binding.buffers[name]: value for name, value in values.items()})
    other = copy.deepcopy(network)
    other.load_state_dict(state)
    other.save_pretrained(path)
    return type(network).from_pretrained(path, dtype=dtype).eval()


def assert_as_transformers(network, batch, path, dtype, memory="resident"):
    models = relatives(network, 3, 0.02)
    recipe = recipe_of(models, buffers="mean")
    merged = MergedModel(recipe, memory=memory, dtype=dtype)
    twin = as_transformers_loads(network, merged, path, dtype)
    batch = {key: merged.place(value) for key, value in batch.items()}
    found, expected = logits_of(merged, batch), logits_of(twin, batch)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    dtypes = {name: buffer.dtype for name, buffer in twin.named_buffers()}
    ours = {name: buffer.dtype for name, buffer in merged.skeleton.named_buffers()}
    assert ours == dtypes
    loss = merged.accumulate([lambda: merged(**batch).logits.float().square().mean()])[0]
    loss.backward()
    assert all(raw.grad.isfinite().all() for raw in merged.raw.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_logits_are_those_of_transformers_bit_for_bit(name, dtype, tmp_path):
    network = family_of(name)
    assert_as_transformers(network, batch_of(network, CASTS[name]), tmp_path / "out", dtype)


@pytest.mark.nightly
def test_logits_of_every_family(tmp_path):
    checked, wrong = 0, {}
    for name, kind in families():
        network, path = family_of(name), tmp_path / name
        if network is None or not loads(network, batch_of(network, kind), path):
            continue
        if network._keys_to_ignore_on_save:
            continue  # transformers recomputes these weights when it loads the model
        try:
            assert_as_transformers(network, batch_of(network, kind), path / "out", torch.bfloat16)
            checked += 1
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    assert checked >= 280


def loads(network, batch, path):
    """Whether plain transformers loads a network in bfloat16, runs it and has its gradients."""
    try:
        network.save_pretrained(path)
        low = type(network).from_pretrained(path, dtype=torch.bfloat16)
        cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        logits = [logits_of(network, batch), logits_of(low.eval(), cast)]
        low(**cast).logits.float().square().mean().backward()
    except Exception:
        return False
    return all(isinstance(found, torch.Tensor) and found.isfinite().all() for found in logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_fit_of_float32_images_runs_in_every_dtype(tmp_path, dtype):
    """Statistics are kept in their stored dtype, and inputs follow the computation."""
    models = relatives(build(Normalised))
    module = MergeModule(recipe_of(models), dtype=dtype)
    trainer_of(tmp_path, max_steps=2).fit(module, datamodule=vectors())
    kept = module.merged.network_buffers.values()
    assert kept["norm.running_var"].dtype == torch.float32
    assert module.merged.skeleton.norm.running_var.dtype == module.merged.dtype
    assert kept["norm.num_batches_tracked"].dtype == torch.int64
    batch = {key: value[None] for key, value in examples(0, 1)[0].items()}
    assert rows_of(module.merged.eval(), "a", batch)[0].isfinite().all()


def test_casting_back_loses_nothing():
    models = relatives(build(Normalised))
    merged = MergedModel(recipe_of(models, buffers="mean"))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    expected, kept = merged(x), merged.network_buffers.values()["norm.running_mean"].clone()
    low = merged.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(merged.to(torch.float32)(x), expected)
    assert torch.equal(merged.network_buffers.values()["norm.running_mean"], kept)


def test_a_float32_computation_of_low_precision_modules_casts_their_buffers():
    models = [model.bfloat16() for model in relatives(build(Normalised))]
    merged = MergedModel(recipe_of(models, buffers="mean"))
    assert merged(torch.ones(2, 6)).dtype == torch.float32


def test_complex_and_integer_buffers_are_not_cast():
    class Turning(Normalised):
        def __init__(self):
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))
            self.register_buffer("count", torch.arange(4))

        def forward(self, x):
            turned = torch.view_as_complex(super().forward(x)[:, :2].float()) * self.turn[0]
            return torch.view_as_real(turned)

    merged = MergedModel(recipe_of(relatives(build(Turning))), dtype=torch.bfloat16)
    assert merged.skeleton.turn.dtype == torch.complex64
    assert merged.skeleton.count.dtype == torch.int64
    assert merged(torch.ones(2, 6, dtype=torch.bfloat16)).isfinite().all()


def test_modules_inside_a_plain_network_follow_transformers():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            network = family_of("LlamaForCausalLM")
            self.body, self.head = network.model, torch.nn.Linear(16, 3)

        def forward(self, input_ids):
            return self.head(self.body(input_ids).last_hidden_state[:, -1])

    merged = MergedModel(recipe_of(relatives(build(Wrapped))), dtype=torch.bfloat16)
    assert merged.skeleton.body.rotary_emb.inv_freq.dtype == torch.float32
    assert merged(torch.ones(2, 4, dtype=torch.int64)).dtype == torch.bfloat16
    assert isinstance(merged.skeleton.body, transformers.LlamaModel)
