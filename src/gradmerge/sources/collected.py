"""Statistics of the sources on their own tasks' data, kept in a folder, read a tensor at a time.

`gradmerge.training.collect` writes them; steps of a preprocess read them through their `Site`.
The folder holds safetensors files and `statistics.json`, which says what was collected, of which
weights, and on which data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradmerge.errors import ConfigError, FingerprintError, shorten
from gradmerge.sources.base import Shared
from gradmerge.spec import modernise

Kind = Literal["gram", "fisher", "kfac", "activations"]
INDEX = "statistics.json"
VERSION = 1


@dataclass(frozen=True)
class Needs:
    """What a step wants to know of each source."""

    kind: Kind
    """gram: `X^T X` of each linear layer's inputs; fisher: squared gradients of each weight; kfac:
    `X^T X` and, of the gradients of the layer's outputs, `D^T D`; activations: moments of units,
    which alignments compare."""
    activations: Literal["source", "merged"] = "source"
    """Whether a layer's inputs are those of the source, or come from the layers merged before."""
    labels: Literal["model", "data"] = "model"
    """Whose labels the gradients are of: drawn from the source's own predictions, or the data's."""
    per: Literal["example", "batch"] = "example"
    """What a gradient is of before it is squared."""
    seed: int = 0
    """Seed of the draws of labels."""


@dataclass(frozen=True)
class Statistic:
    """What is known of one source at one tensor."""

    values: Mapping[str, Tensor]
    """`gram` `[groups, in, in]`; `fisher` of the tensor's shape; or `input` and `output` (kfac).
    Sums over rows (gram, input) or means over examples (fisher, output)."""
    rows: float
    """Rows that the layer saw: examples, tokens or positions, as it takes them."""
    axis: int
    """The axis of the tensor that runs over inputs: 1, or 0 where it is stored `[in, out]`."""
    norm: float
    """L2 norm of the source's statistic over all tensors (fisher)."""


class Readable(Protocol):
    """Statistics by kind, source and tensor."""

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        """What is known of a source at a tensor; None where nothing was collected."""


class SourceStatistics(Shared):
    """An opened folder of statistics.

    Args:
        folder: what `gradmerge collect` wrote.

    Raises:
        ConfigError: there is no such folder, or it is something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.index: dict[str, Any] = modernise(json.loads((self.folder / INDEX).read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"statistics: {folder} holds no readable {INDEX} ({error}); expected a folder that "
                "`gradmerge collect` wrote."
            ) from error
        if self.index.get("version") != VERSION:
            raise ConfigError(
                f"statistics: {folder} is of version {self.index.get('version')}, expected "
                f"{VERSION}; collect again."
            )
        self._files: dict[str, Any] = {}

    def require(
        self,
        needs: Sequence[tuple[Needs, Any]],
        fingerprints: Mapping[str, str],
        alignment: Any = None,
    ) -> None:
        """Refuse statistics of something else.

        Args:
            needs: what each step wants, and the step as plain data.
            fingerprints: content hash of every source, by name.
            alignment: as plain data: in which order the sources' units are read.

        Raises:
            ConfigError: something is missing, or was collected in another way.
            FingerprintError: they are of other weights.
        """
        collected = self.index["collected"]
        for wanted, step in needs:
            found = collected.get(wanted.kind)
            if found is None:
                raise ConfigError(
                    f"statistics: {self.folder} holds {shorten(list(collected))}, expected "
                    f"{wanted.kind}; collect again with this recipe."
                )
            if found["needs"] != asdict(wanted):
                differ = [
                    key for key, value in asdict(wanted).items() if found["needs"][key] != value
                ]
                raise ConfigError(
                    f"statistics: {self.folder} was collected with "
                    + ", ".join(f"{key} {found['needs'][key]}" for key in differ)
                    + ", the recipe says "
                    + ", ".join(f"{key} {getattr(wanted, key)}" for key in differ)
                    + "; collect again with this recipe."
                )
            if wanted.activations == "merged" and found["step"] != step:
                raise ConfigError(
                    f"statistics: {self.folder} was collected on activations of layers merged by "
                    "the same step with other settings; collect again with this recipe."
                )
            if found.get("alignment") != alignment:
                raise ConfigError(
                    f"statistics: the {wanted.kind} statistics of {self.folder} are of sources "
                    "whose units were in another order (another `alignment`, or other settings of "
                    "it); collect again with this recipe."
                )
            lost = [name for name in fingerprints if name not in found["sources"]]
            if lost:
                raise ConfigError(
                    f"statistics: {self.folder} has none of {shorten(lost)}; it is of "
                    f"{shorten(list(found['sources']))}. Collect again with this recipe."
                )
            wrong = [
                name
                for name, value in fingerprints.items()
                if found["sources"][name]["fingerprint"] != value
            ]
            if wrong:
                raise FingerprintError(
                    f"statistics: {self.folder} is of other weights of {shorten(wrong)}; collect "
                    "again with these."
                )

    def summary(self) -> dict[str, Any]:
        """Of which weights and data they are, for provenance; not what is in which file."""
        kinds = {}
        for kind, collected in self.index["collected"].items():
            sources = {
                name: {**source, "tensors": len(source["tensors"])}
                for name, source in collected["sources"].items()
            }
            kinds[kind] = {**collected, "sources": sources}
            if "groups" in collected:
                kinds[kind]["groups"] = len(collected["groups"])
        return {**self.index, "collected": kinds}

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        """What is known of a source at a tensor; None where nothing was collected."""
        found = self.index["collected"][kind]["sources"][source]
        place = found["tensors"].get(tensor)
        if place is None:
            return None
        file = self._open(place["file"])
        values = {part: file.get_tensor(f"{part}:{tensor}") for part in place["parts"]}
        return Statistic(values, place["rows"], place["axis"], found["norm"])

    def tensor(self, file: str, key: str) -> Tensor:
        """A tensor of one of the folder's files, by its key there."""
        found: Tensor = self._open(file).get_tensor(key)
        return found

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"statistics: {self.folder / name} cannot be read ({error}); collect again."
                ) from error
        return self._files[name]
