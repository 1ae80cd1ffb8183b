"""Block and depth of a tensor in the network, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

# By name, as files list tensors in alphabetical order.
_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|shared|stem|conv1|bn1|cls_token|class_token)\b")
_BLOCK = re.compile(r"(?:^|\.)(?:(?:layer|stage|block)_?)?(\d+)\.")


def block_of(name: str) -> int | None:
    """Return the number of a tensor's block: the first number in its name."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def is_embedding(name: str) -> bool:
    """Return True if a tensor comes before the first block: an embedding or a stem, by its name."""
    return _EMBEDDING.search(name) is not None


def depth_of(name: str, names: Iterable[str]) -> float:
    """Return the depth of a tensor between 0 (embeddings) and 1 (the head).

    In the i-th of n blocks it is `(i + 1) / (n + 1)`. Outside of blocks, embeddings and stems (by
    name) come before the first block and all others after the last.

    Args:
        name: the tensor.
        names: all tensors of the network.

    Examples:
        >>> names = ["embed.weight", "layers.0.weight", "layers.4.weight", "head.weight"]
        >>> [round(depth_of(name, names), 3) for name in names]
        [0.0, 0.333, 0.667, 1.0]
    """
    numbers = sorted({number for number in map(block_of, names) if number is not None})
    block = block_of(name)
    if block is not None:
        depth = numbers.index(block)
    else:
        depth = -1 if is_embedding(name) else len(numbers)
    return (depth + 1) / (len(numbers) + 1)
