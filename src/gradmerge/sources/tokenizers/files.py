"""Read and write the tokenizers of model folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmerge.common.errors import SourceError
from gradmerge.common.files import read_bytes, read_json
from gradmerge.sources.files import write_json
from gradmerge.sources.side_files import CODE, copy_files

SENTENCEPIECE = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "spm.model"),
)
# Files with tokens; without any of them, transformers makes an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE)
TOKENIZER_FILES = (
    *_VOCABULARIES,
    *("*.spm", "*.tiktoken", "*.bpe", "*.vocab"),
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one tokenizer."""

    ids: Mapping[str, int]
    """Token -> id, including added tokens."""
    added: Mapping[str, Any] = field(default_factory=dict)
    """Added tokens -> their settings (`AddedToken` of the tokenizers library), in order of id."""
    template: str | None = None
    """Chat template, if the tokenizer has exactly one."""


def has_tokenizer(folder: Path | None) -> bool:
    """Return whether a folder has a tokenizer with tokens."""
    return folder is not None and any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder with transformers.

    Raises:
        SourceError: transformers cannot load it.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # every tokenizer class raises its own
        raise SourceError(
            f"{folder}: transformers cannot load its tokenizer: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. Save it again as tokenizer.json, with a current "
            "transformers."
        ) from error


def read_tokens(folder: Path, trust_remote_code: bool = False) -> Tokens:
    """Return tokens, added tokens and chat template of a folder's tokenizer.

    Raises:
        SourceError: transformers cannot load it.
    """
    loaded = load_tokenizer(folder, trust_remote_code)
    added = {info.content: info for _, info in sorted(loaded.added_tokens_decoder.items())}
    template = getattr(loaded, "chat_template", None)
    return Tokens(loaded.get_vocab(), added, template if isinstance(template, str) else None)


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return the ids of tokens from tokenizer.json, vocab.json or vocab.txt, the first that exists.

    None if there is none. Unlike `read_tokens`, needs no tokenizer of transformers.
    """
    loaded = read_json(folder / "tokenizer.json", plain=True)
    if loaded is not None:
        try:
            vocabulary = (loaded.get("model") or {}).get("vocab") or {}
            if isinstance(vocabulary, list):  # unigram models store [token, score] pairs in order
                vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
            added = {entry["content"]: entry["id"] for entry in loaded.get("added_tokens") or []}
            found = {**vocabulary, **added}
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise SourceError(
                f"{folder}/tokenizer.json: expected a vocabulary and added tokens, got something "
                f"else ({type(error).__name__}: {error})."
            ) from error
        return _with_ids(folder / "tokenizer.json", found)
    plain = read_json(folder / "vocab.json", plain=True)
    if plain is not None:
        return _with_ids(folder / "vocab.json", plain)
    path = folder / "vocab.txt"
    if path.is_file():
        try:
            lines = read_bytes(path).decode().splitlines()
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: expected one token per line, got: {error}.") from error
        return {token: index for index, token in enumerate(lines)}
    return None


def added_tokens(folder: Path) -> set[str]:
    """Return the added tokens in tokenizer.json and added_tokens.json."""
    whole = read_json(folder / "tokenizer.json", plain=True) or {}
    listed = read_json(folder / "added_tokens.json", plain=True) or {}
    return {entry["content"] for entry in whole.get("added_tokens") or []} | listed.keys()


def _with_ids(path: Path, found: dict[Any, Any]) -> dict[str, int]:
    """Return a vocabulary, in which every token has a number."""
    for token, number in found.items():
        if type(token) is not str or type(number) is not int or not 0 <= number < 1 << 31:
            raise SourceError(
                f"{path}: expected tokens with their ids, got {ascii(token)[:60]}: "
                f"{ascii(number)[:60]}."
            )
    return found


def write_tokenizer(
    first: Path,
    ordinary: Sequence[str],
    added: Sequence[Any],
    target: Path,
    trust_remote_code: bool = False,
) -> None:
    """Write the tokenizer of folder `first`, extended by more tokens, into folder `target`.

    Args:
        first: folder of the tokenizer whose tokens keep their ids.
        ordinary: further tokens, which are ordinary in their tokenizers but become added tokens.
        added: further added tokens, with their settings; special ones stay special.
        target: an existing folder.
        trust_remote_code: allow a tokenizer's own code to run.

    Raises:
        SourceError: transformers cannot load the first tokenizer.
    """
    if not ordinary and not added:  # copies of the files lose nothing
        copy_files(first, target, [*TOKENIZER_FILES, CODE])
        return
    loaded = load_tokenizer(first, trust_remote_code)
    # in one call, as every call builds the tokenizer again
    loaded.add_tokens([*ordinary, *added])
    loaded.save_pretrained(target)


def write_template(folder: Path, template: str) -> None:
    """Replace the chat template of a written tokenizer."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings is not None and settings.pop("chat_template", None) is not None:
        write_json(path, settings)
