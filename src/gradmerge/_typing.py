"""Names of shapes that docstrings use.

`sources` K, the number of sources · `rows` the first axis of raw coefficients (K, or 1 with
Complement) · `*slot` the compact shape of a tensor's coefficients · `*shape` the tensor's own shape
· `batch`, `tokens`, `classes`, `vocab` as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

# Raw coefficients by key: a module's parameters, or plain tensors.
Raw = Mapping[str, Tensor] | nn.ParameterDict
Origin = Literal["base", "zero", "mean"]
