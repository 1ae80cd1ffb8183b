"""Triton kernels for frozen tensors on a GPU (private to `operators`)."""
