"""The three splits of a task: reading them, cutting a single one, and what they must not share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.failures import is_out_of_memory
from gradmerge.sources.base import tensor_bytes
from gradmerge.training.examples import STAGES, Stage, TaskData, row_of
from gradmerge.training.kinds import KINDS
from gradmerge.training.unread import explain_unread

_ALIASES = {"adaptation": "train", "selection": "validation", "test": "test"}


def load_splits(task: str, data: TaskData, seed: int) -> dict[Stage, Any]:
    """Load the three splits of a task as datasets.

    Raises:
        ConfigError: the data cannot be read, or lack an expected split.
    """
    if isinstance(data.path, Mapping):
        lost = [stage for stage in STAGES if stage not in data.path]
        if lost:
            raise ConfigError(
                f"task {task}: expected the splits {', '.join(STAGES)}; missing {', '.join(lost)}."
            )
        return {stage: data.path[stage] for stage in STAGES}
    import datasets

    try:
        loaded = _read(data)
    except Exception as error:  # every format raises its own
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"task {task}: {explain_unread(data, error)}") from error
    if isinstance(loaded, datasets.Dataset):
        return _cut(task, _without_repetitions(task, loaded, data), data.fractions, seed)
    for names in ({s: s for s in STAGES}, _ALIASES):
        if all(name in loaded for name in names.values()):
            return {stage: loaded[names[stage]] for stage in STAGES}
    if len(loaded) == 1:
        whole = _without_repetitions(task, next(iter(loaded.values())), data)
        return _cut(task, whole, data.fractions, seed)
    raise ConfigError(
        f"task {task}: expected the splits adaptation, selection, test (or train, validation, "
        f"test), got {', '.join(loaded)}. Choose them with "
        "`splits: {adaptation: ..., selection: ..., test: ...}`."
    )


def _read(data: TaskData) -> Any:
    """Read a dataset, or datasets by split: the configured splits if any, else all."""
    import datasets

    folder = Path(str(data.path))
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(data.path))
    load = partial(
        datasets.load_dataset,
        data.path,
        data.name,
        data_files=data.data_files,
        revision=data.revision,
    )
    if data.splits is None:
        loaded = load()
    else:
        loaded = {stage: load(split=data.splits.get(stage, _ALIASES[stage])) for stage in STAGES}
    if data.path == "text":
        return {
            name: lines.select([i for i, text in enumerate(lines["text"]) if text.strip()])
            for name, lines in loaded.items()
        }
    return loaded


def _without_repetitions(task: str, whole: Any, data: TaskData) -> Any:
    """Drop repeated texts, which could end up in several splits."""
    if not KINDS[data.kind].deduplicated:
        return whole
    firsts: dict[str, int] = {}
    for i in range(len(whole)):
        firsts.setdefault(_digest(sorted(whole[i].items())), i)
    kept = list(firsts.values())
    if len(kept) == len(whole):
        return whole
    # here, since `gradmerge learn` reads columns before anything needs Lightning
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(
        f"task {task}: dropped {len(whole) - len(kept)} exact duplicates of {len(whole)} examples, "
        "to keep the splits disjoint."
    )
    return whole.select(kept)


def _cut(task: str, whole: Any, fractions: Sequence[float], seed: int) -> dict[Stage, Any]:
    shuffled = whole.shuffle(seed=seed)
    first = round(len(shuffled) * fractions[0])
    second = first + round(len(shuffled) * fractions[1])
    if min(first, second - first, len(shuffled) - second) < 1:
        raise ConfigError(f"task {task}: too few examples for three splits: {len(shuffled)}.")
    ranges = (range(first), range(first, second), range(second, len(shuffled)))
    return {stage: shuffled.select(part) for stage, part in zip(STAGES, ranges, strict=True)}


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        raw: Any = tensor_bytes(value)
    else:
        raw = value.tobytes() if hasattr(value, "tobytes") else str(value).encode()
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()


def require_disjoint(task: str, splits: Mapping[Stage, Any], columns: Sequence[str]) -> None:
    """Reject splits that share examples, since scores on them would be biased.

    Raises:
        ConfigError: two splits share examples; the message counts them and names the first rows.
    """
    seen: dict[str, tuple[Stage, int]] = {}
    shared: dict[tuple[Stage, Stage], list[str]] = {}
    for stage, dataset in splits.items():
        for i in range(len(dataset)):
            example = row_of(dataset, i, f"task {task}, {stage}")
            if not isinstance(example, Mapping):
                return
            inputs = [name for name in columns if name in example]
            inputs = inputs or [name for name in example if name not in ("label", "labels")]
            key = "".join(_digest(example[name]) for name in inputs)
            first = seen.setdefault(key, (stage, i))
            if first[0] != stage:
                shared.setdefault((first[0], stage), []).append(f"{first[1]} = {i}")
    if shared:
        found = "; ".join(
            f"{len(pairs)} of {a} also in {b} (rows {shorten(pairs, 3)})"
            for (a, b), pairs in shared.items()
        )
        raise ConfigError(
            f"task {task}: the splits share examples, which biases the scores: {found}. Remove "
            "them, or give a single split, which is deduplicated and cut into three; to allow "
            "shared examples, set data.check_disjoint: false."
        )
