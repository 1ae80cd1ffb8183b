"""Operators: how directions are combined into one tensor."""

from gradmerge.operators.base import AbstractOperator, Spread, Terms
from gradmerge.operators.linear import Linear

__all__ = ["AbstractOperator", "Linear", "Spread", "Terms"]
