"""Learn coefficients with Lightning: the module, its data, and callbacks.

Names are imported on first use, so that what needs no Lightning does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmerge.training.benchmarks import EvaluateEvery
    from gradmerge.training.callbacks import CoefficientLogger, ExportAtEnd
    from gradmerge.training.data import MergeDataModule
    from gradmerge.training.examples import TaskData
    from gradmerge.training.module import MergeModule

_PLACES = {
    "CoefficientLogger": "callbacks",
    "EvaluateEvery": "benchmarks",
    "ExportAtEnd": "callbacks",
    "MergeDataModule": "data",
    "MergeModule": "module",
    "TaskData": "examples",
}

__all__ = [
    "CoefficientLogger",
    "EvaluateEvery",
    "ExportAtEnd",
    "MergeDataModule",
    "MergeModule",
    "TaskData",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gradmerge.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gradmerge.training.{_PLACES[name]}"), name)
