"""What happens to the directions once, without gradient, before coefficients are put on them."""

from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.drop import MagnitudeDrop, RandomDrop
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
    "TSVM",
    "WUDI",
    "AbstractPreprocess",
    "Breadcrumbs",
    "Consensus",
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
