"""Base classes of loss terms and regularisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from gradmerge.common.errors import ConfigError
from gradmerge.common.patterns import matches

# Label of a position without a label, the convention of torch and transformers.
UNLABELLED = -100

# Label in a batch of a position that is predicted, but whose label a budget has taken away: its row
# is kept, with the label -100.
HIDDEN = -200


@dataclass(frozen=True)
class Leading:
    """The most probable classes of each row of a model, and the rest of its distribution."""

    log_p: Tensor
    """Log-probabilities `[rows, k]`, in descending order."""
    classes: Tensor
    """Their classes, `[rows, k]`."""
    log_rest: Tensor
    """Log-probability of all other classes together, `[rows]`; -inf if there are none."""

    @classmethod
    def of(cls, logits: Tensor, count: int, temperature: float = 1.0) -> Leading:
        """Return the `count` most probable classes of logits `[rows, classes]`, or all classes."""
        every = functional.log_softmax(logits / temperature, dim=-1)
        log_p, classes = every.topk(min(count, every.shape[-1]), dim=-1)
        return cls(log_p, classes, every.scatter(-1, classes, -torch.inf).logsumexp(dim=-1))


@dataclass(frozen=True)
class Wanted:
    """Outputs of the task's own source that terms compare with."""

    logits: bool = False
    """All logits."""
    leading: frozenset[tuple[int, float]] = frozenset()
    """The k most probable classes at temperature T, for each (k, T)."""
    layers: tuple[str, ...] = ()
    """Outputs of the modules whose names these regular expressions match."""

    def __or__(self, other: Wanted) -> Wanted:
        """Return what either wants."""
        layers = tuple(dict.fromkeys((*self.layers, *other.layers)))
        return Wanted(self.logits or other.logits, self.leading | other.leading, layers)


@dataclass(frozen=True)
class Predictions:
    """Predictions of one batch: one row per decision (an image, a text, or a token to predict)."""

    logits: Tensor
    """Logits `[rows, classes]`, float32 or wider."""
    labels: Tensor | None = None
    """Labels `[rows]`, if the task has any; -100 in rows without one."""
    teacher: Tensor | None = None
    """Logits of the task's own source on the same rows, if a term needs them."""
    shared: bool = False
    """True if every process holds rows of one global batch, over which the mean is taken. Terms
    then call collectives: all processes run the same tasks in the same order, possibly with no
    rows."""
    ensemble: Sequence[Tensor] | None = None
    """Logits of each source on the same rows, if a term needs them."""
    leading: Mapping[tuple[int, float], Leading] = field(default_factory=dict)
    """Most probable classes of the task's own source by (k, T), if its logits are not kept."""
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs of modules by name, `[tokens, width]` without padding, if a term needs them."""
    teacher_hidden: Mapping[str, Tensor] = field(default_factory=dict)
    """The same of the task's own source."""

    def leading_of_teacher(self, count: int, temperature: float) -> Leading:
        """Return the most probable classes of the task's own source."""
        found = self.leading.get((count, temperature))
        if found is not None:
            return found
        assert self.teacher is not None
        return Leading.of(self.teacher, count, temperature)


def outermost(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    r"""Return the names that an expression matches, without those below another of its matches.

    Args:
        patterns: regular expressions.
        names: names of modules, in the order of the network.

    Examples:
        >>> outermost([r"layer\.\d"], ["layer.0", "layer.0.norm", "layer.1", "head"])
        ['layer.0', 'layer.1']
    """
    found: dict[str, None] = {}
    names = list(names)
    for pattern in patterns:
        matching = [name for name in names if matches([pattern], name)]
        for name in matching:
            if not any(name.startswith(f"{other}.") for other in matching):
                found[name] = None
    return [name for name in names if name in found]


class AbstractTerm(ABC):
    """Loss on the predictions of one task."""

    weight: float

    @property
    def needs_labels(self) -> bool:
        """True if the task must have labels."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """True if the task's own source must run on the same batch."""
        return False

    @property
    def wanted(self) -> Wanted:
        """The outputs of the task's own source that the term reads; by default, its logits."""
        return Wanted(logits=self.needs_teacher)

    @property
    def needs_ensemble(self) -> bool:
        """True if all sources must run on the same batch."""
        return False

    @property
    def adds_over_rows(self) -> bool:
        """True if the loss of a batch is the mean of its rows' own losses, without other inputs.

        Evaluation may then give it some rows at a time.
        """
        return False

    @abstractmethod
    def loss(self, predictions: Predictions) -> Tensor:
        """Return the mean over rows, a scalar, before `weight`; zero, not NaN, without rows.

        With `predictions.shared` the mean is over the rows of all processes, whose gradients are
        averaged afterwards.
        """


class AbstractRegulariser(ABC):
    """Penalty on the coefficients, independent of data."""

    weight: float

    @abstractmethod
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """Return a scalar, before `weight`.

        Args:
            coefficients: `c` of each learned tensor by name, `[sources, *slot]`.
            start: coefficients at the start of training.
        """


def next_token_rows(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Flatten predictions to rows and drop positions that are not to be predicted.

    Args:
        logits: `[batch, classes]` or `[batch, tokens, vocab]`.
        labels: `[batch]` or `[batch, tokens]`; -100 marks positions without a label.
        mask: `[batch, tokens]`, 0 on padding.
        shift: True if position t predicts token t + 1 (causal language models).

    Returns:
        Logits `[rows, classes]`, labels `[rows]`, and a mask of the kept rows (None if all are
        kept), by which the logits of a teacher can be filtered in the same way.

    Raises:
        ConfigError: the logits have neither two nor three axes.
    """
    if logits.dim() == 2:
        return logits, labels, None
    if logits.dim() != 3:
        raise ConfigError(
            f"expected logits of shape [batch, classes] or [batch, tokens, vocab], got "
            f"{tuple(logits.shape)}."
        )
    if shift:
        labels = None if labels is None else labels[:, 1:]
        mask = None if mask is None else mask[:, 1:]
    keep = None if mask is None or bool(mask.all()) else mask.reshape(-1) != 0
    if labels is not None:
        labels = labels.reshape(-1)
        labelled = labels != UNLABELLED
        if not bool(labelled.all()):
            keep = labelled if keep is None else keep & labelled
    length = logits.shape[1] - shift
    if keep is None:
        return logits[:, :length].flatten(0, 1), labels, None
    # The rows are taken from the whole tensor, of which no shifted copy is made.
    index = keep.nonzero()[:, 0]
    index = index + index // length * (logits.shape[1] - length)
    rows = logits.flatten(0, 1).index_select(0, index.to(logits.device))
    return rows, None if labels is None else labels[keep], keep
