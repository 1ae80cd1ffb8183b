"""Modules around a network, as sentence-transformers stores them: `modules.json` and folders."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

from gradmerge.common.errors import SourceError, shorten
from gradmerge.common.files import parse_json, read_bytes, read_json
from gradmerge.common.names import require_file
from gradmerge.sources.base import Checkpoint
from gradmerge.sources.side_files import copy_files

# Files in the folder itself that belong to its modules.
_SETTINGS = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")


def modules_of(folder: Path | None) -> dict[str, str] | None:
    """Return the type of each module in a folder of its own, by folder; None without modules.

    Raises:
        SourceError: modules.json is damaged, or names a folder elsewhere or one that is missing.
    """
    path = None if folder is None else folder / "modules.json"
    if folder is None or path is None or not path.is_file():
        return None
    listed = parse_json(read_bytes(path), path)
    try:
        found = {str(entry["path"]): str(entry["type"]) for entry in listed}
    except (KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: expected a list of modules with `path` and `type`, got another form."
        ) from error
    found.pop("", None)  # the network itself
    for name in found:
        require_file(path, name, SourceError)
    lost = [name for name in found if not (folder / name).is_dir()]
    if lost:
        raise SourceError(
            f"{path}: its modules {shorten(lost)} have no folders; copy or download them again."
        )
    return found


def module_owner(checkpoints: Iterable[Checkpoint]) -> Path | None:
    """Return the folder whose modules a merge gets: the first that has any."""
    folders = (checkpoint.folder for checkpoint in checkpoints)
    return next((folder for folder in folders if modules_of(folder) is not None), None)


def files_of_modules(folder: Path) -> set[str]:
    """Return the files in the folders of modules, relative to the model's folder."""
    return {
        path.relative_to(folder).as_posix()
        for name in modules_of(folder) or {}
        for path in (folder / name).rglob("*")
        if path.is_file()
    }


def copy_modules(owner: Path, target: Path) -> None:
    """Copy the modules around a network, and their settings, if there are any."""
    if modules_of(owner) is None:
        return
    for pattern in _SETTINGS:
        for path in owner.glob(pattern):
            shutil.copyfile(path, target / path.name)
    for name in files_of_modules(owner):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(owner / name, target / name)


class FlatFolder:
    """A temporary folder for a model of sentence-transformers whose network is a module of its own.

    Older versions stored the network in `0_Transformer`, newer ones store it in the folder itself.
    The temporary folder has the newer layout, which both read, and all files but the weights of
    the network. It exists as long as this object.

    Args:
        folder: the model's folder.
        network: name of the folder of the network in it.
    """

    def __init__(self, folder: Path, network: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="gradmerge-modules-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        copy_files(folder, self.path)
        if (folder / "README.md").is_file():  # states the license
            shutil.copyfile(folder / "README.md", self.path / "README.md")
        copy_files(folder / network, self.path)
        listed = parse_json(read_bytes(folder / "modules.json"), folder / "modules.json")
        listed = [{**entry, "path": ""} if entry["path"] == network else entry for entry in listed]
        (self.path / "modules.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")
        for name in files_of_modules(folder):
            if not name.startswith(f"{network}/"):
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, self.path / name)


def network_module(folder: Path) -> str | None:
    """Return the folder of the network among the modules; None if it is the model's folder itself.

    Raises:
        SourceError: no module is a network of transformers, or several are.
    """
    modules = modules_of(folder)
    if modules is None or (folder / "config.json").exists():
        return None
    settings = {name: read_json(folder / name / "config.json") or {} for name in modules}
    found = [name for name, config in settings.items() if "model_type" in config]
    if len(found) != 1:
        what = f"several: {shorten(found)}" if found else f"others: {shorten([*modules.values()])}"
        raise SourceError(
            f"{folder}/modules.json: expected one module with a network of transformers (its "
            f"config.json has a model_type), got {what}.\nGive the folder of one network itself."
        )
    return found[0]
