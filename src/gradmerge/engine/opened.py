"""The opened checkpoints of a merge, and what is known of their content."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from gradmerge.alignment import Aligned
from gradmerge.sources import Checkpoint
from gradmerge.sources.base import (
    Shared,
    fingerprints_of,
    require_finite,
    require_same,
    require_same_files,
    side_hashes,
    watched_files,
)
from gradmerge.sources.identity import require_unchanged
from gradmerge.sources.tokenizers.view import alignment_of
from gradmerge.sources.tokenizers.vocabulary import Alignment


class OpenedSources(Shared):
    """The opened checkpoints of a merge: their hashes, and whether they are sound.

    Args:
        sources: checkpoints to merge, by name.
        base: the base, if there is one.
        heads: checkpoints that only serve tasks, by name.
        order: the alignment of the sources' units, if they were aligned.
    """

    buffers: Collection[str] = ()
    """Names of tensors that are buffers of the network."""

    def __init__(
        self,
        sources: Mapping[str, Checkpoint],
        base: Checkpoint | None,
        heads: Mapping[str, Checkpoint] | None = None,
        order: Aligned | None = None,
    ) -> None:
        self.order = order
        """The alignment of the sources' units, if the recipe asks for one."""
        self.sources = dict(sources)
        self.serving = {**self.sources, **(heads or {})}
        """Checkpoints that may serve a task: the sources and the heads, by name."""
        self.base = base
        self.reference = base if base is not None else next(iter(self.sources.values()))
        self._files = watched_files(self._everything.values())

    @property
    def _everything(self) -> dict[str, Checkpoint]:
        return {**({"base": self.base} if self.base is not None else {}), **self.serving}

    @cached_property
    def infinite_buffers(self) -> frozenset[str]:
        """Names of buffers that hold infinity in all sources alike, as some masks do.

        The first access reads all weights once, unless they have been hashed.

        Raises:
            NonFiniteError: other tensors hold infinity, or some hold NaN.
        """
        return frozenset(require_finite(self._everything, self.buffers))

    def require_finite(self) -> None:
        """Reject NaN and infinity in the sources; from the second call on, at no cost.

        Raises:
            NonFiniteError: the message names tensors, sources and files.
        """
        self.infinite_buffers  # noqa: B018

    def require_unchanged(self) -> None:
        """Reject files that have changed since they were opened; costs microseconds per file.

        Raises:
            SourceError: a file was written to, replaced, cut off or removed.
        """
        require_unchanged(self._files)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of checkpoints, matched vocabularies and the alignment of units, by name.

        The first access reads all weights once, and rejects those that are not finite.
        """
        return self.hashed()

    def hashed(self) -> dict[str, str]:
        """Read all weights and return their `fingerprints` as they are now.

        Raises:
            NonFiniteError: a source holds NaN or infinity.
            SourceError: the files have changed since they were opened.
        """
        self.require_unchanged()
        found = fingerprints_of(self._everything)
        self.require_unchanged()
        self.require_finite()
        if self.tokens is not None:
            found["(tokens)"] = self.tokens.fingerprint()
        if self.order is not None:
            found["(units)"] = self.order.fingerprint()
        return found

    def require_same_as_before(self) -> None:
        """Hash all weights now, and reject those that differ from an earlier hash of this plan.

        Raises:
            FingerprintError: a source's hash differs from the one at an earlier time.
        """
        known = self.__dict__.get("fingerprints")
        if known is None:
            self.fingerprints  # noqa: B018
        else:
            require_same(known, self.hashed())

    @contextmanager
    def sound(self) -> Iterator[None]:
        """Explain errors within the context by changes or flaws of the sources, if there are any.

        NaN makes many computations fail, each in its own way.

        Raises:
            NonFiniteError: something failed, and the sources hold NaN or infinity.
            SourceError: something failed, and their files have changed.
        """
        try:
            yield
        except (ArithmeticError, OSError, RuntimeError, ValueError):
            self.require_unchanged()
            self.require_finite()
            raise

    @cached_property
    def side_hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of configs, tokenizers and adapter settings, by checkpoint and file."""
        found = {name: side_hashes(checkpoint) for name, checkpoint in self._everything.items()}
        return {name: files for name, files in found.items() if files}

    def require_fingerprints(
        self, expected: Mapping[str, str], files: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """Reject coefficients that were trained on other weights, or with other settings of them.

        Args:
            expected: `fingerprints` of the fit.
            files: `side_hashes` of the fit, if it recorded them.

        Raises:
            FingerprintError: a source's hash differs from the expected one.
        """
        require_same(expected, self.fingerprints)
        require_same_files("the coefficients were trained", files or {}, self.side_hashes)

    @property
    def tokens(self) -> Alignment | None:
        """The merged vocabulary and its rows, if the recipe matches vocabularies."""
        return alignment_of(self.reference)

    @property
    def folder(self) -> Path | None:
        """The folder whose config and tokenizer the export copies."""
        folders = [checkpoint.folder for checkpoint in (self.reference, *self.sources.values())]
        return next((folder for folder in folders if folder is not None), None)
