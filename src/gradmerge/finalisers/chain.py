"""All finalisers of a merge as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.finalisers.base import AbstractFinaliser, AbstractRescale, FinalSite
from gradmerge.finalisers.repair import REPAIR, Correction


@dataclass(frozen=True, eq=False)
class Corrections:
    """The corrections that REPAIR found for some coefficients."""

    of: Mapping[str, Correction]
    """By tensor."""
    report: Mapping[str, Any]
    """The corrected layers and those left alone, as plain data."""
    coefficients: list[int]
    """Checksums of the coefficients that they belong to."""

    def to_save(self) -> dict[str, Any]:
        """Return them for a checkpoint, as tensors and plain data."""
        found = {
            name: {"scale": correction.scale, "axis": correction.axis}
            | ({} if correction.shift is None else {"shift": correction.shift})
            | ({} if correction.groups == 1 else {"groups": correction.groups})
            for name, correction in self.of.items()
        }
        return {"corrections": found, "report": self.report, "coefficients": self.coefficients}

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Corrections | None:
        """Return what `to_save` returned; None for an empty mapping."""
        if not saved:
            return None
        with torch.inference_mode(False):
            found = {name: Correction(**kept) for name, kept in saved["corrections"].items()}
        return cls(found, saved.get("report", {}), saved.get("coefficients", []))


class Finalisation:
    """`theta' = f_n(...f_1(theta))` per tensor, with the corrections that REPAIR found.

    Args:
        finalisers: in the order they run.
        site: gives what a tensor was merged from.
    """

    def __init__(
        self, finalisers: Sequence[AbstractFinaliser], site: Callable[[str], FinalSite]
    ) -> None:
        self.finalisers = list(finalisers)
        self._site = site
        self._facts: dict[tuple[int, str], dict[str, float]] = {}
        self.repair = next((f for f in finalisers if isinstance(f, REPAIR)), None)
        """The finaliser that is computed on data, if any."""

    @property
    def active(self) -> bool:
        """True if there is any finaliser."""
        return bool(self.finalisers)

    def __call__(self, name: str, theta: Tensor, corrections: Corrections | None) -> Tensor:
        """Return the finished tensor of a merged one in float32 or wider, which may be overwritten.

        Raises:
            ConfigError: REPAIR has not been computed.
        """
        theta = self.before_repair(name, theta)
        for finaliser, site in self._steps(name, after=True):
            if isinstance(finaliser, REPAIR):
                theta = _corrected(name, theta, corrections)
            else:
                theta = finaliser.finish(theta, site)
        return theta

    def before_repair(self, name: str, theta: Tensor) -> Tensor:
        """Apply the finalisers before REPAIR; none if there is no REPAIR."""
        for finaliser, site in self._steps(name, after=False):
            theta = finaliser.finish(theta, site)
        return theta

    def _steps(self, name: str, after: bool) -> list[tuple[AbstractFinaliser, FinalSite]]:
        """Return REPAIR and those after it, or those before it."""
        cut = 0 if self.repair is None else self.finalisers.index(self.repair)
        site = self._site(name)
        return [
            (finaliser, replace(site, facts=self._facts.setdefault((at, name), {})))
            for at, finaliser in enumerate(self.finalisers)
            if (at >= cut) == after
        ]

    def factor(self, name: str, theta: Tensor) -> float:
        """Return the factor that finalisers which only rescale put on a tensor's coefficients.

        Args:
            name: the tensor.
            theta: merged, in float32 or wider; may be overwritten.
        """
        product = 1.0
        for finaliser, site in self._steps(name, after=True):
            assert isinstance(finaliser, AbstractRescale)
            theta, factor = finaliser.rescale(theta, site)
            product *= factor
        return product


def _corrected(name: str, theta: Tensor, corrections: Corrections | None) -> Tensor:
    if corrections is None:
        raise ConfigError(
            "REPAIR has not been computed for these coefficients: it needs the tasks' "
            "adaptation data. Give `gradmerge merge` a file with `data`; in Python call "
            "`MergeModule.refresh_buffers(data)`; or leave REPAIR out of `finalisers`."
        )
    correction = corrections.of.get(name)
    return theta if correction is None else correction(theta)
