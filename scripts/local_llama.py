"""A Llama that benchmarks make themselves: random weights, and sources a little off them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def make_llamas(
    folder: Path, sources: Sequence[str], noise: float, dtype: str, **config: Any
) -> None:
    """The folders `base` and one of each source, as far as they are not there.

    Weights are drawn by their names, N(0, 0.02^2), gains about 1; a source differs from the base by
    N(0, noise^2).

    Args:
        folder: for the folders.
        sources: their names.
        noise: standard deviation of a direction's entries.
        dtype: of the files.
        **config: fields of `LlamaConfig`.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    fixed = {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    described = transformers.LlamaConfig(**fixed, **config)
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(described)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for index, name in enumerate(("base", *sources)):
        target = folder / name
        if (target / "config.json").is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for key, shape in shapes.items():
            tensor = _drawn(key, shape) * 0.02 + (1 if len(shape) == 1 else 0)
            if index:
                tensor += _drawn(f"{index} {key}", shape) * noise
            tensors[key] = tensor.to(getattr(torch, dtype))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        described.save_pretrained(target)


def _drawn(name: str, shape: Sequence[int]) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
