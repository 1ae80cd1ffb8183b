"""Do the sources fit together? Headers, configs and tokenizers only; no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gradmerge.errors import (
    CompatibilityError,
    ConfigError,
    Problem,
    SourceError,
    nearest,
    report,
    shorten,
)
from gradmerge.sources.base import Checkpoint
from gradmerge.sources.configuration import check_config
from gradmerge.sources.files import read_json
from gradmerge.sources.tokenizers.files import SENTENCEPIECE


def check(
    checkpoints: Mapping[str, Checkpoint],
    private: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> list[Problem]:
    """Everything that keeps the checkpoints from being merged, the first one being the reference.

    Args:
        checkpoints: opened sources by name (the base, if there is one, first).
        private: regular expressions of tensors that stay with their task and are not compared.
        allow: kinds of problems (``tokenizer``, ``config.rope_theta``) taken as warnings.

    Returns:
        The problems, fatal ones and warnings.

    Raises:
        ConfigError: `allow` names what cannot be allowed.
    """
    for kind in allow:
        if kind not in ("tokenizer", "extra", "private") and not kind.startswith("config."):
            raise ConfigError(
                "allow: expected 'tokenizer', 'extra', 'private' or 'config.' and a field, got "
                f"{kind!r}. "
                "Other problems have no meaning that a merge could go on with."
            )
    reference = next(iter(checkpoints.values()))
    problems: list[Problem] = []
    for checkpoint in checkpoints.values():
        problems += _check_precision(checkpoint, private)
        if checkpoint is not reference:
            problems += _check_tensors(reference, checkpoint, private)
            problems += check_config(reference, checkpoint)
            problems += _check_tokenizer(reference, checkpoint)
    # A report that is cut short then still shows every kind.
    counts = Counter(problem.kind for problem in problems)
    problems.sort(key=lambda problem: counts[problem.kind])
    return [replace(p, fatal=p.fatal and p.kind not in allow) for p in problems]


def check_private(
    sources: Mapping[str, Checkpoint], private: Sequence[str], allow: Sequence[str] = ()
) -> list[Problem]:
    """Sources without the private tensors of the first one, from which the network is built.

    A base is not among them: it serves no task.
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
    """Stop with one report if any problem is fatal.

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
    """Whether a pattern says that this tensor stays with its task."""
    return any(re.search(pattern, name) for pattern in private)


def _check_precision(checkpoint: Checkpoint, private: Sequence[str]) -> list[Problem]:
    """Weights that a quantiser packed: their numbers are codes, which cannot be averaged."""
    packed = [
        info
        for info in checkpoint.infos.values()
        if info.dtype.itemsize < 2
        and (info.dtype.is_floating_point or re.search(r"weight$", info.name))
        and not is_private(info.name, private)
    ]
    return [
        Problem(
            "dtype",
            info.file,
            info.name,
            "at least 16 bits per entry",
            str(info.dtype),
            "A quantised tensor cannot be merged; give the unquantised checkpoint.",
        )
        for info in packed
    ]


def _check_tensors(
    reference: Checkpoint, other: Checkpoint, private: Sequence[str]
) -> list[Problem]:
    problems = []
    expected = {n: i for n, i in reference.infos.items() if not is_private(n, private)}
    got = {n: i for n, i in other.infos.items() if not is_private(n, private)}
    extra = sorted(set(got) - set(expected))
    for name in sorted(set(expected) - set(got)):
        problems.append(
            Problem(
                "missing",
                other.label,
                name,
                f"a tensor of shape {expected[name].shape} as in {expected[name].file}",
                "none of that name",
                f"Both must come from one architecture.{nearest(name, extra)} {_tie_hint(name)}"
                f"{_head_hint(name)}",
            )
        )
    for name in extra:
        problems.append(
            Problem(
                "extra",
                other.label,
                name,
                f"no such tensor, as in {reference.label}",
                f"shape {got[name].shape} in {got[name].file}",
                f"It would be dropped; accept that with allow: [extra]. {_tie_hint(name)}"
                f"{_head_hint(name)}",
            )
        )
    for name in sorted(set(expected) & set(got)):
        first, second = expected[name], got[name]
        if first.shape != second.shape:
            problems.append(
                Problem(
                    "shape",
                    second.file,
                    name,
                    f"shape {first.shape} as in {first.file}",
                    f"{second.shape}",
                    _shape_hint(name, first.shape, second.shape),
                )
            )
        elif first.dtype.is_floating_point != second.dtype.is_floating_point and (
            min(first.dtype.itemsize, second.dtype.itemsize) > 1  # else reported as quantised
        ):
            problems.append(
                Problem(
                    "dtype",
                    second.file,
                    name,
                    f"{first.dtype} as in {first.file}",
                    f"{second.dtype}",
                    "Numbers and indices do not merge; they come from different architectures.",
                )
            )
    return problems


def _looks_like_head(name: str) -> bool:
    return bool(re.search(r"classifier|^cls\.|(^|\.)(score|head|qa_outputs|fc)\.", name))


def _head_hint(name: str) -> str:
    if not _looks_like_head(name):
        return ""
    pattern = f"^{re.escape(name.rpartition('.')[0])}\\."
    return f"If it is a task's own head, declare it: private: ['{pattern}']."


def _tie_hint(name: str) -> str:
    return (
        "One of the two ties its embeddings and the other does not; save both alike. "
        if "lm_head" in name
        else ""
    )


def _shape_hint(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> str:
    if _looks_like_head(name):
        return f"The heads differ in their number of labels. {_head_hint(name)}"
    if first[1:] == second[1:] and re.search("embed|lm_head|wte|shared", name):
        return (
            "The vocabularies differ in size. Say whose tokens the merge has, and rows are matched "
            "by token: tokenizer: {source: union} (or base, or the name of a source)."
        )
    return "These are different architectures or sizes."


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id from tokenizer.json, vocab.json or vocab.txt, whichever comes first."""
    loaded = read_json(folder / "tokenizer.json")
    if loaded is not None:
        try:
            vocabulary = (loaded.get("model") or {}).get("vocab") or {}
            if isinstance(vocabulary, list):  # unigram models store [token, score] pairs in order
                vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
            added = {entry["content"]: entry["id"] for entry in loaded.get("added_tokens") or []}
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise SourceError(
                f"{folder}/tokenizer.json: expected a vocabulary and added tokens, got another "
                f"form ({type(error).__name__}: {error})."
            ) from error
        return {**vocabulary, **added}
    plain = read_json(folder / "vocab.json")
    if plain is not None:
        return plain
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {token: index for index, token in enumerate(lines)}
    return None


def _check_tokenizer(reference: Checkpoint, other: Checkpoint) -> list[Problem]:
    if reference.tokenizer_folder == other.tokenizer_folder:
        return []
    if reference.folder is None or other.folder is None or reference.folder == other.folder:
        return []
    first, second = read_vocabulary(reference.folder), read_vocabulary(other.folder)
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
            "The same embedding row stands for different tokens, so merging rows mixes meanings. "
            "Say whose tokens the merge has, and rows are matched by token: tokenizer: {source: "
            "union} (or base, or the name of a source). Or, if rows do agree and the tokens of "
            f"{reference.label} should be used: allow: [tokenizer].",
        )
    ]


def _check_sentencepiece(reference: Path, other: Path, label: str) -> list[Problem]:
    """Compare the files of tokenizers whose vocabulary only the sentencepiece package can read."""
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
                    "The same embedding row may stand for different tokens. Save both tokenizers "
                    "with transformers (tokenizer.json) for a comparison token by token, or allow "
                    f"it with allow: [tokenizer] if the tokens of {label} should be used.",
                )
            )
    return problems
