"""Figures of coefficients and learning curves. matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmerge.engine.state import FitState
from gradmerge.export.history import History
from gradmerge.export.places import Grid, grid_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which readers with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
_DIVERGING = "RdBu_r"
_FIXED = "#b5b5b5"
_ROW, _COLUMN = 0.19, 0.27
_LINE = 0.115
"""Height in inches of a line of labels."""
_TALLEST = 16.0
"""Height in inches, from which on rows get narrower and not all are labelled."""
_LONGEST = 28
"""Characters of a label."""
_PANELS = 4
DPI = 130
_MOST_KEPT = 8
_kept: dict[tuple[str, str], bytes | None] = {}


def figures_are_on() -> bool:
    """Return whether figures are drawn: always, unless `GRADMERGE_FIGURES` is `off`."""
    return os.environ.get("GRADMERGE_FIGURES") != "off"


def png(draw: Callable[[Any], Figure | None], subject: CoefficientTable | History) -> bytes | None:
    """Return a figure of a table or a history as a PNG; None if nothing is to be drawn.

    The last ones are kept, because the logs, the report and the export of a fit show the same
    figures, and drawing one takes longer than many a merge.
    """
    if not figures_are_on():
        return None
    key = draw.__name__, repr(subject.to_save())
    if key not in _kept:
        figure, buffer = draw(subject), io.BytesIO()
        if figure is not None:
            figure.savefig(buffer, format="png", dpi=DPI)
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = buffer.getvalue() or None
    return _kept[key]


@dataclass(frozen=True)
class CoefficientTable:
    """Mean coefficient of every merged tensor and source, now and at the start."""

    names: list[str]
    sources: tuple[str, ...]
    mean: Tensor
    """`[tensors, sources]`, float32."""
    start: Tensor
    """`[tensors, sources]`, float32: the recipe's init."""
    sizes: Tensor
    """Numbers of entries, `[tensors]`, float32."""
    learned: Tensor
    """False for tensors at a fixed coefficient, `[tensors]`."""

    @classmethod
    def of(cls, state: FitState) -> CoefficientTable:
        """Return the table of a merge; all coefficients of one tensor are in memory at a time."""
        plan = state.plan
        names = list(plan.tensors)
        shapes = [plan.reference.infos[name].shape for name in names]
        first = FitState.start(plan) if state.raw else state
        first.fixed = state.fixed
        return cls(
            names,
            tuple(plan.source_names),
            _means(state, names),
            _means(first, names),
            torch.tensor([float(math.prod(shape)) for shape in shapes]),
            torch.tensor([name not in state.fixed for name in names]),
        )

    def to_save(self) -> dict[str, Any]:
        """Return it as plain data."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in own.items()}

    @property
    def centre(self) -> float | None:
        """The start value if that is the same for all tensors and sources, else None."""
        own = self.start[self.learned] if self.learned.any() else self.start
        low, high = own.aminmax()
        return float(low) if high - low <= 1e-6 * max(1.0, abs(float(high))) else None

    @property
    def varies(self) -> bool:
        """True if the coefficients are not all one number, so that there is something to see."""
        low, high = self.mean.aminmax()
        return bool(high - low > 1e-6)


@torch.no_grad()
def _means(state: FitState, names: Sequence[str]) -> Tensor:
    rows = []
    for name in names:
        coefficient = state.coefficient(name).detach().float().cpu()
        rows.append(coefficient.reshape(len(coefficient), -1).mean(dim=1))
    return torch.stack(rows)


@dataclass(frozen=True)
class _Shown:
    """Values on the grid, and what they are."""

    grid: Grid
    cells: Tensor
    """`[sources, rows, columns]`; NaN where no tensor is learned."""
    fixed: Tensor
    """True where all tensors are fixed, `[rows, columns]`."""
    centre: float
    limit: float
    label: str


def _shown(table: CoefficientTable) -> _Shown:
    """Average the tensors of each cell, weighted by their sizes."""
    grid, centre = grid_of(table.names), table.centre
    has_moved = bool((table.mean - table.start).abs().max() > 0)
    values = table.mean
    if not has_moved:
        middle = float(values.mean())
        label = f"coefficient (white: their mean, {middle:.3g})"
    elif centre is None:
        values, middle = table.mean - table.start, 0.0
        label = "change of the coefficient from its start"
    else:
        middle, label = centre, f"coefficient (white: its start, {centre:.3g})"
    shape = len(grid.rows), len(grid.columns)
    total, weight = torch.zeros(len(table.sources), *shape), torch.zeros(shape)
    present = torch.zeros(shape, dtype=torch.bool)
    for at, name in enumerate(table.names):
        row, column = grid.cells[name]
        where = (row, slice(None)) if column is None else (row, slice(column, column + 1))
        present[where] = True
        if table.learned[at]:
            total[(slice(None), *where)] += (table.sizes[at] * values[at])[:, None]
            weight[where] += table.sizes[at]
    cells = total / weight  # NaN where nothing is learned
    known = cells[cells.isfinite()]
    limit = float((known - middle).abs().max()) if known.numel() else 0.0
    return _Shown(grid, cells, present & (weight == 0), middle, max(limit, 1e-6), label)


def heat_map(table: CoefficientTable) -> Figure:
    """Draw layer x component for each source, on one diverging scale centred at the start value.

    A cell is the mean coefficient of its tensors, weighted by their sizes. If tensors or sources
    start at different values, cells are changes from there; without learning the centre is the
    mean. Fixed tensors are grey, and components that a layer does not have are hatched.
    """
    from matplotlib.colors import ListedColormap

    shown = _shown(table)
    rows, columns = len(shown.grid.rows), len(shown.grid.columns)
    panels = min(_PANELS, len(table.sources))
    bands = -(-len(table.sources) // panels)
    body = min(rows * _ROW, _TALLEST)
    width = max(1.5, columns * _COLUMN)
    figure = new_figure(1.9 + panels * (width + 0.25) + 0.9, bands * (max(0.9, body) + 1.4) + 0.2)
    every = figure.subplots(bands, panels, sharey=True, squeeze=False).flatten()
    used = every[: len(table.sources)]
    image: Any = None
    scale = {"vmin": shown.centre - shown.limit, "vmax": shown.centre + shown.limit}
    grey = torch.where(shown.fixed, 0.0, torch.nan).numpy()
    for number, (axes, source) in enumerate(zip(used, table.sources, strict=True)):
        axes.patch.set(hatch="////", facecolor="white", edgecolor="#dddddd")
        drawn = {"aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(shown.cells[number].numpy(), cmap=_DIVERGING, **scale, **drawn)
        axes.imshow(grey, cmap=ListedColormap([_FIXED]), **drawn)
        axes.set_title(short_label(source), fontsize=9)
        axes.set_xticks(
            range(columns), map(short_label, shown.grid.columns), rotation=90, fontsize=7
        )
        axes.tick_params(length=2)
        if number % panels == 0:
            _label_rows(axes, shown.grid, body)
    for axes in every[len(used) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=list(every), fraction=0.04, pad=0.02, aspect=25)
    bar.set_label(shown.label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _label_rows(axes: Any, grid: Grid, height: float) -> None:
    """Label all rows outside of the layers and every n-th layer, as far as there is room."""
    layers, room = _layers(grid), height / len(grid.rows)
    step = _step(len(grid.rows), height / _LINE)
    outside = [at for at in range(len(grid.rows)) if at not in set(layers)]
    kept: list[int] = []
    for at in [*outside, *layers[::step]]:
        if all(abs(at - other) * room >= _LINE for other in kept):
            kept.append(at)
    places = sorted(kept)
    axes.set_yticks(places, [short_label(grid.rows[at]) for at in places], fontsize=6.5)
    if layers:
        axes.set_ylabel("layer", fontsize=8)


def _layers(grid: Grid) -> list[int]:
    return [at for at, stack in enumerate(grid.stacks) if stack is not None]


def depth_lines(table: CoefficientTable) -> Figure | None:
    """Draw the mean coefficient of each layer per source, with the range of its components.

    None for a network without several layers.
    """
    shown = _shown(table)
    layers = _layers(shown.grid)
    if len(layers) < 2:
        return None
    figure = new_figure(min(14.0, max(5.5, 0.16 * len(layers) + 3.0)), 3.4)
    axes = figure.subplots()
    cells = shown.cells[:, layers]
    stacks = [shown.grid.stacks[at] for at in layers]
    for number, source in enumerate(table.sources):
        style = _style(number)
        for stack in dict.fromkeys(stacks):
            own = [at for at, name in enumerate(stacks) if name == stack]
            part = cells[number, own]
            mean = part.nanmean(dim=1)
            low = torch.where(part.isnan(), torch.inf, part).amin(dim=1)
            high = torch.where(part.isnan(), -torch.inf, part).amax(dim=1)
            label = short_label(source) if stack == stacks[0] else None
            axes.plot(own, mean.numpy(), label=label, markersize=3, linewidth=1.2, **style)
            axes.fill_between(own, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.axhline(shown.centre, color="#555555", linewidth=0.8, linestyle="--")
    step = _step(len(layers), figure.get_figwidth() / 0.22)
    names = [short_label(shown.grid.rows[layers[at]]) for at in range(0, len(layers), step)]
    turn = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(range(0, len(layers), step), names, fontsize=7, rotation=turn)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel(shown.label.replace("white", "dashed"), fontsize=7)
    outside_legend(axes)
    return figure


def learning_curves(history: History) -> Figure | None:
    """Draw the losses and the selection score against steps; each task's own source is a line.

    None without a point.
    """
    losses = {name: history.points(name) for name in ("train/loss", "selection/loss")}
    scores = {
        name.split("/")[1]: history.points(name)
        for name in history.curves
        if history.score and name.startswith("selection/") and name.endswith(f"/{history.score}")
    }
    panels = [p for p in (losses, scores) if any(p.values())]
    if not panels:
        return None
    figure = new_figure(1.0 + 4.9 * len(panels), 3.3)
    for axes, curves in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, points) in enumerate(c for c in curves.items() if c[1]):
            bold = name in ("average", "selection/loss")
            style = {**_style(number), **({"color": "#000000"} if bold else {})}
            if name == "train/loss":
                style["marker"] = ""
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                label=short_label(name),
                linewidth=2.0 if bold else 1.0,
                markersize=3,
                **style,
            )
            expert = history.experts.get(name) if curves is scores else None
            if expert is not None:
                axes.axhline(
                    expert,
                    color=style["color"],
                    linewidth=0.9,
                    linestyle=":",
                    label=f"{short_label(name)}: its expert",
                )
        if history.step is not None:
            axes.axvline(history.step, color="#777777", linewidth=0.8, linestyle="--", label="kept")
        better = "higher" if history.higher_is_better else "lower"
        name = f"selection {history.score} ({better} is better)" if curves is scores else "loss"
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.get_major_locator().set_params(integer=True)
        outside_legend(axes)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, whose parts make room for one another."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def outside_legend(axes: Any) -> None:
    """Add a grid, and a legend on the right of the axes."""
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": ("-", "--", "-.")[number // len(COLOURS) % 3],
    }


def _step(count: int, room: float) -> int:
    """Return every how manieth of `count` labels fits."""
    return next(
        (step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count / step <= room), 1000
    )


def short_label(label: str) -> str:
    """Return a label without its middle, if it is long."""
    if len(label) <= _LONGEST:
        return label
    half = (_LONGEST - 1) // 2
    return f"{label[:half]}…{label[-half:]}"
