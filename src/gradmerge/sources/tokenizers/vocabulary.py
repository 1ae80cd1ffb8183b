"""One vocabulary for sources with different tokenizers: rows of embeddings matched by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.atomic import Scratch
from gradmerge.common.errors import ConfigError, Problem, SourceError, nearest, require, shorten
from gradmerge.sources.base import Checkpoint, tensor_bytes
from gradmerge.sources.side_files import CODE, copy_files
from gradmerge.sources.skeleton import bind, build_skeleton
from gradmerge.sources.tokenizers.files import (
    Tokens,
    has_tokenizer,
    read_tokens,
    write_template,
    write_tokenizer,
)
from gradmerge.sources.tokenizers.ids import with_size


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the merge, if tokenizers differ.

    Every source is read with one row per token of the merge's tokenizer. For a token that it lacks,
    a source gets the row of the only source that has it, else of the base, else the mean of the
    rows of all that have it, else zeros, with a warning (the rules of mergekit). Rows without a
    token are dropped; rows of padding are the mean of all tokens' rows.
    """

    source: str = "union"
    """`union` (the tokens of all), `base`, or the name of a source. A union keeps the ids of the
    base, or of the first source without a base. Further tokens follow as added tokens, which the
    tokenizer matches as a whole before it applies its own rules."""
    pad_to_multiple_of: int | None = None
    """Round the number of rows up to a multiple of this."""
    chat_template: str = "auto"
    """Name of the source (or `base`) whose chat template is used, the text of one, or auto: that of
    the tokenizer which keeps its ids, else the first that a source has."""

    def __post_init__(self) -> None:
        """Check the options that do not depend on the sources."""
        multiple = self.pad_to_multiple_of
        valid = multiple is None or multiple >= 1
        require(valid, "tokenizer.pad_to_multiple_of", "at least 1", multiple)

    def require(self, sources: Sequence[str], has_base: bool) -> None:
        """Reject unknown and ambiguous names of sources.

        Args:
            sources: names of the sources.
            has_base: whether the recipe has a base.

        Raises:
            ConfigError: a name is unknown or ambiguous.
        """
        names = [*(["base"] if has_base else []), *sources]
        word = next((n for n in sources if n in ("union", "auto")), None)
        if word is not None:
            raise ConfigError(
                f"tokenizer: a source is named {word!r}, which is also an option; rename it."
            )
        if self.source not in ("union", *names):
            raise ConfigError(
                f"tokenizer.source: expected union or one of {', '.join(names)}, got "
                f"{self.source!r}.{nearest(self.source, ['union', *names])}"
            )
        if self.chat_template not in ("auto", *names) and "{" not in self.chat_template:
            raise ConfigError(
                "tokenizer.chat_template: expected auto, the name of a source, or the text of a "
                f"Jinja template, got {self.chat_template!r}."
                f"{nearest(self.chat_template, ['auto', *names])}"
            )


class Alignment:
    """The tokens of a merge, and the row of each token in every source.

    Checkpoints are named by source; the base (as `base`) is the first, if there is one.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        checkpoints: Mapping[str, Checkpoint],
        trust_remote_code: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.trust_remote_code = trust_remote_code
        self.checkpoints = dict(checkpoints)
        self.warnings: list[Problem] = []
        self.other_settings: dict[str, list[str]] = {}
        first = next(iter(self.checkpoints))
        self.owner = first if vocabulary.source == "union" else vocabulary.source
        self.axes = self._find_axes()
        self.heights = {name: self._height(name) for name in self.checkpoints}
        self.source_tokens = self._read_tokens()
        self._scratch = Scratch("tokenizer")  # removed with this object
        self.folder = self._scratch.path
        self.tokenizer_folder = self.folder / "tokenizer"
        self.tokenizer_folder.mkdir()
        self.added = self._write()
        self.template_of = self._carry_template()
        self.tokens = self._written_tokens()
        needed = max(self.tokens.values()) + 1
        multiple = vocabulary.pad_to_multiple_of or 1
        self.size = -(-needed // multiple) * multiple
        self.rows = {name: self._rows(name) for name in self.checkpoints}
        self.named = torch.zeros(self.size, dtype=torch.bool)
        self.named[torch.tensor(list(self.tokens.values()))] = True
        self._warn_of_zeros()

    def _find_axes(self) -> dict[str, dict[str, int]]:
        """Return the axis over tokens of every tensor that has one, by checkpoint and tensor."""
        known: dict[Any, dict[str, int]] = {}
        found = {}
        for name, checkpoint in self.checkpoints.items():
            if checkpoint.folder is not None and checkpoint.config is not None:
                kind = tuple(checkpoint.infos), str(checkpoint.config.get("architectures"))
                if kind not in known:
                    known[kind] = vocabulary_axes(
                        checkpoint, checkpoint.folder, checkpoint.config, self.trust_remote_code
                    )
                found[name] = known[kind]
        if not found:
            raise ConfigError(
                "tokenizer: no source is a model folder with a config and a tokenizer, so there "
                "are no tokens to compare; give folders, or leave out the option."
            )
        some = next(iter(found.values()))
        return {
            name: found.get(name, {n: axis for n, axis in some.items() if n in checkpoint.infos})
            for name, checkpoint in self.checkpoints.items()
        }

    def _height(self, name: str) -> int:
        """Return the number of rows of a checkpoint's vocabulary."""
        checkpoint = self.checkpoints[name]
        heights = {t: checkpoint.infos[t].shape[axis] for t, axis in self.axes[name].items()}
        if len(set(heights.values())) != 1:
            got = shorten([f"{tensor} {height}" for tensor, height in heights.items()])
            raise SourceError(
                f"{checkpoint.label}: expected tensors with one row per token, all of one height, "
                f"got {got or 'none'}. Rows cannot be matched with tokens."
            )
        return next(iter(heights.values()))

    def _read_tokens(self) -> dict[str, Tokens]:
        first = next(iter(self.checkpoints))
        found = {}
        for name, checkpoint in self.checkpoints.items():
            folder = checkpoint.tokenizer_folder
            if folder is not None and has_tokenizer(folder):
                found[name] = read_tokens(folder, self.trust_remote_code)
                continue
            lacks = f"{checkpoint.label} (source {name}) has no tokenizer"
            if name in (first, self.owner):
                raise ConfigError(
                    f"tokenizer: {lacks}, but others are compared with it. Save one in its folder."
                )
            if self.heights[name] != self.heights[first]:
                raise SourceError(
                    f"{lacks}, and its embedding has {self.heights[name]} rows, but that of "
                    f"{first} {self.heights[first]}, so the tokens of its rows are unknown. Save "
                    "its tokenizer in its folder."
                )
            self._warn(
                checkpoint.label,
                "a tokenizer",
                "none",
                f"It has as many rows as {first}, so its tokens are assumed to be the same.",
            )
            found[name] = found[first]
        return found

    def _write(self) -> dict[str, list[str]]:
        """Write the merge's tokenizer; return the ordinary and the added tokens it gained."""
        ordinary: dict[str, str] = {}
        added: dict[str, Any] = {}
        base = self.source_tokens[self.owner]
        others = [n for n in self.checkpoints if n != self.owner]
        for name in others if self.vocabulary.source == "union" else ():
            tokens = self.source_tokens[name]
            for token, row in sorted(tokens.ids.items(), key=lambda item: item[1]):
                if row >= self.heights[name]:  # it has no row
                    continue
                settings = tokens.added.get(token)
                before = base.added.get(token, added.get(token))
                if token in base.ids or token in added:
                    if settings is not None and settings != before:
                        self.other_settings.setdefault(name, []).append(token)
                elif settings is not None:
                    added[token] = settings
                    ordinary.pop(token, None)
                else:
                    ordinary[token] = name
        for name, tokens_set in self.other_settings.items():
            self._warn(
                self.checkpoints[name].label,
                "the settings of added tokens (special, stripping) of the other tokenizers",
                f"others for {len(tokens_set)} ({_quoted(tokens_set)})",
                "The first settings are kept.",
            )
        folder = self.checkpoints[self.owner].tokenizer_folder
        assert folder is not None  # it has a tokenizer
        more = list(ordinary), list(added.values())
        write_tokenizer(folder, *more, self.tokenizer_folder, self.trust_remote_code)
        if ordinary:
            self._warn(
                self.checkpoints[self.owner].label,
                "the ordinary tokens of all sources",
                f"{len(ordinary)} that only others have ({_quoted(list(ordinary))})",
                "They become added tokens, which are matched as a whole anywhere in a text, before "
                f"its own rules; tokenizer.source: {self.owner} leaves them out.",
            )
        return {"ordinary": list(ordinary), "added": list(added)}

    def _carry_template(self) -> str | None:
        """Write the chat template; return the name of its source."""
        chosen = self.vocabulary.chat_template
        if chosen != "auto" and chosen not in self.source_tokens:
            write_template(self.tokenizer_folder, chosen)
            return "the recipe"
        names = [self.owner, *self.source_tokens] if chosen == "auto" else [chosen]
        for name in names:
            template = self.source_tokens[name].template
            if template is not None:
                if name != self.owner:
                    write_template(self.tokenizer_folder, template)
                return name
        if chosen != "auto":
            raise ConfigError(f"tokenizer.chat_template: source {chosen} has no chat template.")
        return None

    def _written_tokens(self) -> dict[str, int]:
        """Return the tokens of the merge, read back from the written files."""
        config = self.tokenizer_folder / "config.json"  # may name the class of the tokenizer
        fields = self.checkpoints[self.owner].config
        if fields is not None:
            config.write_text(json.dumps(dict(fields)))
        found = read_tokens(self.tokenizer_folder, self.trust_remote_code).ids
        config.unlink(missing_ok=True)
        if not found:
            raise SourceError(f"{self.checkpoints[self.owner].label}: its tokenizer has no tokens.")
        return dict(found)

    def _rows(self, name: str) -> Tensor:
        """Return the row of each id in a checkpoint, `[size]`; -1 if it has none."""
        rows = torch.full((self.size,), -1, dtype=torch.long)
        own, height = self.source_tokens[name].ids, self.heights[name]
        places: dict[int, int] = {}
        for token, i in self.tokens.items():
            if own.get(token, height) < height:
                places.setdefault(i, own[token])  # the first of several tokens with one id
        if places:
            rows[torch.tensor(list(places))] = torch.tensor(list(places.values()))
        return rows

    def _warn_of_zeros(self) -> None:
        nowhere = self.named & (torch.stack(list(self.rows.values())) < 0).all(dim=0)
        tokens = [token for token, i in self.tokens.items() if nowhere[i]]
        if tokens:
            self._warn(
                self.checkpoints[self.owner].label,
                "a row for every token in some checkpoint",
                f"none for {len(tokens)} ({_quoted(tokens)})",
                "Their rows are zeros, as no model was trained on them.",
            )

    def _warn(self, where: str, expected: str, got: str, todo: str) -> None:
        self.warnings.append(Problem("tokenizer", where, "vocabulary", expected, got, todo, False))

    def donors(self, owners: Sequence[str]) -> list[str]:
        """Return the checkpoints whose rows a token gets: the only owner, the base, or all."""
        return ["base"] if len(owners) > 1 and "base" in owners else list(owners)

    def missing(self, name: str, holders: Sequence[str]) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield ids of tokens that a checkpoint lacks, and the donors of their rows (none: zeros).

        Args:
            name: the checkpoint.
            holders: checkpoints that have the tensor in question.
        """
        ids = (self.named & (self.rows[name] < 0)).nonzero().squeeze(1)
        if not len(ids):
            return
        table = torch.stack([self.rows[holder][ids] >= 0 for holder in holders])
        patterns, place = torch.unique(table, dim=1, return_inverse=True)
        for i, pattern in enumerate(patterns.unbind(dim=1)):
            owners = [h for h, has in zip(holders, pattern.tolist(), strict=True) if has]
            yield ids[place == i], self.donors(owners)

    def fingerprint(self) -> str:
        """SHA-256 over the tokens' ids and each checkpoint's rows."""
        digest = hashlib.sha256(json.dumps(sorted(self.tokens.items())).encode())
        for rows in self.rows.values():
            digest.update(tensor_bytes(rows))
        return digest.hexdigest()

    @cached_property
    def owner_config(self) -> dict[str, Any]:
        """All fields of the config of the merge's tokenizer, including defaults."""
        import transformers

        folder, config = self.checkpoints[self.owner].folder, self.checkpoints[self.owner].config
        if folder is None or config is None:
            return {}
        try:
            loaded = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except (ValueError, OSError):  # custom code, which building the network reports
            return dict(config)
        return {**loaded.to_dict(), **config}

    def moved(self, name: str) -> dict[int, int]:
        """Return own id -> id in the merge, for a checkpoint's tokens."""
        own = self.source_tokens[name].ids
        return {row: self.tokens[token] for token, row in own.items() if token in self.tokens}


def _quoted(tokens: Sequence[str]) -> str:
    return shorten([repr(token) for token in tokens], 3)


def vocabulary_axes(
    checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any], trust_remote_code: bool = False
) -> dict[str, int]:
    """Return the axis over tokens of every tensor of a checkpoint that has one.

    Compares two networks without weights, one of them with a larger vocabulary: axes that change
    their length run over tokens (embeddings, heads, their biases), whatever the names.
    """
    small = build_skeleton(folder, trust_remote_code)
    fields: Any = getattr(small, "config", None)
    size = getattr(fields.get_text_config() if fields is not None else None, "vocab_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            f"tokenizer: {type(small).__name__} ({checkpoint.label}) has no vocabulary: its config "
            "has no vocab_size. Leave the option out."
        )
    large = _with_vocabulary(2 * size + 1, folder, config, trust_remote_code)
    axes = {}
    for place, tensor in small.state_dict(keep_vars=True).items():
        shape, other_shape = tensor.shape, large[place].shape
        changed = [axis for axis, length in enumerate(shape) if other_shape[axis] != length]
        if not changed:
            continue
        if len(changed) > 1 or shape[changed[0]] != size:
            raise ConfigError(
                f"tokenizer: expected one axis of {size} tokens, got shape {tuple(shape)} for "
                f"{place} of {type(small).__name__}, so its rows are not tokens alone. Make the "
                "vocabularies agree before the merge."
            )
        axes[place] = changed[0]
    binding = bind(small, list(checkpoint.infos))
    return {name: axes[place] for name, place in binding.places.items() if place in axes}


def _with_vocabulary(
    size: int, folder: Path, config: Mapping[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """Return the tensors, without values, of a network with a vocabulary of another size."""
    with Scratch("network") as other:
        copy_files(folder, other, [CODE])
        (other / "config.json").write_text(json.dumps(with_size(config, size)))
        return build_skeleton(other, trust_remote_code).state_dict(keep_vars=True)
