"""What happens to the directions once, without gradient, before coefficients are put on them."""

from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.drop import RandomDrop
from gradmerge.preprocess.matching import FisherScale, MaTS, RegMean
from gradmerge.preprocess.processed import ProcessedDirections
from gradmerge.preprocess.sign import ElectSign
from gradmerge.preprocess.trim import Breadcrumbs, Trim

__all__ = [
    "AbstractPreprocess",
    "Breadcrumbs",
    "ElectSign",
    "FisherScale",
    "MaTS",
    "ProcessedDirections",
    "RandomDrop",
    "RegMean",
    "Site",
    "Trim",
]
