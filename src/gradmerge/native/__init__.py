"""C kernels for frozen tensors on a CPU, compiled at first use."""

from gradmerge.native.build import native_kernels
from gradmerge.native.kernels import (
    FROM_BASE,
    FROM_DIRECTIONS,
    FROM_MEAN,
    FROM_ZERO,
    GIVEN,
    Kernels,
)
from gradmerge.native.selection import Direction

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
