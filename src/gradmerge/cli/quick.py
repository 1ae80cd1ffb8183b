"""`gradmerge learn`: a learned merge without a YAML, which it leaves behind."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.arguments import PlainParser, flag
from gradmerge.cli.options import kinds_of_data
from gradmerge.cli.plan import memory_for
from gradmerge.cli.room import is_small
from gradmerge.common.atomic import whole_file
from gradmerge.common.errors import ConfigError, GradmergeError, nearest, shorten
from gradmerge.common.names import is_name, require_names
from gradmerge.common.output import require_output

GRANULARITIES = ("Model", "Group", "Tensor", "Column", "Row", "Element")
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_TEXTS = ("input_ids",)
# What a CPU core multiplies and adds per second in a network, by dtype, and how long a fit may
# then take.
_FLOPS, _SECONDS = {"float32": 2e10, "bfloat16": 8e10}, 600
_SMALL = 50_000_000  # parameters; products of smaller networks gain nothing by bfloat16
# Rows by which the length of a task's texts is estimated, and bytes per token of English text.
_ROWS, _BYTES = 64, 4
_CACHE = 2.0  # gigabytes of disk for what the sources return on examples
_BFLOAT16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
_ABOUT = """
Learn a merge of models with sensible defaults: kinds and columns of the data are detected, sizes
follow from the model and the machine, and everything that was chosen is printed and written to
OUTPUT.yaml, which `gradmerge fit --config OUTPUT.yaml` runs again as it is or as you change it.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = PlainParser(
        prog="gradmerge learn",
        description=textwrap.dedent(_ABOUT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example:\n  gradmerge learn ./code ./chat --base ./base --data code=code.jsonl "
        "--data chat=chat.jsonl",
    )
    add = made.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="folder, hub id or adapter; or NAME=SOURCE")
    add("--base", help="the model that the sources were fine-tuned from; needed by adapters")
    add(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PLACE",
        help="data of a source's task, once per task: a .jsonl, .csv, .parquet or .txt file, a "
        "folder, or a hub id",
    )
    add(
        "--kind",
        action="append",
        default=[],
        metavar="NAME=KIND",
        help="kind of a task's data, if the columns do not tell (see the guide on data)",
    )
    add("--output", default="merged", help="folder of the merged model (default: merged)")
    add("--granularity", default="Tensor", metavar="NAME", help=", ".join(GRANULARITIES))
    add(
        "--steps", type=int, help="optimiser steps (default: up to 100, about ten minutes on a CPU)"
    )
    add("--batch_size", type=int, help="examples per task and step")
    add("--max_length", type=int, help="tokens per text")
    add("--memory", choices=("resident", "streamed"), help="default: by the memory of the machine")
    add("--dtype", help="dtype of the computation (default: float32; bfloat16 on a GPU)")
    add("--seed", type=int, default=0)
    for name, text in (
        ("--overwrite", "replace an existing output"),
        ("--dry_run", "write the YAML and stop"),
        ("--trust_remote_code", "run modelling code in the folders"),
    ):
        add(name, nargs="?", const=True, default=False, type=flag, metavar="true", help=text)
    return made


def learn_command(arguments: Sequence[str]) -> list[str]:
    """Choose what the options leave open, write the YAML, and return the arguments of `fit`.

    Returns:
        Arguments for `gradmerge fit`; an empty list after a dry run.

    Raises:
        ConfigError: options, sources or data cannot be used; all problems at once.
    """
    given = parser().parse_args(list(arguments))
    chosen = Choice(given)
    target, config = chosen.target, chosen.config()
    head = f"# Written by `gradmerge learn`. Again: gradmerge fit --config {target}\n"
    text = head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    with whole_file(target) as path:
        path.write_text(text, encoding="utf-8")
    print(chosen.summary(target), flush=True)
    return [] if given.dry_run else ["fit", "--config", str(target)]


@dataclass(frozen=True)
class Task:
    """Data of one task."""

    name: str
    place: str
    kind: str
    columns: Mapping[str, str]
    labelled: bool
    entry: dict[str, Any]
    """Its `TaskData` in the YAML."""
    length: float
    """Mean bytes of text per row, about."""


class Choice:
    """The choices of `gradmerge learn` for the given options.

    Args:
        given: the parsed options.

    Raises:
        ConfigError: options, sources or data cannot be used.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.problems: list[str] = []
        self.sources = self._sources()
        self.data = self._named("data", given.data, list(self.sources))
        self.kinds = self._named("kind", given.kind, list(self.data))
        self._require_places()
        self._require_kinds()
        if given.granularity not in GRANULARITIES:
            self.problems.append(
                f"granularity: expected one of {', '.join(GRANULARITIES)}, got "
                f"{given.granularity!r}.{nearest(given.granularity, GRANULARITIES)}"
            )
        for name in ("steps", "batch_size", "max_length"):
            value = getattr(given, name)
            if value is not None and value < 1:
                self.problems.append(f"{name}: expected at least 1, got {value}.")
        if self.problems:
            raise ConfigError("\n".join(self.problems))
        output = Path(given.output).expanduser()
        self.target = output.with_name(f"{output.name}.yaml")
        self._require_output(output)
        self._open()
        self.tasks = [self._task(name, place) for name, place in self.data.items()]
        self.processor = self._chosen_processor()
        self._choose_sizes()

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that are read."""
        places = [*self.sources.values(), *self.data.values(), *filter(None, [self.given.base])]
        return [path for path in map(Path, places) if path.exists()]

    def _sources(self) -> dict[str, str]:
        """Return the sources by name: a given one, else that of their folder."""
        found: dict[str, str] = {}
        for text in self.given.sources:
            name, equals, place = text.partition("=")
            if not equals or not is_name(name):
                name, place = Path(text.partition("@")[0]).name or "source", text
            own, count = name, 2
            while own in found:
                own, count = f"{name}-{count}", count + 1
            found[own] = place
        if len(found) < 2:
            self.problems.append(f"sources: expected two or more, got {len(found)}.")
        require_names("sources", found)
        return found

    def _named(self, option: str, texts: Sequence[str], names: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for text in texts:
            name, equals, place = text.partition("=")
            if not equals and len(names) == 1:
                name, place = names[0], text
            if not place:
                self.problems.append(f"--{option}: expected NAME=..., got {text!r}.")
            elif name not in names:
                self.problems.append(
                    f"--{option}: unknown name {name!r} (choose from {', '.join(names)})."
                    f"{nearest(name, names)}"
                )
            elif name in found:
                self.problems.append(f"--{option}: expected {name} once, got it twice.")
            found[name] = place
        if option == "data" and not texts:
            self.problems.append(
                "--data: expected NAME=PLACE for at least one source, got none. A merge without "
                "data is `gradmerge merge`."
            )
        return found

    def _require_places(self) -> None:
        """Note all places that look like paths and do not exist, at once."""
        places = {f"source {name}": place for name, place in self.sources.items()}
        places |= {f"data of {name}": place for name, place in self.data.items()}
        places |= {"base": self.given.base} if self.given.base else {}
        for what, place in places.items():
            path = Path(place).expanduser()
            local = place.startswith((".", "/", "~")) or place.count("/") != 1 or path.suffix
            if local and "*" not in place and not path.exists():
                near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
                self.problems.append(f"{what}: {place} does not exist.{nearest(str(path), near)}")

    def _require_kinds(self) -> None:
        """Note unknown kinds, whose names are read from the source text: no import of torch."""
        known = kinds_of_data() if self.kinds else ()
        for name, kind in self.kinds.items():
            if kind not in known:
                self.problems.append(
                    f"--kind {name}: expected one of {', '.join(known)}, got {kind!r}."
                    f"{nearest(kind, known)}"
                )

    def _require_output(self, output: Path) -> None:
        if self.target.exists() and not self.given.overwrite:
            raise ConfigError(
                f"output: expected a new name, got {self.given.output}, whose configuration "
                f"{self.target} exists.\nRun that with `gradmerge fit --config`, choose another "
                "--output, or give --overwrite true."
            )
        require_output(output, self.given.overwrite, self.inputs)

    def _open(self) -> None:
        """Read the headers of base and sources, and build the network without weights."""
        from gradmerge.engine.reading import reading_of
        from gradmerge.sources import as_source
        from gradmerge.sources.skeleton import build_skeleton

        base = None if self.given.base is None else as_source(self.given.base)
        opened: dict[str, Any] = {}
        problems: dict[str, list[str]] = {}
        for name, place in self.sources.items():
            try:
                opened[name] = as_source(place, base).open()
            except GradmergeError as error:
                # the same fault of several sources, such as a wrong base, is told once
                problems.setdefault(str(error).removeprefix(f"{place}: "), []).append(name)
        if problems:
            raise ConfigError(
                "\n".join(
                    f"source{'s' * (len(names) > 1)} {', '.join(names)}: {text}"
                    for text, names in problems.items()
                )
            )
        first = next(iter(opened.values()))
        self.parameters = sum(info.num_elements for info in first.infos.values())
        self.low_precision = all(i.dtype.itemsize <= 2 for i in first.infos.values() if i.shape)
        if first.folder is None:
            raise ConfigError(
                f"source {next(iter(opened))}: expected a folder with config.json, got none, so "
                "the network is unknown. Give a Hugging Face folder."
            )
        reference = first if base is None else base.open()
        self.folders = [reference.folder or first.folder]
        self.folders += [c.tokenizer_folder for c in opened.values() if c.tokenizer_folder]
        network: Any = build_skeleton(first.folder, self.given.trust_remote_code)
        self.network = type(network).__name__
        self.predicts = reading_of(network).predicts
        self.config_of = network.config
        self.private = self._heads(network, opened)

    def _heads(self, network: Any, opened: Mapping[str, Any]) -> list[str]:
        """Return expressions of the heads, if the sources' have other shapes or classes."""
        prefix = getattr(network, "base_model_prefix", "")
        checkpoints = list(opened.values())
        first = checkpoints[0]
        labels = [(c.config or {}).get("id2label") for c in checkpoints]
        names = {
            name
            for checkpoint in checkpoints
            for name, info in checkpoint.infos.items()
            if name not in first.infos or first.infos[name].shape != info.shape
        }
        other = any(label != labels[0] for label in labels)
        if not names and not (other and "Classification" in self.network):
            return []
        outside = {n for n in first.infos if not n.startswith(f"{prefix}.")} if prefix else set()
        return sorted({f"^{name.partition('.')[0]}\\." for name in names | outside})

    def _task(self, name: str, place: str) -> Task:
        """Detect the kind and the columns of a task's data."""
        from gradmerge.training.examples import TaskData, columns_of
        from gradmerge.training.kinds import KINDS, detect_kind
        from gradmerge.training.splits import load_splits

        path = Path(place).expanduser()
        suffix = path.suffix.lower()
        entry: dict[str, Any] = {"path": place}
        if path.is_file():
            if suffix not in _BUILDERS:
                raise ConfigError(
                    f"--data {name}: expected a file that ends in {', '.join(_BUILDERS)}, got "
                    f"{place}."
                )
            entry = {"path": _BUILDERS[suffix], "data_files": place}
        elif path.is_dir() and not any(
            (path / file).is_file() for file in ("dataset_dict.json", "state.json")
        ):
            files = sorted(str(p) for p in path.iterdir() if p.suffix.lower() in _BUILDERS)
            if files:
                builder = _BUILDERS[Path(files[0]).suffix.lower()]
                entry = {"path": builder, "data_files": _splits_in(files) or files}
            else:
                entry = {"path": "imagefolder", "data_files": f"{place}/**"}
        splits = load_splits(name, TaskData(**entry), self.given.seed)
        columns = columns_of(splits["adaptation"], f"task {name}")
        kind = self.kinds.get(name) or detect_kind(columns, self.predicts)
        if kind is None:
            known = [k for k, v in KINDS.items() if self.predicts in v.predicts]
            raise ConfigError(
                f"task {name}: expected columns of a known kind for {self.network}, which predicts "
                f"{self.predicts}; got {shorten(columns, 8)}.\n"
                f"Give --kind {name}=KIND (choose from {', '.join(known)}) or rename columns."
            )
        entry["kind"] = kind
        data = TaskData(**entry)
        chosen = KINDS[data.kind].columns(data, columns)
        labelled = set(KINDS[data.kind].optional) <= {"tools", "input", "score", *chosen}
        texts = KINDS[data.kind].input in _TEXTS
        length = _text_per_row(splits["adaptation"]) if texts else 0.0
        return Task(name, place, kind, chosen, labelled, entry, length)

    def _chosen_processor(self) -> str | None:
        """Return the first source whose tokenizer has a chat template, if the base's has none.

        Raises:
            ConfigError: there are chats, and none has one.
        """
        from gradmerge.training.examples import load_processor

        chats = [task.name for task in self.tasks if task.kind == "chat"]
        for folder in dict.fromkeys(map(str, self.folders)) if chats else ():
            if load_processor(folder, "tokenizer", self.given.trust_remote_code).chat_template:
                return None if folder == str(self.folders[0]) else folder
        if chats:
            raise ConfigError(
                f"data of {', '.join(chats)}: expected a base or source whose tokenizer has a chat "
                "template, got none. Copy chat_template.jinja of the instruct model into the "
                "base's folder."
            )
        return None

    def _choose_sizes(self) -> None:
        """Choose lengths, batches, steps, memory mode and dtype by model and machine."""
        import torch

        given, device = self.given, torch.cuda.is_available()
        longest = getattr(self.config_of, "max_position_embeddings", None) or 512
        small = self.parameters < _SMALL
        self.max_length = given.max_length or min(512 if device or small else 256, longest)
        self.batch_size = given.batch_size or (16 if small else 8 if self.parameters < 1e9 else 4)
        halved = self.low_precision and (device or (not small and _multiplies_bfloat16()))
        self.dtype = given.dtype or ("bfloat16" if halved else "float32")
        tokens = sum(map(self._tokens, self.tasks))
        work = 6.0 * self.parameters * self.batch_size * tokens
        speed = _FLOPS.get(self.dtype, _FLOPS["float32"]) * (os.cpu_count() or 1)
        affordable = 100 if device else int(_SECONDS * speed / work)
        self.steps = given.steps or min(100, max(20, affordable))
        self.scored = {"selection": 128, "test": 256}
        if not device and not small:
            self.scored = {"selection": 32, "test": 64}
        self.memory, width = given.memory or "resident", 2 if self.dtype == "bfloat16" else 4
        if given.memory is None and not is_small(self.parameters * width):
            self.memory = memory_for(self.config())

    def _tokens(self, task: Task) -> float:
        """Return the tokens, or image patches, of one of a task's examples, about."""
        if not _has_tokens(task):
            return 197.0
        whole = task.kind == "causal_lm"  # packed into full windows
        return self.max_length if whole else min(self.max_length, 32 + task.length / _BYTES)

    def config(self) -> dict[str, Any]:
        """Return the configuration of the fit."""
        given = self.given
        recipe: dict[str, Any] = {"base": given.base} if given.base else {}
        recipe |= {
            "sources": self.sources,
            "coefficients": {"class_path": given.granularity},
            "init": {"class_path": "Uniform"},
        }
        if self.private:
            recipe["private"] = self.private
        if given.trust_remote_code:
            recipe["trust_remote_code"] = True
        labelled = all(task.labelled for task in self.tasks)
        tasks = {}
        for task in self.tasks:
            entry = dict(task.entry)
            if _has_tokens(task):
                entry["max_length"] = self.max_length
            tasks[task.name] = {**entry, "limit": dict(self.scored)}
        best = "lightning.pytorch.callbacks.ModelCheckpoint"
        export = {"output": given.output, "score_test": True, "overwrite": given.overwrite}
        cosine = "gradmerge.optimisers.CosineDecay"
        return {
            "seed_everything": given.seed,
            "model": {
                "recipe": recipe,
                **self._objective(labelled),
                "memory": self.memory,
                "dtype": self.dtype,
            },
            "data": {
                "batch_size": self.batch_size,
                "seed": given.seed,
                **({"processor": self.processor} if self.processor else {}),
                "tasks": tasks,
            },
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}},
            "lr_scheduler": {"class_path": cosine},
            "trainer": {
                "max_steps": self.steps,
                "val_check_interval": max(1, self.steps // 5),
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "callbacks": [
                    {
                        "class_path": best,
                        "init_args": {
                            "monitor": "selection/loss",
                            "mode": "min",
                            "filename": "best",
                        },
                    },
                    {"class_path": "ExportAtEnd", "init_args": export},
                ],
            },
        }

    def _objective(self, labelled: bool) -> dict[str, Any]:
        """Return the objective: labels where all tasks have them, else each task's own source."""
        if labelled:
            return {"objective": {"terms": [{"class_path": "CrossEntropy"}]}}
        # sources never change: each example runs through its own once
        term = {"class_path": "KLToSource"}
        return {"objective": {"terms": [term]}, "teacher_cache": _CACHE}

    def summary(self, target: Path) -> str:
        """Return what was chosen, in words."""
        tensors = ", with heads of their own" if self.private else ""
        labelled = all(task.labelled for task in self.tasks)
        goal = "cross-entropy" if labelled else "distillation from each task's source (no labels)"
        lines = [
            f"network    {self.network}, {self.parameters / 1e6:,.1f}M parameters",
            f"sources    {', '.join(self.sources)}{tensors}"
            + (f", on {self.given.base}" if self.given.base else ", no base"),
        ]
        for task in self.tasks:
            columns = ", ".join(f"{role} = {column}" for role, column in task.columns.items())
            lines.append(f"task       {task.name}: {task.kind} ({columns or 'no columns'})")
        if self.processor:
            lines.append(f"template   of chats: {self.processor}, since the base has none")
        lines += [
            f"learned    one coefficient per source and {self.given.granularity.lower()}, from the "
            f"average, by {goal}",
            f"sizes      {self.steps} steps of {self.batch_size} examples per task, up to "
            f"{self.max_length} tokens; scored on {self.scored['selection']} and "
            f"{self.scored['test']} examples",
            f"computed   in {self.dtype}, memory {self.memory}",
            f"again      gradmerge fit --config {target}",
        ]
        return "\n".join(lines)


def _has_tokens(task: Task) -> bool:
    from gradmerge.training.kinds import KINDS

    return KINDS[task.kind].input in _TEXTS  # type: ignore[index]


def _splits_in(files: Sequence[str]) -> dict[str, str]:
    """Return the files that are named after the three splits, by split; none if one lacks."""
    named = {Path(file).stem: file for file in files}
    for names in (("adaptation", "selection", "test"), ("train", "validation", "test")):
        if all(name in named for name in names):
            return {name: named[name] for name in names}
    return {}


def _multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for products of matrices in bfloat16."""
    import torch

    found = (getattr(torch.cpu, name, None) for name in _BFLOAT16)
    return any(supported() for supported in found if supported is not None)


def _text_per_row(rows: Any) -> float:
    """Return the mean number of bytes of text in a row, by its first rows."""

    def size(value: Any) -> int:
        if isinstance(value, str):
            return len(value.encode())
        if isinstance(value, Mapping):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    count = min(_ROWS, len(rows))
    return sum(size(rows[i]) for i in range(count)) / max(1, count)
