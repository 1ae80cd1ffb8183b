"""Publish an exported folder on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradmerge.common.errors import ConfigError, OutputError, shorten
from gradmerge.common.files import read_bytes
from gradmerge.common.local_paths import absolute_places
from gradmerge.common.names import is_name
from gradmerge.common.output import files_of, listed_files
from gradmerge.sources.files import has_weights
from gradmerge.sources.side_files import OF_TRAINING

_RECORDS = ("*.md", "*.yaml", "*.html", "*config*.json", "modules.json")
_WRITTEN = ("provenance.json", "tokens.json", "emr.json")
_LEFT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.tmp", "*.partial", "*.lock", "*.log")
_LARGEST_RECORD = 1 << 24
_COMMIT = "Upload a merge made with gradmerge"


def contents(folder: Path) -> dict[str, int]:
    """Return the size of each file that would be uploaded, by its path in the folder.

    Raises:
        ConfigError: it is not a model's folder, or has files that do not belong to it, or names
            places on this machine.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected an exported folder, got none there.")
    others = ("emr.json", "adapter_config.json")
    if not (has_weights(folder) or any((folder / name).is_file() for name in others)):
        raise ConfigError(
            f"{folder}: expected a folder that gradmerge wrote, with model.safetensors, got one "
            f"with {shorten(files_of(folder)) or 'nothing'}."
        )
    names, listed = files_of(folder), listed_files(folder)
    left = [name for name in names if _is_left(name, listed)]
    if left:
        raise ConfigError(
            f"{folder}: expected only what belongs to the model, got also {shorten(left)}. "
            "Uploaded files stay in the history of a repository: move them elsewhere first."
        )
    named = {name: places for name in names if (places := _places(folder / name))}
    if named:
        shown = [f"{name}: {shorten(places, 2)}" for name, places in named.items()]
        raise ConfigError(
            f"{folder}: expected no places of this machine in what is published, got "
            f"{'; '.join(shown[:5])}.\nExport it again without provenance_paths, or edit the files."
        )
    return {name: (folder / name).stat().st_size for name in names}


def _is_left(name: str, listed: set[str] | None) -> bool:
    """Return whether a file is not the model's, by the folder's own list, or by its name."""
    if listed is not None and name not in listed:
        return True
    path = Path(name)
    if any(not is_name(part) for part in path.parts):
        return True  # hidden
    is_training = any(map(path.match, OF_TRAINING)) and listed is None
    return is_training or any(map(path.match, _LEFT))


def _places(path: Path) -> list[str]:
    """Return the places on this machine that a record names."""
    if not (path.name in _WRITTEN or any(map(path.match, _RECORDS))):
        return []
    if path.stat().st_size > _LARGEST_RECORD:
        return []
    text = read_bytes(path, ConfigError).decode(errors="replace")
    own = {str(place) for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()))}
    found = [f"{place}/..." for place in sorted(own) if len(place) > 1 and f"{place}/" in text]
    # pictures in a page are letters and slashes, and settings of models hold templates
    plain = path.suffix == ".html" or (path.suffix == ".json" and path.name not in _WRITTEN)
    return found if plain else found or absolute_places(text)


def push(folder: Path, repo: str, private: bool = True, files: Sequence[str] = ()) -> str:
    """Upload a folder to a repository of models, which is made if it does not exist.

    Args:
        folder: the exported folder.
        repo: owner/name.
        private: only you see the repository. One that exists keeps its visibility.
        files: paths in the folder of the files to upload (see `contents`).

    Returns:
        Address of the upload.

    Raises:
        ConfigError: nobody is logged in, or the repository is public and should be private.
        OutputError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"{repo}: expected a login at the hub, got none. Run `hf auth login`, or set HF_TOKEN "
            "to a token with write access. `--dry_run true` needs none."
        )
    api = huggingface_hub.HfApi()
    with _explained(repo):
        try:
            is_private = api.repo_info(repo).private
        except RepositoryNotFoundError:
            is_private = private
            api.create_repo(repo, private=private)
        if private and not is_private:
            raise ConfigError(
                f"{repo}: expected a private repository, but it exists and is public. Give "
                "`--private false` to publish the merge there, or another name."
            )
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message=_COMMIT
        )
    return str(getattr(done, "commit_url", done))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # of the HTTP client that huggingface_hub has
        reason = str(error).strip().split("\n")[0][:300]
        raise OutputError(
            f"{repo}: expected the hub to take the upload, got {type(error).__name__}: {reason}\n"
            "Check the network, the name of the owner, and that your token may write there; an "
            "upload that was cut off goes on where it stopped when it is repeated."
        ) from error


def table(files: dict[str, int]) -> str:
    """Return the files and their sizes, one per line, with the sum."""
    rows = [(_size(size), name) for name, size in files.items()]
    rows.append((_size(sum(files.values())), f"in all, {len(files)} files"))
    width = max(len(size) for size, _ in rows)
    return "\n".join(f"{size:>{width}}  {name}" for size, name in rows)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
