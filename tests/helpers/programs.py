"""The benchmark programs as modules, without a lasting effect on the other tests."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The program that the test module names in `PROGRAM`; it silences logs and warnings."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setenv("WANDB_MODE", "offline")  # restored; one program sets it
        yield importlib.import_module(request.module.PROGRAM)
    logging.disable(logging.NOTSET)
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.startswith(str(BENCHMARKS)):
            del sys.modules[name]  # short names that another test could mean otherwise
