"""Alignment: the units of networks that share no initialisation, brought into one order."""

from gradmerge.alignment.activation import ActivationMatching
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
from gradmerge.alignment.cca import CCA
from gradmerge.alignment.symmetry.spec import LinearMap, Map, Maps, PermutationSpec
from gradmerge.alignment.transport import OptimalTransport
from gradmerge.alignment.weights import WeightMatching

__all__ = [
    "CCA",
    "AbstractAlignment",
    "ActivationMatching",
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
    "OptimalTransport",
    "PermutationSpec",
    "WeightMatching",
]
