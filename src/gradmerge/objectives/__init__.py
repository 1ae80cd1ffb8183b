"""Objectives: terms of predictions and regularisers of coefficients."""

from gradmerge.objectives.base import (
    AbstractRegulariser,
    AbstractTerm,
    Predictions,
    next_token_rows,
)
from gradmerge.objectives.objective import Objective
from gradmerge.objectives.regularisers import L1, L2ToInit, Overlap, Similarity
from gradmerge.objectives.terms import CrossEntropy, Entropy, KLToSource

__all__ = [
    "L1",
    "AbstractRegulariser",
    "AbstractTerm",
    "CrossEntropy",
    "Entropy",
    "KLToSource",
    "L2ToInit",
    "Objective",
    "Overlap",
    "Predictions",
    "Similarity",
    "next_token_rows",
]
