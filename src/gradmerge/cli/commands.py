"""The commands that need no trainer, as functions whose signatures define the options."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal

from gradmerge.cli.inspect import inspect_sources, render
from gradmerge.cli.places import is_checkpoint
from gradmerge.common.atomic import Scratch
from gradmerge.common.checkpoints import load_checkpoint, local_checkpoint
from gradmerge.common.errors import CompatibilityError, ConfigError
from gradmerge.common.files import read_json
from gradmerge.common.finite import as_json
from gradmerge.common.hub import require_repo
from gradmerge.common.names import Dtype, named
from gradmerge.common.output import paths_in
from gradmerge.common.spec import to_plain
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.opening import Opening
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.state import FitState
from gradmerge.export import evaluated
from gradmerge.export.adapter import export_adapter, require_adapter
from gradmerge.export.atomic import inputs_of, refuse_existing
from gradmerge.export.emr import export_compact, export_tasks, require_outputs, task_checkpoints
from gradmerge.export.folder import export_state, require_options
from gradmerge.export.license import license_note
from gradmerge.export.provenance import read_as
from gradmerge.export.push import contents, table
from gradmerge.export.push import push as upload
from gradmerge.mergekit.writer import require_file, require_sum, write_mergekit
from gradmerge.search import AbstractSearch
from gradmerge.sources import Checkpoint, as_source
from gradmerge.sources.emr import EMRCheckpoint, require_tasks
from gradmerge.sources.resolve import base_of_compact
from gradmerge.sources.tokenizers.report import summarise, token_report

Outputs = Literal["merged", "tasks", "compact", "adapter"]
Form = Outputs | Literal["mergekit"]


def output_options(
    output: str,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    head: str | None = None,
    provenance_paths: bool = False,
    form: Form = "merged",
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Check the options that all commands writing a model share, before any work.

    The parser resolves a command's `**options` to this signature.

    Args:
        output: folder to write.
        dtype: dtype of the weights. Default: each tensor's stored dtype.
        overwrite: replace an existing folder.
        head: task whose head the model in the folder itself has. Default: the first.
        provenance_paths: keep the local paths of sources and data in provenance.json, README.md and
            gradmerge.yaml. Default: names and hub ids only.
        form: what is written (set by the command).
        inputs: files and folders that are read, which the output must be apart from (set by the
            command).

    Returns:
        The options as arguments of the function that writes this form.

    Raises:
        ConfigError: the output exists, or the form does not have an option.
    """
    target = Path(output).expanduser()
    if form == "mergekit":
        require_file(target, overwrite, inputs)
    else:
        refuse_existing(target, overwrite, inputs)
    require_options(dtype, None, ())
    if head is not None and form != "merged":
        place = f"with outputs {form}, where every task has its own head"
        if form in ("mergekit", "adapter"):
            place = f"for {'a mergekit file' if form == 'mergekit' else 'an adapter'} of one model"
        raise ConfigError(f"head: expected none {place}, got {head!r}; remove it.")
    if dtype is not None and form == "compact":
        raise ConfigError(
            f"dtype: expected none with outputs compact, got {dtype!r}; give it to "
            "`gradmerge unpack`."
        )
    optional = {"dtype": dtype, "head": head}
    given: dict[str, Any] = {name: v for name, v in optional.items() if v is not None}
    if form == "mergekit":
        if provenance_paths:
            raise ConfigError(
                "provenance_paths: expected none for a mergekit file, which always has the paths."
            )
    else:
        given["provenance_paths"] = provenance_paths
    return {"output": output, "overwrite": overwrite, "inputs": inputs, **given}


def merge(
    recipe: Recipe,
    data: Any = None,
    search: AbstractSearch | None = None,
    score: bool = False,
    outputs: Outputs = "merged",
    rank: int | None = None,
    mergekit: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
    configs: Sequence[Path] = (),
    **options: Any,
) -> None:
    """Merge without training, optionally with statistics, a search or scores on data.

    Args:
        recipe: the merge; its `init` sets the coefficients (Constant, Uniform, MetaGPT, ...).
        data: the tasks (MergeDataModule), for steps that need statistics, searches and scores.
        search: choose the coefficients by scores on the selection split (GreedySoup, Scales,
            Draws).
        score: print the merge's scores on the selection split.
        outputs: `merged`: one model; `tasks`: one model folder per task, from the task's direction
            alone (EMR-Merging); `compact`: one vector with a mask and a scale per task, for recipes
            whose last preprocess step is Unify; `adapter`: a LoRA adapter of the base.
        rank: largest rank of an adapter (`outputs: adapter`). Default: the sum of the sources'
            ranks, which is exact.
        mergekit: write an equivalent mergekit YAML instead of a folder; OUTPUT must end in .yaml.
        opened: checkpoints of the recipe that are open already (Python only).
        configs: files that hold the options (Python only).
        **options: options of `output_options`.
    """
    if outputs in ("tasks", "compact") and (search is not None or score or mergekit):
        raise ConfigError(
            f"outputs: a search, scores and a mergekit file need merged, got {outputs}, which has "
            "no single model; remove search, score and mergekit."
        )
    form = _form(outputs, mergekit, rank)
    inputs = [*configs, *recipe.inputs, *paths_in(to_plain(search)), *_read_by(data)]
    checked = output_options(**options, form=form, inputs=inputs)
    _require_mergeable(recipe, form, has_data=data is not None)
    by_module = form == "adapter"
    if by_module:
        require_adapter(recipe, rank)
        checked["rank"] = rank
    measured = search is not None or score
    opening = Opening(recipe, opened=opened, with_network=measured or by_module)
    with Scratch("statistics") as folder:
        statistics = recipe.statistics
        if data is not None and statistics is None and recipe.needs_statistics:
            statistics = str(_collected(recipe, data, folder / "found", opening=opening))
        opening.align(statistics)
        plan = opening.plan(with_skeleton=by_module, statistics=statistics)
        on_data = plan.finalisation.repair is not None or _has_batch_norms(plan)
        known: dict[str, Any] = {}
        if not measured and not (data is not None and on_data):
            state = FitState.start(plan)
        else:
            state, known = _measured(opening.plan(statistics=statistics), data, search, score)
            plan = state.plan
        for warning in plan.warnings:
            print(f"gradmerge merge: warning {warning}", file=sys.stderr)
        if plan.unchanged_note:
            print(f"{plan.unchanged_note}, and stay as they are")
        if plan.tokens is not None and not mergekit:
            print(summarise(token_report(plan.tokens)))
        written = _write(state, form, checked, known)
    _warn_of_license(written, form)
    done = f"merged {len(plan.sources)} sources, {len(plan.tensors)} tensors:"
    print(f"{'mergekit file written to' if mergekit else done} {written}{_error_of(written, form)}")


def _form(outputs: Outputs, mergekit: bool, rank: int | None) -> Form:
    """Return what is written.

    Raises:
        ConfigError: options of different forms are given together.
    """
    if mergekit and outputs != "merged":
        raise ConfigError(f"outputs: expected merged for a mergekit file, got {outputs}.")
    if rank is not None and outputs != "adapter":
        raise ConfigError(
            f"rank: expected none with outputs {outputs}, got {rank}; it is the largest rank of an "
            "adapter (outputs: adapter)."
        )
    return "mergekit" if mergekit else outputs


def _require_mergeable(recipe: Recipe, form: Form, has_data: bool) -> None:
    if form == "mergekit":
        require_sum(recipe)
    elif form in ("tasks", "compact"):
        require_outputs(recipe, form)
    if not has_data and any(finaliser.needs_data for finaliser in recipe.finalisers):
        raise ConfigError(
            "data: expected the tasks' adaptation data for REPAIR, got none; add a configuration "
            "with `data`, as for `gradmerge fit`, or remove REPAIR from recipe.finalisers."
        )


def _measured(
    plan: Plan, data: Any, search: AbstractSearch | None, score: bool
) -> tuple[FitState, dict[str, Any]]:
    """Run the search, the scores and the recipe's corrections on data."""
    from gradmerge.training.module import MergeModule
    from gradmerge.training.search import Scorer

    merged = MergedModel(plan)
    module = MergeModule.around(merged, score_experts=False)
    extra = {}
    if search is not None or score:
        selection = Scorer(module, data)
        if search is not None:
            chosen, extra["search"] = selection.search(search)
            module.start_at(chosen)
            for trial in selection.trials:
                mark = "*" if trial.init == chosen else " "
                print(f"{mark} {_short(trial.init)}: {_row(trial.average)}")
        for task, values in selection.score().items():
            print(f"selection, {task}: {_row(values)}")
    else:
        data.attach(merged)
        data.setup()
        module.take_tasks(data.tasks)
        module.refresh_buffers(data)
    return merged.state, _known(module, extra)


def _known(module: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module knows beyond its coefficients, as arguments of `export_state`."""
    buffers, tasks = module.merged.network_buffers.values(), module.merged.tasks
    measured = {"results": module.results, "history": module.history}
    return {"buffers": buffers, "tasks": tasks, "extra": extra, **measured}


def _write(state: FitState, form: Form, checked: dict[str, Any], known: Mapping[str, Any]) -> Path:
    if form == "merged":
        return export_state(state, **checked, **known)
    if form == "mergekit":
        return write_mergekit(state, **checked, buffers=known.get("buffers"))
    if form == "adapter":
        return export_adapter(state, **checked, **known)
    if form == "compact":
        return export_compact(state.plan, **checked)
    extra = {"merge": to_plain(state.plan.recipe), **read_as(state.plan)}
    inputs = [*checked.pop("inputs"), *inputs_of(state.plan)]
    trusted = state.plan.recipe.trust_remote_code
    more: dict[str, Any] = {"inputs": inputs, "extra": extra, "trust_remote_code": trusted}
    return export_tasks(task_checkpoints(state.plan), **checked, **more)


def collect(recipe: Recipe, data: Any, output: str, overwrite: bool = False) -> None:
    """Collect the sources' statistics on data that a recipe needs, for reuse.

    Set the recipe's `statistics` to the output afterwards.

    Args:
        recipe: the merge. Its steps (FisherScale, RegMean, MaTS) and its alignment
            (ActivationMatching, CCA, OptimalTransport) determine the statistics. For steps each
            source runs on its own tasks' adaptation data, for alignments on that of all tasks.
        data: the tasks.
        output: folder to write.
        overwrite: replace an existing folder.
    """
    folder = _collected(recipe, data, Path(output), overwrite=overwrite)
    print(f"statistics written to {folder}")


def _read_by(data: Any) -> list[Path]:
    if data is None:
        return []
    from gradmerge.training.run import read_by

    return read_by(data)


def _collected(recipe: Recipe, data: Any, target: Path, **options: Any) -> Path:
    from gradmerge.training.collect import collect

    say = partial(print, "gradmerge:", file=sys.stderr)
    return collect(recipe, data, target, report=say, **options)


def _has_batch_norms(plan: Plan) -> bool:
    recomputed = plan.recipe.buffers == "recompute"
    return recomputed and any(name.endswith("running_mean") for name in plan.buffers)


def _short(init: Any) -> str:
    name = next((n for n in ("factor", "value", "seed") if hasattr(init, n)), "")
    return f"{type(init).__name__} {getattr(init, name, '')}"


def _row(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def export(
    checkpoint: str,
    outputs: Literal["merged", "adapter"] = "merged",
    rank: int | None = None,
    mergekit: bool = False,
    allow_modules: Sequence[str] = (),
    trust_remote_code: bool = False,
    sources: dict[str, str] | None = None,
    **options: Any,
) -> None:
    """Write a learned merge as a Hugging Face folder, an adapter, or a mergekit YAML.

    Args:
        checkpoint: checkpoint of `gradmerge fit`.
        outputs: `merged`: one model; `adapter`: a LoRA adapter of the base.
        rank: largest rank of an adapter (`outputs: adapter`). Default: the sum of the sources'
            ranks, which is exact.
        mergekit: write an equivalent mergekit YAML instead of a folder; OUTPUT must end in .yaml.
        allow_modules: modules outside gradmerge whose components the checkpoint may use.
        trust_remote_code: run modelling code that ships with the sources. What the checkpoint says
            about this does not count.
        sources: places of sources that have moved, as NAME=PLACE (repeat the option for several;
            the name of the base is `base`). They must have the same contents.
        **options: options of `output_options`.
    """
    form = _form(outputs, mergekit, rank)
    checked = output_options(**options, form=form, inputs=paths_in(checkpoint))
    if form == "adapter":
        checked["rank"] = rank
    path = require_checkpoint(checkpoint)

    from gradmerge.training.checkpoint import kept_scores
    from gradmerge.training.module import MergeModule

    module = MergeModule.load_from_checkpoint(
        path, allow_modules=allow_modules, trust_remote_code=trust_remote_code, sources=sources
    )
    module.results.update(kept_scores(path))
    written = _write(module.merged.state, form, checked, _known(module, {"checkpoint": path.name}))
    _warn_of_license(written, form)
    name = {"mergekit": "mergekit file", "adapter": "adapter"}.get(form, "merged model")
    print(f"{name} written to {written}{_error_of(written, form)}")


def _error_of(written: Path, form: Form) -> str:
    """Return how near a written adapter is to its merge."""
    record = read_json(written / "provenance.json") if form == "adapter" else None
    return f": {record['adapter']['summary']}" if record else ""


def _warn_of_license(written: Path, form: Form) -> None:
    note = license_note(written) if form == "merged" else None
    if note:
        print(f"gradmerge: warning {note}", file=sys.stderr)


def unpack(
    folder: str,
    output: str,
    base: str | None = None,
    tasks: list[str] | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    provenance_paths: bool = False,
) -> None:
    """Write one Hugging Face folder per task from the compact form of EMR-Merging.

    Args:
        folder: folder of `gradmerge merge --outputs compact`.
        output: folder to write, with one folder per task in it.
        base: path or hub id of the base. Default: its place at the time of the merge.
        tasks: tasks to write. Default: all.
        dtype: dtype of the weights. Default: the base's stored dtypes.
        overwrite: replace an existing folder.
        provenance_paths: keep local paths in the folders' records. Default: names and hub ids only.
    """
    inputs = paths_in(folder, base)
    checked = output_options(
        output, dtype, overwrite, None, provenance_paths, form="tasks", inputs=inputs
    )
    path = Path(folder).expanduser()
    described = require_tasks(path, tasks or ())
    opened = (as_source(base) if base else base_of_compact(path)).open()
    checked["inputs"] = [*inputs, *paths_in(sorted({i.file for i in opened.infos.values()}))]
    found = {task: EMRCheckpoint(path, task, opened) for task in tasks or described["scales"]}
    # where the base was, for `described` may name it relative to the compact folder
    used = {**described, "base": {**described["base"], "from": opened.label}}
    written = export_tasks(found, **checked, extra={"unpacked": used})
    print(f"{len(found)} tasks written to {written}")


def evaluate(
    path: str,
    dtype: Dtype | None = None,
    device: str | None = None,
    head: str | None = None,
    record: bool = True,
    wandb: str | None = None,
    allow_modules: Sequence[str] = (),
    trust_remote_code: bool = False,
    sources: dict[str, str] | None = None,
    **options: Any,
) -> None:
    """Run benchmarks of lm-evaluation-harness on a folder, or on a checkpoint without exporting it.

    The scores go into the card and the provenance of a folder that gradmerge wrote; those of a
    checkpoint are kept beside it, for its export.

    Args:
        path: model folder, hub id, or checkpoint of `gradmerge fit` (*.ckpt).
        dtype: dtype of the weights. Default: that in which transformers opens the folder.
        device: device. Default: a GPU if there is one.
        head: task whose head is used, if a checkpoint has several. Default: the first.
        record: write the scores into the folder, or beside the checkpoint.
        wandb: W&B project to log the scores to; a checkpoint's run in it is continued.
        allow_modules: modules outside gradmerge whose components the checkpoint may use.
        trust_remote_code: run modelling code that ships with the model or the sources.
        sources: places of a checkpoint's sources that have moved, as NAME=PLACE (repeat the option
            for several; the name of the base is `base`). They must have the same contents.
        **options: options of `gradmerge.training.harness.Harness`.
    """
    from gradmerge.training.checkpoint import keep_scores
    from gradmerge.training.harness import (
        Harness,
        log_to_wandb,
        open_folder,
        require_folder,
        require_installed,
    )
    from gradmerge.training.summary import score_table

    require_installed()
    harness = Harness(**options)
    require_options(dtype, None, ())
    of_fit, local = is_checkpoint(path, head, sources), Path(path).expanduser()
    if of_fit:
        require_checkpoint(path)
    else:
        path = require_folder(path, trust_remote_code)
    _ = harness.loaded  # unknown tasks are found before the weights are opened
    if of_fit:
        from gradmerge.training.harness_model import MergedLM

        network: Any = MergedLM(
            local,
            head,
            dtype,
            device,
            trust_remote_code,
            allow_modules,
            sources,
            batch_size=harness.batch_size,
        )
    else:
        network = open_folder(path, dtype, device, trust_remote_code, harness.batch_size)
    found = harness.run(network)
    print(score_table(found.stage, found.scores, {}))
    if wandb is not None:
        log_to_wandb(wandb, local.name, found, local if of_fit else None)
    if not record:
        return
    if of_fit:
        if written := keep_scores(local, {found.stage: found.scores}):
            print(f"scores kept in {written}")
    elif evaluated.is_recorded(local):
        evaluated.record(local, found.stage, found.scores, found.settings)
        print(f"scores added to the card and provenance of {local}")


def push(folder: str, repo: str, private: bool = True, dry_run: bool = False) -> None:
    """Upload an exported folder to the Hugging Face Hub.

    Log in first (`hf auth login`, or HF_TOKEN). Files that do not belong to the model, and records
    that name places on this machine, are refused.

    Args:
        folder: the exported folder.
        repo: owner/name of the repository, which is made if it does not exist.
        private: only you see the repository.
        dry_run: print what would be uploaded, and end without asking the hub.
    """
    require_repo(repo)
    place = Path(folder).expanduser()
    files = contents(place)
    seen = "private" if private else "public"
    print(table(files))
    if note := license_note(place):
        print(f"gradmerge push: warning {note}", file=sys.stderr)
    if dry_run:
        print(f"would go to https://huggingface.co/{repo} ({seen}); nothing was uploaded")
        return
    print(f"uploaded to {upload(place, repo, private, list(files))} ({seen})")


def require_checkpoint(checkpoint: str) -> Path:
    """Return the path of a gradmerge checkpoint after a check that does not read tensors.

    Raises:
        ConfigError: it is no local file, cannot be read, or is not such a checkpoint.
    """
    path = local_checkpoint(checkpoint)
    load_checkpoint(path, mmap=True)
    return path


def inspect(
    sources: list[str],
    base: str | None = None,
    private: list[str] | None = None,
    allow: list[str] | None = None,
    statistics: bool = True,
    json: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Report the compatibility, sizes and directions of checkpoints.

    Args:
        sources: checkpoints to inspect, as paths or hub ids.
        base: checkpoint that they were fine-tuned from.
        private: regular expressions of tensors that are kept per task.
        allow: kinds of problems to report as warnings.
        statistics: read the weights and report norms, cosines and sign conflicts.
        json: print JSON.
        tokenizer: vocabulary of a merge if tokenizers differ: union, base, or the name of a source
            (the last part of its path).
    """
    found = inspect_sources(named(sources), base, private or [], allow or [], statistics, tokenizer)
    problems = found["problems"]
    if json:
        plain = as_json({**found, "problems": [dataclasses.asdict(p) for p in problems]})
        print(dumps(plain, indent=2, allow_nan=False))
    else:
        print(render(found))
    if not found["compatible"]:
        fatal = sum(problem.fatal for problem in problems)
        counted = f"{fatal} problem{'s' if fatal != 1 else ''}"
        raise CompatibilityError(f"these sources cannot be merged: {counted}, listed above.")
