"""Weights of the modules around a network: which differ, and whether they can be merged."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gradmerge.common.errors import Problem, SourceError, shorten
from gradmerge.common.files import parse_json, read_bytes
from gradmerge.sources.base import Checkpoint
from gradmerge.sources.files import SafetensorsFile, TorchFile
from gradmerge.sources.modules import files_of_modules, module_owner, modules_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npy", ".npz")


def check_modules(checkpoints: Sequence[Checkpoint]) -> list[Problem]:
    """Compare the modules around the networks.

    Weights that differ are merged like those of the networks, so all checkpoints must have them in
    the same files, with the same tensors; the settings are those of the first checkpoint.
    """
    owner = module_owner(checkpoints)
    if owner is None:
        return []
    problems = []
    known = next(checkpoint.label for checkpoint in checkpoints if checkpoint.folder == owner)
    merged = differing_weights(checkpoints)
    for checkpoint in checkpoints:
        folder = checkpoint.folder
        if folder is None or modules_of(folder) is None:
            lost = merged
            different = []
        else:
            lost = [name for name in merged if not _same_tensors(owner / name, folder / name)]
            different = [n for n in _differences(owner, folder) if not n.endswith(_WEIGHTS)]
        for names, todo in (
            (lost, "Their weights are merged, for which all checkpoints must have them alike."),
            (different, f"The merge gets those of {known}."),
        ):
            if names:
                problems.append(
                    Problem(
                        "modules",
                        checkpoint.label,
                        "modules.json",
                        f"the modules around the network of {known}",
                        f"others: {shorten(names)}",
                        todo,
                        fatal=names is lost,
                    )
                )
    return problems


def differing_weights(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Return the weight files of modules that are not the same in all folders that have modules."""
    folders = dict.fromkeys(c.folder for c in checkpoints if modules_of(c.folder) is not None)
    first, *others = [folder for folder in folders if folder is not None] or [Path()]
    found = (name for other in others for name in _differences(first, other))
    return sorted({name for name in found if name.endswith(_WEIGHTS)})


def open_weights(path: Path) -> Checkpoint:
    """Open a weight file of a module.

    Raises:
        SourceError: it is missing, damaged, or of a kind that is not read.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(str(path)).open()
    if path.suffix in (".bin", ".pt", ".pth"):
        return TorchFile(str(path)).open()
    raise SourceError(
        f"{path}: expected weights of a module as .safetensors or .bin, which can be merged, got "
        f"{path.suffix}. Use sources that share them."
    )


def _same_tensors(first: Path, second: Path) -> bool:
    if not (first.is_file() and second.is_file()):
        return False
    one, two = (open_weights(path).infos for path in (first, second))
    return {n: i.shape for n, i in one.items()} == {n: i.shape for n, i in two.items()}


def _differences(first: Path, second: Path) -> list[str]:
    """Return the files of modules that differ between two folders."""
    found = []
    for name in sorted(files_of_modules(first) | files_of_modules(second)):
        pair = first / name, second / name
        if not all(path.is_file() for path in pair):
            found.append(name)
        elif name.endswith(".json"):
            values = [parse_json(read_bytes(path), path) for path in pair]
            if json.dumps(values[0], sort_keys=True) != json.dumps(values[1], sort_keys=True):
                found.append(name)
        elif not filecmp.cmp(*pair, shallow=False):
            found.append(name)
    return found
