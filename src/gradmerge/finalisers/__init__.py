"""Finalisers: steps over merged weights once their coefficients are known."""

from gradmerge.finalisers.base import AbstractFinaliser, AbstractRescale, FinalSite
from gradmerge.finalisers.chain import Corrections, Finalisation
from gradmerge.finalisers.depth import DepthRescale
from gradmerge.finalisers.repair import REPAIR, Correction
from gradmerge.finalisers.spectral import SpectralRescale

__all__ = [
    "REPAIR",
    "AbstractFinaliser",
    "AbstractRescale",
    "Correction",
    "Corrections",
    "DepthRescale",
    "FinalSite",
    "Finalisation",
    "SpectralRescale",
]
