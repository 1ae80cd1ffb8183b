"""Preprocess steps: change the directions once, without gradient, before coefficients apply."""

from gradmerge.preprocess.base import AbstractPreprocess, AbstractSelection, Site
from gradmerge.preprocess.drop import MagnitudeDrop, RandomDrop
from gradmerge.preprocess.earlier import EarlierCoefficients
from gradmerge.preprocess.larv import LARV
from gradmerge.preprocess.orthogonalise import Orthogonalise
from gradmerge.preprocess.pcb import ParameterCompetition
from gradmerge.preprocess.processed import ProcessedDirections
from gradmerge.preprocess.regression import FisherScale, MaTS, RegMean
from gradmerge.preprocess.select import Consensus, SelectTop, ShareOfSquares
from gradmerge.preprocess.sign import ElectSign
from gradmerge.preprocess.spectral import TSVM, IsoC, IsoCTS
from gradmerge.preprocess.trim import Breadcrumbs, Trim
from gradmerge.preprocess.unify import Unify
from gradmerge.preprocess.wudi import WUDI

__all__ = [
    "LARV",
    "TSVM",
    "WUDI",
    "AbstractPreprocess",
    "AbstractSelection",
    "Breadcrumbs",
    "Consensus",
    "EarlierCoefficients",
    "ElectSign",
    "FisherScale",
    "IsoC",
    "IsoCTS",
    "MaTS",
    "MagnitudeDrop",
    "Orthogonalise",
    "ParameterCompetition",
    "ProcessedDirections",
    "RandomDrop",
    "RegMean",
    "SelectTop",
    "ShareOfSquares",
    "Site",
    "Trim",
    "Unify",
]
