"""A mergekit file as a recipe: which factors each method becomes, and with which numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gradmerge.cli import main
from gradmerge.coefficients import Constant, Model
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.common.errors import ConfigError
from gradmerge.engine.recipe import Recipe
from gradmerge.mergekit.reader import read_mergekit
from gradmerge.mergekit.table import compact
from gradmerge.operators import Linear
from gradmerge.preprocess import Breadcrumbs, RandomDrop, Trim
from gradmerge.sources.lora import Lora

NAMES = ["embed.weight", "layers.0.w", "layers.1.w", "head.weight"]


def save(folder, dtype=torch.float32, names=NAMES):
    folder.mkdir()
    tensors = {name: torch.randn(4, 3).to(dtype) for name in names}
    save_file({**tensors, "position_ids": torch.arange(3)}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def p(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    paths = {name: save(root / name) for name in ("base", "a", "b", "c")}
    paths["narrow"] = save(root / "narrow", torch.bfloat16)
    return paths


@pytest.fixture
def read(tmp_path):
    def read(config):
        path = tmp_path / "mk.yaml"
        path.write_text(yaml.safe_dump(config))
        return read_mergekit(path)

    return read


def config(p, method, *models, base="base", parameters=None, **more):
    """A file with weights .3 and .6, and parameters of the merge."""
    entries = [{"model": p[m]} for m in models or ("a", "b")]
    if "weight" in more.pop("own", ("weight",)):
        for i, entry in enumerate(entries):
            entry["parameters"] = {"weight": 0.3 * (i + 1)}
    found = {"merge_method": method, "models": entries, "parameters": parameters or {}, **more}
    return {**found, "base_model": p[base]} if base else found


def fields(factor):
    """A factor's class and fields, whichever class it is."""
    values = {f.name: getattr(factor, f.name) for f in dataclasses.fields(factor)}
    return type(factor).__name__, values


def test_task_arithmetic_is_a_sum_from_the_base(p, read):
    reading = read(config(p, "task_arithmetic"))
    assert reading.recipe == Recipe(
        sources={"a": p["a"], "b": p["b"]},
        base=p["base"],
        origin="base",
        coefficients=Model(),
        init=Constant([0.3, 0.6]),
        operator=Linear("directions"),
    )
    assert reading.dtype is None
    assert "mergekit task_arithmetic: Linear, origin base, base /" in reading.summary
    assert f"  b ({p['b']}): coefficient 0.6" in reading.summary


def test_the_opened_checkpoints_have_the_recipe_s_names(p, read):
    reading = read(config(p, "task_arithmetic"))
    assert list(reading.opened) == ["a", "b", "base"]
    assert {name: str(c.folder) for name, c in reading.opened.items()} == {
        name: p[name] for name in reading.opened
    }
    among = read(config(p, "linear", "a", "base", own=(), parameters={"weight": 1.0})).opened
    assert list(among) == ["a", "base1", "base"]
    assert among["base"] is among["base1"]
    assert list(read(config(p, "linear", base=None)).opened) == ["a", "b"]


def test_what_varies_by_tensor_becomes_a_mapping(p, read):
    file = config(p, "task_arithmetic", "a", "b")
    file["models"][0]["parameters"]["weight"] = [0.1, 0.5]
    recipe = read(file).recipe
    assert recipe.coefficients == TensorGranularity()
    assert recipe.init.value == {
        "embed.weight": [0.1, 0.6],
        "layers.0.w": [0.1, 0.6],
        "layers.1.w": [0.5, 0.6],
        "head.weight": [0.1, 0.6],
    }
    assert "coefficient 0.1 to 0.5, mean 0.2 of 4 tensors" in read(file).summary


def test_mappings_are_as_short_as_they_can_be():
    assert compact({"x": [1, 1], "y": [1.0, 1.0]}) == 1
    assert compact({"x": [1, 2], "y": [1, 2]}) == [1, 2]
    assert compact({"x": [1, 2], "y": [3, 3]}) == {"x": [1, 2], "y": 3}


def test_linear_is_a_sum_from_zero_in_which_the_base_is_one_of_all(p, read):
    parameters = {"weight": 0.9}
    recipe = read(config(p, "linear", parameters=parameters)).recipe
    assert list(recipe.sources.values()) == [p["a"], p["b"], p["base"]]
    assert recipe.origin == "zero"
    assert recipe.init.value == pytest.approx([0.3 / 1.8, 0.6 / 1.8, 0.9 / 1.8])
    assert recipe.operator == Linear()
    alone = read(config(p, "linear", base=None)).recipe
    assert alone.base is None
    assert alone.init.value == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("ties", Trim(0.5)),
        ("dare_ties", RandomDrop(0.5, rescale="l1")),
        ("breadcrumbs_ties", Breadcrumbs(0.5, gamma=0.01)),
        ("dare_linear", RandomDrop(0.5, rescale="l1")),
        ("breadcrumbs", Breadcrumbs(0.5, gamma=0.01)),
    ],
)
def test_methods_on_task_vectors_prune_and_elect(p, read, method, step):
    recipe = read(config(p, method, parameters={"density": 0.5, "lambda": 0.7})).recipe
    assert recipe.preprocess == [step]
    if method in ("dare_linear", "breadcrumbs"):
        assert recipe.operator == Linear("directions")
        assert recipe.init.value == pytest.approx([0.21, 0.42])
        return
    normalize = method == "ties"
    assert fields(recipe.operator) == (
        "DisjointMean",
        {"normalize": normalize, "elect": "sum", "scale": 0.7},
    )
    assert recipe.init.value == [0.3, 0.6]


def test_densities_and_rescaling_of_each_model_and_tensor(p, read):
    file = config(p, "della_linear", parameters={"epsilon": 0.1, "rescale": False})
    file["models"][1]["parameters"]["density"] = [{"filter": "head", "value": 0.4}]
    (step,) = read(file).recipe.preprocess
    name, values = fields(step)
    rest = dict.fromkeys(NAMES[:3], 1.0)
    assert name == "MagnitudeDrop"
    assert values["density"] == {**rest, "head.weight": [1.0, 0.4]}
    assert (values["epsilon"], values["rescale"]) == (0.1, "none")


def test_densities_of_one_prune_nothing(p, read):
    assert read(config(p, "dare_linear", parameters={"density": 1})).recipe.preprocess == []


@pytest.mark.parametrize(
    ("method", "models", "base", "parameters", "expected"),
    [
        (
            "slerp",
            ("base", "a"),
            "base",
            {"t": 0.3},
            ("Slerp", {"per": "tensor", "threshold": 0.9995}, "zero", [0.7, 0.3]),
        ),
        (
            "nuslerp",
            ("a", "b"),
            None,
            {"weight": 1.0},
            ("Slerp", {"per": "tensor", "threshold": 0.9999999}, "zero", 0.5),
        ),
        (
            "nuslerp",
            ("a", "b"),
            "base",
            {"weight": 1.0, "nuslerp_flatten": False},
            ("Slerp", {"per": "row", "threshold": 0.9999999}, "base", 0.5),
        ),
        (
            "nuslerp",
            ("a", "b"),
            None,
            {"weight": 1.0, "nuslerp_flatten": False, "nuslerp_row_wise": True},
            ("Slerp", {"per": "column", "threshold": 0.9999999}, "zero", 0.5),
        ),
        (
            "multislerp",
            ("a", "b", "c"),
            "base",
            {"weight": 0.4, "normalize_weights": False},
            ("MultiSlerp", {"normalize": False}, "base", 0.4),
        ),
        (
            "karcher",
            ("a", "b", "c"),
            "base",
            {"max_iter": 5},
            ("Karcher", {"max_iter": 5, "tol": 1e-5}, "zero", 0.25),
        ),
        (
            "model_stock",
            ("a", "b"),
            "base",
            {"filter_wise": True},
            ("ModelStock", {"per": "row"}, "base", 0.5),
        ),
        ("nearswap", ("a",), "base", {"t": 0.01}, ("NearSwap", {}, "base", 0.01)),
        ("arcee_fusion", ("a",), "base", {}, ("ArceeFusion", {}, "base", 1.0)),
    ],
)
def test_methods_with_an_operator_of_their_own(p, read, method, models, base, parameters, expected):
    recipe = read(config(p, method, *models, base=base, parameters=parameters, own=())).recipe
    name, values = fields(recipe.operator)
    wanted = expected[1]
    assert (name, {key: values[key] for key in wanted}) == expected[:2]
    assert recipe.origin == expected[2]
    assert recipe.init.value == pytest.approx(expected[3])


def test_sce_selects_weighs_and_sums(p, read):
    recipe = read(config(p, "sce", parameters={"select_topk": 0.2}, own=())).recipe
    steps = [fields(step) for step in recipe.preprocess]
    assert steps == [("SelectTop", {"density": 0.2}), ("ShareOfSquares", {})]
    assert recipe.init.value == 1.0
    whole = read(config(p, "sce", own=())).recipe
    assert [type(step).__name__ for step in whole.preprocess] == ["ShareOfSquares"]


def test_adapters_are_put_on_their_model(p, read, tmp_path):
    file = config(p, "task_arithmetic")
    file["models"][1]["model"] = f"{p['base']}+{tmp_path / 'adapter'}"
    with pytest.raises(ValueError, match="expected a folder"):
        read(file)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match=r"expected adapter_model\.safetensors"):
        read(file)
    from gradmerge.mergekit.document import ModelReference
    from gradmerge.mergekit.reader import source_of

    spec = source_of(ModelReference("org/base", "v1", ModelReference("org/adapter", "v2")))
    assert isinstance(spec, Lora)
    assert (spec.path, spec.revision, spec.base.path, spec.base.revision) == (
        "org/adapter",
        "v2",
        "org/base",
        "v1",
    )


@pytest.mark.parametrize(
    ("more", "models", "dtype", "form"),
    [
        ({}, ("a", "b"), None, "directions"),
        ({"dtype": "bfloat16"}, ("a", "b"), "bfloat16", "weights"),
        ({"dtype": "float32", "out_dtype": "float16"}, ("a",), "float16", "weights"),
        ({"out_dtype": "torch.float32"}, ("a",), "float32", "directions"),
        # what the models' dtypes promote to is what the reference stores, or is stated
        ({}, ("narrow",), None, "directions"),
        ({"base": "narrow"}, ("a",), "float32", "directions"),
        ({"base": "narrow", "dtype": "bfloat16"}, ("a",), "bfloat16", "weights"),
    ],
)
def test_the_result_s_dtype_is_mergekit_s(p, read, more, models, dtype, form):
    reading = read(config(p, "task_arithmetic", *models, **more))
    assert reading.dtype == dtype
    assert reading.recipe.operator == Linear(form)


REFUSED = [
    ("ties", {"density": 1.5}, "density: expected a share in \\[0, 1\\], got 1.5"),
    (
        "ties",
        {"density": 0.5, "lambda": [0.1, 0.9]},
        "lambda: expected one value for all tensors, got 0.1, 0.9: gradmerge runs ties with a",
    ),
    (
        "dare_linear",
        {"density": 0.5, "rescale": [{"filter": "head", "value": False}, {"value": True}]},
        "rescale: expected one value for all tensors",
    ),
    ("linear", {"weight": 0.0}, "linear cannot normalise weights that sum to zero"),
]


@pytest.mark.parametrize(("method", "parameters", "message"), REFUSED)
def test_values_that_cannot_be_followed_are_refused(p, read, method, parameters, message):
    file = config(p, method, parameters=parameters, own=("weight",))
    if method == "linear":
        file = config(p, method, parameters=parameters, own=(), base=None)
    with pytest.raises(ConfigError, match=message):
        read(file)


def test_multislerp_has_one_epsilon(p, read):
    with pytest.raises(ConfigError, match="eps: expected 1e-08, which is fixed"):
        read(config(p, "multislerp", parameters={"eps": 1e-4}))


def test_slices_have_all_models_where_the_formula_counts_them(p, read):
    def part(layers, *models):
        return {"sources": [{"model": p[m], "layer_range": layers} for m in models]}

    file = {
        "merge_method": "karcher",
        "slices": [part([0, 1], "a", "b"), part([1, 2], "a", "c")],
    }
    with pytest.raises(
        ConfigError, match=r"slices\[1\].sources: expected the same models in every"
    ):
        read(file)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ({"tokenizer_source": "union"}, ("union", None, "auto")),
        ({"tokenizer_source": "base", "chat_template": "{{ x }}"}, ("base", None, "{{ x }}")),
        ({"tokenizer": {"source": "B", "pad_to_multiple_of": 8}}, ("b", 8, "auto")),
        ({"tokenizer": {"source": "BASE"}}, ("base", None, "auto")),
    ],
)
def test_a_tokenizer_becomes_the_recipe_s(p, read, tokenizer, expected):
    file = config(p, "task_arithmetic", **tokenizer)
    if tokenizer.get("tokenizer", {}).get("source", "").isupper():
        file["tokenizer"] = {**file["tokenizer"], "source": p[file["tokenizer"]["source"].lower()]}
    vocabulary = read(file).recipe.tokenizer
    found = vocabulary.source, vocabulary.pad_to_multiple_of, vocabulary.chat_template
    assert found == expected


def test_a_tokenizer_of_another_model_is_refused(p, read):
    with pytest.raises(ConfigError, match="tokenizer: expected one of the models, got /elsewhere"):
        read(config(p, "task_arithmetic", tokenizer_source="/elsewhere"))


def test_models_that_store_several_dtypes_want_one_stated(p, read, tmp_path):
    narrow = {"embed.weight": torch.zeros(4, 3).bfloat16()}
    (tmp_path / "mixed").mkdir()
    rest = {name: torch.zeros(4, 3) for name in NAMES[1:]}
    save_file({**narrow, **rest}, tmp_path / "mixed" / "model.safetensors")
    other = {**p, "mixed": str(tmp_path / "mixed")}
    with pytest.raises(
        ConfigError, match=r"dtype: the models' dtypes promote to several \(bfloat16, "
    ):
        read(config(other, "task_arithmetic", "mixed", base="narrow"))


# ---- the command --------------------------------------------------------------------------------


def test_merge_tells_what_it_read(p, tmp_path, capsys):
    weight = [{"filter": "head", "value": 1.0}, {"value": 0.4}]
    file = config(p, "task_arithmetic", parameters={"weight": weight}, own=())
    path = tmp_path / "mk.yaml"
    path.write_text(yaml.safe_dump(file))
    assert main(["merge", f"--config={path}", "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "mergekit task_arithmetic: Linear, origin base" in told.out
    assert "merged 2 sources, 4 tensors" in told.out


def test_a_filter_that_matches_nothing_is_refused(p, tmp_path, capsys):
    weight = [{"filter": "mlp", "value": 1.0}, {"value": 0.4}]
    path = tmp_path / "mk.yaml"
    path.write_text(
        yaml.safe_dump(config(p, "task_arithmetic", parameters={"weight": weight}, own=()))
    )
    assert main(["merge", f"--config={path}", "--output", str(tmp_path / "out")]) == 2
    assert "weight: the filter 'mlp' matches no tensor." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_refuses_a_file_in_a_list_of_all_that_is_wrong(p, tmp_path, capsys):
    path = tmp_path / "mk.yaml"
    path.write_text(yaml.safe_dump({**config(p, "task_arithmetic"), "dtyp": 1, "tokeniser": 2}))
    assert main(["merge", "--config", str(path), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "dtyp: unknown key. Did you mean 'dtype'?" in told
    assert "tokeniser: unknown key. Did you mean 'tokenizer'?" in told
