"""Drivers: how the optimum is sought, where it is not one `trainer.fit`."""

from gradmerge.drivers.base import AbstractDriver, Job, Output
from gradmerge.drivers.continual import Continual
from gradmerge.drivers.fold import AbstractFold, FoldedRecipe
from gradmerge.drivers.layerwise.driver import LayerWise
from gradmerge.drivers.pairwise import Pairwise, Tree

DRIVERS = ("Continual", "LayerWise", "Pairwise", "Tree")
"""Those that a configuration may name."""

__all__ = [
    "DRIVERS",
    "AbstractDriver",
    "AbstractFold",
    "Continual",
    "FoldedRecipe",
    "Job",
    "LayerWise",
    "Output",
    "Pairwise",
    "Tree",
]
