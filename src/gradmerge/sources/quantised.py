"""Recognise quantised checkpoints: their numbers are codes, which cannot be averaged."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gradmerge.common.errors import Problem, SourceError, shorten
from gradmerge.common.files import read_json
from gradmerge.sources.base import Checkpoint, TensorInfo

# Files beside config.json in which some libraries name their method.
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}

# Names of tensors that only one family of methods writes.
_NAMES = {
    r"\.(qweight|qzeros|g_idx)$": "gptq or awq",
    r"\.weight_(packed|shape|zero_point)$": "compressed-tensors",
    r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$": "bitsandbytes",
    r"\.(SCB|weight_format)$": "bitsandbytes",
    r"\.weight_scale_inv$": "fp8",
    r"_(blocks|scales)$": "mxfp4",
    r"\.W_q$": "hqq",
    r"\.codes$": "aqlm",
    r"\.weight\._(data|scale|shift)$": "quanto",
    r"\.weight:(qdata|scale)$": "torchao",
    r"\.weight_scales$": "eetq",
    r"\.(res_)?indices$": "vptq",
    r"\.dense_weights$": "spqr",
    r"\.weight_scale_2$": "modelopt",
}
_CODES = re.compile("|".join(_NAMES))
# What stands beside codes of methods without names of their own.
_BESIDE = re.compile("scale|absmax|zero|codebook|centroid|SCB|qparams|quant")
_ORDINARY = (torch.bool, torch.int64)  # masks, positions and counters, in any checkpoint

# Fields of config.json that describe a quantisation.
SETTINGS = ("quantization_config", "compression_config", "quantization")

# Methods whose weights transformers itself computes, on any device.
TRANSFORMERS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "metal": "MetalConfig",
    "compressed-tensors": "CompressedTensorsConfig",
}
AFTER_LOADING = ("bitsandbytes", "higgs")


def check_quantised(
    checkpoint: Checkpoint, is_private: Callable[[str], bool] = lambda _: False
) -> list[Problem]:
    """Find quantised weights, from the config and from integer tensors beside scales.

    Args:
        checkpoint: the checkpoint, of which only headers are read.
        is_private: whether a tensor stays with its task.
    """
    stored = codes_of(checkpoint.infos)
    codes = [name for name in stored if not is_private(name)]
    method = method_of(checkpoint)
    if not codes:
        declared = declaration(checkpoint.config or {}) is not None and not stored
        return [_unused(checkpoint, method or "")] if declared else []
    found = method or next((kind for name in codes if (kind := _family(name))), None)
    return [
        Problem(
            "quantised",
            checkpoint.label,
            shorten(codes, 3),
            "weights of at least 16 bits per entry",
            f"codes of {found or 'an unknown quantisation'} "
            f"({_kinds(checkpoint.infos[name] for name in codes)})",
            f"Averages of codes mean nothing. {_remedy(checkpoint, found)}",
        )
    ]


def require_dense(checkpoint: Checkpoint) -> None:
    """Reject a quantised base of an adapter.

    Raises:
        SourceError: its weights are codes.
    """
    for problem in check_quantised(checkpoint):
        if problem.kind == "quantised":
            raise SourceError(
                f"{problem.where}: expected {problem.expected}, got {problem.got}: {problem.what}."
                f"\nAn adapter is added to weights. {problem.todo}"
            )


def codes_of(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Return the tensors that hold codes, or scales of less than 16 bits."""
    beside: dict[str, set[str]] = defaultdict(set)
    for name in infos:
        place, _, last = name.rpartition(".")
        beside[place].add(last)
    return [name for name, info in infos.items() if _is_code(info, beside)]


def _is_code(info: TensorInfo, beside: Mapping[str, set[str]]) -> bool:
    place, _, last = info.name.rpartition(".")
    if info.dtype.is_floating_point:
        return info.dtype.itemsize < 2
    if last == "weight" and info.dtype.itemsize < 2:
        return True
    if info.dtype in _ORDINARY:
        return False
    others = [other for other in beside[place] if other != last and _BESIDE.search(other)]
    return bool(_CODES.search(info.name)) or (bool(others) and info.num_elements > 1)


def method_of(checkpoint: Checkpoint) -> str | None:
    """Return the quantisation method that config.json or a file beside it names."""
    declared = declaration(checkpoint.config or {})
    if declared is not None:
        method = declared.get("quant_method") or declared.get("quant_algo")
        if not method and (declared.get("load_in_4bit") or declared.get("load_in_8bit")):
            method = "bitsandbytes"
        return str(method or "a method without a name").lower()
    for file, method in _SIDE_FILES.items():
        if checkpoint.folder is not None and (checkpoint.folder / file).is_file():
            return str((read_json(checkpoint.folder / file) or {}).get("quant_method") or method)
    return None


def declaration(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the settings of the quantisation in a config, or in the config of a part."""
    for key in SETTINGS:
        own = config.get(key)
        if isinstance(own, Mapping) and own:
            return own
        if own and key == SETTINGS[0]:
            return {"quant_method": own}
    for key, part in config.items():
        found = declaration(part) if key.endswith("_config") and isinstance(part, Mapping) else None
        if found is not None:
            return found
    return None


def is_gguf(path: Path) -> bool:
    """Return whether a file is in llama.cpp's format, whatever its name."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _family(name: str) -> str | None:
    return next((method for pattern, method in _NAMES.items() if re.search(pattern, name)), None)


def _kinds(infos: Any) -> str:
    return "/".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))


def _remedy(checkpoint: Checkpoint, method: str | None) -> str:
    if method in TRANSFORMERS:
        return (
            "Give the checkpoint that it was made from, or read it dequantised: "
            f"{{class_path: Dequantised, init_args: {{path: {checkpoint.label}}}}}."
        )
    if method in AFTER_LOADING:
        names = (checkpoint.config or {}).get("architectures") or ["AutoModel"]
        return (
            "Give the checkpoint that it was made from, or, with that library installed, read it "
            f"dequantised ({{class_path: Dequantised, init_args: {{path: {checkpoint.label}}}}}) "
            f"or write it: `model = transformers.{names[0]}.from_pretrained("
            f'"{checkpoint.label}")`, '
            '`model.dequantize().save_pretrained("dense")`.'
        )
    return "Give the checkpoint that it was made from, in float32, bfloat16 or float16."


def _unused(checkpoint: Checkpoint, method: str) -> Problem:
    return Problem(
        "config.quantization_config",
        f"{checkpoint.label}/config.json",
        "quantization_config",
        f"tensors of {method}",
        "none: its weights are stored unquantised",
        "transformers would look for codes, or quantise the merge. Remove the field from "
        "config.json; if the model is meant to be quantised on loading, accept it with allow: "
        "[config.quantization_config].",
    )
