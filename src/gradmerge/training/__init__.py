"""Learn coefficients with Lightning: the module, its data, and callbacks."""

from gradmerge.training.callbacks import CoefficientLogger, ExportAtEnd
from gradmerge.training.data import MergeDataModule
from gradmerge.training.examples import TaskData
from gradmerge.training.module import MergeModule

__all__ = ["CoefficientLogger", "ExportAtEnd", "MergeDataModule", "MergeModule", "TaskData"]
