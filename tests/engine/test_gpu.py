"""The same gradients on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from architectures import logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import (
    Column,
    Component,
    Constant,
    Element,
    HardMask,
    LeadingComponents,
    Partition,
    Tensor,
)
from gradmerge.operators import (
    ArceeFusion,
    Components,
    DisjointMean,
    Karcher,
    ModelStock,
    MultiSlerp,
    NearSwap,
    Slerp,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("loaded", [False, True], ids=["mapped", "loaded"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize(
    "granularity", [Tensor(), Column(), Partition(3), Element()], ids=lambda g: type(g).__name__
)
def test_gradients_on_a_gpu_equal_those_on_the_cpu(family, granularity, memory, loaded):
    models, inputs = family("llama-tied")
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]}, base=models[0], coefficients=granularity
    )
    grads = []
    for device in ("cpu", "cuda"):
        merged = MergedModel(recipe, memory=memory, dtype=torch.float64).to(device)
        if loaded:
            merged.plan.load(torch.device(device))
        moved = {key: value.to(device) for key, value in inputs.items()}
        loss, _ = merged.accumulate(
            [lambda m=merged, x=moved: logits_of(m(**x)).log_softmax(-1)[..., 0].mean()]
        )
        loss.backward()
        grads.append({key: raw.grad.cpu() for key, raw in merged.raw.items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loaded", [False, True], ids=["mapped", "loaded"])
@pytest.mark.parametrize("granularity", [Tensor(), Element()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize(
    "operator",
    [
        Slerp(),
        Slerp("column"),
        MultiSlerp(),
        Karcher(),
        ModelStock("row"),
        DisjointMean(),
        NearSwap(),
        ArceeFusion(),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_operators_on_a_gpu_equal_those_on_the_cpu(family, operator, granularity, loaded):
    models, inputs = family("llama-tied")
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        coefficients=granularity,
        operator=operator,
        init=Constant(0.02 if isinstance(operator, NearSwap) else [0.3, 0.4]),
    )
    grads = []
    for device in ("cpu", "cuda"):
        merged = MergedModel(recipe, dtype=torch.float64).to(device)
        if loaded:
            merged.plan.load(torch.device(device))
        moved = {key: value.to(device) for key, value in inputs.items()}
        logits_of(merged(**moved)).log_softmax(-1)[..., 0].mean().backward()
        grads.append({key: raw.grad.cpu() for key, raw in merged.raw.items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loaded", [False, True], ids=["mapped", "loaded"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_components_on_a_gpu_equal_those_on_the_cpu(family, memory, loaded):
    models, inputs = family("llama-tied")
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        coefficients=HardMask(Component()),
        operator=Components(0.3),
        init=LeadingComponents(0.5),
    )
    grads = []
    for device in ("cpu", "cuda"):
        merged = MergedModel(recipe, memory=memory, dtype=torch.float64).to(device)
        if loaded:
            merged.plan.load(torch.device(device))
        moved = {key: value.to(device) for key, value in inputs.items()}
        logits_of(merged(**moved)).log_softmax(-1)[..., 0].mean().backward()
        grads.append({key: raw.grad.cpu() for key, raw in merged.raw.items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-8, atol=1e-11)
