"""All finalisers of a merge as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.finalisers.base import AbstractFinaliser, AbstractRescale, FinalSite
from gradmerge.finalisers.repair import REPAIR, Correction


class Finalisation:
    """`theta' = f_n(...f_1(theta))` per tensor, with the corrections that REPAIR found.

    Frozen tensors stay as they are.

    Args:
        finalisers: in the order they run.
        site: gives what a tensor was merged from.
        frozen: names of frozen tensors, as they stand when a tensor is finished.
    """

    def __init__(
        self,
        finalisers: Sequence[AbstractFinaliser],
        site: Callable[[str], FinalSite],
        frozen: Collection[str],
    ) -> None:
        self.finalisers = list(finalisers)
        self._site, self._frozen = site, frozen
        self._facts: dict[tuple[int, str], dict[str, float]] = {}
        self.repair = next((f for f in finalisers if isinstance(f, REPAIR)), None)
        """The finaliser that is computed on data, if any."""
        self.corrections: dict[str, Correction] | None = None
        """By tensor; None before they are computed."""
        self.coefficients: list[int] = []
        """Checksums of the coefficients that the corrections belong to."""
        self.report: dict[str, Any] = {}
        """The corrected layers and those left alone, as plain data."""
        self.version = 0
        """Changes with the corrections."""

    @property
    def active(self) -> bool:
        """True if there is any finaliser."""
        return bool(self.finalisers)

    def __call__(self, name: str, theta: Tensor) -> Tensor:
        """Return the finished tensor of a merged one in float32 or wider, which may be overwritten.

        Raises:
            ConfigError: REPAIR has not been computed.
        """
        return self._run(name, self.before_repair(name, theta), after=True)

    def before_repair(self, name: str, theta: Tensor) -> Tensor:
        """Apply the finalisers before REPAIR; none if there is no REPAIR."""
        return theta if self.repair is None else self._run(name, theta, after=False)

    def _run(self, name: str, theta: Tensor, after: bool) -> Tensor:
        for finaliser, site in self._steps(name, after):
            if isinstance(finaliser, REPAIR):
                theta = self._corrected(name, theta)
            else:
                theta = finaliser.finish(theta, site)
        return theta

    def _steps(self, name: str, after: bool) -> list[tuple[AbstractFinaliser, FinalSite]]:
        """Return REPAIR and those after it, or those before it."""
        if name in self._frozen or not self.finalisers:
            return []
        cut = 0 if self.repair is None else self.finalisers.index(self.repair)
        site = self._site(name)
        return [
            (finaliser, replace(site, facts=self._facts.setdefault((at, name), {})))
            for at, finaliser in enumerate(self.finalisers)
            if (at >= cut) == after
        ]

    def _corrected(self, name: str, theta: Tensor) -> Tensor:
        if self.corrections is None:
            raise ConfigError(
                "REPAIR has not been computed for these coefficients: it needs the tasks' "
                "adaptation data. Give `gradmerge merge` a file with `data`; in Python call "
                "`MergeModule.refresh_buffers(data)`; or leave REPAIR out of `finalisers`."
            )
        correction = self.corrections.get(name)
        return theta if correction is None else correction(theta)

    def correct(
        self,
        corrections: Mapping[str, Correction] | None,
        report: Mapping[str, Any],
        coefficients: Sequence[int],
    ) -> None:
        """Set corrections, their report, and checksums of the coefficients they belong to."""
        self.corrections = None if corrections is None else dict(corrections)
        self.coefficients = list(coefficients)
        self.report = dict(report)
        self.version += 1

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

    def state(self) -> dict[str, Any]:
        """Return corrections and report for a checkpoint, as tensors and plain data."""
        if self.corrections is None:
            return {}
        found = {
            name: {"scale": correction.scale, "axis": correction.axis}
            | ({} if correction.shift is None else {"shift": correction.shift})
            | ({} if correction.groups == 1 else {"groups": correction.groups})
            for name, correction in self.corrections.items()
        }
        return {
            "corrections": found,
            "report": self.report,
            "coefficients": self.coefficients,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        found = state.get("corrections")
        with torch.inference_mode(False):
            corrections = found and {name: Correction(**kept) for name, kept in found.items()}
        self.correct(corrections, state.get("report", {}), state.get("coefficients", []))
