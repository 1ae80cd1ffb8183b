"""Tokenizers of model folders: their tokens and files, and one that has the tokens of several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmerge.errors import SourceError
from gradmerge.sources.files import read_json

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Files that hold tokens; without one of them transformers makes up an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE)
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Tokens:
    """What a merge knows of one tokenizer."""

    ids: Mapping[str, int]
    """Token -> id, added tokens among them."""
    added: Mapping[str, Any] = field(default_factory=dict)
    """Added tokens -> their settings (`AddedToken` of the tokenizers library), in order of id."""
    template: str | None = None
    """Chat template, where the tokenizer has exactly one."""


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a folder holds the tokens of a tokenizer."""
    return folder is not None and any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder as transformers loads it.

    Raises:
        SourceError: transformers cannot.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # every tokenizer class raises its own
        raise SourceError(
            f"{folder}: transformers cannot load its tokenizer: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. Save it again with a current transformers, as "
            "tokenizer.json."
        ) from error


def read_tokens(folder: Path, trust_remote_code: bool = False) -> Tokens:
    """Tokens, added tokens and chat template of a folder's tokenizer.

    Raises:
        SourceError: transformers cannot load it.
    """
    loaded = load_tokenizer(folder, trust_remote_code)
    added = {info.content: info for _, info in sorted(loaded.added_tokens_decoder.items())}
    template = getattr(loaded, "chat_template", None)
    return Tokens(loaded.get_vocab(), added, template if isinstance(template, str) else None)


def write_tokenizer(
    first: Path,
    ordinary: Sequence[str],
    added: Sequence[Any],
    target: Path,
    trust_remote_code: bool = False,
) -> None:
    """The tokenizer of folder `first`, with more tokens behind its own, into folder `target`.

    Args:
        first: whose tokens keep their ids.
        ordinary: further tokens that their own tokenizers make by rule; here they are added tokens.
        added: further added tokens, with their settings; special ones stay special.
        target: an existing folder.
        trust_remote_code: allow a tokenizer's own code to run.

    Raises:
        SourceError: transformers cannot load the first tokenizer.
    """
    if not ordinary and not added:  # the very files: nothing is lost in another form
        for name in TOKENIZER_FILES:
            if (first / name).is_file():
                shutil.copyfile(first / name, target / name)
        for code in first.glob("*.py"):
            shutil.copyfile(code, target / code.name)
        return
    loaded = load_tokenizer(first, trust_remote_code)
    # at once: the tokenizer is built again at every call
    loaded.add_tokens([*ordinary, *added])
    loaded.save_pretrained(target)


def write_template(folder: Path, template: str) -> None:
    """Set the chat template of a written tokenizer, and remove others."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings is not None and settings.pop("chat_template", None) is not None:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
