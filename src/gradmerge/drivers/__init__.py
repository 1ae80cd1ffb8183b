"""Drivers: how the optimum is sought, where it is not one `trainer.fit`."""

from gradmerge.drivers.base import AbstractDriver, Job, Output
from gradmerge.drivers.continual import Continual
from gradmerge.drivers.fold import AbstractFold, Pairwise, Tree
from gradmerge.drivers.layerwise import LayerWise

__all__ = [
    "AbstractDriver",
    "AbstractFold",
    "Continual",
    "Job",
    "LayerWise",
    "Output",
    "Pairwise",
    "Tree",
]
