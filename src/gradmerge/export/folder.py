"""From coefficients to a folder that `transformers` loads alone.

Written tensor by tensor (memory never holds the model) into a temporary folder beside the target,
which takes its name only when complete: a kill at any moment leaves the old folder or the new one
(none, where there was none), never half a one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge._memory import release_freed_memory
from gradmerge._typing import Raw
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError, nearest
from gradmerge.export.atomic import discard, refuse_existing, start_beside, take_name
from gradmerge.export.card import model_card
from gradmerge.export.provenance import versions
from gradmerge.export.writer import Entry, write_safetensors
from gradmerge.sources.tokenizers.report import token_report
from gradmerge.spec import to_plain

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Files of a model folder that are not weights, not training leftovers and not about one checkpoint.
_COPIED = (".json", ".txt", ".model", ".jinja", ".py")
_NOT_COPIED = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "config.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "adapter_config.json",
    "provenance.json",
    "tokens.json",
)


def export_merged(merged: MergedModel, output: str | Path, **options: Any) -> Path:
    """Write a trained merge as a Hugging Face folder, with the buffers and tasks it runs with.

    Args:
        merged: the merged model (`module.merged`).
        output: folder to write; it must not exist unless `overwrite`.
        **options: those of `export_plan`: dtype, overwrite, head, results, extra, max_shard_size.

    Returns:
        The folder.
    """
    buffers = merged.statistics.values()
    return export_plan(
        merged.plan, merged.raw, output, buffers=buffers, tasks=merged.tasks, **options
    )


def export_plan(
    plan: Plan,
    raw: Raw,
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
    tasks: Mapping[str, str] | None = None,
    head: str | None = None,
    results: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Write a merge as a Hugging Face folder.

    Args:
        plan: the opened recipe.
        raw: raw coefficients by key.
        output: folder to write; it must not exist unless `overwrite`.
        dtype: float32, bfloat16, float16 or float64; default: as the reference stores each tensor.
        overwrite: replace an existing folder, once the new one is complete.
        buffers: buffers recomputed on data, by name; default: by the recipe's rule.
        tasks: task -> source of its private tensors; default: the sources' names.
        head: task whose head the folder itself carries; default: the first. Every task gets a
            folder `tasks/<task>` that shares the merged weights.
        results: scores to put into the model card.
        extra: more for provenance.json (seeds, training configuration).
        max_shard_size: bytes per file.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, or an option has no such value.
    """
    target = Path(output).expanduser()
    tasks = dict(tasks) if tasks else {name: name for name in plan.sources}
    kind = require_options(dtype, head, tasks)
    head = head or next(iter(tasks))
    refuse_existing(target, overwrite)
    work = start_beside(target)
    # sources are hashed while they are merged: both read the same files
    hashing = ThreadPoolExecutor(1)
    hashes = hashing.submit(lambda: plan.fingerprints)
    # else holes in the heap may keep each tensor that was written, up to the whole model
    release_freed_memory()
    try:
        shared = list(_merged_entries(plan, raw, buffers or {}, kind))
        private = list(_private_entries(plan, tasks[head], kind))
        files = _write_sharded(work, [*shared, *private], max_shard_size)
        write_config(plan, work, tasks[head] if plan.private else None, kind)
        if plan.private:
            own = {entry.name for entry in private}
            shared_files = {name: file for name, file in files.items() if name not in own}
            for task, source in tasks.items():
                _write_task(plan, work, task, source, shared_files, kind)
        _write_coefficients(plan, raw, work)
        hashes.result()
        provenance = provenance_of(plan, dtype, tasks, results, extra)
        (work / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        if plan.alignment is not None:
            text = json.dumps(token_report(plan.alignment), indent=2, ensure_ascii=False)
            (work / "tokens.json").write_text(text + "\n", encoding="utf-8")
        if plan.run.get("yaml"):
            (work / "gradmerge.yaml").write_text(plan.run["yaml"])
        (work / "README.md").write_text(model_card(plan, raw, provenance, head))
        take_name(work, target, overwrite)
    finally:
        hashing.shutdown(wait=False, cancel_futures=True)
        discard(work, target)
    return target


def require_options(
    dtype: str | None, head: str | None, tasks: Iterable[str]
) -> torch.dtype | None:
    """Stop before any work if an option has no such value; returns the dtype.

    Raises:
        ConfigError: it has not.
    """
    if head is not None and head not in list(tasks):
        raise ConfigError(f"head: {head!r} is no task.{nearest(head, tasks)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    return None if dtype is None else DTYPES[dtype]


def _merged_entries(
    plan: Plan,
    raw: Raw,
    buffers: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> Iterator[Entry]:
    raw = {key: value.detach().cpu() for key, value in raw.items()}
    for name in plan.tensors:
        info = plan.reference.infos[name]
        kind = dtype or info.dtype

        def make(name: str = name, kind: torch.dtype = kind) -> Tensor:
            return plan.materialise(name, raw, kind)

        yield Entry(name, info.shape, kind, make)
    for name in plan.buffers:
        info = plan.reference.infos[name]

        def make_buffer(name: str = name, kind: torch.dtype = info.dtype) -> Tensor:
            value = buffers[name] if name in buffers else plan.buffer(name)
            return value.detach().cpu().to(kind)

        yield Entry(name, info.shape, info.dtype, make_buffer)


def _private_entries(plan: Plan, source: str, dtype: torch.dtype | None) -> Iterator[Entry]:
    plan.require_private(source)
    infos = plan.serving[source].infos
    for name in plan.private:
        kind = dtype or infos[name].dtype

        def make(name: str = name, kind: torch.dtype = kind) -> Tensor:
            return plan.read(source, name).to(kind)

        yield Entry(name, infos[name].shape, kind, make)


def _write_sharded(folder: Path, entries: Sequence[Entry], limit: int) -> dict[str, str]:
    """One file, or shards with an index; returns the file of each tensor."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        size = sum(e.num_bytes for e in shards[-1])
        if shards[-1] and size + entry.num_bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    files = {}
    for i, shard in enumerate(shards):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        write_safetensors(folder / name, shard)
        files.update({entry.name: name for entry in shard})
    if len(shards) > 1:
        _write_index(folder, files, sum(entry.num_bytes for entry in entries))
    return files


def _write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(plan: Plan, work: Path, source: str | None, dtype: torch.dtype | None) -> None:
    """Config, generation config, tokenizer and processor: of the reference, labels of the
    head's.
    """
    head = plan.reference if source is None else plan.serving[source]
    candidates = [head, plan.reference, *plan.sources.values()]
    config = next((dict(c.config) for c in candidates if c.config is not None), None)
    if plan.folder is not None:
        for file in sorted(plan.folder.iterdir()):
            if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED:
                shutil.copyfile(file, work / file.name)
    elif hasattr(getattr(plan.skeleton, "generation_config", None), "save_pretrained"):
        plan.skeleton.generation_config.save_pretrained(work)  # type: ignore[union-attr, operator]
    if config is not None:
        config.pop("_name_or_path", None)
        if not config.get("architectures") and plan.skeleton is not None:
            config["architectures"] = [type(plan.skeleton).__name__]
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_task(
    plan: Plan,
    work: Path,
    task: str,
    source: str,
    shared: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    """A folder with the task's own head and config, whose index points at the shared weights."""
    folder = work / "tasks" / task
    folder.mkdir(parents=True)
    entries = list(_private_entries(plan, source, dtype))
    write_safetensors(folder / "head.safetensors", entries)
    files = {name: f"../../{file}" for name, file in shared.items()}
    files.update({entry.name: "head.safetensors" for entry in entries})
    _write_index(folder, files, 0)
    write_config(plan, folder, source, dtype)


def _write_coefficients(plan: Plan, raw: Raw, work: Path) -> None:
    """`c` of every merged tensor, `[sources, *slot]`, float32."""
    num = len(plan.sources)
    entries = []
    for name in plan.tensors:
        shape = () if name in plan.fixed else plan.layout.slots[name].shape

        def make(name: str = name) -> Tensor:
            return plan.coefficient(name, raw).detach().cpu().float()

        entries.append(Entry(name, (num, *shape), torch.float32, make))
    metadata = {
        "sources": json.dumps(list(plan.sources)),
        "origin": plan.recipe.resolved_origin,
        "coefficients": json.dumps(to_plain(plan.recipe.coefficients)),
        # on a square matrix a shape does not tell rows from columns
        "slots": json.dumps({name: slot.spread_over for name, slot in plan.layout.slots.items()}),
    }
    write_safetensors(work / "coefficients.safetensors", entries, metadata)


def provenance_of(
    plan: Plan,
    dtype: str | None,
    tasks: Mapping[str, str],
    results: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a merge was made of and how, as plain data."""
    checkpoints = {**({"base": plan.base} if plan.base is not None else {}), **plan.sources}
    recipe = to_plain(plan.recipe)
    of = {name: checkpoint.label for name, checkpoint in plan.serving.items()}
    heads = {name: label for name, label in of.items() if name not in plan.sources}
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "sources": {
            name: {"from": checkpoint.label, "sha256": plan.fingerprints[name]}
            for name, checkpoint in checkpoints.items()
        },
        **({"heads": heads} if heads else {}),
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "fixed": dict(plan.fixed),
        "tasks": dict(tasks),
        "dtype": dtype or "as stored",
        **read_as(plan),
        "results": dict(results or {}),
        **({"finalisation": plan.finalisation.report} if plan.finalisation.report else {}),
        **({"run": plan.run} if plan.run else {}),
        **(extra or {}),
    }


def read_as(plan: Plan) -> dict[str, Any]:
    """How a merge's sources were read, as plain data: in whose tokens, with units in which order,
    and with statistics of which data.
    """
    tokens = {} if plan.alignment is None else token_report(plan.alignment)
    long = ("added", "differs", "dropped", "other_settings")  # they stand in tokens.json
    return {
        **({"tokenizer": {k: v for k, v in tokens.items() if k not in long}} if tokens else {}),
        **({"alignment": plan.order.report} if plan.order is not None else {}),
        **({"statistics": plan.collected.summary()} if plan.collected is not None else {}),
    }
