"""Choice of an implementation of the linear operator: C on a CPU, Triton on a GPU, else torch.

`GRADMERGE_KERNELS=torch` selects torch operations everywhere.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.operators import chunks
from gradmerge.operators._native import kernels_for
from gradmerge.operators.base import Spread, Terms

_log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NVIDIA's first devices that compute in bfloat16; AMD's have larger numbers.
_CAPABILITY = (8, 0)


class Backend(Protocol):
    """Implementation of `Linear` for dense terms without masks."""

    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """Merge as `AbstractOperator.combine` does, with coefficients `[sources, slot]`."""

    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """Contract as `AbstractOperator.contract` does."""


def backend_for(tensors: Sequence[Tensor]) -> Backend:
    """Return the fastest implementation that supports all these tensors.

    Raises:
        ConfigError: `GRADMERGE_KERNELS` asks for kernels that cannot be had.
    """
    return _triton_for(tensors) or kernels_for(tensors) or chunks


def _triton_for(tensors: Sequence[Tensor]) -> Backend | None:
    device, choice = tensors[0].device, os.environ.get("GRADMERGE_KERNELS", "auto")
    # Triton's interpreter takes tensors on a CPU, slowly: for tests of the arithmetic
    interpreted = choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "torch" or device.type != ("cpu" if interpreted else "cuda"):
        return None
    plain = all(
        tensor.device == device
        and tensor.dtype in _DTYPES
        and tensor.layout == torch.strided
        # kernels read memory, which tensors of other classes (fake, distributed) may not have
        and type(tensor) in (Tensor, torch.nn.Parameter)
        for tensor in tensors
    )
    return _load(choice, device) if plain else None


@functools.cache
def _load(choice: str, device: torch.device) -> Backend | None:
    """Return the Triton kernels if they work on a device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        reason = f"the Triton kernels need compute capability 8.0 or later, not that of {device}"
        _log.info("%s; merging with torch operations", reason)
    else:
        try:
            # an optional package, which takes long to import
            from gradmerge.operators._triton import launch

            launch.check(device)
            return launch
        except ImportError as error:
            reason = f"Triton cannot be imported: {error}"
            _log.info("%s; merging with torch operations", reason)
        except Exception as error:  # whatever compilers, drivers and linkers raise
            reason = f"the Triton kernels failed on {device}: {str(error)[-500:]}"
            if choice != "triton":
                warnings.warn(
                    f"{reason}. Merging continues with torch operations, which move several times "
                    "the bytes; set GRADMERGE_KERNELS=torch to silence this warning.",
                    stacklevel=2,
                )
    if choice == "triton":
        raise ConfigError(
            f"GRADMERGE_KERNELS=triton: {reason}. Install Triton (CUDA builds of torch bring it "
            "along) and a C compiler, or unset the variable."
        )
    return None
