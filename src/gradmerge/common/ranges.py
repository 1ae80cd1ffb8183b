"""Ranges of numbers in options, by class.

A class checks its own when it is made. A configuration is checked against the table alone, because
drivers, callbacks and the trainer take seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf

from gradmerge.common.errors import ConfigError

Range = tuple[float, float]
_COUNT: Range = (1, inf)
_FROM_0: Range = (0, inf)
_HARNESS = {"num_fewshot": _FROM_0, "limit": _COUNT, "batch_size": _COUNT}
RANGES: Mapping[str, Mapping[str, Range]] = {
    "AbstractFold": {"every_n_steps": _COUNT},
    "Continual": {"earlier_sources": _COUNT, "alpha": (0, 1)},
    "LayerWise": {
        "epochs": _COUNT,
        "steps": _COUNT,
        "batch_size": _COUNT,
        "activation_memory": _FROM_0,
    },
    "CoefficientLogger": {"every_n_validations": _COUNT},
    "EvaluateEvery": {"every_n_validations": _COUNT, **_HARNESS},
    "Harness": _HARNESS,
    "evaluate": _HARNESS,
    # of Lightning: what it would misread, or reject in other words
    "Trainer": {
        "max_steps": (-1, inf),
        "max_epochs": (-1, inf),
        "min_steps": _FROM_0,
        "min_epochs": _FROM_0,
        "gradient_clip_val": _FROM_0,
        "accumulate_grad_batches": _COUNT,
        "check_val_every_n_epoch": _COUNT,
        "log_every_n_steps": _FROM_0,
        "num_sanity_val_steps": (-1, inf),
        "reload_dataloaders_every_n_epochs": _FROM_0,
        "num_nodes": _COUNT,
    },
    "EarlyStopping": {"patience": _FROM_0},
    "ModelCheckpoint": {
        "save_top_k": (-1, inf),
        "every_n_train_steps": _FROM_0,
        "every_n_epochs": _FROM_0,
    },
    "EMAWeightAveraging": {"decay": (0, 1), "update_every_n_steps": _COUNT},
}
"""Least and largest value of options, by the class (or command) that has them."""


def out_of_range(
    kinds: Iterable[str], options: Mapping[str, object]
) -> Iterator[tuple[str, str, float]]:
    """Yield name, expectation and value of each number that is out of its range, or infinite.

    Args:
        kinds: names of a class and of its bases.
        options: values by name; what is not a number does not count.
    """
    for kind in kinds:
        for name, (least, most) in RANGES.get(kind, {}).items():
            value = options.get(name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if not (least <= value <= most and abs(value) < inf):
                words = f"of at least {least:g}" if most == inf else f"from {least:g} to {most:g}"
                yield name, f"a number {words}", value


def require_ranges(
    kind: type | str, options: Mapping[str, object], prefix: str | None = None
) -> None:
    """Reject numbers out of range.

    Args:
        kind: the class that has the options, or its name.
        options: values by name.
        prefix: what the message puts before an option. Default: name of the class and a dot.

    Raises:
        ConfigError: there are some; the message lists all of them.
    """
    names = [kind] if isinstance(kind, str) else [base.__name__ for base in kind.__mro__]
    prefix = f"{names[0]}." if prefix is None else prefix
    wrong = [f"{prefix}{n}: expected {e}, got {v}." for n, e, v in out_of_range(names, options)]
    if wrong:
        raise ConfigError("\n".join(wrong))
