"""Write a merge as a folder that `transformers` loads on its own.

Weights are written one tensor at a time, so memory never holds the model. The folder gets its name
only when complete: a kill at any moment leaves the old folder or the new one, never a part of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.memory import release_freed_memory
from gradmerge.common.names import dtype_name, require_names
from gradmerge.common.spec import to_plain
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.export.atomic import inputs_of, new_folder, require_room
from gradmerge.export.card import model_card
from gradmerge.export.history import History
from gradmerge.export.license import terms_of
from gradmerge.export.modules import write_modules
from gradmerge.export.opened import folder_like, load_class, require_opens
from gradmerge.export.provenance import provenance_of, strip_settings
from gradmerge.export.report import write_report
from gradmerge.export.weights import (
    SHARD_SIZE,
    merged_entries,
    own_entries,
    write_beside_own,
    write_weights,
)
from gradmerge.export.writer import Entry, write_safetensors
from gradmerge.sources.files import write_json
from gradmerge.sources.modules import copy_modules, module_owner
from gradmerge.sources.side_files import copy_files
from gradmerge.sources.tokenizers.files import TOKENIZER_FILES
from gradmerge.sources.tokenizers.report import token_report

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
COEFFICIENTS = "coefficients.st"  # servers and converters take every *.safetensors for weights


def export_merged(merged: MergedModel, output: str | Path, **options: Any) -> Path:
    """Write a trained merge as a Hugging Face folder, with its current buffers and tasks.

    Args:
        merged: the merged model (`module.merged`).
        output: folder to write; it must not exist unless `overwrite`.
        **options: dtype, overwrite, head, results, extra, max_shard_size, inputs, history and
            provenance_paths of `export_state`.

    Returns:
        The folder.
    """
    buffers = merged.network_buffers.values()
    return export_state(merged.state, output, buffers=buffers, tasks=merged.tasks, **options)


def export_state(
    state: FitState,
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
    tasks: Mapping[str, str] | None = None,
    head: str | None = None,
    results: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    max_shard_size: int = SHARD_SIZE,
    inputs: Iterable[Path] = (),
    history: History | None = None,
    provenance_paths: bool = False,
) -> Path:
    """Write a merge as a Hugging Face folder.

    Args:
        state: the opened recipe with its coefficients.
        output: folder to write; it must not exist unless `overwrite`.
        dtype: float32, bfloat16, float16 or float64; default: that of each reference tensor.
        overwrite: replace an existing folder, once the new one is complete.
        buffers: buffers recomputed on data, by name; default: by the recipe's rule.
        tasks: task -> source of its private tensors; default: one task per source, of its name.
        head: task whose head the folder itself contains; default: the first. With private tensors
            or adapters every task also gets a complete folder `tasks/<task>`, whose files of shared
            weights are hard links.
        results: scores for the model card, by stage, task and metric.
        extra: further entries of provenance.json (seeds, training configuration).
        max_shard_size: bytes per file.
        inputs: files and folders besides the sources that the output must be apart from.
        history: what a fit has measured, for the learning curves in `report.html`.
        provenance_paths: keep local paths in the records. Default: only the last part of each, and
            ids of models on the hub.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists or overlaps with an input, or an option is invalid.
        OutputError: it cannot be written.
    """
    target = Path(output).expanduser()
    plan = state.plan
    tasks = dict(tasks) if tasks else {name: name for name in plan.sources}
    kind = require_options(dtype, head, tasks)
    head = head or next(iter(tasks))
    require_room(target, plan, kind)
    state.require_finite()
    with new_folder(target, overwrite, [*inputs, *inputs_of(plan)]) as work:
        # sources are hashed while they are merged: both read the same files
        behind = ThreadPoolExecutor(2)
        hashes = behind.submit(plan.require_same_as_before)
        loaded = behind.submit(load_class, plan.reference.config)
        behind.shutdown(wait=False)  # its threads end with this work
        release_freed_memory()  # fragmented heap could otherwise hold every written tensor
        with plan.sound():
            write_coefficients(state, work)
            modules = _write_model(state, buffers or {}, tasks, head, kind, work, max_shard_size)
        hashes.result()
        loaded.result()  # a module that is being imported must not be used
        check = _require_opens(plan, work, target, tasks, head)
        more = {**(extra or {}), "check": check, **({"modules": modules} if modules else {})}
        provenance = partial(provenance_of, state, dtype, tasks, results, paths=provenance_paths)
        write_records(work, state, provenance, more, head, target.name, history)
    return target


def write_records(
    work: Path,
    state: FitState,
    provenance: Callable[..., dict[str, Any]],
    extra: Mapping[str, Any],
    head: str,
    name: str,
    history: History | None,
) -> None:
    """Write what is known about a merge beside its weights: provenance, card, report, YAML."""
    plan, terms = state.plan, terms_of(state.plan)
    settled = {"id": str(terms.license)} if terms.license else {"warning": terms.warning}
    record = provenance(extra={**extra, "license": settled})
    strip_settings(work)
    write_json(work / "provenance.json", record)
    if plan.tokens is not None:
        write_json(work / "tokens.json", token_report(plan.tokens))
    if yaml := record.get("run", {}).get("yaml"):
        (work / "gradmerge.yaml").write_text(yaml)
    card = model_card(state, record, head, name, terms)
    (work / "README.md").write_text(card, encoding="utf-8")
    write_report(work, state, record["results"], history, name)


def _require_opens(
    plan: Plan, work: Path, target: Path, tasks: Mapping[str, str], head: str
) -> str:
    """Open the folder, and those of its tasks, as `require_opens`; return what was found."""
    trusted = plan.recipe.trust_remote_code

    def opens(part: str, task: str) -> str:
        like = folder_like(plan.serving[tasks[task]] if plan.private else plan.reference)
        return require_opens(work / part, target / part, like, trusted)

    for task in tasks if plan.has_own else ():
        opens(f"tasks/{task}", task)
    return opens("", head)


def require_options(
    dtype: str | None, head: str | None, tasks: Iterable[str]
) -> torch.dtype | None:
    """Reject invalid options and names of folders before any work; return the dtype."""
    require_names("tasks", tasks)
    if head is not None and head not in list(tasks):
        known = shorten(list(tasks))
        raise ConfigError(
            f"head: unknown task {head!r} (choose from {known}).{nearest(head, tasks)}"
        )
    dtype = None if dtype is None else dtype_name(dtype)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    return None if dtype is None else DTYPES[dtype]


def _write_model(
    state: FitState,
    buffers: Mapping[str, Tensor],
    tasks: Mapping[str, str],
    head: str,
    dtype: torch.dtype | None,
    work: Path,
    max_shard_size: int,
) -> dict[str, dict[str, str]]:
    """Write weights and configs; a task's folder has all weights, with its own beside the shared.

    Returns what `write_modules` returns.
    """
    plan = state.plan
    merged = list(merged_entries(state, buffers, dtype))
    folders = {task: work / "tasks" / task for task in tasks} if plan.has_own else {}
    if folders:
        for folder in folders.values():
            folder.mkdir(parents=True)
        shared = [entry for entry in merged if entry.name not in plan.ranks]
        own = {task: own_entries(state, task, source, dtype) for task, source in tasks.items()}
        placed = {work: own[head], **{folders[task]: found for task, found in own.items()}}
        write_beside_own(shared, placed, max_shard_size)
    else:
        write_weights(work, merged, max_shard_size)
    _write_config_for(plan, work, tasks[head], dtype)
    modules = write_modules(state, work, dtype)
    for task, folder in folders.items():
        _write_config_for(plan, folder, tasks[task], dtype)
        for name in modules:
            shutil.rmtree((folder / name).parent)
            shutil.copytree((work / name).parent, (folder / name).parent)
    return modules


def _write_config_for(plan: Plan, work: Path, source: str, dtype: torch.dtype | None) -> None:
    """Write the configs of the reference; those of a source with a head know its labels."""
    first = plan.serving[source] if plan.private else plan.reference
    candidates = [first, plan.reference, *plan.sources.values()]
    config = next((c.config for c in candidates if c.config is not None), None)
    write_config(work, plan.folder, config, dtype, plan.skeleton)
    tokenizer = plan.reference.tokenizer_folder
    if tokenizer not in (None, plan.folder):  # an adapter's own
        copy_files(tokenizer, work, TOKENIZER_FILES)
    owner = module_owner([plan.reference, *plan.sources.values()])
    if owner not in (None, plan.folder):
        copy_modules(owner, work)


def write_config(
    work: Path,
    folder: Path | None,
    config: Mapping[str, Any] | None,
    dtype: torch.dtype | None = None,
    network: Any = None,
) -> None:
    """Write `config`; copy all but the weights from `folder`, or take it from a model in memory."""
    if folder is not None:
        copy_files(folder, work, ignored=["config.json"])
        copy_modules(folder, work)
    elif hasattr(getattr(network, "generation_config", None), "save_pretrained"):
        network.generation_config.save_pretrained(work)
    if config is None:
        return
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if not config.get("architectures") and network is not None:
        config["architectures"] = [type(network).__name__]
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    write_json(work / "config.json", config, spelled=True)


def write_coefficients(state: FitState, work: Path) -> None:
    """Write `c` of every merged tensor, `[sources, *slot]`, float32."""
    plan, entries = state.plan, []
    for name in plan.tensors:
        slot = () if name in state.fixed else plan.layout.slots[name].shape
        shape = (len(plan.sources), *slot)
        entries.append(Entry(name, shape, torch.float32, partial(state.coefficient, name)))
    metadata = {
        "sources": json.dumps(list(plan.sources)),
        "origin": plan.recipe.resolved_origin,
        "coefficients": json.dumps(to_plain(plan.recipe.coefficients)),
        # on a square matrix the shape does not distinguish rows from columns
        "slots": json.dumps({name: slot.spread_over for name, slot in plan.layout.slots.items()}),
    }
    write_safetensors(work / COEFFICIENTS, entries, metadata)
