"""Next-token logits of a batch in parts: those of a large vocabulary may exceed the network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.engine.merged import MergedModel
from gradmerge.engine.reading import NEXT_TOKEN, NOT_INPUTS, reading_of, wide
from gradmerge.objectives import next_token_rows
from gradmerge.objectives.base import UNLABELLED

PART = 64 << 20
"""Bytes of float32 logits, beyond which they are computed in parts of about this size."""
_MOST = 8
"""Parts at most: where weights are streamed, each part merges the head again."""
_KEEP = "logits_to_keep"
Part = tuple[Tensor, "Tensor | None", Tensor]


def in_parts(merged: MergedModel, task: str, batch: Mapping[str, Any]) -> Iterator[Part] | None:
    """Return logits `[rows, vocabulary]`, labels `[rows]` and texts of some positions at a time.

    The third are the numbers within the batch of the texts that the rows belong to, `[rows]`.

    The body of the network runs once. For each part the network's own forward runs on the body's
    output with transformers' `logits_to_keep`, so whatever it does to logits (a bias, a scale, soft
    capping) is done. Products of matrices of other sizes may differ in the last bits.

    None if the logits are small, a batch is read in another way, gradients are wanted, or the
    network does not separate a body from a head in this way: then take all logits at once.
    """
    network: Any = merged.skeleton
    ids: Any = batch.get("input_ids")
    body = body_of(network)
    is_plain = reading_of(network, batch) is NEXT_TOKEN and isinstance(ids, Tensor)
    if body is None or not is_plain or torch.is_grad_enabled():
        return None
    width = getattr(network.config.get_text_config(), "vocab_size", 0)
    positions = _positions(batch)
    size = 4 * width * len(ids) * len(positions)
    if size <= PART:
        return None
    count = min(_MOST, len(positions), math.ceil(size / PART))
    parts = positions.tensor_split(count)
    found = _Found(merged, task, batch, body)
    first = found.first(parts[0], len(ids))
    return None if first is None else found.all(first, parts)


def body_of(network: nn.Module) -> nn.Module | None:
    """Return the part of a network before its head, if its forward can leave out logits."""
    body = getattr(network, getattr(network, "base_model_prefix", "") or "-", None)
    takes = _KEEP in inspect.signature(network.forward).parameters
    return body if takes and isinstance(body, nn.Module) and body is not network else None


def _positions(batch: Mapping[str, Any]) -> Tensor:
    """Return the positions that predict a token which counts in some row of the batch."""
    ids, labels = batch["input_ids"], batch.get("labels")
    counts = torch.ones_like(ids, dtype=torch.bool)
    if (mask := batch.get("attention_mask")) is not None:
        counts = counts & (mask.to(ids.device) != 0)
    if labels is not None:
        counts = counts & (labels.to(ids.device) != UNLABELLED)
    return counts[:, 1:].any(dim=0).nonzero().flatten()


class _Found:
    """The body's output on a batch, and the logits of parts of it."""

    def __init__(
        self, merged: MergedModel, task: str, batch: Mapping[str, Any], body: nn.Module
    ) -> None:
        self._merged, self._task, self._batch = merged, task, batch
        self._body: Any = body
        self._outputs: list[Any] = []
        self._inputs = {
            key: merged.place(value) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in NOT_INPUTS
        }

    def first(self, positions: Tensor, texts: int) -> Tensor | None:
        """Run the body, and return the logits of the first part; None if it has another shape."""
        hook = self._body.register_forward_hook(lambda *given: self._outputs.append(given[-1]))
        try:
            logits = self._logits(positions)
        finally:
            hook.remove()
        is_part = isinstance(logits, Tensor) and len(self._outputs) == 1
        is_part = is_part and tuple(logits.shape[:2]) == (texts, len(positions))
        return logits if is_part else None

    def all(self, first: Tensor, parts: tuple[Tensor, ...]) -> Iterator[Part]:
        """Yield all parts; the body is not run again."""
        yield self._rows(first, parts[0])
        del first
        (output,) = self._outputs
        for positions in parts[1:]:
            self._body.forward = lambda *_, **__: output
            try:
                logits = self._logits(positions)
            finally:
                del self._body.forward
            yield self._rows(logits, positions)

    def _logits(self, positions: Tensor) -> Any:
        output = self._merged(task=self._task, **self._inputs, **{_KEEP: positions})
        return getattr(output, "logits", output)

    def _rows(self, logits: Tensor, positions: Tensor) -> Part:
        given = (self._batch.get(key) for key in ("labels", "attention_mask"))
        labels, mask = (None if v is None else v[:, positions.to(v.device) + 1] for v in given)
        size = logits.shape[:2]
        rows, labels, keep = next_token_rows(wide(logits), labels, mask, shift=False)
        texts = torch.arange(size[0])[:, None].expand(size).flatten()
        return rows, labels, texts if keep is None else texts[keep.cpu()]
