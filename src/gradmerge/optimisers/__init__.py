"""Optimisers that published merges use and torch does not have."""

from gradmerge.optimisers.mofo import MoFO
from gradmerge.optimisers.sam import SAM

__all__ = ["SAM", "MoFO"]
