"""A budget of labels: a few examples of a split keep their labels, the others lose them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradmerge.common.errors import ConfigError
from gradmerge.objectives.base import HIDDEN, UNLABELLED
from gradmerge.training.labels import Labels

# Added before rounding down, as sums of shares are not exact.
_ROUNDING = 1e-9


class LabelBudget(Dataset[dict[str, Any]]):
    """Prepared examples of which only some keep their labels.

    Tokens that had a label still count as decisions, so that a teacher is followed on them; their
    label is `HIDDEN`.

    Args:
        examples: the prepared examples of a split.
        kept: indices of those that keep their labels.
    """

    def __init__(self, examples: Any, kept: Sequence[int]) -> None:
        self.examples, self.kept = examples, sorted(kept)
        known = set(kept)
        self.hidden = [i for i in range(len(examples)) if i not in known]
        """Indices of the examples without labels."""
        self.labelled = bool(kept) and getattr(examples, "labelled", True)
        self._known = known

    def __len__(self) -> int:
        return len(self.examples)

    def __str__(self) -> str:
        return f"{len(self.kept):,} of {len(self):,} examples keep their labels"

    def __getitem__(self, index: int) -> Any:
        example = self.examples[index]
        if index in self._known or "labels" not in example:
            return example
        return {**example, "labels": _hidden(example["labels"])}


def _hidden(labels: Any) -> Any:
    if not isinstance(labels, Tensor):
        return UNLABELLED
    if labels.dim() == 0:
        return torch.full_like(labels, UNLABELLED)
    return torch.where(labels == UNLABELLED, labels, HIDDEN)


def choose(
    examples: Any, labels: Labels | None, count: int, generator: torch.Generator, where: str
) -> list[int]:
    """Return the examples that keep their labels: the first of a random order.

    With class numbers, classes take turns in that order, so that they are equally many as far as
    there are enough. More labels include all of fewer.

    Args:
        examples: the prepared examples.
        labels: their class numbers, if they have classes.
        count: number of labels.
        generator: source of the order.
        where: task and split, for error messages.

    Raises:
        ConfigError: the labels are part of what is predicted, as which texts are a pair.
    """
    order = torch.randperm(len(examples), generator=generator).tolist()
    if labels is not None:
        values = labels.values
        turn: dict[int, int] = {}
        places = {}
        for index in order:
            if values[index] != UNLABELLED:
                places[index] = turn[values[index]] = turn.get(values[index], -1) + 1
        return sorted(places, key=lambda index: places[index])[:count]
    first = examples[0]
    if "labels" not in first:
        if "reading" in first:
            raise ConfigError(
                f"{where}: expected labels that can be left out, got pairs of texts, each of which "
                "is the label of the other. Remove labels_per_task, or give a column of scores."
            )
        return []
    found: list[int] = []
    for index in order:
        if len(found) == count:
            break
        if _is_labelled(examples[index]["labels"]):
            found.append(index)
    return found


def _has_classes(examples: Any) -> bool:
    """Return whether the label of an example is one class number."""
    label = examples[0].get("labels")
    return isinstance(label, (int, Tensor)) and torch.as_tensor(label).dim() == 0


def _is_labelled(labels: Any) -> bool:
    return bool((torch.as_tensor(labels) != UNLABELLED).any())


def mixed(
    budget: LabelBudget, share: float, task: str, at: int, drawn: Callable[[str, int, int], int]
) -> int:
    """Return the index of the example at a place of a stream that mixes both kinds of examples.

    Of the first n examples, `floor(n share)` have labels, for every n.

    Args:
        budget: the examples.
        share: share of examples with labels, or that of the split if it is larger.
        task: name of the task.
        at: the place.
        drawn: function from a name, a place and a number of examples to a place in their order,
            which is shuffled anew for every lap.
    """
    kept, hidden = budget.kept, budget.hidden
    share = max(share, len(kept) / len(budget)) if kept else 0.0
    before = int(at * share + _ROUNDING)
    if not hidden or int((at + 1) * share + _ROUNDING) > before:
        return kept[drawn(f"{task}, labelled", before, len(kept))]
    return hidden[drawn(f"{task}, unlabelled", at - before, len(hidden))]


def within_budget(
    given: int | Mapping[str, int] | None,
    task: str,
    examples: Any,
    labels: Labels | None,
    seed: int,
) -> Any:
    """Return a task's adaptation examples within a budget of labels; themselves if all are.

    Args:
        given: number of labels per task, or by task; None, as for tasks without a number, for all.
        task: name of the task.
        examples: its prepared examples.
        labels: their labels, if they have been read.
        seed: seed of the choice, which depends on the task, too.
    """
    count = given.get(task) if isinstance(given, Mapping) else given
    if count is None:
        return examples
    name = zlib.crc32(task.encode())
    generator = torch.Generator().manual_seed((seed * 1_000_003 + name) % 2**63)
    known = labels if _has_classes(examples) else None
    kept = choose(examples, known, count, generator, f"task {task}, adaptation")
    return examples if len(kept) < count else LabelBudget(examples, kept)
