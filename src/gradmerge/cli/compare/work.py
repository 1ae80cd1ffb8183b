"""One method on one seed as plain data: the work, its trials, and their records on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gradmerge.cli.compare.methods import Axis, Method
from gradmerge.common.errors import GradmergeError
from gradmerge.common.version import __version__

_FORMAT = 1
"""Raised when the same configuration gives another result."""
Select = Literal["score", "loss"]
Say = Callable[[str, float], None]
"""Called with the end of each trial: what was found, and how many seconds it took."""


def digest(*content: Any) -> str:
    """Return a short hash of plain data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Other:
    """Other test data, on which each choice is scored, too."""

    name: str
    suite: str
    """The suite's file with these data."""
    contents: Mapping[str, Any]
    """Fingerprints of the data."""

    def record(self, final: Path) -> Path:
        """Return the record of a choice on these data, beside its final record."""
        return final.with_name(f"{final.stem}-{digest(self.name, self.contents)}.json")


@dataclass(frozen=True)
class Work:
    """A method on a seed, with all that its results depend on; it is sent to other processes."""

    seed: int
    method: Method
    suite: str
    """The suite's file for this seed."""
    contents: Mapping[str, Any]
    """Fingerprints of sources and data."""
    folder: str
    """Folder of the whole comparison."""
    trials: int
    """Values that are tried."""
    select: Select = "score"
    """Criterion on the selection split."""
    fixed: Any = None
    """The value that another seed has chosen, `{"value": ...}`; None to tune."""
    sizes: tuple[int, ...] = ()
    """Numbers of adaptation examples per task of a learning curve."""
    tune_examples: bool = False
    """Tune for each number of examples."""
    ensemble: bool = False
    others: tuple[Other, ...] = ()
    allow_modules: tuple[str, ...] = ()

    @cached_property
    def axis(self) -> Axis | None:
        """The option that is tuned."""
        return self.method.tuned_by(self.suite, self.trials)

    @property
    def planned(self) -> int:
        """Number of trials that are foreseen."""
        tried = 1 if self.axis is None or self.fixed is not None else len(self.axis.values)
        return tried + len(self.sizes) * (tried if self.tune_examples else 1) * self.method.learns

    @property
    def place(self) -> Path:
        """Folder of the records."""
        return Path(self.folder) / "jobs" / f"seed{self.seed}" / self.method.name

    @property
    def statistics(self) -> Path:
        """Folder of the statistics that methods of the same seed share."""
        return Path(self.folder) / "statistics" / f"seed{self.seed}"

    @cached_property
    def _key(self) -> list[Any]:
        tree = self.method.tree(self.suite)
        return [_FORMAT, __version__, self.seed, tree, self.contents, self.select]

    def key(self, value: Any, examples: int | None) -> str:
        """Return the digest of the full configuration of a trial."""
        option = self.axis.option if self.axis is not None else None
        return digest(*self._key, option, value, examples)

    def options(self, value: Any) -> list[str]:
        """Return the arguments of `fit` for a value of the axis."""
        arguments = self.method.arguments(self.suite)
        allowed = [word for name in self.allow_modules for word in ("--allow_modules+", name)]
        return [*arguments, *self.method.options(self.suite, self.axis, value), *allowed]


@dataclass
class Trial:
    """The result of a value of the axis on the selection split."""

    value: Any
    label: str
    key: str
    examples: int | None = None
    """Adaptation examples per task; None for all."""
    selection: dict[str, float] = field(default_factory=dict)
    """Averages over tasks."""
    score: str = ""
    higher_is_better: bool = True
    step: int | None = None
    """Step of a fit that was kept."""
    seconds: float = 0.0
    opening: float = 0.0
    """Seconds that opening the merge and collecting its statistics took beside."""
    tried: int = 1
    """Merges that were scored."""
    memory: int = 0
    """Bytes of resident memory, at most."""
    trainable: int = 0
    """Numbers that were learned or chosen."""
    adaptation: int = 0
    """Different examples of the adaptation split that were used, of all tasks."""
    labels: bool = False
    """True if their labels were used."""
    error: str = ""
    init: Any = None
    """Chosen coefficients of a merge without learning, as plain data."""
    checkpoint: str = ""
    """File of the learned coefficients, or folder of a driver's merge, within the records."""

    def rank(self, select: Select) -> float:
        """Return the number by which it is chosen; higher is better."""
        name = "loss" if select == "loss" else self.score
        value = self.selection.get(name, math.nan)
        if self.error or math.isnan(value):
            return -math.inf
        value = float(f"{value:.6g}")  # means of float32 differ in the last digits
        return value if select == "score" and self.higher_is_better else -value

    @property
    def found(self) -> str:
        """Its result in words."""
        if self.error:
            return f"failed: {self.error.partition(chr(10))[0]}"
        value = self.selection.get(self.score, math.nan)
        return f"selection {self.score.replace('_', ' ')} {value:.4f}"


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a record; None if there is none, or a damaged one, since a job can be repeated."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def read_final(path: Path) -> dict[str, Any] | None:
    """Return the record of a final score; None if it or its examples are missing."""
    return read_record(path) if path.with_suffix(".npz").is_file() else None


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, in a folder that may not exist yet."""
    from gradmerge.drivers.state import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def write_final(path: Path, content: Mapping[str, Any], examples: Any) -> None:
    """Write a final score, and beside it the scores of single examples, on which it depends."""
    import numpy as np

    from gradmerge.common.atomic import whole_file
    from gradmerge.training.per_example import to_arrays

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path.with_suffix(".npz")) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **to_arrays(examples))
    write_record(path, content)


def score_others(
    work: Work, final: Path, about: Mapping[str, Any], score: Callable[[Other], tuple[Any, Any]]
) -> None:
    """Record a choice's scores on other test data, or why there are none.

    Args:
        work: the method, with the other test data.
        final: the choice's final record.
        about: what each record states beside the scores.
        score: returns the scores on other test data, and those of each example.
    """
    for other in work.others:
        path = other.record(final)
        if read_final(path) is not None:
            continue
        try:
            test, examples = score(other)
        except GradmergeError as error:  # of data that do not fit this method alone
            write_final(path, {**about, "test": {}, "error": str(error)}, {})
        else:
            write_final(path, {**about, "test": test}, examples)


class MissingError(Exception):
    """A trial or final score has no record yet."""
