"""Results of `gradmerge compare`: rows, intervals, tables, figures and a page."""

from __future__ import annotations

from gradmerge.comparison.intervals import Interval, paired_interval
from gradmerge.comparison.results import Comparison, Outcome, Row

__all__ = ["Comparison", "Interval", "Outcome", "Row", "paired_interval"]
