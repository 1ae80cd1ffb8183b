"""The command and its options."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from gradmerge.cli.arguments import PlainParser, flag
from gradmerge.cli.compare.methods import REFERENCE
from gradmerge.cli.compare.plan import Plan

_ABOUT = """
Compare methods on a suite: each is tuned on the selection split with the same number of trials,
and its choice is scored once on the test split. Base, experts, uniform average and tuned task
arithmetic are always there. A killed comparison resumes when the same command runs again.
"""
_METHODS = "[NAME=]FILE[+FILE...]"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = PlainParser(
        prog="gradmerge compare",
        description=textwrap.dedent(_ABOUT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example:\n  gradmerge compare suite.yaml configs/methods/tensor.yaml "
        "configs/static/ties.yaml\n      --output compared --seeds 0 1 2",
    )
    add = made.add_argument
    add("suite", metavar="SUITE", help="YAML of `gradmerge fit` with sources, data and trainer")
    add(
        "methods",
        metavar="METHOD",
        nargs="+",
        help=f"{_METHODS}: YAML that completes the suite, as those in configs/methods (learned) "
        "and configs/static",
    )
    add("--output", required=True, help="folder of records, tables and figures")
    add("--trials", type=int, default=5, help="values that are tried of each method (default: 5)")
    add("--seeds", type=int, nargs="+", default=None, help="default: the suite's own")
    add(
        "--tune_seeds",
        choices=("all", "first"),
        default="all",
        help="tune on every seed, or on the first for all (default: all)",
    )
    add(
        "--tune",
        nargs="+",
        default=[],
        metavar="METHOD:option=[v,v]",
        help="tune another option than the learning rate or the scale; or a YAML file of "
        "{METHOD: {option: [v, v]}}",
    )
    add("--select", choices=("score", "loss"), default="score", help="what is best on selection")
    add("--metric", help="score that is compared (default: that by which the tasks are judged)")
    add("--reference", default=None, help=f"row that others are compared with ({REFERENCE})")
    add(
        "--ensemble",
        nargs="?",
        const=True,
        default=False,
        type=flag,
        metavar="true",
        help="also score the mean prediction of all sources",
    )
    add(
        "--examples",
        type=int,
        nargs="+",
        default=[],
        help="also learn with so many adaptation examples per task",
    )
    add(
        "--tune_examples",
        nargs="?",
        const=True,
        default=False,
        type=flag,
        metavar="true",
        help="tune for each number of examples, too (default: the rate chosen with all)",
    )
    add(
        "--also",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="YAML with other test data, as `data.tasks` that complete the suite's: each choice is "
        "also scored on them (corrupted inputs, tasks that no source was trained on)",
    )
    add("--resamples", type=int, default=2000, help="of the bootstrap (default: 2000)")
    add("--workers", type=int, default=1, help="processes; 0: in this one (default: 1)")
    add(
        "--allow_modules",
        nargs="+",
        default=[],
        help="modules outside gradmerge whose components the files may name; importing one runs "
        "its code",
    )
    return made


def compare_command(arguments: Sequence[str]) -> int:
    """Compare methods, and return the exit status: 0, or 1 if a method has failed.

    Raises:
        ConfigError: options, files or data cannot be used; all problems at once.
    """
    given = parser().parse_args(list(arguments))
    plan = Plan(given)
    with plan.alone():
        from gradmerge.cli.compare.run import Run  # imports torch and Lightning
        from gradmerge.cli.compare.workers import prepared

        with prepared():
            return Run(plan).all()
