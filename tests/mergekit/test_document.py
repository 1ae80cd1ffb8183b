"""mergekit's rules: filters, gradients, precedence, places of tensors, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from gradmerge.common.errors import ConfigError
from gradmerge.mergekit import is_mergekit
from gradmerge.mergekit.document import ModelReference, Problems, read_document
from gradmerge.mergekit.table import check_filters, evaluate, tabulate

LAYERS = [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("attn", "mlp")]
NAMES = ["model.embed_tokens.weight", *LAYERS, "model.norm.weight", "lm_head.weight"]


def read(tmp_path, config):
    path = tmp_path / "mk.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return read_document(path)


def table_of(tmp_path, config, names=NAMES):
    problems = Problems()
    table = tabulate(read(tmp_path, config), names, problems)
    problems.stop("mk.yaml")
    return table


def task_vectors(**more):
    models = [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b"}]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": models, **more}


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "t", "value"),
    [
        (0.3, 0.7, 0.3),
        ("1e-3", 0.0, 1e-3),  # text in YAML 1.1
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 1.0, 0.5], 0.75, 0.75),
        ([0.0, "1e1"], 0.5, 5.0),
        ([0.2, 0.4, 0.9], 1.0, 0.9),
        ([0.2], 0.5, 0.2),
        ([], 0.5, None),
        ({"value": [0, 1]}, 0.5, 0.5),
        ([{"filter": "attn", "value": 1}, {"filter": "mlp", "value": 2}], 0.0, 2.0),
        ([{"filter": "mlp", "value": 1}, {"filter": "layers.3", "value": 2}], 0.0, 1.0),
        ([{"filter": "*", "value": 4}, {"filter": "mlp", "value": 2}], 0.0, 4.0),
        ([{"filter": None, "value": 4}, {"value": 2}], 0.0, 4.0),
        ([{"filter": "attn", "value": 1}], 0.0, None),
        ([{"filter": "layers.*", "value": 1}], 0.0, None),  # a part of the name, no pattern
        ([{"filter": "mlp", "value": []}, {"value": 2}], 0.0, None),  # the first match counts
    ],
)
def test_settings_are_values_gradients_and_filters(tmp_path, setting, t, value):
    document = read(tmp_path, task_vectors(parameters={"weight": setting}))
    cases = document.slices[0].shared[-1]["weight"]
    assert evaluate(cases, "model.layers.3.mlp.weight", t) == value


def test_truth_values_are_not_interpolated(tmp_path):
    parameters = {"normalize": ["yes", False, 1.0]}
    document = read(tmp_path, task_vectors(parameters=parameters))
    cases = document.slices[0].shared[-1]["normalize"]
    values = [evaluate(cases, "x", t) for t in (0.0, 0.49, 0.5, 0.99, 1.0)]
    assert values == [True, True, False, False, True]


def test_a_list_as_long_as_the_layers_is_a_value_a_layer(tmp_path):
    config = task_vectors(parameters={"weight": [0.1, 0.2, 0.3, 0.4, 0.5]})
    values = table_of(tmp_path, config).coefficients(Problems())
    second = {name: row[1] for name, row in values.items()}
    assert [second[f"model.layers.{i}.mlp.weight"] for i in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )
    # what lies outside of layers takes the first, also behind them
    assert {second[n] for n in NAMES if "layers" not in n} == {0.1}
    assert {row[0] for row in values.values()} == {0.3}


def test_the_only_layer_takes_the_last_of_a_list(tmp_path):
    names = ["embed.weight", "layers.0.mlp.weight", "norm.weight"]
    config = task_vectors(parameters={"weight": [0.1, 0.9]})
    values = table_of(tmp_path, config, names).coefficients(Problems())
    assert [row[1] for row in values.values()] == [0.1, 0.9, 0.1]


def test_each_stack_of_layers_has_its_own_depth(tmp_path):
    names = [f"encoder.block.{i}.x" for i in range(3)] + [f"decoder.block.{i}.x" for i in range(2)]
    config = task_vectors(parameters={"weight": [0.0, 1.0]})
    values = table_of(tmp_path, config, names).coefficients(Problems())
    assert [row[1] for row in values.values()] == [0.0, 0.5, 1.0, 0.0, 1.0]


def test_the_nearest_place_that_gives_a_value_counts(tmp_path):
    def value(name, own=None, of_slice=None, of_file=None):
        parts = {}
        for i, (first, last) in enumerate([(0, 2), (2, 5)]):
            source = {"model": "a", "layer_range": [first, last]}
            base = {"model": "base", "layer_range": [first, last]}
            if own is not None:
                source["parameters"] = {"weight": own}
            parts[i] = {"sources": [source, base]}
            if of_slice is not None:
                parts[i]["parameters"] = {"weight": of_slice}
        config = task_vectors(slices=list(parts.values()), parameters={"weight": of_file or 0.9})
        del config["models"]
        return table_of(tmp_path, config).rows[name]["weight"]

    name = "model.layers.3.mlp.weight"
    miss = [{"filter": "attn", "value": 0.1}]
    found = [
        value(name, 0.1, 0.2, 0.3),
        value(name, miss, 0.2, 0.3),
        value(name, miss, miss, 0.3),
        value(name, of_file=[0.0, 1.0]),  # the second of three layers of its slice
    ]
    assert found == [[0.1], [0.2], [0.3], [0.5]]


def test_what_comes_before_the_layers_is_of_the_first_slice_and_what_follows_of_the_last(tmp_path):
    def part(layers, weight):
        sources = [{"model": m, "layer_range": layers} for m in ("a", "base")]
        return {"sources": sources, "parameters": {"weight": weight}}

    config = task_vectors(slices=[part([0, 2], [0.1, 0.2]), part([2, 5], [0.6, 0.9])])
    del config["models"]
    names = [*NAMES, "transformer.wte.weight", "gpt_neox.embed_in.weight", "embed_out.weight"]
    values = table_of(tmp_path, config, names).coefficients(Problems())
    first = {name for name, row in values.items() if row == [0.1] and "layers" not in name}
    last = {name for name, row in values.items() if row == [0.6] and "layers" not in name}
    assert first == {
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
    }
    assert last == {"model.norm.weight", "lm_head.weight", "embed_out.weight"}


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"merge_method": "linear"}, [0.25, 0.75]),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, [0.2, 0.6]),
        ({"merge_method": "task_arithmetic", "base_model": "base"}, [0.2, 0.6]),
        (
            {
                "merge_method": "task_arithmetic",
                "base_model": "base",
                "parameters": {"normalize": True, "lambda": 2},
            },
            [0.5, 1.5],
        ),
        # lambda and division act after the election
        ({"merge_method": "ties", "base_model": "base", "parameters": {"lambda": 2}}, [0.2, 0.6]),
        ({"merge_method": "nuslerp"}, [0.25, 0.75]),
        ({"merge_method": "multislerp"}, [0.2, 0.6]),
    ],
)
def test_weights_become_coefficients(tmp_path, config, values):
    models = [
        {"model": "a", "parameters": {"weight": 0.2}},
        {"model": "b", "parameters": {"weight": 0.6}},
    ]
    found = table_of(tmp_path, {**config, "models": models}).coefficients(Problems())
    assert all(row == pytest.approx(values) for row in found.values())


def test_slerp_runs_from_the_base_wherever_it_is_listed(tmp_path):
    for models, row in ((["base", "a"], [0.7, 0.3]), (["a", "base"], [0.3, 0.7])):
        config = {"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.3}}
        config["models"] = [{"model": m} for m in models]
        table = table_of(tmp_path, config)
        assert [str(model) for model in table.document.sources] == models
        assert table.coefficients(Problems())["lm_head.weight"] == pytest.approx(row)


def test_filters_that_match_nothing_are_named(tmp_path):
    weight = [{"filter": "self_attn", "value": 1}, {"filter": "mlp", "value": 1}, {"value": 0}]
    problems = Problems()
    check_filters(read(tmp_path, task_vectors(parameters={"weight": weight})), NAMES, problems)
    hint = "Did you mean 'attn', as in model.layers.0.attn.weight?"
    assert problems == [f"weight: the filter 'self_attn' matches no tensor. {hint}"]


# ---- structure ----------------------------------------------------------------------------------


def test_models_are_paths_with_revision_and_adapter(tmp_path):
    config = task_vectors(
        base_model="org/base@v2",
        models=[
            {"model": "org/base@v2+/adapters/x@main"},
            {"model": {"model": {"path": "/odd+path", "revision": "r"}, "lora": "l"}},
            {"model": {"path": "/a@b"}},
        ],
    )
    models = read(tmp_path, config).models
    assert list(models) == [
        ModelReference("org/base", "v2", ModelReference("/adapters/x", "main")),
        ModelReference("/odd+path", "r", ModelReference("l")),
        ModelReference("/a@b"),
        ModelReference("org/base", "v2"),  # the base is added where it is not listed
    ]


def test_everything_wrong_is_reported_at_once(tmp_path):
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "dtyp": "float32",
        "out_dtype": "int8",
        "parameters": {"lambda": "much", "normalise": True, "gamma": 0.1},
        "models": [
            {"model": "a", "params": {}, "parameters": {"weights": 0.3, "normalize": True}},
            {"model": "a", "parameters": {"weight": [{"filtr": "mlp", "value": 1}]}},
            {"model": "a@b@c"},
            {"model": "d", "parameters": {"weight": [{"filter": "mlp"}, 0.3], "density": [[1]]}},
        ],
        "tokenizer": {"source": "union", "tokens": {"<s>": {"source": "a"}}},
        "chat_template": "chatml",
    }
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, config)
    message = str(caught.value)
    for part in [
        "mk.yaml: this mergekit file has 16 problems:",
        "dtyp: unknown key. Did you mean 'dtype'?",
        "chat_template: expected auto or the text of a template, got 'chatml'",
        "models[0].params: unknown key. Did you mean 'parameters'?",
        "models[0].parameters.weights: task_arithmetic has no such parameter. Did you mean",
        "models[0].parameters.normalize: applies to all models, and mergekit ignores it here",
        "models[1].parameters.weight[0].filtr: unknown key. Did you mean 'filter'?",
        "models[2].model: expected a path or a hub id, with at most one '@revision', got 'a@b@c'",
        "models[3].parameters.weight[0]: expected a filter with its value",
        "models[3].parameters.weight[1]: expected a filter with its value, got 0.3",
        "models[3].parameters.density: expected a number, got [1]",
        "models: a is listed twice",
        "tokenizer.tokens: is not supported: gradmerge initialises the rows of new tokens",
        "parameters.lambda: expected a number, got 'much'",
        "parameters.normalise: task_arithmetic has no such parameter. Did you mean 'normalize'?",
        "parameters.gamma: task_arithmetic has no such parameter. It belongs to breadcrumbs",
        "out_dtype: expected one of float16, bfloat16, float32, float64, got 'int8'",
    ]:
        assert part in message, (part, message)


def test_an_unknown_method_does_not_hide_unknown_keys(tmp_path):
    config = task_vectors(merge_method="tise", models=[{"model": "a", "params": {}}])
    with pytest.raises(ConfigError, match="has 2 problems") as caught:
        read(tmp_path, config)
    assert "models[0].params: unknown key. Did you mean 'parameters'?" in str(caught.value)
    parts = [{"sources": [{"model": "a", "range": [0, 1]}], "layer": 1}]
    with pytest.raises(ConfigError, match="has 4 problems") as caught:
        read(tmp_path, {"merge_method": "tise", "slices": parts})
    for place in ("slices[0].layer", "slices[0].sources[0].range"):
        assert f"{place}: unknown key." in str(caught.value)


def slices(*ranges, **more):
    return [
        {"sources": [{"model": "a", "layer_range": list(r)} for r in part], **more}
        for part in ranges
    ]


REFUSED = [
    ({"merge_method": "tise"}, r"unknown merge method 'tise'. Did you mean 'ties'\?"),
    ({"merge_method": "ram"}, "ram is not supported: gradmerge does not have it"),
    ({"merge_method": None}, "merge_method: expected a merge method, got none"),
    ({"models": None}, "expected one of models, slices and modules, got none"),
    ({"slices": slices([(0, 5)])}, "expected one of .*, got models and slices"),
    ({"base_model": None}, "base_model: expected the base that task_arithmetic needs, got none"),
    ({"models": [{"model": "base"}]}, "expected at least 1 model besides the base for .*, got 0"),
    (
        {"merge_method": "model_stock", "models": [{"model": "a"}]},
        "expected at least 2 models besides the base for model_stock, got 1",
    ),
    (
        {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]},
        "expected 1 model besides the base for slerp, got 2",
    ),
    (
        {"merge_method": "nuslerp", "models": [{"model": "a"}]},
        "expected 2 models besides the base for nuslerp, got 1",
    ),
    ({"parameters": {"lambda": None}}, "parameters.lambda: expected a number, got None"),
    ({"parameters": {"normalize": 0.5}}, "normalize: expected true or false, got 0.5"),
    ({"parameters": {"lambda": float("inf")}}, "lambda: expected a number, got inf"),
    ({"parameters": [1]}, "parameters: expected a mapping, got a list"),
    (
        {"parameters": {"lambda": [{"filter": 3, "value": 1}]}},
        r"lambda\[0\].filter: expected text, got 3",
    ),
    (
        {"parameters": {"lambda": {"value": [[1]]}}},
        r"lambda\[0\].value: expected a number, got \[1\]",
    ),
    (
        {"parameters": {"lambda": [{"filter": "x", "value": {"value": 1}}]}},
        r"lambda\[0\].value: expected a number, got {'value': 1}",
    ),
    ({"models": ["a"]}, r"models\[0\]: expected a mapping, got a str"),
    ({"models": {"a": 1}}, "models: expected a list, got a dict"),
    ({"models": [{"model": "a+b+c"}]}, r"expected one adapter after '\+', got 2"),
    (
        {"models": [{"model": {"model": "a", "override_architecture": "X"}}]},
        "override_architecture: is not supported",
    ),
    ({"tokenizer_source": "base", "base_model": None}, "expected a base_model for 'base'"),
    (
        {"tokenizer_source": "base", "tokenizer": {"source": "base"}},
        "tokenizer_source: expected either tokenizer_source or tokenizer, got both",
    ),
    (
        {"tokenizer": {"pad_to_multiple_of": 0.5}},
        "pad_to_multiple_of: expected a positive whole number, got 0.5",
    ),
    ({"chat_template": "auto"}, "chat_template: expected a tokenizer_source with it, got none"),
    ({"experts": [], "gate_mode": "hidden"}, "gate_mode: is not supported: this is a file for"),
    (
        {"models": None, "modules": {"encoder": {}, "decoder": {}}},
        "expected the single module 'default', got encoder, decoder",
    ),
    (
        {"models": None, "modules": {"default": {}}},
        "modules.default: expected one of models and slices, got none",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {**task_vectors(), **change})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (slices([(0, 3)], [(2, 5)]), r"expected layers from 3 on, got \[2, 5\]: omitted, repeated"),
        (slices([(1, 5)]), r"expected layers from 0 on, got \[1, 5\]"),
        (slices([(0, 2)], [(0, 2)]), r"expected layers from 2 on, got \[0, 2\]"),
        (slices([(0, 2), (2, 4)]), r"slices\[0\].sources: expected one layer_range for .*, got 2"),
        (slices([(0, 4)]), "slices: expected all 5 layers, got 4: another depth is another"),
        (slices([(0, 6)]), "slices: expected all 5 layers, got 6"),
        (slices([(0, 5)], residual_weight=0.1), "residual_weight: is not supported"),
        (slices([(0, 5, 7)]), r"expected \[first, last \+ 1\], got \[0, 5, 7\]"),
        (slices([(5, 0)]), r"expected \[first, last \+ 1\], got \[5, 0\]"),
        ([{"sources": []}], r"slices\[0\].sources: expected a list"),
    ],
)
def test_slices_that_change_the_network_are_refused(tmp_path, parts, message):
    config = {"merge_method": "passthrough", "slices": parts}
    with pytest.raises(ConfigError, match=message):
        table_of(tmp_path, config)


def test_slices_of_several_stacks_are_refused(tmp_path):
    config = {"merge_method": "passthrough", "slices": slices([(0, 1)])}
    names = ["encoder.block.0.x", "decoder.block.0.x"]
    with pytest.raises(ConfigError, match=r"expected one stack of layers, got decoder\.block\., "):
        table_of(tmp_path, config, names)


def test_a_missing_weight_names_the_model_and_the_tensors(tmp_path):
    weight = [{"filter": "mlp", "value": 1}]
    config = task_vectors(models=[{"model": "a", "parameters": {"weight": weight}}, {"model": "b"}])
    with pytest.raises(ConfigError) as caught:
        table_of(tmp_path, config)
    message = str(caught.value)
    assert "has 2 problems" in message
    assert (
        "weight: required by task_arithmetic, missing for a (model.embed_tokens.weight, " in message
    )
    assert message.endswith("weight: required by task_arithmetic, missing for b")


def test_weights_that_sum_to_zero_are_not_normalised_silently(tmp_path):
    config = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": -0.5}},
        ],
    }
    problems = Problems()
    table_of(tmp_path, config).coefficients(problems)
    assert problems == ["merge_method: linear cannot normalise weights that sum to zero"]
    config["models"][1]["parameters"]["weight"] = [{"filter": "head", "value": -0.5}, {"value": 1}]
    table_of(tmp_path, config).coefficients(problems)
    assert problems[1].endswith("weights that sum to zero (lm_head.weight)")


@pytest.mark.parametrize("text", ["[1", "- 1", "3"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "mk.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"expected (a mergekit )?YAML"):
        read_document(tmp_path / "mk.yaml")


def test_mergekit_files_are_told_from_ours():
    assert is_mergekit({"merge_method": "linear", "models": []})
    assert is_mergekit({"slices": []})
    assert is_mergekit({"experts": []})
    assert not is_mergekit({"recipe": {}, "dtype": "float32"})
    assert not is_mergekit({"model": {"recipe": {}}})
    assert not is_mergekit(None)
