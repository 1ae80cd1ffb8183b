"""The weights of an exported folder: its tensors, and the files that they are split into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def write_weights(
    folder: Path, entries: Sequence[Entry], max_shard_size: int = SHARD_SIZE
) -> dict[str, str]:
    """Write one file, or shards with an index; return the file of each tensor."""
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [by_name[name] for name in names])
    if split.is_sharded:
        files = {name: split.tensor_to_filename[name] for name in by_name}
        write_index(folder, files, sum(entry.num_bytes for entry in entries))
    return split.tensor_to_filename


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Write the index of a folder's weights: the file of each tensor."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    write_json(folder / "model.safetensors.index.json", index)
