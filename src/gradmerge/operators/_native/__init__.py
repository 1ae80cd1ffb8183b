"""C kernels for frozen tensors on a CPU, compiled at first use (private to `operators`)."""

from gradmerge.operators._native.build import kernels_for, native_kernels
from gradmerge.operators._native.kernels import (
    FROM_BASE,
    FROM_DIRECTIONS,
    FROM_MEAN,
    FROM_ZERO,
    GIVEN,
    Kernels,
    run_each,
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
    "kernels_for",
    "native_kernels",
    "run_each",
]
