"""Quantised checkpoints are refused by name, or read through the library that knows their codes."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from commands import fails
from gradmerge.cli import main
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.sources import Checkpoint, Dequantised, HuggingFace, Lora, TensorInfo, as_source
from gradmerge.sources.compatibility import check

FLOAT, HALF, INT8, BYTE = torch.float32, torch.float16, torch.int8, torch.uint8
INT16, INT32, UINT32, LONG = torch.int16, torch.int32, torch.uint32, torch.int64
FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu

# The tensors of one linear layer, as each library writes them; the family that they tell.
SCHEMES = {
    "gptq": ({"qweight": INT32, "qzeros": INT32, "scales": HALF, "g_idx": INT32}, "gptq or awq"),
    "awq": ({"qweight": INT32, "qzeros": INT32, "scales": HALF}, "gptq or awq"),
    "compressed-tensors": (
        {"weight_packed": INT32, "weight_scale": HALF, "weight_shape": LONG},
        "compressed-tensors",
    ),
    "compressed-tensors, fp8": ({"weight": FP8, "weight_scale": FLOAT}, "unknown"),
    "bitsandbytes, 4 bit": (
        {
            "weight": BYTE,
            "weight.absmax": BYTE,
            "weight.quant_map": FLOAT,
            "weight.quant_state.bitsandbytes__nf4": BYTE,
        },
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bit": ({"weight": INT8, "SCB": FLOAT, "weight_format": BYTE}, "bitsandbytes"),
    "fp8": ({"weight": FP8, "weight_scale_inv": FLOAT}, "unknown"),
    "mxfp8": ({"weight": FP8, "weight_scale_inv": BYTE}, "fp8"),
    "mxfp4": ({"gate_up_proj_blocks": BYTE, "gate_up_proj_scales": BYTE}, "mxfp4"),
    "nvfp4": ({"weight": BYTE, "weight_scale": FP8, "weight_scale_2": FLOAT}, "unknown"),
    "hqq": ({"W_q": BYTE, "scale": HALF, "zero": HALF}, "hqq"),
    "aqlm": ({"codes": INT16, "codebooks": HALF, "scales": HALF}, "aqlm"),
    "quanto": ({"weight._data": INT8, "weight._scale": FLOAT}, "quanto"),
    "torchao": ({"weight:qdata": INT8, "weight:scale": FLOAT}, "torchao"),
    "eetq": ({"weight": INT8, "weight_scales": HALF}, "unknown"),
    "vptq": ({"indices": INT16, "centroids.weight": HALF, "weight_scale": HALF}, "vptq"),
    "mlx": ({"weight": UINT32, "scales": HALF, "biases": HALF}, "unknown"),
    "bitnet": ({"weight": BYTE, "weight_scale": HALF}, "unknown"),
    "e8m0": ({"weight": INT8, "scale": E8M0}, "unknown"),
}


class Headers(Checkpoint):
    """A checkpoint of headers only: reading a weight is an error."""

    def __init__(self, name, tensors, config=None):
        known = {"embed.weight": FLOAT, **{f"layer.{key}": d for key, d in tensors.items()}}
        infos = {key: TensorInfo(key, (4, 4), dtype, name) for key, dtype in known.items()}
        super().__init__(name, infos, None, config)

    def read(self, name):
        raise AssertionError(f"{name} was read")


def problems(tensors, config=None, private=()):
    found = check({name: Headers(name, tensors, config) for name in "ab"}, private)
    return [(p.kind, p.where, p.got) for p in found if p.fatal]


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_found_in_every_source_whatever_the_config_says(name):
    tensors, family = SCHEMES[name]
    told = problems(tensors)
    assert [(kind, where) for kind, where, _ in told] == [("quantised", "a"), ("quantised", "b")]
    assert f"codes of {'an unknown' if family == 'unknown' else family}" in told[0][2]
    declared = problems(tensors, {"quantization_config": {"quant_method": "spqr"}})
    assert "codes of spqr" in declared[0][2]
    assert problems(tensors, private=[r"^layer\."]) == []


def test_codes_beside_weights_are_one_problem_not_one_per_tensor():
    dense = Headers("a", {"weight": FLOAT, "bias": FLOAT})
    found = check({"a": dense, "b": Headers("b", SCHEMES["gptq"][0])})
    assert [(p.kind, p.where, p.what) for p in found] == [
        ("quantised", "b", "layer.qweight, layer.qzeros, layer.g_idx")
    ]


@pytest.mark.parametrize(
    "tensors",
    [
        {"position_ids": LONG, "weight": HALF},
        {"position_ids": INT32, "weight": HALF},
        {"bias": BYTE, "masked_bias": HALF, "c_attn.weight": HALF},  # GPT-2's causal mask
        {"relative_position_index": LONG, "logit_scale": FLOAT},  # Swin v2
        {"num_batches_tracked": LONG, "weight": FLOAT, "running_mean": FLOAT},
        {"weight": HALF, "smooth_scale": HALF, "act_scale": FLOAT},  # SmoothQuant's parameters
        {"scales": FLOAT, "zeros": FLOAT, "weight": FLOAT, "codes": FLOAT, "indices": LONG},
        {"mask": torch.bool, "scale": FLOAT},
    ],
)
def test_integers_that_are_no_codes(tensors):
    assert problems(tensors) == []


def test_a_config_that_announces_codes_which_the_files_do_not_hold():
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    told = problems({"weight": HALF}, config)
    assert told[0] == (
        "config.quantization_config",
        "a/config.json",
        "none: its weights are stored unquantised",
    )
    assert problems({"weight": HALF}, {"quantization_config": "gptq"})[0][0] == told[0][0]
    sources = {name: Headers(name, {"weight": HALF}, config) for name in "ab"}
    allowed = check(sources, allow=["config.quantization_config"])
    assert [problem.fatal for problem in allowed] == [False, False]


def test_a_file_beside_the_config_names_the_method(tmp_path):
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    checkpoint = Headers("a", SCHEMES["gptq"][0])
    checkpoint._folder = tmp_path
    (problem,) = check({"a": checkpoint})
    assert problem.got == "codes of gptq (int32)"


# ---- on disk ------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def llama(folder, seed):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()
    model.save_pretrained(folder)
    return folder


def announce(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))


def as_fp8(folder, block=8):
    """Store DeepSeek's blocks of float8 with their scales; return what they stand for."""
    state, stored = load_file(folder / "model.safetensors"), {}
    for name, weight in state.items():
        if "proj" not in name:
            stored[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().reshape(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        stored[name] = codes.reshape(rows, columns)
        stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        state[name] = (codes.float() * scale).reshape(rows, columns).bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    announce(folder, {**settings, "activation_scheme": "dynamic"})
    return state


def test_every_command_refuses_codes_and_says_what_to_do(tmp_path, capsys):
    names = ["base", "a", "b"]
    base, *sources = [str(llama(tmp_path / name, i)) for i, name in enumerate(names)]
    for name in names:
        as_fp8(tmp_path / name)
    assert main(["inspect", *sources, "--base", base, "--statistics", "false"]) == 2
    told = capsys.readouterr().out
    assert "compatible: no" in told
    assert told.count("error [quantised]") == 3
    recipe = [
        "--recipe.base",
        base,
        "--recipe.sources",
        json.dumps(dict(zip("ab", sources, strict=True))),
    ]
    told = fails(["merge", *recipe, "--output", str(tmp_path / "out")], capsys)
    assert "got codes of fp8 (float8_e4m3fn)" in told
    assert f"class_path: Dequantised, init_args: {{path: {base}}}" in told
    assert not (tmp_path / "out").exists()


def test_fp8_is_merged_as_the_weights_that_it_stands_for(tmp_path):
    meant = {name: as_fp8(llama(tmp_path / name, i)) for i, name in enumerate("ab")}
    sources = {
        name: {
            "class_path": "Dequantised",
            "init_args": {"path": str(tmp_path / name)},
        }
        for name in meant
    }
    (tmp_path / "merge.yaml").write_text(
        json.dumps({"recipe": {"sources": sources, "init": {"class_path": "Uniform"}}})
    )
    output = tmp_path / "out"
    assert main(["merge", "--config", str(tmp_path / "merge.yaml"), "--output", str(output)]) == 0
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    merged = transformers.LlamaForCausalLM.from_pretrained(output, dtype="auto").state_dict()
    assert merged.keys() == meant["a"].keys()
    for name, tensor in merged.items():
        mean = (meant["a"][name].float() + meant["b"][name].float()) / 2
        # transformers rounds the products of codes and scales to bfloat16, too
        torch.testing.assert_close(tensor.float(), mean, rtol=2**-7, atol=2**-14)


def test_mxfp4_experts_are_read_as_their_values(tmp_path):
    config = transformers.GptOssConfig(
        **{**SIZES, "hidden_size": 32}, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention"],
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    stored = dict(state)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    meant = {}
    for name in [name for name in state if name.endswith("experts.gate_up_proj")]:
        experts, rows, columns = 2, *state[name].shape[1:][::-1]
        generator = torch.Generator().manual_seed(0)
        nibbles = torch.randint(0, 16, (experts, rows, columns // 32, 16, 2), generator=generator)
        exponents = torch.randint(120, 130, (experts, rows, columns // 32), generator=generator)
        stored[f"{name}_blocks"] = (nibbles[..., 0] + 16 * nibbles[..., 1]).to(torch.uint8)
        stored[f"{name}_scales"] = exponents.to(torch.uint8)
        scales = torch.exp2(exponents.float() - 127)[..., None, None]
        dense = (values[nibbles] * scales).reshape(experts, rows, columns)
        meant[name] = dense.mT.bfloat16()
        del stored[name]
    shutil.copytree(tmp_path / "dense", tmp_path / "codes")
    save_file(stored, tmp_path / "codes" / "model.safetensors", metadata={"format": "pt"})
    announce(tmp_path / "codes", {"quant_method": "mxfp4"})
    read = Dequantised(str(tmp_path / "codes")).open()
    assert set(read.infos) == set(state)
    assert meant
    for name in state:
        assert torch.equal(read.read(name), meant.get(name, state[name])), name


def test_dequantising_what_cannot_be_dequantised(tmp_path):
    folder = llama(tmp_path / "a", 0)
    with pytest.raises(ConfigError, match=r"Dequantised: expected a quantised checkpoint"):
        Dequantised(str(folder)).open()
    announce(folder, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"which transformers can dequantise, got .* of gptq"):
        Dequantised(str(folder)).open()
    announce(folder, {"quant_method": "compressed-tensors", "config_groups": {}})
    with pytest.raises(SourceError, match=r"cannot dequantise it \(compressed-tensors\)"):
        Dequantised(str(folder)).open()


def test_adapters_and_codes(tmp_path):
    folder = llama(tmp_path / "base", 0)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    as_fp8(folder)
    lora = Lora(str(tmp_path / "adapter"), HuggingFace(str(folder)))
    with pytest.raises(SourceError, match=r"got codes of fp8 .*\n.*added to weights\."):
        lora.open()
    dense = Dequantised(str(folder))
    assert Lora(str(tmp_path / "adapter"), dense).open().infos.keys() == dense.open().infos.keys()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SourceError, match=r"adapter: expected weights of at least 16 bits"):
        Lora(str(tmp_path / "adapter"), dense).open()


def test_files_of_llama_cpp(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ConfigError, match=r"got a GGUF file, which llama\.cpp writes"):
        as_source(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"got model\.gguf\. GGUF is llama\.cpp's format"):
        as_source(tmp_path).open()
