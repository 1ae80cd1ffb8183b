"""Plots of coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def heat_map(
    table: Tensor, names: Sequence[str], sources: Sequence[str], path: Path | None, title: str = ""
) -> Any:
    """Mean coefficient of each tensor (rows) and source (columns), diverging around zero.

    Args:
        table: `[tensors, sources]`.
        names: tensors, in order of depth.
        sources: names of the sources.
        path: PNG to write; None returns the figure only.
        title: text above the map.
    """
    from matplotlib.figure import Figure

    height = min(24.0, max(3.0, 0.17 * len(names) + 1.4))
    figure = Figure(figsize=(3.6 + 0.7 * len(sources), height), layout="constrained")
    axes = figure.subplots()
    limit = max(float(table.abs().max()), 1e-6)
    image = axes.imshow(
        table.numpy(),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    axes.set_xticks(range(len(sources)), list(sources), rotation=30, ha="right")
    if len(names) <= 120:
        axes.set_yticks(range(len(names)), list(names), fontsize=6)
    else:
        axes.set_ylabel(f"{len(names)} tensors, first to last")
    axes.set_title(title or "mean coefficient of each tensor and source", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.6)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure
