"""Check from headers, configs and tokenizers whether sources can be merged; no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from gradmerge.common.errors import (
    CompatibilityError,
    ConfigError,
    Problem,
    nearest,
    report,
    shorten,
)
from gradmerge.common.patterns import matches
from gradmerge.sources.base import Checkpoint, TensorInfo
from gradmerge.sources.configuration import check_config
from gradmerge.sources.labels import check_labels
from gradmerge.sources.quantised import check_quantised
from gradmerge.sources.tokenizers.files import SENTENCEPIECE, added_tokens, read_vocabulary

Read = Callable[[Path], dict[str, int] | None]


def check(
    checkpoints: Mapping[str, Checkpoint],
    private: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> list[Problem]:
    """Return everything that keeps the checkpoints from being merged.

    Args:
        checkpoints: opened sources by name; the first (the base, if there is one) is the reference.
        private: regular expressions of tensors that stay with their task and are not compared.
        allow: kinds of problems (``tokenizer``, ``config.rope_theta``) reported as warnings.

    Raises:
        ConfigError: `allow` names a kind that cannot be allowed.
    """
    for kind in allow:
        if kind not in ("tokenizer", "extra", "private") and not kind.startswith("config."):
            raise ConfigError(
                "allow: expected 'tokenizer', 'extra', 'private' or 'config.FIELD', got "
                f"{kind!r}. With other problems, sources cannot be merged at all."
            )
    reference = next(iter(checkpoints.values()))
    problems: list[Problem] = []
    keeps = partial(is_private, private=private)
    read: Read = cache(read_vocabulary)
    codes = {name: check_quantised(checkpoint, keeps) for name, checkpoint in checkpoints.items()}
    problems += [problem for found in codes.values() for problem in found]
    quantised = any(p.kind == "quantised" for p in next(iter(codes.values())))
    for name, checkpoint in checkpoints.items():
        if checkpoint is not reference:
            if not quantised and not any(p.kind == "quantised" for p in codes[name]):
                problems += _check_tensors(reference, checkpoint, private)
            problems += check_config(reference, checkpoint)
            problems += _check_tokenizer(reference, checkpoint, read)
    problems += _check_rows(reference, read)
    problems += check_labels(checkpoints, keeps)
    # rare kinds first, so that a shortened report shows every kind
    counts = Counter(problem.kind for problem in problems)
    problems.sort(key=lambda problem: counts[problem.kind])
    return [replace(p, fatal=p.fatal and p.kind not in allow) for p in problems]


def check_private(
    sources: Mapping[str, Checkpoint], private: Sequence[str], allow: Sequence[str] = ()
) -> list[Problem]:
    """Find sources (not the base) that lack private tensors of the first one.

    The network is built from the first source, and every task runs it.
    """
    first = next(iter(sources.values()))
    needed = [name for name in first.infos if is_private(name, private)]
    problems = []
    for source in sources.values():
        lost = [name for name in needed if name not in source.infos]
        if not lost:
            continue
        own = [n for n in source.infos if is_private(n, private) and n not in needed]
        problems.append(
            Problem(
                "private",
                source.label,
                shorten(lost),
                f"a private tensor of each name, as in {first.label}",
                f"{shorten(own)} instead" if own else "none",
                "Every task runs one network, so the heads must have the same tensors; their "
                "numbers of labels may differ. Save this source's head under these names; or, if "
                "it serves no task, accept that with allow: [private].",
                "private" not in allow,
            )
        )
    return problems


def require(problems: Sequence[Problem]) -> None:
    """Raise one report if any problem is fatal.

    Raises:
        CompatibilityError: the report of all problems.
    """
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise CompatibilityError(
            f"the sources cannot be merged as they are: {len(fatal)} problem(s).\n"
            f"{report(problems)}"
        )


def is_private(name: str, private: Sequence[str]) -> bool:
    """Return whether a pattern matches this tensor, so that it stays with its task."""
    return matches(private, name)


def _check_tensors(
    reference: Checkpoint, other: Checkpoint, private: Sequence[str]
) -> list[Problem]:
    expected = {n: i for n, i in reference.infos.items() if not is_private(n, private)}
    got = {n: i for n, i in other.infos.items() if not is_private(n, private)}
    extra = sorted(set(got) - set(expected))
    problems = [
        Problem(
            "missing",
            other.label,
            name,
            f"a tensor of shape {expected[name].shape} as in {expected[name].file}",
            "none of that name",
            f"Both must be of one architecture.{nearest(name, extra)} {_name_hint(name)}",
        )
        for name in sorted(set(expected) - set(got))
    ]
    problems += [
        Problem(
            "extra",
            other.label,
            name,
            f"no such tensor, as in {reference.label}",
            f"shape {got[name].shape} in {got[name].file}",
            f"It would be dropped; accept that with allow: [extra]. {_name_hint(name)}",
        )
        for name in extra
    ]
    for name in sorted(set(expected) & set(got)):
        problems += _check_form(expected[name], got[name])
    return problems


def _check_form(expected: TensorInfo, got: TensorInfo) -> list[Problem]:
    """Compare the shapes and kinds of number of one tensor in two checkpoints."""
    if expected.shape != got.shape:
        kind, wanted, given = "shape", f"shape {expected.shape}", f"{got.shape}"
        todo = _shape_hint(got.name, expected.shape, got.shape)
    elif expected.dtype.is_floating_point != got.dtype.is_floating_point and (
        min(expected.dtype.itemsize, got.dtype.itemsize) > 1  # else reported as quantised
    ):
        kind, wanted, given = "dtype", f"{expected.dtype}", f"{got.dtype}"
        todo = "Numbers cannot be merged with indices; these are different architectures."
    else:
        return []
    return [Problem(kind, got.file, got.name, f"{wanted} as in {expected.file}", given, todo)]


def _looks_like_head(name: str) -> bool:
    return bool(re.search(r"classifier|^cls\.|(^|\.)(score|head|qa_outputs|fc)\.", name))


def _head_hint(name: str) -> str:
    pattern = f"^{re.escape(name.rpartition('.')[0])}\\."
    return f"If it is a task's own head, declare it: private: ['{pattern}']."


def _name_hint(name: str) -> str:
    """Return what the absence of a tensor in one of two checkpoints may mean."""
    if "lm_head" in name:
        return (
            "One of them has no head, and no config that ties it to the embeddings "
            "(tie_word_embeddings); save both alike, in folders with their configs."
        )
    return _head_hint(name) if _looks_like_head(name) else ""


def _shape_hint(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> str:
    if _looks_like_head(name):
        return f"The heads have different numbers of labels. {_head_hint(name)}"
    if first[1:] == second[1:] and re.search("embed|lm_head|wte|shared", name):
        return (
            "The vocabularies differ in size. Choose the tokens of the merge, to match rows by "
            "token: tokenizer: {source: union} (or base, or the name of a source)."
        )
    return "These are different architectures or sizes."


def _check_rows(reference: Checkpoint, read: Read) -> list[Problem]:
    """Find tokens of the tokenizer of the merge that have no row in the embeddings.

    Some models have added tokens beyond, which only others of their family use.
    """
    folder, config = reference.tokenizer_folder, reference.config or {}
    sizes = {size for info in reference.infos.values() for size in info.shape}
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    rows = config.get("vocab_size", inner.get("vocab_size"))
    # another number of rows is the config's fault, which is told elsewhere
    found = read(folder) if folder is not None and rows in sizes else None
    if folder is None or not found or max(found.values()) < rows:
        return []
    added = added_tokens(folder)
    lost = sorted(token for token, row in found.items() if row >= rows and token not in added)
    if not lost:
        return []
    return [
        Problem(
            "tokenizer",
            str(folder),
            "vocabulary",
            f"ids 0 to {rows - 1}, the rows of the embeddings (vocab_size in config.json)",
            f"{len(lost)} beyond ({shorten([repr(token) for token in lost], 3)})",
            "Texts with these tokens would end in an error. Give the tokenizer that belongs to "
            "these weights, or accept that with allow: [tokenizer].",
        )
    ]


def _check_tokenizer(reference: Checkpoint, other: Checkpoint, read: Read) -> list[Problem]:
    if reference.tokenizer_folder == other.tokenizer_folder:
        return []
    if reference.folder is None or other.folder is None or reference.folder == other.folder:
        return []
    first, second = read(reference.folder), read(other.folder)
    if first is None or second is None:
        return _check_sentencepiece(reference.folder, other.folder, reference.label)
    if first == second:
        return []
    moved = sorted(token for token in first.keys() & second.keys() if first[token] != second[token])
    lost, new = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    parts = []
    for title, tokens in (("with another id", moved), ("missing", lost), ("new", new)):
        if tokens:
            parts.append(f"{len(tokens)} {title} ({shorten([repr(token) for token in tokens], 3)})")
    return [
        Problem(
            "tokenizer",
            str(other.folder),
            "vocabulary",
            f"the {len(first)} tokens of {reference.label}",
            ", ".join(parts),
            "One embedding row stands for different tokens, so merging rows would mix them. Choose "
            "the tokens of the merge, to match rows by token: tokenizer: {source: union} (or base, "
            "or the name of a source). If the rows do agree, use the tokens of "
            f"{reference.label} with allow: [tokenizer].",
        )
    ]


def _check_sentencepiece(reference: Path, other: Path, label: str) -> list[Problem]:
    """Compare the files of tokenizers that only the sentencepiece package can read."""
    problems = []
    for name in SENTENCEPIECE:
        first, second = reference / name, other / name
        if first.is_file() and second.is_file() and first.read_bytes() != second.read_bytes():
            problems.append(
                Problem(
                    "tokenizer",
                    str(second),
                    "vocabulary",
                    f"the same file as {label}",
                    f"another one ({second.stat().st_size} bytes, {first.stat().st_size} there)",
                    "One embedding row may stand for different tokens. Save both tokenizers with "
                    "transformers (tokenizer.json) to compare them token by token, or use the "
                    f"tokens of {label} with allow: [tokenizer].",
                )
            )
    return problems
