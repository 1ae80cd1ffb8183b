"""Operators: how directions are combined."""

from gradmerge.operators.base import AbstractOperator, Spread, Terms
from gradmerge.operators.compiled import CompiledLinear
from gradmerge.operators.linear import Linear

__all__ = ["AbstractOperator", "CompiledLinear", "Linear", "Spread", "Terms"]
