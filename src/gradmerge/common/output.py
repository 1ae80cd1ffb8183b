"""Places of output: never over input or over what gradmerge did not write, and writable."""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradmerge.common.atomic import existing, hidden_name, nameless
from gradmerge.common.errors import ConfigError, OutputError, shorten

MANIFEST = ".gradmerge"
"""File of a folder that gradmerge wrote, with the names of all others."""

# What folders of versions without a manifest are known by, and what they may hold.
_DESCRIBED = ("provenance.json", "emr.json", "statistics.json", "*/provenance.json")
_WRITTEN = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "README.md",
    "gradmerge.yaml",
)
_YAML = "# Coefficients of gradmerge "
# Bytes that the name of a folder at work and the names in it take at most.
_LONGEST_FILE = 100


def paths_in(*given: Any, patterns: bool = False) -> list[Path]:
    """Return the files and folders that exist among all texts in plain data.

    Args:
        *given: paths, texts, and lists and mappings of them.
        patterns: texts may also be patterns like `data/*.json`.
    """
    found = []
    for item in given:
        if isinstance(item, Mapping):
            found += paths_in(*item.values(), patterns=patterns)
        elif isinstance(item, (list, tuple)):
            found += paths_in(*item, patterns=patterns)
        elif isinstance(item, (str, os.PathLike)):
            with suppress(OSError, ValueError, RuntimeError):  # a text that is no path
                path = Path(item).expanduser()
                if path.exists():
                    found.append(path)
                elif patterns and glob.has_magic(str(item)):
                    found += map(Path, glob.glob(str(path)))
    return found


def require_output(
    target: Path, overwrite: bool, inputs: Iterable[Path] = (), remedy: str = "--overwrite true"
) -> None:
    """Reject a folder to write that cannot be written, or that would take something away.

    Args:
        target: the folder.
        overwrite: it may exist if gradmerge wrote it, and nothing else is in it.
        inputs: files and folders that are read, and must not be in it or around it.
        remedy: the option that allows to overwrite.

    Raises:
        ConfigError: it exists, or overlaps with an input.
        OutputError: it cannot be written.
    """
    _require_name(target)
    require_apart(target, inputs)
    try:
        entry = target.stat()  # once: another export may move it in between
    except FileNotFoundError:
        if target.is_symlink():
            raise ConfigError(f"{target} is a link to nothing; give another folder.") from None
    except NotADirectoryError:
        pass  # below a file, which cannot be written
    else:
        if not overwrite:
            raise ConfigError(f"{target} exists; give another folder, or {remedy}.")
        if not stat.S_ISDIR(entry.st_mode):
            raise ConfigError(f"{target} is a file; give a folder.")
        try:
            _require_own(target)
        except ConfigError:
            with suppress(FileNotFoundError):  # another export replaces it just now
                if target.stat().st_ino == entry.st_ino:
                    raise
    require_writable(target)


def require_output_file(target: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Reject a mergekit file to write, as `require_output` does for folders."""
    _require_name(target)
    require_apart(target, inputs)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give a file.")
    if target.exists():
        if not overwrite:
            raise ConfigError(f"{target} exists; give another file, or --overwrite true.")
        with target.open("rb") as file:
            if file.read(len(_YAML)) != _YAML.encode():
                raise ConfigError(
                    f"{target}: expected a file that gradmerge wrote (its first line says so), "
                    "which alone is overwritten, got another; give another name, or remove it."
                )
    require_writable(target)


def _require_name(target: Path) -> None:
    if "\0" in str(target):
        raise ConfigError(f"output: expected a path, got a NUL character in {str(target)!r}.")
    place = existing(target)
    limit, total = (_limit(place, name) for name in ("PC_NAME_MAX", "PC_PATH_MAX"))
    for part in target.parts:
        size = len(os.fsencode(part))
        if size > limit:
            raise ConfigError(
                f"output: expected names of at most {limit} bytes, got one of {size}: "
                f"{part[:40]}...; give a shorter one."
            )
    size = len(os.fsencode(target.absolute())) + _LONGEST_FILE
    if size > total:
        raise ConfigError(
            f"output: expected paths of at most {total} bytes, got {size} with the names of the "
            "files in it; give a shorter path."
        )


def _limit(place: Path, name: str) -> int:
    with suppress(OSError, ValueError, AttributeError):
        return os.pathconf(place, name)
    return 255 if name == "PC_NAME_MAX" else 4096


def require_writable(target: Path) -> None:
    """Prove that a file or folder can be made, by making a folder where it will be."""
    place = existing(target)
    if place == target.absolute():
        place = place.parent
    descriptor = nameless(place)  # leaves nothing, even if the process is killed
    if descriptor is not None:
        os.close(descriptor)
        return
    probe = place / hidden_name(target, "partial").name
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {error.strerror} ({place}); give another place."
        ) from error


# ---- overlaps ------------------------------------------------------------------------------------


def require_apart(target: Path, inputs: Iterable[Path], replaced: bool = True) -> None:
    """Reject output that would take the place of an input, hold it, or lie in it.

    Paths are compared by the files they lead to: through links, mounts and any spelling.

    Args:
        target: what is written.
        inputs: files and folders that are read.
        replaced: it takes the place of what is there. Otherwise files are only added.
    """
    around = _identities(target)
    if not around:
        return
    own = around[0] if target.exists() else None
    for place in ("current", "home") if own is not None and replaced else ():
        with suppress(OSError, RuntimeError):  # there is none
            if own in _identities(Path.home() if place == "home" else Path.cwd()):
                raise ConfigError(
                    f"output: expected a folder of its own, got {str(target)!r}, which is the "
                    f"{place} folder, or holds it; give another."
                )
    for path in inputs:
        theirs = _identities(path)
        if not theirs:
            continue
        if path.is_dir() and theirs[0] in around:
            raise ConfigError(
                f"{target}: expected a place apart from the input, got one in {path}, which is "
                "read; give another."
            )
        if own is not None and own in (theirs if replaced else theirs[:1]):
            raise ConfigError(
                f"{target}: expected a place apart from the input, got one that holds {path}, "
                "which is read and would be deleted; give another."
            )


def _identities(path: Path) -> list[tuple[int, int]]:
    """Return device and number of a path and all folders above it, as far as they exist."""
    found = []
    with suppress(OSError):
        path = path.resolve()
    for place in (path, *path.parents):
        with suppress(OSError):
            entry = place.stat()
            found.append((entry.st_dev, entry.st_ino))
    return found


# ---- what gradmerge wrote ------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """Record the names of all files of a folder that gradmerge wrote."""
    text = json.dumps({"files": files_of(folder)}, ensure_ascii=True, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[str]:
    """Return the names of all files and links in a folder and below, without the manifest."""
    names = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        names += [os.path.relpath(os.path.join(place, name), folder) for name in files + links]
    return sorted(name.replace(os.sep, "/") for name in names if name != MANIFEST)


def _require_own(target: Path) -> None:
    """Reject a folder that gradmerge did not write, or that holds files of others."""
    if os.path.ismount(target):
        raise ConfigError(f"{target} is a mount point, which cannot be replaced; give one in it.")
    files = files_of(target)
    listed = listed_files(target)
    if listed is None and files and not _is_described(target):
        raise ConfigError(
            f"{target}: expected a folder that gradmerge wrote, which alone is overwritten, got "
            f"one with {shorten(files)}; give another folder, or remove it."
        )
    foreign = [n for n in files if not (_is_known(n) if listed is None else n in listed)]
    if foreign:
        raise ConfigError(
            f"{target}: expected nothing but what gradmerge wrote, which would be deleted, got "
            f"also {shorten(foreign)}; move it elsewhere, or give another folder."
        )


def listed_files(folder: Path) -> set[str] | None:
    """Return the names of the files that gradmerge wrote into a folder; None without a manifest."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return set(map(str, json.loads((folder / MANIFEST).read_bytes())["files"]))
    return None


def _is_described(folder: Path) -> bool:
    """Return whether a folder without a manifest has a description that gradmerge writes."""
    for pattern in _DESCRIBED:
        for path in folder.glob(pattern):
            with suppress(OSError, ValueError, AttributeError, RecursionError):
                found = json.loads(path.read_bytes())
                is_own = "gradmerge" in str(found.get("versions")) or "scales" in found
                if is_own:
                    return True
    return False


def _is_known(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in _WRITTEN)
