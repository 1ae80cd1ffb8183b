"""gradmerge: learn how to merge fine-tuned checkpoints of one architecture into one.

Names are imported when they are first used, so that `gradmerge --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradmerge._version import __version__

_WHERE = {
    "MergeDataModule": "training.data",
    "MergeModule": "training.module",
    "MergedModel": "engine.merged",
    "Plan": "engine.plan",
    "Recipe": "engine.recipe",
    "TaskData": "training.data",
    "export_merged": "export.folder",
}

__all__ = [
    "MergeDataModule",
    "MergeModule",
    "MergedModel",
    "Plan",
    "Recipe",
    "TaskData",
    "__version__",
    "export_merged",
]

if TYPE_CHECKING:
    from gradmerge.engine.merged import MergedModel
    from gradmerge.engine.plan import Plan
    from gradmerge.engine.recipe import Recipe
    from gradmerge.export.folder import export_merged
    from gradmerge.training.data import MergeDataModule, TaskData
    from gradmerge.training.module import MergeModule


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gradmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gradmerge.{_WHERE[name]}"), name)
