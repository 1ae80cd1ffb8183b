"""Ids of models on the Hugging Face hub, told apart from paths, and their download."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.common.files import near
from gradmerge.common.names import is_name


@dataclass(frozen=True)
class _Namer:
    """A file that names sources, what to do, and the hub ids that the user named, too."""

    file: str
    remedy: str
    known: frozenset[str]


_namer: ContextVar[_Namer | None] = ContextVar("namer", default=None)


@contextmanager
def without_downloads(file: object, remedy: str, known: Iterable[str] = ()) -> Iterator[None]:
    """Take hub ids from the local cache only within the context.

    Only what the user names is downloaded, never what a file names.

    Args:
        file: the file that names the sources to be opened.
        remedy: how the user names them.
        known: hub ids that the user has named.
    """
    token = _namer.set(_Namer(str(file), remedy, frozenset(known)))
    try:
        yield
    finally:
        _namer.reset(token)


_SECONDS = 10
"""Time in which the hub must answer."""
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")

_HOW = "write owner/name, or `class_path: HuggingFace` with `path` and, if it has one, `revision`."


def expanded(text: str) -> Path:
    """Return a path with `~` expanded.

    Raises:
        ConfigError: there is no such user, or the system does not take the path.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{_shown(text)}: expected a path or a hub id: {why}.") from error
    return path


def _shown(text: str) -> str:
    return (text if text.isprintable() else ascii(text)[1:-1])[:200]


def require_hub_id(text: str, single: bool = False, anywhere: bool = False) -> None:
    """Reject a text that names no local file or folder and is not the id of a model on the hub.

    Args:
        text: path or hub id, without its revision; nothing local has that name.
        single: accept old ids without an owner, such as ``gpt2``. Those in the cache always count.
        anywhere: accept an id whose owner is the name of a folder here.

    Raises:
        SourceError: it looks like a path.
    """
    owner, slash, _ = text.rpartition("/")
    why = ""
    if not _ID.fullmatch(text) or len(text) > 96 or ".." in text or "--" in text:
        why = "it looks like a path"
    elif not slash and not single and not _is_cached(text):
        why = "it has no owner"
    elif slash and not anywhere and Path(owner).is_dir() and not _is_cached(text):
        why = f"{owner} is a folder here"
    if why:
        plain = text.startswith((".", "/", "~"))  # nobody means the hub
        raise SourceError(
            f"{_shown(text)}: expected a folder or file, but none exists.{near(text)}"
            + ("" if plain else f"\nIt was not looked up on the hub, because {why}: {_HOW}")
        )


def _is_cached(repo: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}").is_dir()


def download(repo: str, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    """Return the local snapshot of a model, downloaded if it is not in the cache.

    Raises:
        SourceError: there is no such model, or neither the hub nor the cache has it.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if revision is not None and not all(map(is_name, revision.split("/"))):
        raise SourceError(
            f"{repo}: expected a branch, tag or commit as revision, got {ascii(revision)[:200]}."
        )
    namer = _namer.get()
    offline, tried = constants.HF_HUB_OFFLINE, "the hub was not asked (HF_HUB_OFFLINE)"
    remedy = "Check the name and the network, or give the path of a local folder."
    if namer is not None and repo not in namer.known:
        offline, remedy = True, namer.remedy
        tried = f"only what you name yourself is downloaded; {namer.file} names it"
    if not offline:
        tried = "the hub has no such snapshot for you"
        try:  # the client itself would wait for a silent server without end
            huggingface_hub.HfApi(token=token).model_info(repo, revision=revision, timeout=_SECONDS)
        except huggingface_hub.errors.HfHubHTTPError:
            pass  # it answered, and the snapshot below says what
        except Exception as error:  # of the HTTP client that huggingface_hub has
            offline, tried = True, f"the hub did not answer ({type(error).__name__}: {error})"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=list(patterns),
                local_files_only=offline,
            )
        )
    except Exception as error:  # the hub client raises many kinds
        why = "" if offline else f": {type(error).__name__}: {error}"
        raise SourceError(
            f"{repo} (revision {revision or 'main'}): no such local folder, not complete in the "
            f"cache ({constants.HF_HUB_CACHE}), and {tried}{why}.\n{remedy}"
        ) from error


def require_repo(repo: str) -> None:
    """Reject what is no name of a repository.

    Raises:
        ConfigError: it is not owner/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        sound = repo.count("/") == 1
    except HFValidationError:
        sound = False
    if not sound:
        raise ConfigError(f"repo: expected owner/name, got {ascii(repo)[:200]}.")
