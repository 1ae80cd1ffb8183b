"""Plots and `report.html`: what is drawn, where, and that the page stands alone."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from gradmerge.coefficients import Constant
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export import plots
from gradmerge.export.history import History
from gradmerge.export.plots import CoefficientTable, depth_lines, heat_map, learning_curves
from gradmerge.export.report import report
from tiny import build, recipe_of, relatives

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")


def table_of(layers=30, start=0.3, sources=("code", "chat"), fixed=(), seed=0):
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in PARTS]
    names += ["model.norm.weight", "lm_head.weight"]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.full((len(names), len(sources)), start)
    return CoefficientTable(
        names,
        sources,
        starts + 0.1 * torch.randn(starts.shape, generator=generator),
        starts,
        torch.arange(1.0, len(names) + 1),
        torch.tensor([name not in fixed for name in names]),
    )


def overlaps(labels, figure):
    """Pairs of labels whose boxes overlap on the drawn page."""
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_a_cell_is_the_mean_of_its_tensors_weighted_by_their_sizes():
    table = table_of(layers=2)
    # a second norm in layer 0
    names = [*table.names, "model.layers.0.post_attention_layernorm.weight"]
    mean = torch.cat([table.mean, torch.tensor([[0.7, -0.2]])])
    both = CoefficientTable(
        names,
        table.sources,
        mean,
        torch.full_like(mean, 0.3),
        torch.cat([table.sizes, torch.tensor([3.0])]),
        torch.ones(len(names), dtype=torch.bool),
    )
    axes = heat_map(both).axes[0]
    drawn = axes.images[0].get_array()
    at = names.index("model.layers.0.input_layernorm.weight")
    size = float(table.sizes[at])
    expected = (size * float(table.mean[at, 0]) + 3 * 0.7) / (size + 3)
    assert drawn[1, 4] == pytest.approx(expected, rel=1e-6)  # row 0 is the embedding
    embedding = float(table.mean[0, 0])
    assert drawn[0].tolist() == pytest.approx([embedding] * 5, rel=1e-6)
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["q", "o", "up", "down", "norms"]


def test_all_sources_share_one_scale_centred_at_the_start_value():
    table = table_of(start=0.3)
    figure = heat_map(table)
    limits = {axes.images[0].get_clim() for axes in figure.axes[:2]}
    assert len(limits) == 1
    low, high = limits.pop()
    assert (low + high) / 2 == pytest.approx(0.3, abs=1e-6)
    cells = [axes.images[0].get_array() for axes in figure.axes[:2]]
    assert max(abs(c - 0.3).max() for c in cells) == pytest.approx((high - low) / 2, rel=1e-5)
    assert "start, 0.3" in figure.axes[-1].get_ylabel()


def test_different_start_values_show_changes_and_a_merge_without_learning_its_mean():
    plan = open_plan(recipe_of(relatives(build()), init=Constant([0.1, 0.9])))
    state = FitState.start(plan)
    static = heat_map(CoefficientTable.of(state))
    assert "their mean" in static.axes[-1].get_ylabel()
    for raw in state.raw.values():
        raw.add_(0.25)
    learned = heat_map(CoefficientTable.of(state))
    assert "change" in learned.axes[-1].get_ylabel()
    changes = learned.axes[0].images[0].get_array().flatten().tolist()
    assert changes == pytest.approx([0.25] * 4, abs=1e-6)


def test_fixed_tensors_are_grey_and_not_part_of_the_scale():
    table = table_of(layers=3, fixed=("lm_head.weight",))
    table.mean[-1] = 50.0
    axes = heat_map(table).axes[0]
    assert axes.images[0].get_array().mask[-1].all()  # nothing coloured
    assert (axes.images[1].get_array()[-1] == 0).all()  # but grey
    assert axes.images[0].get_clim()[1] < 2


@pytest.mark.parametrize("layers", [2, 30, 130])
def test_labels_do_not_overlap(layers):
    table = table_of(layers, sources=("code", "chat", "mathematics"))
    figure = heat_map(table)
    axes = figure.axes[0]
    rows = axes.get_yticklabels()
    assert not overlaps(rows, figure)
    assert not overlaps(axes.get_xticklabels(), figure)
    shown = [label.get_text() for label in rows]
    assert shown[0] == "embed_tokens"
    assert shown[-2:] == ["norm", "lm_head"]
    if layers == 30:
        assert shown[1:-2] == [str(i) for i in range(30)]
    lines = depth_lines(table)
    assert not overlaps(lines.axes[0].get_xticklabels(), lines)


def test_depth_lines_are_the_means_over_the_components_of_a_layer():
    table = table_of(layers=4)
    axes = depth_lines(table).axes[0]
    line = axes.lines[1]
    assert line.get_label() == "chat"
    rows = [i for i, name in enumerate(table.names) if ".layers.2." in name]
    assert line.get_ydata()[2] == pytest.approx(float(table.mean[rows, 1].mean()), rel=1e-6)
    flat = CoefficientTable(
        ["a.weight", "b.weight"],
        ("x",),
        torch.ones(2, 1),
        torch.zeros(2, 1),
        torch.ones(2),
        torch.ones(2, dtype=torch.bool),
    )
    assert depth_lines(flat) is None


def history_of(steps=40):
    history = History(score="bits_per_byte", higher_is_better=False, step=20)
    for step in range(steps):
        history.add("train/loss", step, torch.tensor(2.0 - step / 100))
    for step in (0, 20, 40):
        history.add("selection/loss", step, 2.1 - step / 100)
        history.add("selection/a/bits_per_byte", step, 1.5 - step / 100)
        history.add("selection/average/bits_per_byte", step, 1.4 - step / 100)
    history.experts = {"a": 1.05}
    return history


def test_learning_curves_have_losses_scores_and_the_experts_as_lines():
    history = history_of()
    losses, scores = learning_curves(history).axes
    assert [line.get_label() for line in losses.lines][:2] == ["train/loss", "selection/loss"]
    drawn = {line.get_label(): line for line in scores.lines}
    assert list(drawn["a"].get_ydata()) == pytest.approx([1.5, 1.3, 1.1])
    assert list(drawn["a: its expert"].get_ydata()) == [1.05, 1.05]
    assert list(drawn["kept"].get_xdata()) == [20, 20]
    assert "lower is better" in scores.get_title()
    assert learning_curves(History()) is None


def test_a_long_history_is_thinned_evenly_and_is_plain_data():
    history = History()
    for step in range(5000):
        history.add("train/loss", step, torch.tensor(float(step)))
    points = history.points("train/loss")
    assert 400 <= len(points) <= 1000
    assert {b[0] - a[0] for a, b in itertools.pairwise(points)} == {8}
    assert all(value == step for step, value in points)
    assert History.restore(history.to_save()).points("train/loss") == points
    assert History.restore({}) == History()


@pytest.mark.usefixtures("figures")
def test_the_page_stands_alone_and_says_the_scores():
    models = relatives(build())
    state = FitState.start(open_plan(recipe_of(models, init=Constant(0.3))))
    for raw in state.raw.values():
        raw.add_(torch.randn(raw.shape, generator=torch.Generator().manual_seed(2)))
    results = {"selection": {"a": {"accuracy": 0.75}, "average": {"accuracy": math.nan}}}
    page = report(state, results, history_of(), "one <b>")
    assert "one &lt;b&gt;" in page
    assert "<td>0.7500</td>" in page
    assert "<td>n/a</td>" in page
    assert "<td>1.5000</td><td>1.0500</td>" in page  # start and expert
    assert "Constant(0.3)" in page
    assert not re.search(r"<script|<link|https?:", page)
    images = re.findall(r'<img [^>]*src="([^"]*)"', page)
    assert len(images) == 2
    for image in images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as found:
            assert min(found.size) > 200


def test_a_figure_is_drawn_once_unless_figures_are_off(monkeypatch):
    drawn = []

    def draw(subject):
        drawn.append(subject)
        return learning_curves(subject)

    assert plots.png(draw, history_of()) is None
    assert "Without figures" in report(FitState.start(open_plan(recipe_of(relatives(build())))), {})
    monkeypatch.delenv("GRADMERGE_FIGURES")
    image, again = (plots.png(draw, history_of()) for _ in range(2))
    assert image is again
    assert image.startswith(b"\x89PNG")
    longer = history_of()
    longer.add("train/loss", 99, 1.0)
    assert plots.png(draw, longer) not in (None, image)
    assert drawn == [history_of(), longer]


@pytest.mark.usefixtures("figures")
def test_equal_coefficients_are_said_and_not_drawn():
    state = FitState.start(open_plan(recipe_of(relatives(build()), init=Constant(0.25))))
    page = report(state, {})
    assert "All coefficients are 0.25." in page
    assert "<img" not in page


def test_matplotlib_is_imported_only_when_something_is_drawn():
    code = "import sys, gradmerge.export.folder; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
