"""Open a written folder once, as its users will, before it gets its name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradmerge.common.errors import OutputError, SourceError, shorten
from gradmerge.common.files import read_json
from gradmerge.sources import Checkpoint
from gradmerge.sources.architecture import UnknownArchitectureError, model_class_of, read_config
from gradmerge.sources.base import View
from gradmerge.sources.skeleton import build_skeleton

_KINDS = {
    "missing_keys": "not in the files, so they would be random",
    "unexpected_keys": "in the files, but not in the class, so they would be dropped",
    "mismatched_keys": "of other shapes in the files",
    "error_msgs": "not to be loaded",
}


def load_class(config: Mapping[str, Any] | None) -> None:
    """Import the class that will be opened; the import takes longer than opening."""
    names = (config or {}).get("architectures")
    if names:
        with suppress(Exception):  # opening reports it
            import transformers

            getattr(transformers, names[0])


def require_opens(
    folder: Path, target: Path, like: Path | None = None, trust_remote_code: bool = False
) -> str:
    """Open a folder with transformers, without reading its weights.

    Args:
        folder: the complete folder.
        target: the name that it will get, for messages.
        like: folder of a source. Tensors that it has, too, may be left over.
        trust_remote_code: allow modelling code in the folder to run.

    Returns:
        What was found, in a few words.

    Raises:
        OutputError: transformers refuses the config, or tensors are missing, left over or of other
            shapes.
    """
    config = read_json(folder / "config.json") or {}
    if not config.get("architectures"):
        return "not opened: it has no config that names a class"
    try:
        found = _problems(folder, trust_remote_code)
    except (UnknownArchitectureError, ImportError) as error:
        warnings.warn(f"{target}: not opened with transformers to check it: {error}", stacklevel=2)
        return f"not opened: {error}"
    except Exception as error:  # networks and their configs fail in many ways
        reason = f"{type(error).__name__}: {error}"
        try:
            build_skeleton(folder, trust_remote_code)
        except SourceError as refused:  # names the field of the config
            reason = str(refused).replace(str(folder), str(target))
        raise OutputError(
            f"{target}: expected a merge that transformers opens; it was not written. "
            f"{reason[:600]}"
        ) from error
    left = "unexpected_keys"
    same = like and read_json(like / "config.json")
    if found.get(left) and like and same and same.get("architectures") == config["architectures"]:
        with suppress(Exception):  # what transformers cannot open is no measure
            found[left] -= _problems(like, trust_remote_code).get(left, set())
    listed = [
        f"{shorten(sorted(names))} ({_KINDS[kind]})" for kind, names in found.items() if names
    ]
    if listed:
        raise OutputError(
            f"{target}: expected weights that {config['architectures'][0]} of transformers loads "
            f"completely, got tensors that do not fit: {'; '.join(listed)}.\n"
            "It was not written. The config of the base, or of the source whose head it has, does "
            "not describe these weights: correct it, or declare heads `private`."
        )
    return "opened with transformers"


def folder_like(checkpoint: Checkpoint) -> Path | None:
    """Return the folder of the weights of a checkpoint, if transformers could open it."""
    while isinstance(checkpoint, View):
        checkpoint = checkpoint.inner
    folder = checkpoint.folder
    files = ("model.safetensors", "model.safetensors.index.json")
    return folder if folder and any((folder / name).is_file() for name in files) else None


def _problems(folder: Path, trust_remote_code: bool) -> dict[str, set[str]]:
    """Return what transformers reports when it opens a folder, by kind."""
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ImportError("transformers opens models without weights only with accelerate")
    kind = model_class_of(read_config(folder, trust_remote_code), folder, trust_remote_code)
    with _quiet():
        _, found = kind.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    return {key: set(map(str, found[key])) for key in _KINDS if found.get(key)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the reports and progress bars of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
