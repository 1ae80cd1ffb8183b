"""Objectives: loss terms on predictions and regularisers of coefficients."""

from gradmerge.objectives.base import (
    AbstractRegulariser,
    AbstractTerm,
    Leading,
    Predictions,
    Wanted,
    next_token_rows,
)
from gradmerge.objectives.distillation import (
    HardLabels,
    HiddenStates,
    KLToEnsemble,
    KLToSource,
)
from gradmerge.objectives.objective import Objective
from gradmerge.objectives.regularisers import (
    L1,
    FisherToInit,
    L1ToInit,
    L2ToInit,
    Lp,
    Overlap,
    Similarity,
)
from gradmerge.objectives.terms import (
    CrossEntropy,
    Entropy,
    SquaredError,
)

__all__ = [
    "L1",
    "AbstractRegulariser",
    "AbstractTerm",
    "CrossEntropy",
    "Entropy",
    "FisherToInit",
    "HardLabels",
    "HiddenStates",
    "KLToEnsemble",
    "KLToSource",
    "L1ToInit",
    "L2ToInit",
    "Leading",
    "Lp",
    "Objective",
    "Overlap",
    "Predictions",
    "Similarity",
    "SquaredError",
    "Wanted",
    "next_token_rows",
]
