"""mergekit's own files: read here they give its weights, and written here it gives ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from gradmerge.cli import main
from tiny import relatives, save_family, write_yaml

pytest.importorskip("mergekit", reason="mergekit, the oracle, is not installed")

pytestmark = pytest.mark.usefixtures("own_folder")

# a vocabulary whose embedding spans several chunks of the kernels
LLAMA = {
    "vocab_size": 4200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUNDING = 3e-7  # of a tensor's largest entry: two roundings of float32


def qwen2() -> torch.nn.Module:
    """Tied, with biases."""
    config = {**LLAMA, "vocab_size": 32, "tie_word_embeddings": True}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))


def gated_t5() -> torch.nn.Module:
    """Two stacks, of different depth."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32,
            d_model=16,
            d_ff=24,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=2,
            d_kv=8,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


OWN = {"qwen2": qwen2, "t5": gated_t5}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, str]:
    torch.manual_seed(0)
    first = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    )
    root = tmp_path_factory.mktemp("llamas")
    return save_family(root, relatives(first, 4, 0.02), tokenizer=False)


def by_mergekit(config: dict[str, Any] | Path, output: Path) -> dict[str, torch.Tensor]:
    """What mergekit makes of a configuration."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache.loaders.clear()  # else a path that is used again serves the weights of before
    if isinstance(config, Path):
        config = yaml.safe_load(config.read_text())
    options = MergeOptions(
        quiet=True,
        copy_tokenizer=False,
        write_model_card=False,
        random_seed=0,
        lora_merge_cache=str(output.parent / "adapters"),
    )
    run_merge(MergeConfiguration.model_validate(config), str(output), options)
    return load_file(output / "model.safetensors")


def by_gradmerge(folder: Path, *arguments: str) -> dict[str, torch.Tensor]:
    assert main(["merge", *arguments, "--output", str(folder)]) == 0
    return load_file(folder / "model.safetensors")


def both(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """mergekit's weights and ours, of one configuration."""
    path = write_yaml(folder / "mk.yaml", config)
    theirs = by_mergekit(copy.deepcopy(config), folder / "theirs")
    ours = by_gradmerge(folder / "ours", "--config", path)
    assert ours.keys() == theirs.keys()
    return ours, theirs


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, in parts of a tensor's largest entry."""
    return max(
        float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1e-30))
        for n in theirs
    )


def different(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that are not equal bit for bit."""
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def weight(path: str, weight: Any = None, **parameters: Any) -> dict[str, Any]:
    """A model with parameters."""
    own = {**({} if weight is None else {"weight": weight}), **parameters}
    return {"model": path, **({"parameters": own} if own else {})}


FILTERS = [
    {"filter": "self_attn", "value": [0.0, 1.0]},
    {"filter": "mlp.down_proj", "value": "1e-1"},
    {"filter": "mlp", "value": [0.1, 0.5, 0.2]},
    {"filter": "lm_head", "value": 0.9},
    {"value": 0.4},
]


def linear_gradients(p):
    return {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "models": [weight(p["a"], [0.1, 0.9]), weight(p["b"], [0.5, 0.2, 0.7, 0.1])],
    }


def linear_filters_with_the_base_listed(p):
    return {
        "merge_method": "linear",
        "base_model": p["base"],
        "parameters": {"normalize": False, "weight": FILTERS},
        "models": [weight(p["base"], 0.3), weight(p["a"]), weight(p["b"], 0.2)],
    }


def linear_with_the_base_not_listed(p):
    return {
        "merge_method": "linear",
        "base_model": p["base"],
        "parameters": {"normalize": False, "weight": 0.4},
        "models": [weight(p["a"]), weight(p["b"], 0.2)],
    }


def a_filter_that_matches_nothing_falls_through(p):
    return {
        "merge_method": "task_arithmetic",
        "base_model": p["base"],
        "parameters": {"weight": [{"filter": "*", "value": [0.1, 0.7]}]},
        "models": [
            weight(p["a"], [{"filter": "mlp", "value": 0.8}]),
            weight(p["b"], {"filter": "norm", "value": [0.3, 0.5]}),
            weight(p["base"], 12.0),
        ],
    }


def three_task_vectors(p):
    return {
        "merge_method": "task_arithmetic",
        "base_model": p["base"],
        "dtype": "float32",
        "models": [weight(p["a"], FILTERS), weight(p["b"], -0.25), weight(p["c"], [0, 0.5, 1])],
    }


def slices_with_their_own_parameters(p):
    def part(first, last, a, b, **more):
        layers = [first, last]
        return {
            "sources": [
                {"model": p["base"], "layer_range": layers},
                {"model": p["a"], "layer_range": layers, "parameters": {"weight": a}},
                {"model": p["b"], "layer_range": layers, **b},
            ],
            **more,
        }

    return {
        "merge_method": "task_arithmetic",
        "base_model": p["base"],
        "parameters": {"weight": 0.6},
        "slices": [
            part(0, 1, [0.2, 0.7], {}, parameters={"weight": [0.3, 0.8]}),
            part(1, 4, [0.1, 0.9], {"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}),
        ],
    }


def layers_of_different_models(p):
    return {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": p["a"], "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": p["b"],
                        "layer_range": [2, 4],
                        "parameters": {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1}]},
                    }
                ]
            },
        ],
    }


def one_module(p):
    return {
        "merge_method": "linear",
        "parameters": {"normalize": False, "weight": 0.2},
        "modules": {
            "default": {
                "parameters": {"weight": [{"filter": "mlp", "value": [0.3, 0.4]}]},
                "models": [weight(p["a"], [{"filter": "q_proj", "value": 1}]), weight(p["b"])],
            }
        },
    }


def dare_that_drops_nothing(p):
    return {
        "merge_method": "dare_linear",
        "base_model": p["base"],
        "models": [weight(p["a"], [0.2, 0.9], density=1.0), weight(p["b"], 0.5)],
    }


def breadcrumbs(p):
    return {
        "merge_method": "breadcrumbs",
        "base_model": p["base"],
        "parameters": {"int8_mask": True},
        "models": [
            weight(p["a"], [0.2, 0.9], density=[0.5, 0.9], gamma=0.05),
            weight(p["b"], 0.5, density=[{"filter": "mlp", "value": 1.0}, {"value": 0.7}]),
        ],
    }


@pytest.mark.parametrize(
    "make",
    [
        linear_gradients,
        linear_filters_with_the_base_listed,
        linear_with_the_base_not_listed,
        a_filter_that_matches_nothing_falls_through,
        three_task_vectors,
        slices_with_their_own_parameters,
        layers_of_different_models,
        one_module,
        dare_that_drops_nothing,
        breadcrumbs,
    ],
)
def test_a_mergekit_file_gives_the_weights_of_mergekit_bit_for_bit(llamas, tmp_path, make):
    assert different(*both(make(llamas), tmp_path)) == []


def test_sums_that_are_divided_or_scaled_agree_to_a_rounding(llamas, tmp_path):
    p = llamas
    models = [weight(p["a"], FILTERS), weight(p["b"], [0.7, 0.1]), weight(p["c"], 0.2)]
    configs = [
        {"merge_method": "linear", "models": models},
        {
            "merge_method": "task_arithmetic",
            "base_model": p["base"],
            "parameters": {"normalize": True, "lambda": [0.7, 1.1]},
            "models": models,
        },
        {
            "merge_method": "breadcrumbs",
            "base_model": p["base"],
            "parameters": {"rescale": True, "density": 0.8},
            "models": models,
        },
    ]
    for i, config in enumerate(configs):
        (tmp_path / str(i)).mkdir()
        ours, theirs = both(config, tmp_path / str(i))
        assert 0 < distance(ours, theirs) < ROUNDING, config["merge_method"]


def on_vectors(**own: Any) -> dict[str, Any]:
    """Parameters of three models: lists hold one per model."""
    return {key: value if isinstance(value, list) else [value] * 3 for key, value in own.items()}


PRUNED = on_vectors(weight=[[0.3, 0.8], 0.5, 0.2], density=[0.4, [0.2, 0.7], 0.6])
WHOLE = on_vectors(weight=[[0.3, 0.8], 0.5, 0.2])
SLICE = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}]
BY_ROW = {"nuslerp_flatten": False}
# Of each method: the models, their parameters, those of the merge, whether the base is given, and
# whether the bits have to be the same.
OTHERS = [
    ("ties", "abc", PRUNED, {}, True, True),
    ("ties", "abc", PRUNED, {"lambda": 0.7, "normalize": False}, True, False),
    ("breadcrumbs_ties", "abc", PRUNED, {}, True, True),
    ("breadcrumbs_ties", "abc", PRUNED, {"rescale": True}, True, False),
    ("dare_ties", "abc", WHOLE, {}, True, True),
    ("della", "abc", WHOLE, {}, True, True),
    ("della_linear", "abc", WHOLE, {}, True, True),
    ("sce", "abc", {}, {"select_topk": 0.3}, True, False),
    ("sce", "abc", {}, {}, True, False),
    ("slerp", ["base", "a"], {}, {"t": SLICE}, True, False),
    ("slerp", ["a", "base"], {}, {"t": 0.3}, True, False),
    ("nuslerp", "ab", WHOLE, {}, True, False),
    ("nuslerp", "ab", WHOLE, {}, False, False),
    ("nuslerp", "ab", WHOLE, BY_ROW, True, False),
    ("nuslerp", "ab", WHOLE, {**BY_ROW, "nuslerp_row_wise": True}, True, False),
    ("multislerp", "abc", WHOLE, {}, True, False),
    ("multislerp", "abc", WHOLE, {}, False, False),
    ("karcher", "abc", {}, {}, True, False),
    ("karcher", "abc", {}, {"max_iter": 20}, False, False),
    ("model_stock", "abc", {}, {}, True, False),
    ("model_stock", "abc", {}, {"filter_wise": True}, True, False),
    ("nearswap", "a", {}, {"t": 0.003}, True, False),
    ("arcee_fusion", "a", {}, {}, True, True),
]


@pytest.mark.parametrize(
    ("method", "models", "own", "shared", "with_base", "exact"),
    OTHERS,
    ids=[f"{i}-{row[0]}" for i, row in enumerate(OTHERS)],
)
def test_every_method_s_file_gives_its_weights(
    llamas, tmp_path, method, models, own, shared, with_base, exact
):
    entries = [
        weight(llamas[name], **{key: values[i] for key, values in own.items()})
        for i, name in enumerate(models)
    ]
    config = {"merge_method": method, "models": entries, "parameters": shared}
    if with_base:
        config["base_model"] = llamas["base"]
    ours, theirs = both(config, tmp_path)
    if exact:
        assert different(ours, theirs) == []
    # mergekit's norms are sums in float32 over a whole tensor, ours in float64
    assert distance(ours, theirs) < 2e-6


def test_weights_that_cancel_out_are_not_normalised(llamas, tmp_path):
    config = {
        "merge_method": "task_arithmetic",
        "base_model": llamas["base"],
        "parameters": {"normalize": True},
        "models": [weight(llamas["a"], 0.5), weight(llamas["b"], -0.5)],
    }
    assert different(*both(config, tmp_path)) == []


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "bert", "t5"])
def test_architectures_with_ties_biases_and_several_stacks(tmp_path, name):
    torch.manual_seed(0)
    first = OWN[name]() if name in OWN else ARCHITECTURES[name][0]()
    p = save_family(tmp_path, relatives(first, 3, 0.02), tokenizer=False)
    # a filter must match something: Llama and T5 have no biases, GPT-2 says wte
    bias = "norm" if name in ("llama-tied", "t5") else "bias"
    embedding = {"gpt2": "wte", "t5": "shared"}.get(name, "embed")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": p["base"],
        "models": [
            weight(p["a"], [{"filter": bias, "value": 0.3}, {"value": [0.1, 0.9]}]),
            weight(p["b"], [{"filter": embedding, "value": 0.8}, {"value": [0.5, 0.2]}]),
        ],
    }
    assert different(*both(config, tmp_path)) == []


def test_dtypes_of_the_file_and_of_the_command(llamas, tmp_path):
    config = {
        "merge_method": "linear",
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "parameters": {"normalize": False},
        "models": [weight(llamas["a"], 0.3), weight(llamas["b"], 0.6)],
    }
    ours, theirs = both(config, tmp_path)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert different(ours, theirs) == []
    path = str(tmp_path / "mk.yaml")
    wide = by_gradmerge(tmp_path / "wide", "--dtype", "float32", "--config", path)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_adapters_on_a_model(llamas, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(llamas["base"])
    torch.manual_seed(1)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": llamas["base"],
        "models": [
            weight(f"{llamas['base']}+{tmp_path / 'adapter'}", [0.2, 0.9]),
            weight(llamas["a"], 0.5),
        ],
    }
    ours, theirs = both(config, tmp_path)
    assert distance(ours, theirs) < ROUNDING
    changed = different(ours, load_file(Path(llamas["base"]) / "model.safetensors"))
    assert len(changed) == len(ours)


@pytest.mark.parametrize(
    ("method", "tokenizer", "source"),
    [
        ("task_arithmetic", {"tokenizer_source": "union"}, "union"),
        ("task_arithmetic", {"tokenizer": {"pad_to_multiple_of": 16}}, "union"),
        ("task_arithmetic", {"tokenizer_source": "base"}, "base"),
        (
            "linear",
            {"tokenizer": {"source": "b"}, "chat_template": "{{ messages[0].content }}"},
            "b",
        ),
    ],
)
def test_files_that_merge_vocabularies(tmp_path, method, tokenizer, source):
    wordings = pytest.importorskip("wordings", reason="no models with tokenizers that differ")
    p = wordings.bpe_family(tmp_path, padding=3)
    config = {
        "merge_method": method,
        "models": [weight(p["a"], 0.3), weight(p["b"], 0.7)],
        "dtype": "float32",
        **tokenizer,
    }
    if source == "b":
        config["tokenizer"] = {"source": p["b"]}
    if method == "task_arithmetic":
        config["base_model"] = p["base"]
    ours, theirs = both(config, tmp_path)
    for name in ours.keys() & theirs.keys():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            # ids of tokens that the base lacks are in another order
            first, second = (
                wordings.rows_by_token(tmp_path / made, name) for made in ("theirs", "ours")
            )
            assert ours[name].shape == theirs[name].shape
            assert first.keys() == second.keys()
            assert distance(second, first) < 1e-6
        else:
            assert distance({name: ours[name]}, {name: theirs[name]}) < ROUNDING
    if "chat_template" in tokenizer:
        template = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template
        assert template == "{{ messages[0].content }}"


# ---- and back -----------------------------------------------------------------------------------

LEARNED = {
    "weights": {},
    "directions": {"operator": {"class_path": "Linear", "init_args": {"form": "directions"}}},
    "zero": {"origin": "zero"},
    "mean": {"origin": "mean"},
    "model": {"coefficients": "Model"},
    "group": {"coefficients": {"class_path": "Group", "init_args": {"patterns": [r"\.\d+\."]}}},
}


@pytest.mark.parametrize(
    ("form", "kernels"),
    [*((form, "auto") for form in LEARNED), ("weights", "torch"), ("mean", "torch")],
)
def test_a_table_written_for_mergekit_gives_the_exported_weights_bit_for_bit(
    llamas, tmp_path, monkeypatch, form, kernels
):
    monkeypatch.setenv("GRADMERGE_KERNELS", kernels)
    recipe = {
        "sources": {name: llamas[name] for name in "abc"},
        "base": llamas["base"],
        "init": {"class_path": "Mixup", "init_args": {"per": "tensor", "scale": 0.7}},
        "frozen": {r"layers\.1.*norm": 0.1},
        **LEARNED[form],
    }
    config = write_yaml(tmp_path / "recipe.yaml", {"recipe": recipe})
    ours = by_gradmerge(tmp_path / "ours", "--config", config)
    output = tmp_path / "mk.yaml"
    arguments = ["merge", "--config", config, "--mergekit", "true", "--output", str(output)]
    assert main(arguments) == 0
    theirs = by_mergekit(output, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert different(ours, theirs) == []
    assert different(ours, load_file(Path(llamas["a"]) / "model.safetensors"))
    again = by_gradmerge(tmp_path / "again", "--config", str(output))
    assert different(again, theirs) == []


def test_a_table_over_bfloat16_gives_the_exported_bits(llamas, tmp_path):
    paths = {}
    for name, folder in llamas.items():
        narrow = tmp_path / name
        narrow.mkdir()
        tensors = load_file(Path(folder) / "model.safetensors")
        save_file({k: v.bfloat16() for k, v in tensors.items()}, narrow / "model.safetensors")
        text = (Path(folder) / "config.json").read_text().replace("float32", "bfloat16")
        (narrow / "config.json").write_text(text)
        paths[name] = str(narrow)
    recipe = {
        "sources": {name: paths[name] for name in "abc"},
        "base": paths["base"],
        "init": {"class_path": "Mixup", "init_args": {"per": "tensor"}},
    }
    config = write_yaml(tmp_path / "recipe.yaml", {"recipe": recipe})
    ours = by_gradmerge(tmp_path / "ours", "--config", config)
    output = str(tmp_path / "mk.yaml")
    assert main(["merge", "--config", config, "--mergekit", "true", "--output", output]) == 0
    theirs = by_mergekit(Path(output), tmp_path / "theirs")
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    assert different(ours, theirs) == []


def test_a_learned_table_runs_in_mergekit_and_starts_another_fit(world, tmp_path, capsys):
    fitted = write_yaml(
        tmp_path / "fit.yaml",
        world,
        {
            "model": {"recipe": {"coefficients": "Tensor"}, "learning_rate": 0.05},
            "trainer": {"default_root_dir": str(tmp_path), "max_steps": 3},
        },
    )
    assert main(["fit", "--config", fitted]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    output = tmp_path / "learned.yaml"
    assert main(["export", str(checkpoint), str(output), "--mergekit", "true"]) == 0
    assert f"mergekit file written to {output}" in capsys.readouterr().out
    assert main(["export", str(checkpoint), str(tmp_path / "folder")]) == 0
    ours = load_file(tmp_path / "folder" / "model.safetensors")
    theirs = by_mergekit(output, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert different(ours, theirs) == []
    learned = load_file(tmp_path / "folder" / "coefficients.st")
    assert len({tuple(row.tolist()) for row in learned.values()}) > 10  # a table, not one row
    recipe = {
        **world["model"]["recipe"],
        "init": {"class_path": "FromMergekit", "init_args": {"path": str(output)}},
    }
    config = write_yaml(tmp_path / "again.yaml", {"recipe": recipe})
    again = by_gradmerge(tmp_path / "again", "--config", config)
    start = load_file(tmp_path / "again" / "coefficients.st")
    assert different(start, learned) == []
    assert different(again, ours) == []
