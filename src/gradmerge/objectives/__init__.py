"""Objectives: loss terms on predictions and regularisers of coefficients."""

from gradmerge.objectives.base import (
    AbstractRegulariser,
    AbstractTerm,
    Predictions,
    next_token_rows,
)
from gradmerge.objectives.objective import Objective
from gradmerge.objectives.regularisers import (
    L1,
    FisherToInit,
    L2ToInit,
    Lp,
    Overlap,
    Similarity,
)
from gradmerge.objectives.terms import (
    CrossEntropy,
    Entropy,
    KLToEnsemble,
    KLToSource,
    SquaredError,
)

__all__ = [
    "L1",
    "AbstractRegulariser",
    "AbstractTerm",
    "CrossEntropy",
    "Entropy",
    "FisherToInit",
    "KLToEnsemble",
    "KLToSource",
    "L2ToInit",
    "Lp",
    "Objective",
    "Overlap",
    "Predictions",
    "Similarity",
    "SquaredError",
    "next_token_rows",
]
