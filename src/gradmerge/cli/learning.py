"""`fit`, `validate` and `test` through LightningCLI, and what parsers need before they parse."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gradmerge.cli.arguments import underscored, with_model_folder, with_sources
from gradmerge.cli.ending import watch_processes
from gradmerge.cli.explain import COMPONENTS
from gradmerge.cli.method import with_method
from gradmerge.cli.options import LEARNING
from gradmerge.cli.precheck import prechecked
from gradmerge.common.secrets import mask_given


def learn(arguments: Sequence[str] | None, run: bool = True, opens: bool = True) -> Any:
    """Run `fit`, `validate` or `test` through LightningCLI.

    Args:
        arguments: arguments as on the command line. Default: those of the process.
        run: run the command that comes first in the arguments. Otherwise they hold only options,
            and model, data and trainer are built without running anything.
        opens: open the sources. Otherwise `model` is a call that does, and there is no trainer.

    Returns:
        The CLI object with `model`, `datamodule` and `trainer`, or with `job` if there is a driver.
    """
    given = underscored(sys.argv[1:] if arguments is None else arguments)
    given = with_sources(with_model_folder(given))
    # `given` starts with the command, unless it is only parsed
    count = 1 if given and given[0] in LEARNING else 0
    command = given[0] if count else "fit"
    options, method = given[count:], ""
    if count and not {"-h", "--help"} & set(options):
        options, method = with_method(command, options)
    given = [*given[:count], *prechecked(command, options)]

    from gradmerge.cli.configs import refuse_mergekit
    from gradmerge.cli.fit import MergeCLI, SaveConfig
    from gradmerge.cli.imports import allowed_modules, only_components
    from gradmerge.training.data import MergeDataModule
    from gradmerge.training.module import MergeModule

    if run:
        watch_processes()
    refuse_mergekit(given)
    register(given)
    if arguments is None:
        sys.argv[1:] = given  # read by LightningCLI and by the processes of DDP
        if [mask_given(argument) for argument in given] != given:
            os.environ.setdefault("WANDB_X_DISABLE_META", "true")  # it would record them
    quieten()
    MergeCLI.allowed, MergeCLI.opens = allowed_modules(given), opens
    MergeCLI.method = method
    with only_components(MergeCLI.allowed):
        return MergeCLI(
            MergeModule,
            MergeDataModule,
            args=None if arguments is None else given,
            run=run,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "method": method},
            # its table shows a module without parameters other than coefficients
            trainer_defaults={"log_every_n_steps": 1, "enable_model_summary": False},
            parser_kwargs={"prog": "gradmerge"},
        )


def quieten() -> None:
    """Silence Lightning's advertisements, and its advice that does not apply to merges."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_tip)
    for pattern in (
        ".*in eval mode at the start of training.*",  # sources are frozen, so dropout stays off
        ".*does not have many workers.*",  # batches are prepared once and cached
        ".*isinstance.treespec, LeafSpec.*",
        ".*Trying to infer the `batch_size`.*",
        ".*will be overridden by .*configure_optimizers.*",
        ".*args parameter is intended to run from within Python.*",  # as `gradmerge plan` does
    ):
        warnings.filterwarnings("ignore", pattern)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in str(record.msg)


def register(arguments: Sequence[str] = ("--help",)) -> None:
    """Register the short names of components, and docstrings as help texts.

    Args:
        arguments: arguments as on the command line. Docstrings are parsed only if these ask for
            help, because parsing takes most of the start-up time.
    """
    import jsonargparse

    from gradmerge.cli.configs import require_text

    require_text(arguments)
    for name in (*COMPONENTS, "mergekit", "optimisers"):
        importlib.import_module(f"gradmerge.{name}")
    read_old_paths()
    asked = any(
        argument in ("-h", "--help") or argument.endswith(".help") or "--print_config" in argument
        for argument in arguments
    )
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=asked)


def read_old_paths() -> None:
    """Make the parser translate class paths of earlier versions in configurations."""
    import jsonargparse
    import yaml

    from gradmerge.common.files import require_bounded
    from gradmerge.common.spec import current_path, modernise

    load = jsonargparse.get_loader("yaml")

    def load_modernised(text: str) -> Any:
        require_bounded(text)
        try:
            found = modernise(load(text))
        except ValueError as error:  # a date such as 2020-13-45, or a number of 5,000 digits
            raise yaml.YAMLError(str(error)) from error
        return current_path(found) if isinstance(found, str) else found

    if load.__name__ != load_modernised.__name__:
        jsonargparse.set_loader("yaml", load_modernised, (yaml.YAMLError,))
