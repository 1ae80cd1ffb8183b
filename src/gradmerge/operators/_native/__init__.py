"""C kernels for frozen tensors on a CPU, compiled at first use."""

from gradmerge.operators._native.build import native_kernels
from gradmerge.operators._native.kernels import (
    FROM_BASE,
    FROM_DIRECTIONS,
    FROM_MEAN,
    FROM_ZERO,
    GIVEN,
    Kernels,
)
from gradmerge.operators._native.selection import Direction

__all__ = [
    "FROM_BASE",
    "FROM_DIRECTIONS",
    "FROM_MEAN",
    "FROM_ZERO",
    "GIVEN",
    "Direction",
    "Kernels",
    "native_kernels",
]
