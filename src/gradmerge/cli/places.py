"""Files, folders and hub ids that a command reads, and its output, checked before the command runs.

Neither Lightning nor transformers is imported, and no weights are opened.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gradmerge.cli.arguments import SCORING
from gradmerge.cli.check import Mistake
from gradmerge.cli.options import LEARNING
from gradmerge.common.checkpoints import load_checkpoint, local_checkpoint
from gradmerge.common.errors import ConfigError, GradmergeError, SourceError, nearest, shorten
from gradmerge.common.files import near
from gradmerge.common.hub import expanded, require_hub_id, require_repo
from gradmerge.common.names import FILE_SUFFIXES
from gradmerge.common.output import paths_in, require_output

# Builders of datasets that read local files.
_BUILDERS = ("csv", "json", "parquet", "text", "arrow", "xml", "imagefolder", "audiofolder")
_DATA = (".csv", ".json", ".jsonl", ".parquet", ".txt", ".arrow")
Tree = Mapping[str, Any]


def lost(command: str, tree: Tree) -> Iterator[Mistake]:
    """Yield what is read and does not exist, and what forbids to write the output; without torch.

    Args:
        command: name of the command.
        tree: its options as plain data of the right form.
    """
    data = tree.get("data") or {}
    for name, task in (data.get("tasks") or {}).items():
        if isinstance(task, Mapping):
            yield from _files(f"data.tasks.{name}", task)
    yield from _owners(command, tree)
    folder = _recipe(command, tree).get("statistics")
    if isinstance(folder, str) and command != "collect" and not expanded(folder).exists():
        where = "model.recipe" if command in LEARNING else "recipe"
        text = f"expected a folder of `gradmerge collect`, but {folder} does not exist."
        yield Mistake(f"{where}.statistics", f"{text}{near(folder)}")
    driver = tree.get("driver")
    earlier = (
        (driver.get("init_args") or {}).get("earlier") if isinstance(driver, Mapping) else None
    )
    if isinstance(earlier, str) and not expanded(earlier).is_dir():
        text = f"expected a model folder, but {earlier} does not exist.{near(earlier)}"
        yield Mistake("driver.init_args.earlier", text)
    yield from _refused("", partial(_require_output, command, tree))
    if tree.get("model_folder"):
        yield from _refused("", partial(require_scored, command, tree.get("ckpt_path")))
    if command in _NEEDED:
        yield from _refused("", partial(_NEEDED[command], tree))
    try:
        for at, place in _sources(command, tree):
            yield from _refused(at, partial(_require_place, place))
    except GradmergeError as error:
        yield Mistake("", str(error))


def unreadable(command: str, tree: Tree) -> Iterator[Mistake]:
    """Yield what exists and cannot be read (see `lost`)."""
    from gradmerge.sources import as_source

    if command in _READABLE:
        yield from _refused("", partial(_READABLE[command], tree))
    base: Any = None
    for at, place in _sources(command, tree):
        try:
            found = as_source(place, base)
            base = found if at.endswith("base") else base
        except GradmergeError as error:
            yield Mistake(at, str(error))


def _refused(at: str, check: Callable[[], object]) -> Iterator[Mistake]:
    try:
        check()
    except GradmergeError as error:
        yield Mistake(at, str(error))


def _files(at: str, task: Mapping[str, Any]) -> Iterator[Mistake]:
    path, files = task.get("path"), task.get("data_files")
    if not isinstance(path, str):
        return
    if path not in _BUILDERS:
        local = path.startswith((".", "/", "~")) or path.endswith(_DATA)
        if local and not _exists(path):
            yield Mistake(
                f"{at}.path", f"expected a data set, but {path} does not exist.{near(path)}"
            )
        return
    listed = list(files.values()) if isinstance(files, Mapping) else [files]
    flat = [file for part in listed for file in (part if isinstance(part, list) else [part])]
    lost = [file for file in flat if isinstance(file, str) and not _exists(file)]
    if lost:
        one = len(lost) == 1
        text = f"expected files, but {shorten(lost)} do{'es' if one else ''} not exist."
        yield Mistake(f"{at}.data_files", f"{text}{near(lost[0])}")


def _owners(command: str, tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield the tasks whose `source` is none of the recipe's."""
    recipe, tasks = _recipe(command, tree), (tree.get("data") or {}).get("tasks")
    given = [recipe.get(part) or {} for part in ("sources", "heads")]
    if tree.get("driver") or not all(isinstance(part, Mapping) for part in (*given, tasks or {})):
        return  # a driver's earlier merges are sources, too
    known = [name for part in given for name in part]
    for name, task in (tasks or {}).items() if known else ():
        source = task.get("source") if isinstance(task, Mapping) else None
        if source is not None and source not in known:
            choice = f"choose from {', '.join(known)}"
            text = f"unknown source {source!r} ({choice}).{nearest(str(source), known)}"
            yield Mistake(f"data.tasks.{name}.source", text)


def _exists(file: str) -> bool:
    return "://" in file or bool(glob.glob(str(Path(file).expanduser()), recursive=True))


def _require_output(command: str, tree: Tree) -> None:
    output = tree.get("output")
    if command in LEARNING or not isinstance(output, str) or tree.get("mergekit"):
        return
    recipe = _recipe(command, tree)
    read = [recipe.get(option) for option in ("base", "sources", "heads")]
    read += [tree.get(option) for option in ("checkpoint", "folder", "base")]
    inputs = paths_in(read, patterns=True)
    require_output(Path(output).expanduser(), bool(tree.get("overwrite")), inputs)


# ---- sources -------------------------------------------------------------------------------------


def _recipe(command: str, tree: Tree) -> Mapping[str, Any]:
    holder = (tree.get("model") or {}) if command in LEARNING else tree
    found = holder.get("recipe")
    return found if isinstance(found, Mapping) and not tree.get("model_folder") else {}


def _sources(command: str, tree: Tree) -> Iterator[tuple[str, str]]:
    """Yield option and text of every source that is one; those that have moved at new places.

    Raises:
        ConfigError: an unknown source has moved.
    """
    yield from ((at, place) for at, place in _given(command, tree) if isinstance(place, str))


def _given(command: str, tree: Tree) -> Iterator[tuple[str, Any]]:
    from gradmerge.cli.resume import move_sources

    recipe = copy.deepcopy(dict(_recipe(command, tree)))
    moved, prefix = tree.get("sources"), "model.recipe" if command in LEARNING else "recipe"
    if recipe:
        if isinstance(moved, Mapping):
            move_sources(recipe, moved)
        yield f"{prefix}.base", recipe.get("base")
        for part in ("sources", "heads"):
            for name, place in (recipe.get(part) or {}).items():
                yield f"{prefix}.{part}.{name}", place
        return
    yield "model_folder", tree.get("model_folder")
    yield "base", tree.get("base")
    named = moved.items() if isinstance(moved, Mapping) else enumerate(moved or ())
    for name, place in named:
        yield f"sources.{name}" if isinstance(name, str) else f"sources[{name}]", place


def _require_place(text: str) -> None:
    """Reject what is neither here nor may be on the hub.

    Raises:
        SourceError: it is not.
    """
    path = expanded(text)
    if not text or "*" in text or path.exists():
        return  # patterns and empty texts have rules of their own
    if path.suffix in FILE_SUFFIXES:
        raise SourceError(f"{text}: expected a file, but none exists.{near(text)}")
    require_hub_id(text.partition("@")[0])


def require_scored(command: str, ckpt_path: str | None) -> None:
    """Reject a command or options that do not combine with a folder to score."""
    if command not in SCORING:
        raise ConfigError(
            f"model_folder: `gradmerge {command}` learns a merge, but a folder can only be scored; "
            "use `gradmerge test --model FOLDER` or `gradmerge validate --model FOLDER`."
        )
    if ckpt_path is not None:
        raise ConfigError(
            f"--model and --ckpt_path {ckpt_path}: expected one of them, got both; a folder holds "
            "weights, a checkpoint coefficients of a merge. Remove one."
        )


# ---- what commands without a recipe read ---------------------------------------------------------


def _require_folder(tree: Tree) -> None:
    folder = str(tree["folder"])
    if not expanded(folder).is_dir():
        raise ConfigError(f"{folder}: expected an exported folder, but none exists.{near(folder)}")


def _require_upload(tree: Tree) -> None:
    require_repo(str(tree["repo"]))
    _require_folder(tree)


def _require_evaluated(tree: Tree) -> None:
    path = str(tree["path"])
    if is_checkpoint(path, tree.get("head"), tree.get("sources")):
        local_checkpoint(path)
    folder = tree.get("include_path")
    if isinstance(folder, str) and not expanded(folder).is_dir():
        raise ConfigError(
            f"include_path: expected a folder of task files, but {folder} does not exist."
            f"{near(folder)}"
        )


def is_checkpoint(path: str, head: object = None, sources: object = None) -> bool:
    """Return whether a place to evaluate is a checkpoint; otherwise it is a folder or hub id.

    Raises:
        ConfigError: a folder or hub id is given a head or sources.
        SourceError: it is none of them.
    """
    local = expanded(path)
    if local.is_file() or local.suffix == ".ckpt":
        return True
    if head is not None or sources:
        raise ConfigError(
            f"{path}: expected a checkpoint for `head` and `sources`, got a folder or hub id, "
            "which has one head and no sources. Remove them; heads are in FOLDER/tasks/TASK."
        )
    if not local.is_dir():
        require_hub_id(path, single=True)
    return False


_NEEDED: Mapping[str, Callable[[Tree], object]] = {
    "export": lambda tree: local_checkpoint(str(tree["checkpoint"])),
    "unpack": _require_folder,
    "push": _require_upload,
    "evaluate": _require_evaluated,
}


def _read_compact(tree: Tree) -> None:
    from gradmerge.sources.emr import require_tasks

    require_tasks(expanded(str(tree["folder"])), tree.get("tasks") or ())


def _read_upload(tree: Tree) -> None:
    from gradmerge.export.push import contents

    contents(expanded(str(tree["folder"])))


def _read_evaluated(tree: Tree) -> None:
    if is_checkpoint(str(tree["path"])):
        load_checkpoint(str(tree["path"]), mmap=True)


_READABLE: Mapping[str, Callable[[Tree], object]] = {
    "export": lambda tree: load_checkpoint(str(tree["checkpoint"]), mmap=True),
    "unpack": _read_compact,
    "push": _read_upload,
    "evaluate": _read_evaluated,
}
