"""Shared types, and the axis names that docstrings use in shapes.

- `sources`: K, the number of sources
- `rows`: first axis of raw coefficients (K, or 1 with `Complement`)
- `*slot`: compact shape of a tensor's coefficients
- `*shape`: shape of the tensor itself
- `batch`, `tokens`, `classes`, `vocab`: as usual
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

# Raw coefficients by key: parameters of a module, or plain tensors.
Raw = Mapping[str, Tensor] | nn.ParameterDict
Origin = Literal["base", "zero", "mean"]
# The entries of a tensor that share a coefficient: all, a line along an axis, ...
SpreadKind = Literal["scalar", "axis", "partition", "element", "component"]
