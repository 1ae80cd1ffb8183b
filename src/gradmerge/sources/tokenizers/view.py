"""Checkpoints read with the rows of another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import Problem
from gradmerge.common.files import read_json
from gradmerge.sources.base import Checkpoint, TensorInfo, View
from gradmerge.sources.files import write_json
from gradmerge.sources.modules import copy_modules
from gradmerge.sources.side_files import copy_files
from gradmerge.sources.tokenizers.files import TOKENIZER_FILES
from gradmerge.sources.tokenizers.ids import with_ids, with_size
from gradmerge.sources.tokenizers.vocabulary import Alignment, Vocabulary

_PART = 4096


class VocabularyView(View):
    """A checkpoint whose embeddings, heads and their biases have one row per token of the merge.

    All other tensors are unchanged. Its folder is a temporary one: a copy of the small files, with
    the merge's tokenizer and its token ids in the configs.

    Args:
        alignment: the vocabulary of the merge.
        name: name of the checkpoint in `alignment`.
    """

    def __init__(self, alignment: Alignment, name: str) -> None:
        super().__init__(alignment.checkpoints[name])
        self.alignment = alignment
        self._name = name
        self._axes = alignment.axes[name]
        rows = alignment.rows[name]
        own = torch.arange(alignment.size)
        self._is_own = alignment.heights[name] == alignment.size and torch.equal(rows, own)

    @cached_property
    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        infos = dict(self.inner.infos)
        for name, axis in self._axes.items():
            shape = list(infos[name].shape)
            shape[axis] = self.alignment.size
            infos[name] = replace(infos[name], shape=tuple(shape))
        return infos

    @cached_property
    @override
    def config(self) -> Mapping[str, Any] | None:
        config = self.inner.config
        if config is None:
            return None
        found = self.alignment
        resized = with_size(config, found.size)
        return with_ids(resized, found.owner_config, found.moved(self._name), found.size)

    @cached_property
    @override
    def folder(self) -> Path | None:
        own = self.inner.folder
        if own is None:
            return None
        number = list(self.alignment.checkpoints).index(self._name)  # a name may have slashes
        folder = self.alignment.folder / str(number)
        folder.mkdir()
        copy_files(self.alignment.tokenizer_folder, folder, ["*"])
        copy_files(own, folder, ignored=TOKENIZER_FILES)
        copy_modules(own, folder)
        if self.config is not None:
            write_json(folder / "config.json", self.config, spelled=True)
        generation = read_json(own / "generation_config.json")
        if generation is not None:
            found = self.alignment
            theirs = found.checkpoints[found.owner].folder
            owner = (theirs and read_json(theirs / "generation_config.json")) or {}
            changed = with_ids(generation, owner, found.moved(self._name), found.size)
            write_json(folder / "generation_config.json", changed)
        return folder

    @property
    @override
    def tokenizer_folder(self) -> Path | None:
        return self.alignment.tokenizer_folder

    @override
    def changes(self, name: str) -> bool:
        return name in self._axes and not self._is_own

    @override
    def form(self, name: str) -> Tensor:
        found = self.alignment
        holders = [holder for holder, axes in found.axes.items() if name in axes]

        def read(holder: str) -> Tensor:
            return found.checkpoints[holder].read(name).movedim(found.axes[holder][name], 0)

        mine = read(self._name)
        dtypes = [found.checkpoints[holder].infos[name].dtype for holder in holders]
        dtype = reduce(torch.promote_types, dtypes)
        wide = torch.promote_types(dtype, torch.float32)
        formed = torch.zeros((found.size, *mine.shape[1:]), dtype=dtype)
        rows = found.rows[self._name]
        for ids in (rows >= 0).nonzero().squeeze(1).split(_PART):
            formed[ids] = mine[rows[ids]].to(dtype)
        for lost, donors in found.missing(self._name, holders):
            tensors = [read(donor) for donor in donors]
            for ids in lost.split(_PART) if donors else ():
                total = torch.zeros((len(ids), *mine.shape[1:]), dtype=wide)
                for donor, tensor in zip(donors, tensors, strict=True):
                    total += tensor[found.rows[donor][ids]].to(wide)
                formed[ids] = (total / len(donors)).to(dtype)
        if not found.named.all():
            count = int(found.named.sum())
            first = bool(found.named[:count].all())  # then no copy is made
            real = formed[:count] if first else formed[found.named]
            formed[~found.named] = real.mean(dim=0, dtype=wide).to(dtype)
        return formed.movedim(0, self._axes[name]).contiguous()


def align(
    vocabulary: Vocabulary, checkpoints: Mapping[str, Checkpoint], trust_remote_code: bool = False
) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """Return views of all checkpoints on one vocabulary, and warnings.

    Arguments and errors are those of `Alignment`.
    """
    alignment = Alignment(vocabulary, checkpoints, trust_remote_code)
    return {name: VocabularyView(alignment, name) for name in checkpoints}, alignment.warnings


def alignment_of(checkpoint: Checkpoint) -> Alignment | None:
    """Return the vocabulary that a checkpoint is read with; None for its own."""
    while isinstance(checkpoint, View) and not isinstance(checkpoint, VocabularyView):
        checkpoint = checkpoint.inner  # a view that reorders units
    return checkpoint.alignment if isinstance(checkpoint, VocabularyView) else None
