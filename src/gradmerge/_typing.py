"""Names of shapes that docstrings use.

`sources` K, the number of sources · `rows` the first axis of raw coefficients (K, or 1 with
Complement) · `*slot` the compact shape of a tensor's coefficients · `*shape` the tensor's own shape ·
`batch`, `tokens`, `classes`, `vocab` as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

TensorDict = Mapping[str, Tensor]
Origin = Literal["base", "zero", "mean"]
