"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3


def release_freed_memory(threshold: int = 1 << 20) -> bool:
    """Let every block of `threshold` bytes and more go back to the system once it is freed (glibc).

    By default glibc raises its threshold to the largest block freed so far, up to 32 MB, and keeps
    smaller ones for reuse: in streamed memory the heap then holds many freed layers between live
    activations. The price is a page fault for each page of a new block.

    Returns:
        Whether the C library took the setting (other than glibc has none).
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold))
    except (AttributeError, OSError):
        return False
