"""Coefficients of an earlier merge, as an exported folder keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradmerge.common.errors import ConfigError, nearest
from gradmerge.common.files import parse_json
from gradmerge.common.schema import require_shape


@dataclass(frozen=True)
class CoefficientFile:
    """The file coefficients.st of an earlier merge."""

    path: str
    """An exported folder, or its file coefficients.st (coefficients.safetensors in older ones)."""
    who: str = "FromFile"
    """Name of the option, for messages."""

    def _file(self) -> Path:
        given = Path(self.path).expanduser()
        # an older YAML may name the file as it was called then
        for path in (given, given / "coefficients.st", given / "coefficients.safetensors"):
            if path.is_file():
                return path
        renamed = given.with_suffix(".st")
        if given.suffix == ".safetensors" and renamed.is_file():
            return renamed
        raise ConfigError(f"{self.who}: {self.path}: no such file.")

    def names(self) -> list[str]:
        """Return the names of the tensors that have coefficients in the file."""
        return self._load("")[0]

    def _load(self, name: str) -> tuple[list[str], Tensor | None, dict[str, str]]:
        """Return all names, the numbers of one tensor if there are some, and the metadata."""
        try:
            with safe_open(self._file(), framework="pt") as file:
                names = list(file.keys())
                loaded = file.get_tensor(name).double() if name in names else None
                return names, loaded, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{self.who}: {self.path}: not a readable safetensors file: {error}."
            ) from error

    def read(self, name: str, sources: tuple[str, ...]) -> tuple[Tensor, str | None]:
        """Return stored coefficients in the order of `sources`, and what they run over.

        Raises:
            ConfigError: the file has none of this tensor, or others than of these sources.
        """
        names, loaded, metadata = self._load(name)
        where, remedy = f"{self.who}: {self.path}", "Export the coefficients again."
        if loaded is None:
            raise ConfigError(f"{where} contains no coefficients for {name}.{nearest(name, names)}")
        stored, slots = (
            parse_json(metadata.get(key, "null"), f"{where}: {key}", ConfigError)
            for key in ("sources", "slots")
        )
        shape = {"sources": ([str], None), "slots": ({str: str}, None)}
        require_shape(where, {"sources": stored, "slots": slots}, shape, remedy, ConfigError)
        spread = (slots or {}).get(name)
        if not loaded.isfinite().all() or loaded.dim() < 1:
            raise ConfigError(f"{where}: expected finite coefficients of {name}, got others.")
        if len(loaded) != len(sources if stored is None else stored):
            raise ConfigError(
                f"{where} is for {len(loaded)} sources, this merge has {len(sources)}."
            )
        if stored is None:
            return loaded, spread
        if sorted(stored) != sorted(sources):
            raise ConfigError(
                f"{where} is for the sources {stored}, this merge has {list(sources)}."
            )
        return loaded[[stored.index(source) for source in sources]], spread
