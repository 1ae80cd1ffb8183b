"""A mergekit file as the start of a learned merge: models are matched, weights translated."""

from __future__ import annotations

import pytest
import torch
import yaml

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import InitContext, MergeTensor, Model, Softmax
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.coefficients.base import Slot
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.mergekit.init import FromMergekit
from tiny import build, relatives

NAMES = ("embed.weight", "layers.0.w", "layers.1.w", "head.weight")
LABELS = {"base": "/m/base", "a": "/m/a", "b": "/m/b"}


@pytest.fixture
def row(tmp_path):
    """The coefficients that a file starts a tensor with."""

    def row(config, name="layers.1.w", origin="base", labels=LABELS, models=None, slot=None):
        path = tmp_path / "mk.yaml"
        path.write_text(yaml.safe_dump(config))
        sources = tuple(source for source in labels if source != "base")
        tensors = {n: MergeTensor(n, (2, 2)) for n in NAMES}
        context = InitContext(sources, tensors, lambda: torch.ones(2), origin, labels, NAMES)
        init = FromMergekit(str(path), models or {})
        found = init.coefficient(tensors[name], slot or Slot("tensor", "scalar", ()), context)
        return found.tolist()

    return row


def config(method="task_arithmetic", a=0.3, b=0.6, base="/m/base", parameters=None, **more):
    models = [
        {"model": "/m/a", "parameters": {"weight": a}},
        {"model": "/m/b", "parameters": {"weight": b}},
    ]
    found = {"merge_method": method, "models": models, "parameters": parameters or {}, **more}
    return {**found, "base_model": base} if base else found


def test_gradients_and_filters_start_each_tensor(row):
    file = config(a=[{"filter": "head", "value": 0.9}, {"value": [0.1, 0.5]}])
    assert [row(file, name)[0] for name in NAMES] == [0.1, 0.1, 0.5, 0.9]
    assert [row(file, name)[1] for name in NAMES] == [0.6] * 4
    columns = Slot("x", "axis", (2,), axis=1)
    assert row(file, slot=columns) == [[0.5, 0.5], [0.6, 0.6]]


@pytest.mark.parametrize(
    ("file", "origin", "values"),
    [
        (config(parameters={"lambda": 2}), "base", [0.6, 1.2]),
        (config("ties", parameters={"lambda": 2, "density": 0.2}), "base", [0.6, 1.2]),
        (config("multislerp"), "base", [1 / 3, 2 / 3]),
        (config("nuslerp", base=None), "zero", [1 / 3, 2 / 3]),
        (config("linear", base=None), "zero", [1 / 3, 2 / 3]),
        # sums of models that are sums of directions, too: from the base, and from the mean
        (config("linear", base=None), "base", [1 / 3, 2 / 3]),
        (config("linear", base=None), "mean", [1 / 3, 2 / 3]),
        (
            config("linear", parameters={"weight": 0.1, "normalize": False}),
            "base",
            [0.3, 0.6],
        ),
    ],
)
def test_weights_are_those_of_the_method(row, file, origin, values):
    assert row(file, origin=origin) == pytest.approx(values)


def test_methods_without_weights_of_their_own_start_even(row):
    models = [{"model": "/m/a"}, {"model": "/m/b"}]
    stock = {"merge_method": "model_stock", "base_model": "/m/base", "models": models}
    assert row(stock) == [0.5, 0.5]
    assert row({"merge_method": "karcher", "models": models}, origin="zero") == [0.5, 0.5]
    slerp = {"merge_method": "slerp", "base_model": "/m/a", "models": models}
    slerp["parameters"] = {"t": 0.3}
    assert row(slerp, origin="zero") == [0.7, 0.3]


def test_task_vectors_from_zero_want_the_base_as_a_source(row):
    labels = {"a": "/m/a", "old": "/m/base", "b": "/m/b"}
    assert row(config(), origin="zero", labels=labels) == pytest.approx([0.3, 0.1, 0.6])
    with pytest.raises(ConfigError, match=r"Not in this merge: /m/base\. Name the same models"):
        row(config(), origin="zero")


def test_sources_are_found_by_path_name_or_as_stated(row, tmp_path):
    moved = {"base": "/other/base", "a": "/other/first/a", "b": "hub/b"}
    assert row(config(), labels=moved) == [0.3, 0.6]
    swapped = {"base": "/m/base", "b": "/m/a", "a": "/m/b"}
    assert row(config(), labels=swapped) == [0.3, 0.6]  # the path goes before the name
    named = {"base": "/x/y", "one": "/x/1", "two": "/x/2"}
    stated = {"base": "/m/base", "one": "/m/b", "two": "/m/a"}
    assert row(config(), labels=named, models=stated) == [0.6, 0.3]
    (tmp_path / "a").mkdir()
    file = config()
    file["models"][0]["model"] = str(tmp_path / "a" / ".." / "a")
    assert row(file, labels={**LABELS, "a": str(tmp_path / "a")}) == [0.3, 0.6]


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (
            config(),
            {"labels": {"base": "/m/base", "a": "/m/a"}},
            r"merges /m/a, /m/b, /m/base; this merge has base .*Not in this merge: /m/b\.",
        ),
        (
            config(),
            {"labels": {**LABELS, "c": "/m/c"}},
            r"Not in the file: c\. Name the same models in both, or state which is which",
        ),
        (config(), {"labels": {**LABELS, "base": "/m/x"}}, r"Not in the file: base\. Not in this"),
        (config(), {"models": {"a": "/m/b"}}, "Name the same models in both"),
        (config(), {"models": {"a": "/m/q"}}, r"Not in the file: a\. Not in this merge: /m/a"),
        (
            config("linear", base=None, parameters={"normalize": False}),
            {},
            r"the weights of layers\.1\.w sum to 0\.9, but from origin base they always sum to 1",
        ),
        (config(a="much"), {}, "expected a number, got 'much'"),
        (
            config(a=[{"filter": "head", "value": 1}]),
            {},
            "weight: required by .*, missing for /m/a",
        ),
        (
            {
                "merge_method": "nearswap",
                "base_model": "/m/base",
                "models": [{"model": "/m/a"}],
                "parameters": {"t": 0.1},
            },
            {},
            "merge_method: nearswap states no weights",
        ),
    ],
)
def test_what_does_not_fit_is_refused(row, file, options, message):
    with pytest.raises(ConfigError, match=message):
        row(file, **options)


def test_a_missing_file_is_named():
    tensor, slot = MergeTensor("x", (2,)), Slot("x", "scalar", ())
    context = InitContext(("a",), {"x": tensor}, lambda: torch.ones(1))
    with pytest.raises(ConfigError, match=r"FromMergekit: /no/mk\.yaml: no such file"):
        FromMergekit("/no/mk.yaml").coefficient(tensor, slot, context)


def test_a_changed_file_is_read_again(row, tmp_path):
    import os

    assert row(config(a=0.3))[0] == 0.3
    os.utime(tmp_path / "mk.yaml", ns=(1, 1))
    assert row(config(a=0.4))[0] == 0.4


def test_it_starts_a_learned_merge(tmp_path):
    models = relatives(build())
    path = tmp_path / "mk.yaml"
    weight = [{"filter": "head", "value": 0.25}, {"value": 0.75}]
    file = {"merge_method": "linear", "parameters": {"weight": weight, "normalize": True}}
    file["models"] = [
        {"model": "a"},
        {"model": "b", "parameters": {"weight": [{"filter": "head", "value": 0.75}]}},
    ]
    path.write_text(yaml.safe_dump(file))
    sources = dict(zip("ab", models[1:], strict=True))
    init = FromMergekit(str(path), {"a": "a", "b": "b"})
    for coefficients in (TensorGranularity(), Softmax(TensorGranularity())):
        recipe = Recipe(sources, base=models[0], coefficients=coefficients, init=init)
        found = MergedModel(recipe).coefficients()
        for name, value in found.items():
            wanted = [0.25, 0.75] if "head" in name else [0.5, 0.5]
            assert value.tolist() == pytest.approx(wanted, abs=1e-6)
    shared = Recipe(sources, base=models[0], coefficients=Model(), init=init)
    mean = next(iter(MergedModel(shared).coefficients().values()))
    assert mean.tolist() == pytest.approx([0.375, 0.625])  # of two tensors of each kind
    assert from_plain(to_plain(init)) == init
