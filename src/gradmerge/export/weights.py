"""The weights of an exported folder: its tensors, and the files that they are split into."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.export.writer import Entry, entries_of, write_safetensors
from gradmerge.sources.files import write_json

SHARD_SIZE = 5_000_000_000


def merged_entries(
    state: FitState, buffers: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[Entry]:
    """Yield the merged tensors and buffers of a merge.

    Args:
        state: the opened recipe with its coefficients.
        buffers: buffers recomputed on data, by name; others by the recipe's rule.
        dtype: dtype of the merged tensors. Default: that of each reference tensor.
    """
    plan = state.plan
    state = state.at({key: value.detach().cpu() for key, value in state.raw.items()})
    infos = plan.reference.infos
    for name in plan.tensors:
        kind = dtype or infos[name].dtype
        make = partial(_materialise, state, name)
        wide = torch.promote_types(kind, torch.float32)
        yield Entry(name, infos[name].shape, kind, partial(make, kind), partial(make, wide))
    for name in plan.buffers:
        read = partial(buffers.__getitem__, name) if name in buffers else partial(plan.buffer, name)
        # those of sources are compared with each other where the sources are hashed
        infinite = name not in buffers or name in plan.infinite_buffers
        yield Entry(name, infos[name].shape, infos[name].dtype, read, infinite=infinite)


def _materialise(state: FitState, name: str, dtype: torch.dtype) -> Tensor:
    state.plan.require_unchanged()  # before each tensor, for writing may take long
    return state.materialise(name, dtype)


def private_entries(plan: Plan, source: str, dtype: torch.dtype | None = None) -> list[Entry]:
    """Return the private tensors (head) of a source, which must have them."""
    plan.require_private(source)
    return entries_of(plan.serving[source], plan.private, dtype)


def own_entries(
    state: FitState, task: str, source: str, dtype: torch.dtype | None = None
) -> list[Entry]:
    """Return what a task has of its own: private tensors, and merged matrices with its adapter.

    Args:
        state: the merge, with what a fit has trained for the task, if there was one.
        task: the task.
        source: its source, which has the private tensors that were not trained.
        dtype: dtype of the floating-point ones. Default: as stored.
    """
    plan, parts = state.plan, state.private
    trained = {} if parts is None else {name: parts.tensor(task, name) for name in plan.trained}
    found = []
    for entry in private_entries(plan, source, dtype):
        value = trained.get(entry.name)
        make = entry.make if value is None else value.detach
        found.append(Entry(entry.name, entry.shape, entry.dtype, make, infinite=entry.infinite))
    for entry in merged_entries(state, {}, dtype):
        if entry.name in plan.ranks and entry.exact is not None:
            make = partial(_adapted, state, task, entry.name, entry.exact)
            found.append(Entry(entry.name, entry.shape, entry.dtype, make))
    return found


@torch.no_grad()
def _adapted(state: FitState, task: str, name: str, merged: Callable[[], Tensor]) -> Tensor:
    update = None if state.private is None else state.private.update(task, name)
    theta = merged()
    return theta if update is None else theta + update.to(theta)


def write_beside_own(
    shared: Sequence[Entry], folders: Mapping[Path, Sequence[Entry]], size: int = SHARD_SIZE
) -> None:
    """Write several folders of the same shared tensors, each with tensors of its own.

    Shared files are written once and are hard links in the other folders, so that each folder is
    complete and copied or published as it is. On a file system without links they are copies.

    Args:
        shared: tensors of all folders.
        folders: further tensors by folder.
        size: bytes per file.
    """
    written: list[Path] = []
    for folder, own in folders.items():
        shards = [*_shards(shared, size), *_shards(own, size)]
        files: dict[str, str] = {}
        for i, shard in enumerate(shards):
            path = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            files |= {entry.name: path.name for entry in shard}
            if i < len(written):
                _link(written[i], path)
                continue
            write_safetensors(path, shard)
        if not written:
            written = [folder / name for name in sorted({files[entry.name] for entry in shared})]
        write_index(folder, files, sum(entry.num_bytes for entry in [*shared, *own]))


def _shards(entries: Sequence[Entry], size: int) -> list[list[Entry]]:
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern="{suffix}",
        max_shard_size=size,
    )
    return [[by_name[name] for name in names] for names in split.filename_to_tensors.values()]


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # no links on this file system, or too many
        shutil.copyfile(path, target)


def write_weights(folder: Path, entries: Sequence[Entry], max_shard_size: int = SHARD_SIZE) -> None:
    """Write one file, or shards with an index."""
    if len(_shards(entries, max_shard_size)) > 1:
        write_beside_own(entries, {folder: ()}, max_shard_size)
        return
    write_safetensors(folder / "model.safetensors", entries)


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Write the index of a folder's weights: the file of each tensor."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    write_json(folder / "model.safetensors.index.json", index)
