"""Private tensors and adapters that are trained per task, against networks written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from families import family_of
from gradmerge import MergedModel, Recipe, export_merged
from gradmerge.coefficients import Constant
from gradmerge.common.errors import ConfigError
from gradmerge.finalisers import REPAIR
from stored import Suite, eager
from tiny import build, recipe_of, relatives

MEMORY = pytest.mark.parametrize("memory", ["resident", "streamed"])
PARTS = {"private": ["^head"], "trained": ["^head"], "adapters": {"^body": 2}}


def merged_of(memory="resident", dtype=torch.float64, tasks=None, **options):
    models = [model.double() for model in relatives(build())]
    recipe = recipe_of(models, **{**PARTS, **options})
    return MergedModel(recipe, memory=memory, dtype=dtype, tasks=tasks), models


def moved(merged):
    """Move all that is trained away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in merged.private.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.add_(0.1 * noise)
    return merged


def inputs(seed=1, count=5):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).double()


def written_out(merged, models, task):
    """Return the task's weights as plain functions of leaves, and these by name of parameter."""
    leaves = {
        name: value.detach().clone().requires_grad_() for name, value in merged.named_parameters()
    }
    base, sources = models[0].state_dict(), [m.state_dict() for m in models[1:]]
    names = ["body.weight", "body.bias"]
    weights = {}
    for i, name in enumerate(names):
        table = leaves["raw.tensor"][:, i]
        weights[name] = base[name] + sum(
            c * (source[name] - base[name]) for c, source in zip(table, sources, strict=True)
        )
    own = {key.removeprefix(f"private.values.{task}:"): leaf for key, leaf in leaves.items()}
    weights["body.weight"] = weights["body.weight"] + own["body/weight:B"] @ own["body/weight:A"]
    weights["head.weight"], weights["head.bias"] = own["head/weight"], own["head/bias"]
    return weights, leaves


@MEMORY
@pytest.mark.parametrize("at_once", [True, False], ids=["accumulate", "backward"])
def test_gradients_are_those_of_a_network_written_out(memory, at_once):
    merged, models = merged_of(memory)
    moved(merged)
    total, expected = 0, {}
    for seed, task in enumerate("ab"):
        weights, leaves = written_out(merged, models, task)
        loss = functional_call(models[0], weights, inputs(seed)).square().sum()
        loss.backward()
        total = total + loss.detach()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                expected[name] = expected.get(name, 0) + leaf.grad
    runs = [
        lambda seed=seed, task=task: merged(inputs(seed), task=task).square().sum()
        for seed, task in enumerate("ab")
    ]
    if at_once:
        loss, _ = merged.accumulate(runs, scale=8.0)
    else:
        loss = sum(run() for run in runs)
    loss.backward()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-12, atol=0)
    found = {name: parameter.grad for name, parameter in merged.named_parameters()}
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@MEMORY
def test_activation_checkpointing_runs_the_task_of_the_forward_pass_again(memory, family):
    models, batch = family("bert", dtype=torch.float64)
    recipe = recipe_of(
        models,
        private=["LayerNorm", "classifier"],
        trained=["LayerNorm", "classifier"],
        adapters={"query": 1},
    )
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        merged = moved(MergedModel(recipe, memory=memory, dtype=torch.float64))
        if checkpointed:
            merged.enable_activation_checkpointing()
        losses = [merged(**batch, task=task).logits.square().sum() for task in "ab"]
        sum(losses).backward()
        grads.append({name: value.grad for name, value in merged.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_streamed_memory_makes_an_adapted_matrix_again_for_backward():
    """The product is not kept: what backward needs of the weights is built anew, bit by bit."""
    merged, models = merged_of("streamed")
    moved(merged)
    made, make = [], merged._make_as
    merged._make_as = lambda *args: (made.append(args), make(*args))[1]
    x = inputs().requires_grad_()
    loss = merged(x, task="b").square().sum()
    assert not made
    loss.backward()
    assert [(key, task) for key, _, task in made] == [("body.weight", "b")]
    other = inputs().requires_grad_()
    weights, _ = written_out(merged, models, "b")
    functional_call(models[0], weights, other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-12)


@MEMORY
def test_parts_at_their_start_change_no_bit(memory):
    plain = MergedModel(recipe_of(relatives(build()), private=["^head"]), memory=memory)
    merged = MergedModel(recipe_of(relatives(build()), **PARTS), memory=memory)
    x = inputs().float()
    for task in "ab":
        found = merged(x, task=task)
        assert torch.equal(found, plain(x, task=task))
        loss, _ = merged.accumulate([lambda task=task: merged(x, task=task).square().sum()])
        loss.backward()
        other, _ = plain.accumulate([lambda task=task: plain(x, task=task).square().sum()])
        other.backward()
    assert torch.equal(merged.raw["tensor"].grad, plain.raw["tensor"].grad)


@MEMORY
def test_a_teacher_keeps_its_stored_head(memory):
    merged, models = merged_of(memory)
    x = inputs()
    with merged.as_source("a"):
        before = merged(x, task="a")
    moved(merged)
    with merged.as_source("a"):
        after = merged(x, task="a")
    assert torch.equal(after, before)
    torch.testing.assert_close(after, models[1](x), rtol=1e-12, atol=0)


@MEMORY
def test_tasks_that_share_a_source_have_parts_of_their_own(memory):
    merged, _ = merged_of(memory, tasks={"one": "a", "two": "a"})
    x = inputs()
    first = merged(x, task="one").detach()
    assert torch.equal(first, merged(x, task="two"))
    with torch.no_grad():
        merged.private.values["two:head/bias"].add_(1.0)
    torch.testing.assert_close(merged(x, task="two"), first + 1.0, rtol=1e-12, atol=1e-12)
    assert torch.equal(merged(x, task="one"), first)
    assert merged.private.count() == {"one": 3 * 8 + 3 + 2 * (8 + 6), "two": 55}


def test_a_task_alone_needs_no_name():
    merged, _ = merged_of(tasks={"only": "b"})
    moved(merged)
    x = inputs()
    assert torch.equal(merged(x), merged(x, task="only"))


def test_adapters_alone_ask_for_the_task():
    merged, _ = merged_of(private=[], trained=[])
    with pytest.raises(ConfigError, match=r"task: expected one of a, b, got none.*LoRA of body"):
        merged(inputs())


def test_tasks_before_a_fit_start_at_their_sources_and_stay_after_one():
    merged, models = merged_of()
    merged.tasks = {"x": "b", "a": "a"}
    assert [key.partition(":")[0] for key in merged.private.values][::4] == ["x", "a"]
    assert torch.equal(merged.private.values["x:head/weight"], models[2].head.weight)
    kept = dict(merged.private.values)
    merged.private.settled = True
    merged.tasks = {"a": "a"}
    assert dict(merged.private.values) == kept
    with pytest.raises(ConfigError, match=r"tasks: expected those of the fit \(x, a\).*got new"):
        merged.tasks = {"new": "a"}


def test_a_copy_trains_parts_of_its_own():
    merged, _ = merged_of()
    other = copy.deepcopy(merged)
    x = inputs()
    before = merged(x, task="a").detach()
    moved(other)
    assert torch.equal(merged(x, task="a"), before)
    assert not torch.allclose(other(x, task="a"), before, atol=1e-3)
    assert other.state.private is other.private


def test_other_dtypes_keep_wide_parameters():
    merged, _ = merged_of(dtype=torch.float32)
    merged.to(torch.bfloat16)
    assert {value.dtype for value in merged.private.parameters()} == {torch.float32}
    out = merged(inputs().bfloat16(), task="a")
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert merged.private.values["a:body/weight:B"].grad.dtype == torch.float32


def test_parameters_written_between_forward_and_backward_are_noticed():
    merged, _ = merged_of("streamed")
    loss = merged(inputs(), task="a").sum()
    moved(merged)
    with pytest.raises(RuntimeError, match="coefficients changed between forward and backward"):
        loss.backward()


@MEMORY
def test_adapters_of_matrices_that_the_network_stacks(tmp_path, memory):
    """One per stored matrix: gradients by those of given weights, logits by transformers."""
    suite = Suite(eager(family_of("MixtralForCausalLM").double()), tmp_path)
    options = {"init": Constant(0.3), "adapters": {r"experts\.1\.w[12]": 2}}
    recipe = Recipe(**suite.recipe(**options))
    merged = moved(MergedModel(recipe, memory=memory, dtype=torch.float64))
    assert merged.plan.binding.fused
    batch = {"input_ids": torch.arange(3, 19).view(2, 8)}

    def loss():
        return merged(**batch, task="a").logits.square().mean()

    total, _ = merged.accumulate([loss])
    total.backward()
    given = {name: merged.state.materialise(name, torch.float64) for name in merged.plan.tensors}
    factors = {}
    for name in merged.plan.ranks:
        key = f"a:{name.replace('.', '/')}"
        factors[name] = [merged.private.values[f"{key}:{part}"] for part in "BA"]
        left, right = factors[name]
        given[name] = (given[name] + left @ right).detach().requires_grad_()
    with merged.as_weights(given.__getitem__):
        other = loss()
        other.backward()
    torch.testing.assert_close(total.detach(), other.detach(), rtol=1e-12, atol=0)
    assert len(factors) >= 2
    for name, (left, right) in factors.items():
        slope = given[name].grad
        assert slope.abs().max() > 1e-6
        torch.testing.assert_close(left.grad, slope @ right.T, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(right.grad, left.T @ slope, rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        expected = merged(**batch, task="a").logits
    folder = export_merged(merged, tmp_path / "merged")
    found = eager(suite.kind.from_pretrained(folder / "tasks" / "a"))
    with torch.no_grad():
        torch.testing.assert_close(found(**batch).logits, expected, rtol=1e-9, atol=1e-9)


def test_private_matrices_among_stacked_ones_are_those_of_the_task(tmp_path):
    """In resident memory the other experts of the stack are built once for all tasks."""
    suite = Suite(eager(family_of("MixtralForCausalLM").double()), tmp_path)
    recipe = Recipe(**suite.recipe(init=Constant(0.3), private=[r"experts\.[01]\.w1"]))
    batch = {"input_ids": torch.arange(3, 19).view(2, 8)}
    found = {}
    for memory in ("resident", "streamed"):
        merged = MergedModel(recipe, memory=memory, dtype=torch.float64)
        with torch.no_grad():
            found[memory] = [merged(**batch, task=task).logits for task in "aba"]
    assert not torch.allclose(found["streamed"][0], found["streamed"][1], atol=1e-6)
    torch.testing.assert_close(found["resident"], found["streamed"], rtol=1e-12, atol=1e-12)
    folder = export_merged(merged, tmp_path / "merged")
    plain = eager(suite.kind.from_pretrained(folder / "tasks" / "b"))
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, found["resident"][1], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained": ["^body"]}, r"trained: '\^body' matches no private parameter"),
        ({"adapters": {"bias$": 2}}, r"adapters: 'bias\$' matches no merged matrix"),
        ({"adapters": {"^head": 2}}, r"adapters: '\^head' matches no merged matrix"),
        ({"adapters": {"^body": 0}}, r"adapters: expected a rank of at least 1"),
        ({"trained": ["nowhere"]}, r"trained: 'nowhere' matches no tensor of the sources"),
        ({"trained": ["("]}, r"trained: invalid regular expression"),
        ({"finalisers": [REPAIR()]}, r"finalisers: REPAIR corrects one merged network"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        merged_of(**options)
