"""Frozen zero-shot heads: embeddings of the texts that describe classes, computed once.

A network of images and texts that computes `s * cos(image, text) + b` (CLIP, arXiv 2103.00020;
SigLIP, arXiv 2303.15343) classifies images by a matrix of text embeddings. If its text tower is not
learned, that matrix is a constant of the fit, and a step runs the vision tower only.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gradmerge.alignment.views import original_of
from gradmerge.common.errors import shorten
from gradmerge.common.progress import Progress
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.reading import NOT_INPUTS, Rows, ZeroShot, reading_of, wide

_CHUNK = 256
"""Texts that run through the text tower at a time."""
Inputs = Mapping[str, Tensor]


def rows_by_head(
    merged: MergedModel, task: str, batch: Mapping[str, Any], source: str | None = None
) -> Rows | None:
    """Return the rows of a zero-shot batch by a frozen head; the text tower does not run.

    Scale and bias of the logits are the network's, merged like its other tensors.

    Args:
        merged: the model; with `source` it has that source's weights.
        task: the task.
        batch: its batch.
        source: the source that is asked, None for the merge.

    Returns:
        Logits, labels and None; or None if the whole network must run: its text tower is learned or
        private, it computes its logits in another way, or the batch is of another kind.
    """
    reading = reading_of(merged.skeleton, batch)
    if not isinstance(reading, ZeroShot) or not reading.texts:
        return None
    inputs = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    images = {k: merged.place(v) for k, v in inputs.items() if k.startswith("pixel_")}
    texts = {key: value for key, value in inputs.items() if key not in images}
    tower = _tower(merged, texts, images)
    if not tower or (source is None and _is_learned(merged, tower, len(texts["input_ids"]))):
        return None
    head = _head(merged, reading, texts, tower, source)
    network: Any = merged.skeleton
    network.forward = lambda **given: _logits(network, given, head)
    try:
        logits = merged(task=task, **images)
    finally:
        del network.forward
    return logits, batch.get("labels"), None


def _logits(network: Any, images: Inputs, head: Tensor) -> Tensor:
    """Return `s * cos(image, class) + b`, `[images, classes]`."""
    features = wide(network.get_image_features(**images).pooler_output)
    logits = wide(network.logit_scale).exp() * functional.normalize(features, dim=-1) @ head.mT
    bias = getattr(network, "logit_bias", None)
    return logits if bias is None else logits + wide(bias)


def _embed(network: Any, texts: Inputs) -> Tensor:
    features = wide(network.get_text_features(**texts).pooler_output)
    return functional.normalize(features, dim=-1)


def _tower(merged: MergedModel, texts: Inputs, images: Inputs) -> tuple[str, ...]:
    """Return the names of the tensors that embeddings of texts depend on.

    The network itself is asked, on one image and two texts: () if its logits are not those of a
    frozen head.
    """
    if "tower" not in merged.heads:
        merged.heads["tower"] = _inspect(merged, texts, images)
    found: tuple[str, ...] = merged.heads["tower"]
    return found


@torch.no_grad()
def _inspect(merged: MergedModel, texts: Inputs, images: Inputs) -> tuple[str, ...]:
    network: Any = merged.skeleton
    first = next(iter(merged.plan.sources))
    names: dict[str, None] = {}

    def read(name: str) -> Tensor:
        names[name] = None
        return merged.plan.read(first, name)

    texts = {key: merged.place(value[:2]) for key, value in texts.items()}
    images = {key: value[:1] for key, value in images.items()}
    with torch.autocast(merged.device.type, enabled=False), merged.as_weights(read):
        try:
            head = _embed(network, texts)
            tower = tuple(names)
            found = _logits(network, images, head)
        except AttributeError:  # other outputs, or logits without such a scale
            return ()
        expected = wide(network(**texts, **images).logits_per_image)
    tolerance = torch.finfo(merged.dtype).eps ** 0.5 * float(expected.abs().max())
    return tower if torch.allclose(found, expected, rtol=0, atol=tolerance) else ()


def _is_learned(merged: MergedModel, tower: tuple[str, ...], texts: int) -> bool:
    """Return whether the text tower of the merge changes during a fit, with a warning once."""
    plan, fixed = merged.plan, merged.state.fixed
    shared = plan.tensors.keys() - (fixed.keys() - plan.ranks.keys())
    own = [name for name in tower if name in plan.private or name in shared]
    if own and "warned" not in merged.heads:
        merged.heads["warned"] = True
        patterns = dict.fromkeys(f"{name.partition('.')[0]}.*" for name in tower)
        frozen = ", ".join(f"'{pattern}': origin" for pattern in patterns)
        warnings.warn(
            f"zero-shot heads: the text tower is learned ({shorten(own, 2)}), so all {texts} texts "
            "that describe classes run in every step.\nTo keep the base's, and compute the heads "
            f"once: recipe.frozen: {{{frozen}}}.",
            stacklevel=2,
        )
    return bool(own)


def _head(
    merged: MergedModel,
    reading: ZeroShot,
    texts: Inputs,
    tower: tuple[str, ...],
    source: str | None,
) -> Tensor:
    """Return the normalised embeddings of the classes, `[classes, width]`, in float32 or wider."""
    owner = _owner(merged, tower, source)
    key = (reading.texts, reading.templates, owner, merged.dtype, merged.device)
    if key not in merged.heads:
        merged.heads[key] = _build(merged, reading, texts, source)
    found: Tensor = merged.heads[key]
    return found


def _owner(merged: MergedModel, tower: tuple[str, ...], source: str | None) -> Hashable:
    """Name the text tower, so that what shares that of the base shares its heads."""
    plan = merged.plan
    if source is None:
        values = tuple(merged.state.fixed.get(name, 0.0) for name in tower)
        at_base = plan.recipe.resolved_origin == "base" and not any(values)
        return "base" if at_base else values
    if plan.base is None:
        return ("source", source)
    itself = original_of(plan.serving[source])
    stored = [(itself.stored_as(name), plan.base.stored_as(name)) for name in tower]
    is_base = all(own == base and own is not None for own, base in stored)
    return "base" if is_base else ("source", source)


@torch.no_grad()
def _build(merged: MergedModel, reading: ZeroShot, texts: Inputs, source: str | None) -> Tensor:
    state, count = merged.state, len(texts["input_ids"])

    def fixed(name: str) -> Tensor | None:
        if name not in merged.plan.tensors:
            return None
        return merged.build(name, state.own(name), merged.dtype_of(name))

    weights = merged.as_weights(fixed) if source is None else merged.as_source(source, own=True)
    rows = []
    with (
        torch.inference_mode(False),  # later steps differentiate through products with it
        torch.autocast(merged.device.type, enabled=False),
        weights,
        Progress("making zero-shot heads", count, "texts") as progress,
    ):
        for at in range(0, count, _CHUNK):
            chunk = {k: merged.place(v[at : at + _CHUNK]) for k, v in texts.items()}
            rows.append(_embed(merged.skeleton, chunk))
            progress.advance(len(rows[-1]))
        return reading.centres(torch.cat(rows))
