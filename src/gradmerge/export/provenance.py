"""Versions and mean coefficients that an exported folder and a checkpoint record."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from gradmerge._typing import Raw
from gradmerge._version import __version__
from gradmerge.engine.plan import Plan

_PACKAGES = ("lightning", "transformers", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Of this package and of those whose results depend on theirs."""
    packages = {name: version(name) for name in _PACKAGES}
    torch_version = str(torch.__version__)  # a class of its own, which no checkpoint may hold
    python = platform.python_version()
    return {"gradmerge": __version__, "torch": torch_version, **packages, "python": python}


def mean_coefficients(plan: Plan, raw: Raw) -> dict[str, float]:
    """Mean coefficient of each source: over the entries of a tensor, then over learned tensors."""
    num = len(plan.sources)
    with torch.no_grad():
        rows = [
            plan.coefficient(name, raw).double().reshape(num, -1).mean(dim=1)
            for name in plan.learned
        ]
    return dict(zip(plan.sources, torch.stack(rows).mean(dim=0).tolist(), strict=True))
