"""Open a written folder once, as its users will, before it gets its name."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gradmerge.common.cache import cache_folder
from gradmerge.common.errors import OutputError, SourceError, shorten
from gradmerge.common.files import read_bytes, read_json
from gradmerge.common.names import is_name
from gradmerge.sources import Checkpoint, HuggingFace
from gradmerge.sources.architecture import UnknownArchitectureError, model_class_of, read_config
from gradmerge.sources.base import View
from gradmerge.sources.skeleton import build_skeleton

OPENED = "opened with transformers"
_KINDS = {
    "missing_keys": "not in the files, so they would be random",
    "unexpected_keys": "in the files, but not in the class, so they would be dropped",
    "mismatched_keys": "of other shapes in the files",
    "error_msgs": "not to be loaded",
}
_GENERATION = "generation_config.json"


def load_class(config: Mapping[str, Any] | None) -> None:
    """Import the class that will be opened, unless one like it was opened before.

    The import takes seconds, opening a tenth of one.
    """
    kept = _kept(config or {})
    if kept is not None and not any(kept.glob("*")):
        with suppress(Exception):  # opening reports it
            import transformers

            getattr(transformers, kept.name)


def require_opens(
    folder: Path, target: Path, like: Path | None = None, trust_remote_code: bool = False
) -> str:
    """Open a folder with transformers, without reading its weights.

    What transformers finds depends on the configs and on the headers of the tensors alone. A folder
    that it has opened completely is remembered by them, and the next one like it is not opened.

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
    record = None if trust_remote_code else _record(folder, config)
    if record is not None and record.is_file():
        return OPENED
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
    if record is not None and not found:
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
    return OPENED


def folder_like(checkpoint: Checkpoint) -> Path | None:
    """Return the folder of the weights of a checkpoint, if transformers could open it."""
    while isinstance(checkpoint, View):
        checkpoint = checkpoint.inner
    folder = checkpoint.folder
    files = ("model.safetensors", "model.safetensors.index.json")
    return folder if folder and any((folder / name).is_file() for name in files) else None


def _problems(folder: Path, trust_remote_code: bool) -> dict[str, set[str]]:
    """Return what transformers reports when it opens a folder, by kind."""
    import transformers
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ImportError("transformers opens models without weights only with accelerate")
    config = read_config(folder, trust_remote_code)
    kind = model_class_of(config, folder, trust_remote_code)
    place: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": True}
    if issubclass(kind, transformers.PreTrainedModel):
        # of the headers, because it would read the weights
        infos = HuggingFace(str(folder)).open().infos.values()
        state = {i.name: torch.empty(i.shape, dtype=i.dtype, device="meta") for i in infos}
        place = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
    with _quiet():
        if (folder / _GENERATION).exists():
            transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        _, found = kind.from_pretrained(
            **place,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    return {key: set(map(str, found[key])) for key in _KINDS if found.get(key)}


def _kept(config: Mapping[str, Any]) -> Path | None:
    """Return the folder of the records of a class and of the versions that open it."""
    names, cache = config.get("architectures"), cache_folder()
    if cache is None or not (isinstance(names, list) and names and is_name(names[0])):
        return None
    try:
        versions = [f"{n}-{version(n)}" for n in ("gradmerge", "transformers", "accelerate")]
    except PackageNotFoundError:
        return None
    return cache / "opened" / "-".join(versions) / names[0]


def _record(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the file that exists if a folder with these configs and headers has been opened."""
    kept = _kept(config)
    if kept is None:
        return None
    described = hashlib.sha256(read_bytes(folder / "config.json"))
    if (folder / _GENERATION).is_file():
        described.update(read_bytes(folder / _GENERATION))
    for info in sorted(HuggingFace(str(folder)).open().infos.values(), key=lambda i: i.name):
        described.update(repr((info.name, info.shape, info.dtype)).encode())
    return kept / described.hexdigest()


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
