"""Drivers: ways to learn a merge that are not one fit of all sources."""

from gradmerge.drivers.base import AbstractDriver, Job
from gradmerge.drivers.continual import Continual
from gradmerge.drivers.fold import AbstractFold, FoldedRecipe
from gradmerge.drivers.layerwise.driver import LayerWise
from gradmerge.drivers.pairwise import Pairwise
from gradmerge.drivers.tree import Tree

DRIVERS = ("Continual", "LayerWise", "Pairwise", "Tree")
"""Names that a configuration may give."""

__all__ = [
    "DRIVERS",
    "AbstractDriver",
    "AbstractFold",
    "Continual",
    "FoldedRecipe",
    "Job",
    "LayerWise",
    "Pairwise",
    "Tree",
]
