"""Operators: combine the directions of all sources into one tensor."""

from gradmerge.operators.base import AbstractOperator, Spread, Terms
from gradmerge.operators.components import Components
from gradmerge.operators.disjoint import DisjointMean
from gradmerge.operators.entrywise import AbstractEntrywise
from gradmerge.operators.fusion import ArceeFusion
from gradmerge.operators.linear import Linear
from gradmerge.operators.masked import MaskedDirections
from gradmerge.operators.nearswap import NearSwap
from gradmerge.operators.span import AbstractSpan
from gradmerge.operators.spherical import Karcher, MultiSlerp, Slerp
from gradmerge.operators.stock import ModelStock

__all__ = [
    "AbstractEntrywise",
    "AbstractOperator",
    "AbstractSpan",
    "ArceeFusion",
    "Components",
    "DisjointMean",
    "Karcher",
    "Linear",
    "MaskedDirections",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "Slerp",
    "Spread",
    "Terms",
]
