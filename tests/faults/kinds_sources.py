"""Faults of checkpoints: weights, indexes, configs, tokenizers and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import (
    DROP,
    HANG,
    Damage,
    Hostile,
    both,
    checkpoint,
    cut,
    damaged_json,
    entry,
    fields,
    folder,
    link,
    pipe,
    raw_tensors,
    remove,
    tensors,
    text,
    write,
)
from fault_runner import LOG, Kind

MERGE = "merge --config merge.yaml --output out"
FIT = "fit --config fit.yaml"
INSPECT = "inspect a b --base base"
CLASSES = "merge --config classes.yaml --output out"
ALL = [f"{name}/config.json" for name in ("base", "a", "b")]
FILE = "a/model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
NAN = float("nan")


def loads(work: Path) -> bool:
    """The output opens in transformers with nothing missing, and is finite."""
    import transformers

    _, found = transformers.AutoModelForCausalLM.from_pretrained(
        work / "out", output_loading_info=True
    )
    return not any(found.values())


def noted(text: str) -> Callable[[Path], bool]:
    """The command has said so."""
    return lambda work: text in (work.parent / LOG).read_text()


def averages(work: Path) -> bool:
    """The output is the average of the sources as transformers loads them."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    first, second, found = (load(work / name).state_dict() for name in ("a", "b", "out"))
    return all(torch.allclose(found[n], (first[n] + second[n]) / 2, atol=1e-6) for n in found)


# ---- config.json --------------------------------------------------------------------------------

_SIZES: dict[str, list[Any]] = {
    "vocab_size": [99, 0, -1, "x"],
    "hidden_size": [24, 0, "sixteen"],
    "intermediate_size": [99, -1],
    "num_hidden_layers": [4, 1, 0, "two", 10**9],
    "num_attention_heads": [0, 3, "four"],
    "num_key_value_heads": [3, 4, 0],
    "head_dim": [7],
    "hidden_act": ["nope", 5],
    "architectures": [["pipeline"], [5], "LlamaForCausalLM", ["BertForMaskedLM"], {}],
    "model_type": ["nope", 5, "bert"],
    "rms_norm_eps": ["x"],
    "rope_parameters": [[], {"rope_type": "nope"}],
    "attention_bias": [True],
    "mlp_bias": [True],
    "pad_token_id": ["x"],
}


def _of_all() -> list[Kind]:
    """Return configs that are wrong in all sources alike."""
    kinds = []
    for key, values in _SIZES.items():
        for value in values:
            change = fields(ALL, **{key: value})
            name = f"config/all-{key}-{json.dumps(value)}"
            about = f"{key}|config"
            # a newer transformers may know it
            unknown = (key, value) == ("model_type", "nope")
            right = noted("not opened with transformers") if unknown else None
            kinds.append(Kind(f"{name}-merge", MERGE, change, about, right))
            kinds.append(Kind(f"{name}-fit", FIT, change, about))
    return kinds


_DIFFER: dict[str, Any] = {
    "hidden_act": "gelu",
    "rms_norm_eps": 0.1,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    "tie_word_embeddings": True,
    "num_hidden_layers": 3,
    "vocab_size": 33,
    "model_type": "mistral",
    "hidden_size": 17,
}
_SAME: dict[str, Any] = {
    "use_cache": False,
    "attention_dropout": 0.3,
    "initializer_range": 1.0,
    "transformers_version": "4.0.0",
    "torch_dtype": "float32",
    "dtype": DROP,
    "pretraining_tp": DROP,
    "_name_or_path": "elsewhere",
}


def _of_one() -> list[Kind]:
    kinds = [
        Kind(
            f"config/one-{key}",
            MERGE,
            fields("a/config.json", **{key: value}),
            "config|tensor",
            noted("as transformers loads them") if key == "tie_word_embeddings" else None,
        )
        for key, value in _DIFFER.items()
    ]
    kinds += [
        Kind(
            f"config/harmless-{key}",
            MERGE,
            fields("a/config.json", **{key: value}),
            right=averages,
        )
        for key, value in _SAME.items()
    ]
    kinds += [
        Kind(f"config/file-{name}-{where}", MERGE, damage, r"config\.json")
        for where in ("a", "base")
        for name, damage in damaged_json(f"{where}/config.json").items()
    ]
    kinds += [
        Kind(f"config/inspect-{name}", INSPECT, damage, r"config\.json")
        for name, damage in damaged_json("a/config.json").items()
    ]
    kinds.append(Kind("config/missing", FIT, remove("base/config.json"), right=_trained))
    return kinds


def _trained(work: Path) -> bool:
    return True


# ---- weights ------------------------------------------------------------------------------------


def _renamed(state: dict[str, Any]) -> None:
    state["model.layers.0.mlp.upp_proj.weight"] = state.pop(UP)


def _quantised() -> dict[str, Damage]:
    import torch

    def parts(**shapes: Any) -> Damage:
        def change(state: dict[str, Any]) -> None:
            state.pop(UP)
            prefix = UP.removesuffix(".weight")
            for name, (shape, dtype) in shapes.items():
                state[f"{prefix}.{name.replace('__', '.')}"] = torch.zeros(shape).to(dtype)

        return both(*(tensors(f"{n}/model.safetensors", change) for n in ("base", "a", "b")))

    def declared(method: str, damage: Damage, **more: Any) -> Damage:
        return both(damage, fields(ALL, quantization_config={"quant_method": method, **more}))

    i32, u8, i8, f16 = torch.int32, torch.uint8, torch.int8, torch.float16
    gptq = parts(
        qweight=((2, 24), i32), qzeros=((1, 3), i32), scales=((1, 24), f16), g_idx=((16,), i32)
    )
    return {
        "gptq": declared("gptq", gptq, bits=4, group_size=128),
        "gptq-undeclared": gptq,
        "awq": declared(
            "awq",
            parts(qweight=((16, 3), i32), qzeros=((1, 3), i32), scales=((1, 24), f16)),
            bits=4,
        ),
        "bitsandbytes-8": declared(
            "bitsandbytes", parts(weight=((24, 16), i8), SCB=((24,), f16)), load_in_8bit=True
        ),
        "bitsandbytes-4": declared(
            "bitsandbytes",
            parts(weight=((192, 1), u8), weight__absmax=((6,), u8), weight__quant_map=((16,), f16)),
            load_in_4bit=True,
        ),
        "compressed-tensors": declared(
            "compressed-tensors",
            parts(weight_packed=((24, 2), i32), weight_scale=((24, 1), f16)),
        ),
        "fp8": declared(
            "fp8",
            parts(weight=((24, 16), torch.float8_e4m3fn), weight_scale_inv=((1, 1), torch.float32)),
        ),
        "mxfp4": declared("mxfp4", parts(blocks=((24, 1, 8), u8), scales=((24, 1), u8))),
        "hqq": parts(W_q=((24, 8), u8), scale=((24, 1), f16), zero=((24, 1), f16)),
        "declared-only": fields(ALL, quantization_config={"quant_method": "gptq", "bits": 4}),
    }


def _headers() -> dict[str, Damage]:
    def one(text: bytes, data: int = 0) -> Damage:
        return raw_tensors(FILE, text, data)

    return {
        "long-number": one(
            b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4
        ),
        "deep": one(b'{"w":' + b"[" * 100_000, 4),
        "twice": one(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            8,
        ),
        "overlap": one(
            b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"v":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            8,
        ),
        "unknown-dtype": one(b'{"w":{"dtype":"F5","shape":[1],"data_offsets":[0,4]}}', 4),
        "no-shape": one(b'{"w":{"dtype":"F32","data_offsets":[0,4]}}', 4),
        "no-tensors": one(b"{}"),
        "negative": one(b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', 4),
    }


def _weights() -> list[Kind]:
    import torch

    damages: dict[str, Damage] = {
        "empty": write(FILE, b""),
        "cut-off-header": cut(FILE, 100),
        "cut-off-data": cut(FILE, -64),
        "garbage": write(FILE, b"\xff" * 4096),
        "html": write(FILE, "<html><body>404 Not Found</body></html>" * 20),
        "git-lfs-pointer": write(
            FILE,
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2145\nsize 9840\n",
        ),
        "a-folder": folder(FILE),
        "a-pipe": pipe(FILE),
        "link-to-nothing": link(FILE, "nothing"),
        "link-to-itself": link(FILE, "model.safetensors"),
        "zeros": lambda work: (work / FILE).write_bytes(bytes((work / FILE).stat().st_size)),
        "missing": remove(FILE),
        **{f"header-{name}": damage for name, damage in _headers().items()},
    }
    kinds = []
    for name, damage in damages.items():
        kinds.append(Kind(f"weights/file-{name}-merge", MERGE, damage, r"\ba\b"))
        kinds.append(Kind(f"weights/file-{name}-inspect", INSPECT, damage, r"\ba\b"))
    changed: dict[str, Damage] = {
        "missing-tensor": tensors(FILE, lambda s: s.pop(UP) is None or None),
        "extra-tensor": tensors(FILE, lambda s: s.update(more=torch.zeros(3))),
        "renamed": tensors(FILE, _renamed),
        "transposed": tensors(FILE, lambda s: s.update({UP: s[UP].T})),
        "shape": tensors(FILE, lambda s: s.update({UP: s[UP][:-1]})),
        "flat": tensors(FILE, lambda s: s.update({UP: s[UP].reshape(-1)})),
        "integers": tensors(FILE, lambda s: s.update({UP: s[UP].long()})),
        "bytes": tensors(FILE, lambda s: s.update({UP: s[UP].to(torch.uint8)})),
        "fp8": tensors(FILE, lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn)})),
        "bools": tensors(FILE, lambda s: s.update({UP: s[UP] > 0})),
        "scalar": tensors(FILE, lambda s: s.update({UP: torch.tensor(1.0)})),
        "no-entries": tensors(FILE, lambda s: s.update({UP: s[UP][:0]})),
    }
    kinds += [
        Kind(f"weights/{name}", MERGE, damage, "up_proj|more") for name, damage in changed.items()
    ]
    for value in (NAN, float("inf"), -float("inf")):
        for where, name in (("a", UP), ("base", UP), ("b", "model.norm.weight")):
            damage = entry(f"{where}/model.safetensors", name, value)
            for command in (INSPECT, MERGE, FIT):
                word = command.split()[0]
                about = f"{name.split('.')[-2]}"
                kinds.append(Kind(f"weights/{value}-in-{where}-{word}", command, damage, about))
    huge = both(*(entry(f"{n}/model.safetensors", UP, 1e30) for n in "ab"))
    kinds.append(Kind("weights/overflow-of-cast", f"{MERGE} --dtype float16", huge, "up_proj"))
    bf16 = tensors(FILE, lambda s: {k: v.bfloat16() for k, v in s.items()})
    kinds.append(Kind("weights/another-dtype", MERGE, bf16, right=loads))
    for name, damage in _quantised().items():
        for command in (INSPECT, MERGE, FIT):
            word = command.split()[0]
            kinds.append(Kind(f"weights/quantised-{name}-{word}", command, damage, "quant"))
    return kinds


# ---- indexes and torch files --------------------------------------------------------------------

INDEX = "sharded/model.safetensors.index.json"
SHARDED = (
    "merge --recipe.base base --recipe.sources '{a: sharded, b: b}' --recipe.init Uniform "
    "--output out"
)
BIN = SHARDED.replace("sharded", "torch_file")
BIN_FILE = "torch_file/pytorch_model.bin"


def _map(change: Any) -> Damage:
    def damage(work: Path) -> None:
        content = json.loads((work / INDEX).read_text())
        content["weight_map"] = change(content["weight_map"])
        (work / INDEX).write_text(json.dumps(content))

    return damage


def _first_to(value: Any) -> Any:
    return lambda places: {**places, next(iter(places)): value}


def _indexes() -> list[Kind]:
    shard = "sharded/model-00001-of-"

    def first_shard(work: Path) -> Path:
        return next(work.glob(f"{shard}*"))

    damages = {
        "names-above": _map(_first_to("../a/model.safetensors")),
        "absolute-name": _map(_first_to("/etc/passwd")),
        "null-name": _map(_first_to(None)),
        "number-name": _map(_first_to(5)),
        "empty-name": _map(_first_to("")),
        "nul-name": _map(_first_to("a\0b")),
        "long-name": _map(_first_to("x" * 5000)),
        "unknown-shard": _map(_first_to("model-00099.safetensors")),
        "tensor-of-no-shard": _map(lambda places: {**places, "more": next(iter(places.values()))}),
        "map-null": _map(lambda places: None),
        "map-list": _map(list),
        "map-empty": _map(lambda places: {}),
        "no-map": fields(INDEX, weight_map=DROP),
        "shard-missing": lambda work: first_shard(work).unlink(),
        "shard-cut-off": lambda work: first_shard(work).write_bytes(
            first_shard(work).read_bytes()[:-8]
        ),
        "shard-of-another-file": lambda work: first_shard(work).write_bytes(
            (work / FILE).read_bytes()
        ),
        **{f"file-{name}": damage for name, damage in damaged_json(INDEX).items()},
    }
    kinds = [Kind(f"index/{name}", SHARDED, damage, "sharded") for name, damage in damages.items()]
    kinds.append(Kind("index/total-size", SHARDED, fields(INDEX, metadata={}), right=loads))
    kinds.append(Kind("index/fine", SHARDED, right=loads))
    torches: dict[str, Damage] = {
        "empty": write(BIN_FILE, b""),
        "garbage": write(BIN_FILE, b"\x80\x02garbage" * 50),
        "cut-off": cut(BIN_FILE, -500),
        "a-list": checkpoint(BIN_FILE, lambda s, w: list(s.values())),
        "a-tensor": checkpoint(BIN_FILE, lambda s, w: s[UP]),
        "numbers": checkpoint(BIN_FILE, lambda s, w: {**s, "epoch": 5}),
        "no-tensors": checkpoint(BIN_FILE, lambda s, w: {"epoch": 5}),
        "hostile": checkpoint(BIN_FILE, lambda s, w: {**s, "x": Hostile(w)}),
        "nested": checkpoint(BIN_FILE, lambda s, w: {"model": {"deeper": s}}),
        "complex": checkpoint(BIN_FILE, lambda s, w: {**s, UP: s[UP] + 0j}),
        "sparse": checkpoint(BIN_FILE, lambda s, w: {**s, UP: s[UP].to_sparse()}),
        "nan": checkpoint(BIN_FILE, lambda s, w: {**s, UP: s[UP] * NAN}),
        "a-folder": folder(BIN_FILE),
        "a-pipe": pipe(BIN_FILE),
        "names-of-numbers": checkpoint(BIN_FILE, lambda s, w: dict(enumerate(s.values()))),
    }
    kinds += [Kind(f"torch-file/{n}", BIN, damage, r"torch_file") for n, damage in torches.items()]
    kinds.append(Kind("torch-file/fine", BIN, right=loads))
    wrapped = checkpoint(BIN_FILE, lambda s, w: {"state_dict": s})
    kinds.append(Kind("torch-file/wrapped", BIN, wrapped, right=loads))
    return kinds


# ---- tokenizers ---------------------------------------------------------------------------------


def _tokenizers() -> list[Kind]:
    file = "a/tokenizer.json"
    swapped = both(
        text(file, '"w3": 6', '"w3": 7777'),
        text(file, '"w4": 7,', '"w4": 6,'),
        text(file, "7777", "7"),
    )
    damages = damaged_json(file)
    kinds = [Kind(f"tokenizer/{n}-merge", MERGE, d, r"tokenizer") for n, d in damages.items()]
    both_files = {
        name: both(
            damage,
            damaged_json("base/tokenizer.json")[name],
            damaged_json("b/tokenizer.json")[name],
        )
        for name, damage in damages.items()
    }
    kinds += [
        Kind(f"tokenizer/{n}-of-all-fit", FIT, d, r"tokenizer") for n, d in both_files.items()
    ]
    union = f"{MERGE} --recipe.tokenizer.source union"
    kinds += [Kind(f"tokenizer/{n}-union", union, d, r"tokenizer") for n, d in damages.items()]
    kinds += [
        Kind("tokenizer/other-ids", MERGE, swapped, "tokenizer"),
        Kind("tokenizer/other-ids-inspect", INSPECT, swapped, "cannot be merged"),
        Kind("tokenizer/other-ids-union", union, swapped, right=loads),
        Kind(
            "tokenizer/more-than-rows",
            MERGE,
            both(
                *(
                    text(f"{n}/tokenizer.json", '"w28": 31', '"w28": 31, "w29": 32, "w30": 99')
                    for n in ("base", "a", "b")
                )
            ),
            "token",
        ),
        Kind("tokenizer/unknown-choice", f"{MERGE} --recipe.tokenizer.source nope", None, "nope"),
        Kind("tokenizer/config-list", FIT, write("base/tokenizer_config.json", "[]"), "tokenizer"),
        Kind(
            "tokenizer/config-class",
            FIT,
            both(
                *(
                    fields(f"{n}/tokenizer_config.json", tokenizer_class="os.system")
                    for n in ("base", "a", "b")
                )
            ),
            "tokenizer",
            right=_trained,
        ),
        Kind(
            "tokenizer/none",
            FIT,
            both(
                *(
                    remove(f"{n}/tokenizer{s}.json")
                    for n in ("base", "a", "b")
                    for s in ("", "_config")
                )
            ),
            "tokenizer",
        ),
    ]
    return kinds


# ---- adapters -----------------------------------------------------------------------------------

ADAPTERS = "merge --config adapters.yaml --output out"
SETTINGS = "l_a/adapter_config.json"
FACTORS = "l_a/adapter_model.safetensors"
FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def _adapters() -> list[Kind]:
    import torch

    values: dict[str, list[Any]] = {
        "r": [0, -1, "x", None, NAN, 3, 10**30],
        "lora_alpha": [NAN, "x", None, [4], float("inf")],
        "peft_type": ["NOPE", "IA3", None, 5],
        "alpha_pattern": [{HANG: 8}, {"(": 8}, [1], {"q_proj": "x"}, {"q_proj": NAN}],
        "rank_pattern": [{HANG: 8}, {"(": 8}, {"q_proj": -1}],
        "use_dora": [True, "x"],
        "use_rslora": ["x"],
        "modules_to_save": [5, [5]],
        "bias": ["nope", 5],
        "fan_in_fan_out": ["x"],
    }
    kinds = [
        Kind(
            f"adapter/{key}-{json.dumps(value)[:20]}",
            ADAPTERS,
            fields(SETTINGS, **{key: value}),
            f"{key}|l_a",
            (lambda w: True) if value == {HANG: 8} else None,  # it matches nothing, as in PEFT
        )
        for key, some in values.items()
        for value in some
    ]
    changed: dict[str, Damage] = {
        "no-factors": tensors(FACTORS, lambda s: {"x": torch.zeros(1)}),
        "one-factor": tensors(FACTORS, lambda s: s.pop(f"{FACTOR}A.weight") is None or None),
        "rank": tensors(FACTORS, lambda s: s.update({f"{FACTOR}A.weight": torch.zeros(3, 16)})),
        "shape": tensors(FACTORS, lambda s: s.update({f"{FACTOR}A.weight": torch.zeros(2, 15)})),
        "module": tensors(
            FACTORS, lambda s: {k.replace("q_proj", "nope"): v for k, v in s.items()}
        ),
        "nan": entry(FACTORS, f"{FACTOR}A.weight", NAN),
        "cut-off": cut(FACTORS, -8),
        "missing": remove(FACTORS),
        "hostile-bin": both(
            remove(FACTORS),
            lambda w: __import__("torch").save({"x": Hostile(w)}, w / "l_a/adapter_model.bin"),
        ),
        **{f"file-{name}": damage for name, damage in damaged_json(SETTINGS).items()},
    }
    kinds += [Kind(f"adapter/{n}", ADAPTERS, d, r"l_a|adapter|up_proj") for n, d in changed.items()]
    lone = (
        "merge --recipe.sources '{a: l_a, b: b}' --recipe.origin zero --recipe.init Uniform "
        "--output out"
    )
    for name, base in (("itself", "l_a"), ("one-another", "l_b"), ("missing", "nothing/here")):
        change = fields(SETTINGS, base_model_name_or_path=base)
        if name == "one-another":
            change = both(change, fields("l_b/adapter_config.json", base_model_name_or_path="l_a"))
        kinds.append(Kind(f"adapter/base-{name}", lone, change, "l_a|nothing"))
    kinds.append(Kind("adapter/fine", ADAPTERS, right=loads))
    return kinds


# ---- classes ------------------------------------------------------------------------------------


def _classes() -> list[Kind]:
    names = ["entailment", "neutral", "contradiction"]
    reordered = fields(
        "c_b/config.json",
        id2label={str(i): n for i, n in enumerate(names)},
        label2id={n: i for i, n in enumerate(names)},
    )
    other = fields(
        "c_b/config.json",
        id2label={str(i): n for i, n in enumerate("xyz")},
        label2id={n: i for i, n in enumerate("xyz")},
    )
    private = f"{CLASSES} --recipe.private '[^classifier]'"
    kinds = [
        Kind("classes/reordered", CLASSES, reordered, "label"),
        Kind("classes/reordered-inspect", "inspect c_a c_b --base c_base", reordered, "merged"),
        Kind("classes/other-names", CLASSES, other, "label"),
        Kind("classes/reordered-private", private, reordered, right=lambda w: (w / "out").is_dir()),
    ]
    damaged: list[Any] = [[], 5, "x", {"0": 5}, {"x": "y"}, {str(i): "y" for i in range(7)}]
    for value in damaged:
        change = fields([f"c_{n}/config.json" for n in ("base", "a", "b")], id2label=value)
        kinds.append(
            Kind(f"classes/id2label-{json.dumps(value)[:20]}", CLASSES, change, "label|config")
        )
    return kinds


KINDS = [
    *_of_all(),
    *_of_one(),
    *_weights(),
    *_indexes(),
    *_tokenizers(),
    *_adapters(),
    *_classes(),
]
