"""Kinds with a class per text, image or word."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.engine.reading import ZeroShot
from gradmerge.objectives.base import UNLABELLED
from gradmerge.training.kinds.base import (
    AbstractKind,
    Classified,
    Example,
    Sequences,
    Split,
    Tally,
    as_example,
)
from gradmerge.training.labels import Labels, column_of
from gradmerge.training.loaders import Shared


def labels_of(split: Split) -> Labels | None:
    """Return the class numbers of a split; None if it has no column of labels."""
    name = split.columns.get("label")
    return None if name is None else Labels.read(split.rows, name, split.where)


class TextClassification(AbstractKind):
    """A text and its class number."""

    roles: ClassVar = {"text": ("text", "content", "sentence")}
    optional: ClassVar = {"label": ("label",)}
    predicts = ("classes",)

    @override
    def prepare(self, split: Split) -> Any:
        column = split.columns["text"]
        for index, text in enumerate(column_of(split.rows, column)):
            split.text({column: text}, "text", index)
        convert = partial(self._tokens, replace(split, network=None), column)
        return Classified(split, convert, labels_of(split))

    @staticmethod
    def _tokens(split: Split, column: str, row: Mapping[str, Any]) -> Example:
        found = split.tokenize(row[column], return_tensors="pt")
        return {key: value[0] for key, value in found.items()}


class AbstractImages(AbstractKind):
    """Images and their class numbers."""

    roles: ClassVar = {"image": ("image", "img")}
    optional: ClassVar = {"label": ("label",)}
    input = "pixel_values"
    deduplicated = False


class ImageClassification(AbstractImages):
    """An image and its class number."""

    predicts = ("classes",)
    processor = "image_processor"

    @override
    def prepare(self, split: Split) -> Any:
        convert = partial(_pixels, split.processor, split.columns["image"])
        return Classified(split, convert, labels_of(split))


def _pixels(processor: Any, column: str, row: Mapping[str, Any]) -> Example:
    image = row[column]
    image = image.convert("RGB") if getattr(image, "mode", "RGB") != "RGB" else image
    return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]}


class ZeroShotImageClassification(AbstractImages):
    """An image and its class number; classes are described by texts (CLIP, arXiv 2103.00020).

    The texts are `templates` filled with `class_names`, by default those of the label column.
    """

    predicts = ("the similarity of images and texts",)
    processor = "both"

    @override
    def prepare(self, split: Split) -> Any:
        names, labels = self._classes(split), labels_of(split)
        if labels is not None:
            labels.require_below(len(names))
        texts = [template.format(name) for name in names for template in split.data.templates]
        # to full length, as these networks were trained (SigLIP has no mask)
        length = getattr(split.processor.tokenizer, "model_max_length", 0)
        padding = "max_length" if length <= 1024 else True
        tokens = split.processor.tokenizer(
            texts, padding=padding, truncation=True, return_tensors="pt"
        )
        shared = {key: Shared(value) for key, value in tokens.items()}
        digest = hashlib.sha256(tokens["input_ids"].numpy().tobytes()).hexdigest()
        shared["reading"] = Shared(ZeroShot(len(split.data.templates), digest))
        convert = partial(_pixels, split.processor.image_processor, split.columns["image"])
        return Classified(split, convert, labels, shared)

    @staticmethod
    def _classes(split: Split) -> list[str]:
        if split.data.class_names:
            return list(split.data.class_names)
        features = getattr(getattr(split.rows, "dataset", split.rows), "features", None) or {}
        names = getattr(features.get(split.columns.get("label", "")), "names", None)
        if not names:
            raise ConfigError(
                f"{split.where}: expected the names of the classes, by which a text describes each "
                "of them, got none. Set class_names, in the order of the class numbers."
            )
        return list(names)


class TokenClassification(AbstractKind):
    """Words and their class numbers; the first token of each word has a loss."""

    roles: ClassVar = {"tokens": ("tokens", "words")}
    optional: ClassVar = {"tags": ("ner_tags", "tags", "pos_tags", "labels")}
    predicts = ("a class per token",)

    @override
    def prepare(self, split: Split) -> Any:
        labelled = "tags" in split.columns
        tally, examples, largest = Tally(loss_tokens=0), [], []
        for index, row in split:
            words, tags = split.get(row, "tokens"), split.get(row, "tags")
            with split.preparing(index):
                found = split.tokenize(list(words), is_split_into_words=True)
            places = found.word_ids()
            seen = [place for place in places if place is not None]
            tally.truncated += len(words) > len(set(seen))
            tally.tokens += len(places)
            example = as_example(**found)
            if labelled:
                read = Labels.read(
                    [{"tags": tag} for tag in tags], "tags", f"{split.where}, row {index}"
                )
                if len(read.values) != len(words):
                    raise ConfigError(
                        f"{split.where}, row {index}: expected a tag per word, got {len(words)} "
                        f"words and {len(read.values)} tags. Repair or remove it."
                    )
                labels = [
                    UNLABELLED if place is None or place == before else read.values[place]
                    for place, before in zip(places, [None, *places[:-1]], strict=True)
                ]
                example.update(as_example(labels=labels))
                count = sum(label != UNLABELLED for label in labels)
                tally.loss_tokens = (tally.loss_tokens or 0) + count
                tally.without_loss += count == 0
                largest.append(max(labels, default=UNLABELLED))
            examples.append(example)
        tally.examples = len(examples)
        if not labelled:
            tally.loss_tokens = None
            return Sequences(examples, tally)
        return Sequences(
            examples, tally, labels=Labels(split.where, split.columns["tags"], largest)
        )
