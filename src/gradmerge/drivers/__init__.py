"""Drivers: how the optimum is sought, where it is not one `trainer.fit`."""

from gradmerge.drivers.base import AbstractDriver, Job, Output
from gradmerge.drivers.layerwise import LayerWise

__all__ = ["AbstractDriver", "Job", "LayerWise", "Output"]
