"""Statistics of the sources on their own tasks' data, in a folder that is read per tensor.

`gradmerge.training.collect` writes them; steps of a preprocess read them through their `Site`. The
folder holds safetensors files and `statistics.json`, which records what was collected, of which
weights, and on which data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradmerge.common.errors import ConfigError, FingerprintError, shorten
from gradmerge.common.files import read_json
from gradmerge.common.names import is_name
from gradmerge.common.schema import a_count, an_amount, require_shape
from gradmerge.common.spec import modernise
from gradmerge.sources.base import Shared, require_same_files

Kind = Literal["gram", "fisher", "kfac", "activations"]
INDEX = "statistics.json"
VERSION = 1


def _an_axis(value: Any) -> bool:
    """0 or 1"""  # noqa: D415
    return type(value) is int and value in (0, 1)


def _a_file(value: Any) -> bool:
    """a safetensors file in the folder"""  # noqa: D403, D415
    return is_name(value) and value.endswith(".safetensors")


def _kind(*parts: str) -> dict[str, Any]:
    """Return the shape of the record of one kind of statistic, which has these parts."""

    def are_parts(value: Any) -> bool:
        return value == list(parts)

    are_parts.__doc__ = f"the parts {', '.join(parts) or 'none'}"
    tensor = {"file": _a_file, "parts": are_parts, "rows": an_amount, "axis": _an_axis}
    source = {
        "fingerprint": str,
        "files?": {str: str},
        "tasks": [str],
        "examples": a_count,
        "norm": an_amount,
        "tensors": {str: tensor},
    }
    needs = {"kind": str, "activations": str, "labels": str, "per": str, "seed": int}
    return {"needs": needs, "step": dict, "alignment?": (dict, None), "sources": {str: source}}


_GROUPS = {
    "pairs": [[str]],
    "groups": {str: {"file": _a_file, "rows": a_count, "size": a_count, "places": [dict]}},
}
_SHAPE = {
    "collected": {
        "gram?": _kind("gram"),
        "fisher?": _kind("fisher"),
        "kfac?": _kind("input", "output"),
        "activations?": {**_kind(), **_GROUPS},
    }
}


@dataclass(frozen=True)
class Needs:
    """The statistic that a step needs of each source."""

    kind: Kind
    """gram: `X^T X` of each linear layer's inputs; fisher: squared gradients of each weight; kfac:
    `X^T X`, and `D^T D` of the gradients of the layer's outputs; activations: moments of units,
    which alignments compare."""
    activations: Literal["source", "merged"] = "source"
    """The origin of a layer's inputs: the source itself, or the layers merged before."""
    labels: Literal["model", "data"] = "model"
    """Labels of the gradients: drawn from the source's own predictions, or the data's."""
    per: Literal["example", "batch"] = "example"
    """The rows that a gradient sums over before it is squared."""
    seed: int = 0
    """Seed for drawing labels."""


@dataclass(frozen=True)
class Statistic:
    """The statistic of one source at one tensor."""

    values: Mapping[str, Tensor]
    """`gram` `[groups, in, in]`; `fisher` of the tensor's shape; or `input` and `output` (kfac).
    Sums over rows (gram, input) or means over examples (fisher, output)."""
    rows: float
    """Rows that the layer saw: examples, tokens or positions."""
    axis: int
    """The tensor's axis of inputs: 1, or 0 if it is stored `[in, out]`."""
    norm: float
    """L2 norm of the source's statistic over all tensors (fisher)."""

    def require_shape(self, tensor: str, shape: Sequence[int]) -> None:
        """Reject values that do not belong to a tensor of a shape.

        Raises:
            ConfigError: they do not.
        """
        size = math.prod(shape)
        for part, values in self.values.items():
            found = tuple(values.shape)
            # `[groups, n, n]`: the tensor's entries are rows or columns of n in each group
            square = len(found) == 3 and found[1] == found[2] > 0 == size % (found[0] * found[1])
            if found != tuple(shape) if part == "fisher" else not square:
                raise ConfigError(
                    f"statistics: expected {part} for {tensor} of shape {tuple(shape)}, got shape "
                    f"{found}; collect again."
                )


class Readable(Protocol):
    """Statistics by kind, source and tensor."""

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        """Return the statistic of a source at a tensor; None if none was collected."""


class SourceStatistics(Shared):
    """An opened folder of statistics.

    Args:
        folder: written by `gradmerge collect`.

    Raises:
        ConfigError: it is not such a folder, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / INDEX
        try:
            found = read_json(path, ConfigError)
        except ConfigError as error:
            raise ConfigError(f"statistics: {error} Collect again.") from error
        if found is None:
            raise ConfigError(
                f"statistics: {folder} holds no {INDEX}; expected a folder that `gradmerge "
                "collect` wrote."
            )
        self.index: dict[str, Any] = modernise(found)
        if self.index.get("version") != VERSION:
            raise ConfigError(
                f"statistics: {folder} is of version {self.index.get('version')}, expected "
                f"{VERSION}; collect again."
            )
        require_shape(f"statistics: {path}", self.index, _SHAPE, "Collect again.", ConfigError)
        self._files: dict[str, Any] = {}

    def require(
        self,
        needs: Sequence[tuple[Needs, Any]],
        fingerprints: Mapping[str, str],
        alignment: Any = None,
        files: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Reject statistics of other weights, or collected in another way.

        Args:
            needs: what each step needs, and the step as plain data.
            fingerprints: content hash of every source, by name.
            alignment: as plain data; it determines the order of the sources' units.
            files: SHA-256 of each source's config, tokenizer and adapter settings, by file; they
                are compared if the statistics recorded them.

        Raises:
            ConfigError: something is missing, or was collected in another way.
            FingerprintError: they are of other weights.
        """
        for wanted, step in needs:
            found = self.index["collected"].get(wanted.kind)
            differs = self._difference(found, wanted, step, fingerprints, alignment)
            if differs:
                raise ConfigError(
                    f"statistics: {self.folder} {differs}; collect again with this recipe."
                )
            sources = found["sources"]
            wrong = [n for n, value in fingerprints.items() if sources[n]["fingerprint"] != value]
            if wrong:
                raise FingerprintError(
                    f"statistics: {self.folder} is of other weights of {shorten(wrong)}; collect "
                    "again with these."
                )
            kept = {n: sources[n]["files"] for n in files or () if "files" in sources[n]}
            require_same_files(f"statistics: {self.folder} was collected", kept, files or {})

    def _difference(
        self, found: Any, wanted: Needs, step: Any, sources: Iterable[str], alignment: Any
    ) -> str | None:
        """Return what one kind of statistic lacks, if anything."""
        if found is None:
            return f"holds {shorten(list(self.index['collected']))}, expected {wanted.kind}"
        kept, own = found["needs"], asdict(wanted)
        differ = [key for key, value in own.items() if kept[key] != value]
        if differ:
            ways = [", ".join(f"{key} {way[key]}" for key in differ) for way in (kept, own)]
            return f"was collected with {ways[0]}, the recipe says {ways[1]}"
        if wanted.activations == "merged" and found["step"] != step:
            return (
                "was collected on activations of layers merged by the same step with other settings"
            )
        if found.get("alignment") != alignment:
            return (
                f"has {wanted.kind} statistics of sources whose units were in another order "
                "(another `alignment`, or other settings of it)"
            )
        lost = [name for name in sources if name not in found["sources"]]
        if lost:
            return f"has none of {shorten(lost)}, only of {shorten(list(found['sources']))}"
        return None

    def summary(self) -> dict[str, Any]:
        """Return the weights and data they belong to, for provenance, without the list of files."""
        kinds = {}
        for kind, collected in self.index["collected"].items():
            kinds[kind] = collected | {
                "sources": {
                    name: {**source, "tensors": len(source["tensors"])}
                    for name, source in collected["sources"].items()
                }
            }
            if "groups" in collected:
                kinds[kind]["groups"] = len(collected["groups"])
        return {**self.index, "collected": kinds}

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        """Return the statistic of a source at a tensor; None if none was collected."""
        found = self.index["collected"][kind]["sources"][source]
        place = found["tensors"].get(tensor)
        if place is None:
            return None
        values = {part: self.tensor(place["file"], f"{part}:{tensor}") for part in place["parts"]}
        return Statistic(values, place["rows"], place["axis"], found["norm"])

    def tensor(self, file: str, key: str) -> Tensor:
        """Return a tensor of one of the folder's files by its key."""
        if file not in self._files:
            self._files[file] = self._reading(file, lambda path: safe_open(path, framework="pt"))
        found: Tensor = self._reading(file, lambda _: self._files[file].get_tensor(key))
        if not found.is_floating_point() or not found.isfinite().all():
            raise ConfigError(
                f"statistics: {self.folder / file}: expected finite numbers in {key}, got others; "
                "collect again."
            )
        return found

    def _reading(self, file: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.folder / file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"statistics: {self.folder / file} cannot be read ({error}); collect again."
            ) from error
