"""gradmerge: learn how to merge fine-tuned checkpoints of one architecture into one.

Names are imported when they are first used, so that `gradmerge --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradmerge._version import __version__

_WHERE = {
    "MergeDataModule": "data",
    "MergeModule": "module",
    "MergedModel": "merged",
    "Plan": "plan",
    "Recipe": "recipe",
    "TaskData": "data",
    "export_merged": "export",
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
    from gradmerge.data import MergeDataModule, TaskData
    from gradmerge.export import export_merged
    from gradmerge.merged import MergedModel
    from gradmerge.module import MergeModule
    from gradmerge.plan import Plan
    from gradmerge.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gradmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gradmerge.{_WHERE[name]}"), name)
