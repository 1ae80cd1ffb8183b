"""Drivers: how the optimum is sought, where it is not one `trainer.fit`."""

from gradmerge.drivers.base import AbstractDriver, Job, Output

__all__ = ["AbstractDriver", "Job", "Output"]
