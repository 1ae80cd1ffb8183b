"""Every kind of bad input ends in a clear error or a right result, and loses nothing.

CI runs every fortieth kind and those that found a fault; `pytest -m "nightly or not nightly"
tests/faults` runs them all, and `python tests/faults/count_faults.py` counts them per class.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_kinds import KINDS
from fault_runner import ACCEPTED, Kind, run_kind, start_server
from fault_world import build_world

SHARE = 40
# Kinds that found a fault once.
FOUND = (
    "checkpoint/task-unknown-source-export",
    "classes/id2label-5",
    "compact/scales-empty",
    "config/all-architectures-{}-merge",
    "config/all-attention_bias-true-merge",
    "config/all-model_type-5-merge",
    "config/all-num_hidden_layers-0-merge",
    "config/all-num_hidden_layers-1000000000-merge",
    'data/kind-"tensors"',
    "data/processor-size",
    'data/source-"nope"',
    "fit-option/data.batch_size-null",
    "option/Constant.value-null",
    "output/fit-into-a-source",
    'recipe/private-["."]',
    "statistics/tensors-flat",
    "tokenizer/a-folder-union",
    "tokenizer/more-than-rows",
    "torch-file/names-of-numbers",
    "torch-file/sparse",
)


def _marked(number: int, kind: Kind) -> pytest.param:
    chosen = number % SHARE == 0 or kind.name in FOUND
    marks = [] if chosen else [pytest.mark.nightly]
    return pytest.param(kind, id=kind.name.encode("ascii", "replace").decode(), marks=marks)


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = build_world(tmp_path_factory.mktemp("faults") / "world")
    start_server()
    return world


@pytest.mark.parametrize("kind", [_marked(i, kind) for i, kind in enumerate(KINDS)])
def test_kind_is_refused_or_right(kind: Kind, faultless: Path, tmp_path: Path) -> None:
    outcome = run_kind(kind, faultless, tmp_path)
    assert outcome.kind in ACCEPTED, f"{outcome.kind}, status {outcome.status}\n{outcome.printed}"


def test_there_are_at_least_500_kinds_of_different_names() -> None:
    names = {kind.name for kind in KINDS}
    assert len(names) == len(KINDS) >= 500
    assert names.issuperset(FOUND)
