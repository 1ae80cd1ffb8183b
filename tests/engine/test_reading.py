"""However a forward reads its weights: it computes with merged ones, or is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.utils import parametrizations

from families import batch_of, family_of
from gradmerge import MergedModel
from gradmerge.coefficients import Constant, Element, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from tiny import build, recipe_of, relatives

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Reads(nn.Module):
    """A linear layer, read as the subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)

    def forward(self, x):
        return self.read(x, self.layer)

    def read(self, x, layer):
        return layer(x)


# ---- right ----------------------------------------------------------------------------------


class ByGetattr(Reads):
    def read(self, x, layer):
        return linear(x, getattr(layer, "weight"), getattr(layer, "bias"))  # noqa: B009


class ByData(Reads):
    def read(self, x, layer):
        return linear(x, layer.weight.data) + layer.bias


class ByStack(Reads):
    def read(self, x, layer):
        experts = torch.stack([expert.weight for expert in (layer, self.other)])
        return torch.einsum("bi,eoi->bo", x, experts)


class ByFunctionalCall(Reads):
    """Weights made by another layer, handed to a module by name."""

    def read(self, x, layer):
        made = {"weight": self.other.weight * 2, "bias": self.other.bias}
        return functional_call(layer, made, (x,)) + layer(x)


class ByShallowCopy(Reads):
    def read(self, x, layer):
        return copy.copy(layer)(x)


class ByParametrization(Reads):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.layer)
        parametrizations.orthogonal(self.other)

    def read(self, x, layer):
        return self.other(layer(x))


class ByComplexView(Reads):
    """A view as another dtype must not be rebuilt by the strides of the merged tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(3, 4, 2))

    def read(self, x, layer):
        turned = torch.view_as_complex(self.pairs)
        return (layer(x).to(turned.dtype) @ turned.conj()).abs()


class ByMetadata(Reads):
    def read(self, x, layer):
        first = next(self.parameters())
        sizes = sum(p.numel() for p in self.parameters() if p.requires_grad or p.dim())
        return layer(x.to(device=first.device, dtype=first.dtype)) * sizes / len(first)


class ByRecurrence(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(3, 3, batch_first=True)

    def read(self, x, layer):
        return self.recurrent(layer(x)[None])[0]


class ByAttention(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.into = nn.Linear(3, 4)

    def read(self, x, layer):
        return self.attention(self.into(layer(x))[None])


class BySparseEmbedding(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)

    def read(self, x, layer):
        return layer(self.table(torch.tensor([1, 4, 4])))


class ByListsAndDicts(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList(torch.randn(3) for _ in range(2))
        keys = ("weight", "data", "keys", "0", "a/b", "ünï cøde", "class")
        self.named = nn.ParameterDict()
        for key in keys:
            if not hasattr(self.named, key):
                self.named[key] = nn.Parameter(torch.randn(3))
        self.values = nn.Parameter(torch.randn(3))

    def read(self, x, layer):
        total = sum(self.many) + sum(self.named[key] for key in self.named.keys())  # noqa: SIM118
        return layer(x) * total * self.values


RIGHT = [
    Reads,
    ByGetattr,
    ByData,
    ByStack,
    ByFunctionalCall,
    ByShallowCopy,
    ByParametrization,
    ByComplexView,
    ByMetadata,
    ByRecurrence,
    ByAttention,
    BySparseEmbedding,
    ByListsAndDicts,
]


def expected_of(models, granularity, loss):
    """Loss and gradients by coefficient in ordinary float64 autograd."""
    base, sources = models[0], models[1:]
    names = [name for name, _ in base.named_parameters()]
    shape = (lambda p: p.shape) if isinstance(granularity, Element) else (lambda _: ())
    c = {
        name: [torch.full(shape(p), 0.25, dtype=torch.float64, requires_grad=True) for _ in sources]
        for name, p in base.named_parameters()
    }
    theta = {
        name: base.get_parameter(name).detach()
        + sum(
            own * (source.get_parameter(name) - base.get_parameter(name)).detach()
            for own, source in zip(c[name], sources, strict=True)
        )
        for name in names
    }
    twin = copy.deepcopy(base)
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    value = loss(lambda x: functional_call(twin, theta, (x,)))
    value.backward()
    grads = {
        name: torch.stack([torch.zeros_like(z) if z.grad is None else z.grad for z in own])
        for name, own in c.items()
    }
    return value.detach(), grads


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("way", ["plain", "accumulate"])
@pytest.mark.parametrize("granularity", [Tensor(), Element()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_what_is_supported_equals_float64_autograd(kind, granularity, way, memory):
    models = [model.double() for model in relatives(build(kind))]
    recipe = recipe_of(models, coefficients=granularity, init=Constant(0.25))
    merged = MergedModel(recipe, memory=memory, dtype=torch.float64)

    def loss(network):
        output = network(X)
        return (output * torch.linspace(0, 1, output.numel()).reshape(output.shape)).square().sum()

    value, expected = expected_of(models, granularity, loss)
    for _ in range(2):  # the first passes are watched
        merged.zero_grad()
        if way == "plain":
            found = loss(merged)
        else:
            found, _ = merged.accumulate([lambda: loss(merged)])
        found.backward()
        torch.testing.assert_close(found.detach(), value, rtol=1e-12, atol=1e-12)
        slots = merged.plan.layout.slots
        grads = {key: z.grad if z.grad is not None else 0 * z for key, z in merged.raw.items()}
        for name, grad in expected.items():
            came = slots[name].read(grads)
            torch.testing.assert_close(came, grad, rtol=1e-8, atol=1e-10, msg=name)


# ---- refused --------------------------------------------------------------------------------


class Parameters(Reads):
    def read(self, x, layer):
        weight, bias = layer.parameters()
        return linear(x, weight, bias)


class Private(Reads):
    def read(self, x, layer):
        return x @ layer._parameters["weight"].T


class StateDict(Reads):
    def read(self, x, layer):
        return functional_call(self.other, layer.state_dict(), (x,))


class Penalty(Reads):
    def read(self, x, layer):
        return layer(x) + sum(p.square().sum() for _, p in self.named_parameters())


class Stacked(Reads):
    def read(self, x, layer):
        weights, _ = torch.func.stack_module_state([layer, self.other])
        return x @ weights["weight"].sum(0)


class Vector(Reads):
    def read(self, x, layer):
        return layer(x) + nn.utils.parameters_to_vector(self.parameters()).sum()


class StandInData(Reads):
    def read(self, x, layer):
        next(layer.parameters()).data.mul_(2)
        return layer(x)


class Masks(Reads):
    def read(self, x, layer):
        layer.weight.data *= 0.5
        return layer(x)


class Adds(Reads):
    def read(self, x, layer):
        with torch.no_grad():
            layer.bias.add_(1)
        return layer(x)


class Clamps(Reads):
    def read(self, x, layer):
        torch.clamp(layer.weight.detach(), -1, 1, out=layer.weight.detach())
        return layer(x)


class Views(Reads):
    def read(self, x, layer):
        layer.weight.detach()[0].zero_()
        return layer(x)


class Many(Reads):
    def read(self, x, layer):
        torch._foreach_mul_([layer.weight.detach(), layer.bias.detach()], 0.5)
        return layer(x)


class Normalises(Reads):
    def read(self, x, layer):
        layer.weight.data = layer.weight.data / layer.weight.data.norm()
        return layer(x)


class Replaces(Reads):
    def read(self, x, layer):
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
        return layer(x)


class Deletes(Reads):
    def read(self, x, layer):
        weight = layer.weight
        del layer.weight
        layer.weight = weight * 2
        return layer(x)


class Copies(Reads):
    def read(self, x, layer):
        return copy.deepcopy(layer)(x)


READS = r"layer\.weight: expected the network's forward to read it as an attribute of its module"
WRITES = r"layer\.{}: expected a forward that leaves its weights as they are"
REFUSED = {
    Parameters: READS,
    Private: READS,
    StateDict: READS,
    Penalty: READS,
    Stacked: READS,
    Vector: READS,
    StandInData: READS,
    Masks: WRITES.format("weight"),
    Adds: WRITES.format("bias"),
    Clamps: WRITES.format("weight"),
    Views: WRITES.format("weight"),
    Many: WRITES.format("weight"),
    Normalises: WRITES.format("weight"),
    Replaces: r"expected a forward that leaves its weights as they are, got one that assigns to",
    Deletes: r"expected a forward that leaves its weights as they are, got one that assigns to",
    Copies: "expected a forward that uses its modules, got one that copies a module",
}


def from_source(merged):
    with merged.as_source("a"):
        merged(X)


def evaluated(merged):
    with torch.no_grad():
        merged.eval()(X)


FIRST = {
    "plain": lambda merged: merged(X),
    "accumulate": lambda merged: merged.accumulate([lambda: merged(X).sum()]),
    "source": from_source,
    "evaluation": evaluated,
}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("way", FIRST)
@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_a_merge_cannot_see_is_refused_at_the_first_forward(kind, way, memory):
    models = [model.double() for model in relatives(build(kind))]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    merged = MergedModel(recipe_of(models), memory=memory, dtype=torch.float64)
    with pytest.raises(ConfigError, match=REFUSED[kind]):
        FIRST[way](merged)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_rwkv_which_rescales_its_weights_is_refused_with_the_option_that_stops_it():
    network = family_of("RwkvForCausalLM")
    batch = batch_of(network, "CAUSAL_LM")
    merged = MergedModel(recipe_of(relatives(network)))
    with pytest.raises(ConfigError, match="for RWKV set `rescale_every: 0` in the config"):
        merged(**batch)
    config = transformers.RwkvConfig(**{**network.config.to_dict(), "rescale_every": 0})
    plain = transformers.RwkvForCausalLM(config)
    assert MergedModel(recipe_of(relatives(plain)))(**batch).logits.isfinite().all()


# ---- kinds of numbers -----------------------------------------------------------------------


class Numbers(nn.Module):
    """A parameter of another kind of number beside a layer."""

    def __init__(self, dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        own = torch.arange(3).to(dtype)
        self.own = nn.Parameter(own, requires_grad=False)

    def forward(self, x):
        return self.layer(x) * self.own


def test_complex_parameters_are_refused():
    models = [build(Numbers, dtype=torch.complex64) for _ in range(3)]
    with pytest.raises(ConfigError, match="expected real weights, got complex ones: own"):
        MergedModel(recipe_of(models))
    with pytest.raises(ConfigError, match="expected real weights, got complex ones: own"):
        open_plan(recipe_of(models), with_skeleton=False)


def test_a_task_s_own_complex_parameter_is_used():
    models = [build(Numbers, dtype=torch.complex64) for _ in range(3)]
    models[2].own.data += 2j
    models[1].layer.bias.data += 1  # else there is nothing to merge
    merged = MergedModel(recipe_of(models, private=["own"]))
    found = merged(torch.ones(1, 3), task="b")
    models[2].layer.bias.data += 0.3  # as merged
    torch.testing.assert_close(found, models[2](torch.ones(1, 3)))


def test_integer_parameters_are_the_reference_s_as_in_the_export():
    models = [build(Numbers, dtype=torch.int64) for _ in range(3)]
    for number, model in enumerate(models):
        model.own.data += 10 * number
    models[1].layer.bias.data += 1  # else there is nothing to merge
    merged = MergedModel(recipe_of(models), dtype=torch.bfloat16)
    assert merged.skeleton.own.dtype == torch.int64
    assert torch.equal(merged.skeleton.own, models[0].own)
    assert torch.equal(merged.plan.buffer("own"), models[0].own)
    with merged.as_source("b"):
        assert torch.equal(merged.skeleton.own, models[2].own)


def test_names_that_differ_by_dots_and_slashes_have_their_own_coefficients():
    class Slashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.register_parameter("a/weight", nn.Parameter(torch.randn(2, 2)))

        def forward(self, x):
            return self.a(x) @ getattr(self, "a/weight")

    merged = MergedModel(recipe_of(relatives(build(Slashed)), coefficients=Element()))
    assert len(merged.raw) == 3
    merged(torch.ones(1, 2)).sum().backward()
    assert all(raw.grad is not None for raw in merged.raw.values())
