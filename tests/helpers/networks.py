"""Tiny networks of transformers, of sizes that tests change where they matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def transformer(kind: Any, **options: Any) -> nn.Module:
    """A network with weights of the generator as it stands.

    Args:
        kind: class of transformers.
        **options: fields of its config, besides or instead of `SIZES`.
    """
    has = kind.config_class()
    sizes = {name: size for name, size in SIZES.items() if hasattr(has, name)}
    network: nn.Module = kind(kind.config_class(**{**sizes, **options}))
    return network


def seeded(kind: Any, seed: int = 0, **options: Any) -> nn.Module:
    """The same with seeded weights."""
    torch.manual_seed(seed)
    return transformer(kind, **options)
