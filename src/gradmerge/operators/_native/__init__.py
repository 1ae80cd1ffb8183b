"""C kernels for frozen tensors on a CPU, compiled at first use (private to `operators`)."""

from gradmerge.operators._native.build import kernels_for, native_kernels
from gradmerge.operators._native.kernels import Kernels, run_each
from gradmerge.operators._native.selection import Direction

__all__ = [
    "Direction",
    "Kernels",
    "kernels_for",
    "native_kernels",
    "run_each",
]
