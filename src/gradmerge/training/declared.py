"""Batches of the size that a task declares, without its data: shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.reading import Pairs, ZeroShot
from gradmerge.training.data import MergeDataModule
from gradmerge.training.examples import Stage, TaskData
from gradmerge.training.loaders import collate

_SEQUENCES = ("causal_lm", "chat", "completion", "instruction", "seq2seq")
_PER_TOKEN = (*_SEQUENCES, "token_classification", "masked_lm")


def declared_batch(
    data: MergeDataModule, task: str, network: nn.Module, stage: Stage
) -> dict[str, Any]:
    """Return the largest batch of a task: texts have `max_length` tokens, or the network's most.

    The numbers of tasks of the kind `tensors` are read, since only they tell their shapes.

    Args:
        data: the data module; nothing of it is set up.
        task: the task.
        network: the network, whose config tells the size of images and the longest text.
        stage: the split: adaptation has batches of `batch_size`, the others of `eval_batch_size`.

    Raises:
        ConfigError: neither the task nor the network's config tells the size of an example.
    """
    count = data.batch_size if stage == "adaptation" else data.eval_batch_size
    own = data.tasks[task]
    if own.kind == "tensors":
        rows = data.splits(task)[stage]
        return collate([rows[i % len(rows)] for i in range(count)])
    if own.kind == "image_classification":
        return {**_images(network, count), "labels": _integers(count)}
    if own.kind == "zero_shot_image_classification":
        classes = len(own.class_names or ())
        if not classes:
            raise ConfigError(f"task {task}: expected class_names, by which its texts are counted.")
        texts = _texts(network, classes * len(own.templates), own.max_length)
        reading = ZeroShot(len(own.templates))
        return {**_images(network, count), **texts, "labels": _integers(count), "reading": reading}
    return _text_batch(own, network, count)


def _text_batch(own: TaskData, network: nn.Module, count: int) -> dict[str, Any]:
    kind = own.kind
    pairs = kind == "embeddings"
    batch: dict[str, Any] = _texts(network, 2 * count if pairs else count, own.max_length)
    shape = batch["input_ids"].shape
    if pairs:
        return {**batch, "reading": Pairs(own.pooling or "mean", own.similarity_scale)}
    batch["labels"] = _integers(*shape) if kind in _PER_TOKEN else _integers(count)
    if kind == "question_answering":
        batch["labels"] = _integers(count, 2)
    if kind == "seq2seq":
        batch |= {f"decoder_{key}": value for key, value in _texts(network, *shape).items()}
    if kind in _SEQUENCES:
        batch["bytes_per_token"] = 1.0
    if own.packs and kind in _SEQUENCES:
        del batch["attention_mask"]
        if kind != "causal_lm":
            batch |= {"position_ids": _integers(*shape), "use_cache": False}
    return batch


def _texts(network: nn.Module, count: int, length: int) -> dict[str, Tensor]:
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None) or length
    ids = _integers(count, min(length, longest))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(network: nn.Module, count: int) -> dict[str, Tensor]:
    config: Any = getattr(network, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ConfigError(
            f"{type(network).__name__}: expected a config with image_size, got none, so the size "
            "of a batch of images is not known before the data are read."
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.zeros(count, channels, height, width)}


def _integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def declared_batches(
    data: MergeDataModule, network: nn.Module, stage: Stage
) -> Mapping[str, Mapping[str, Any]]:
    """Return the declared batch of every task."""
    return {task: declared_batch(data, task, network, stage) for task in data.tasks}
