"""Check that the rows of merged heads stand for the same labels in all checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from gradmerge.common.errors import Problem, shorten
from gradmerge.sources.base import Checkpoint

# Classes without labels, whose configs may still have names of some.
_NO_LABELS = re.compile(r"(LM|LMHead\w*|Generation|QuestionAnswering|MultipleChoice|PreTraining)$")
_HEAD = re.compile(r"classif|class_|score|head|logits|out_proj|(^|\.)(cls|fc|output)\.|predict")
_GENERIC = re.compile(r"label[_ ]?\d+$")

Labels = tuple[str, ...]


def check_labels(
    checkpoints: Mapping[str, Checkpoint], is_private: Callable[[str], bool] = lambda _: False
) -> list[Problem]:
    """Return labels and kinds of problem that differ, where heads are merged.

    Names such as LABEL_0 say nothing and are no difference, but deserve a warning.

    Args:
        checkpoints: opened checkpoints by name; the first is the reference.
        is_private: whether a tensor stays with its task.
    """
    merged = [c for c in checkpoints.values() if _has_merged_head(c, is_private)]
    problems = [problem for c in merged for problem in _check_itself(c)]
    named = [(c, labels) for c in merged if (labels := labels_of(c.config or {})) is not None]
    if not named:
        return [*problems, *_check_kind(merged)]
    first, expected = named[0]
    for checkpoint, labels in named[1:]:
        if _plain(labels) != _plain(expected) and len(labels) == len(expected):
            problems.append(_moved(first, expected, checkpoint, labels))
    known = [checkpoint for checkpoint, _ in named]
    problems += [_unnamed(first, expected, c) for c in merged if c not in known]
    return [*problems, *_check_kind(merged)]


def labels_of(config: Mapping[str, Any]) -> Labels | None:
    """Return the labels in the order of a head's rows; None if there are no names, or generic ones.

    Names are taken from `id2label`, or else from `label2id`.
    """
    for found in (_by_row(config.get("id2label")), _by_label(config.get("label2id"))):
        if found and not all(_GENERIC.match(name.casefold()) for name in found):
            return found
    return None


def _by_row(names: Any) -> Labels | None:
    try:
        rows = {int(row): str(name) for row, name in names.items()}
    except (AttributeError, TypeError, ValueError):  # transformers reports it when it reads it
        return None
    return tuple(rows[row] for row in sorted(rows))


def _by_label(rows: Any) -> Labels | None:
    pairs = list(rows.items()) if isinstance(rows, Mapping) else [("", None)]
    if not all(type(row) is int or str(row).isdecimal() for _, row in pairs):
        return None
    return _by_row({row: name for name, row in pairs})


def _plain(labels: Labels) -> Labels:
    return tuple(" ".join(name.casefold().replace("_", " ").split()) for name in labels)


def _has_merged_head(checkpoint: Checkpoint, is_private: Callable[[str], bool]) -> bool:
    """Return whether a tensor that is merged has one row per label."""
    config = checkpoint.config or {}
    classes = config.get("architectures")
    if isinstance(classes, list) and any(_NO_LABELS.search(str(name)) for name in classes):
        return False
    names = config.get("id2label") or config.get("label2id")
    count = len(names) if isinstance(names, Mapping) else config.get("num_labels", 2)
    rows = (count, count + 1)  # detectors have one for "nothing"
    return any(
        info.shape and info.shape[0] in rows and _HEAD.search(name) and not is_private(name)
        for name, info in checkpoint.infos.items()
    )


def _moved(first: Checkpoint, expected: Labels, other: Checkpoint, labels: Labels) -> Problem:
    return Problem(
        "config.id2label",
        f"{other.label}/config.json",
        "id2label",
        f"{_show(expected)} as in {first.label}",
        _show(labels),
        "Rows of the head that stand for different labels would be merged. Reorder its head, or "
        "keep the heads with their tasks (private). If the rows do agree, use the labels of the "
        "reference: allow: [config.id2label].",
    )


def _unnamed(first: Checkpoint, expected: Labels, other: Checkpoint) -> Problem:
    return Problem(
        "config.id2label",
        f"{other.label}/config.json",
        "id2label",
        f"{_show(expected)} as in {first.label}",
        "no names of labels",
        "Whether the rows of its head stand for the same labels cannot be checked.",
        fatal=False,
    )


def _show(labels: Labels) -> str:
    return shorten([f"{row}: {name}" for row, name in enumerate(labels)])


def _check_itself(checkpoint: Checkpoint) -> list[Problem]:
    """Compare `label2id` with `id2label` of one config."""
    config = checkpoint.config or {}
    first = _by_row(config.get("id2label"))
    second = _by_label(config.get("label2id"))
    if first is None or second is None or first == second:
        return []
    if all(_GENERIC.match(name.casefold()) for name in first) or len(second) != len(first):
        return []
    return [
        Problem(
            "config.label2id",
            f"{checkpoint.label}/config.json",
            "label2id",
            f"the inverse of id2label, {_show(first)}",
            _show(second),
            "Programs that read one or the other disagree about its labels; id2label is compared.",
            fatal=False,
        )
    ]


def _check_kind(merged: list[Checkpoint]) -> list[Problem]:
    given = [(c, kind) for c in merged if (kind := (c.config or {}).get("problem_type"))]
    return [
        Problem(
            "config.problem_type",
            f"{other.label}/config.json",
            "problem_type",
            f"{given[0][1]!r} as in {given[0][0].label}",
            repr(kind),
            "Scores of one kind would be averaged with those of another. Keep the heads with their "
            f"tasks (private), or use that of {given[0][0].label}: allow: [config.problem_type].",
        )
        for other, kind in given[1:]
        if kind != given[0][1]
    ]
