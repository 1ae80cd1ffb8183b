"""gradmerge: merge fine-tuned checkpoints of one architecture, with learned or fixed coefficients.

Names are imported on first use, so that `gradmerge --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradmerge.common.version import __version__

_PLACES = {
    "Generation": "training.generation.Generation",
    "GradmergeError": "common.errors.GradmergeError",
    "MergeDataModule": "training.data.MergeDataModule",
    "MergeModule": "training.module.MergeModule",
    "MergedModel": "engine.merged.MergedModel",
    "Recipe": "engine.recipe.Recipe",
    "TaskData": "training.examples.TaskData",
    "collect": "training.collect.collect",
    "export_merged": "export.folder.export_merged",
    "inspect": "cli.inspect.inspect_sources",
    "merge": "export.merge.merge",
    "read_mergekit": "mergekit.reader.read_mergekit",
}

__all__ = [
    "Generation",
    "GradmergeError",
    "MergeDataModule",
    "MergeModule",
    "MergedModel",
    "Recipe",
    "TaskData",
    "__version__",
    "collect",
    "export_merged",
    "inspect",
    "merge",
    "read_mergekit",
]

if TYPE_CHECKING:
    from gradmerge.cli.inspect import inspect_sources as inspect
    from gradmerge.common.errors import GradmergeError
    from gradmerge.engine.merged import MergedModel
    from gradmerge.engine.recipe import Recipe
    from gradmerge.export.folder import export_merged
    from gradmerge.export.merge import merge
    from gradmerge.mergekit.reader import read_mergekit
    from gradmerge.training.collect import collect
    from gradmerge.training.data import MergeDataModule
    from gradmerge.training.examples import TaskData
    from gradmerge.training.generation import Generation
    from gradmerge.training.module import MergeModule


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gradmerge' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].rpartition(".")
    return getattr(importlib.import_module(f"gradmerge.{module}"), attribute)
