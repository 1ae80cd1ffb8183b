"""The command line."""

from gradmerge.cli.main import main

__all__ = ["main"]
