"""Alignment: the units of networks that share no initialisation, brought into one order."""

from gradmerge.alignment.base import (
    AbstractAlignment,
    Activations,
    Aligned,
    AlignmentContext,
    Identity,
    Matched,
    Matching,
    Moments,
)
from gradmerge.alignment.spec import LinearMap, Map, Maps, PermutationSpec
from gradmerge.alignment.weights import WeightMatching

__all__ = [
    "AbstractAlignment",
    "Activations",
    "Aligned",
    "AlignmentContext",
    "Identity",
    "LinearMap",
    "Map",
    "Maps",
    "Matched",
    "Matching",
    "Moments",
    "PermutationSpec",
    "WeightMatching",
]
