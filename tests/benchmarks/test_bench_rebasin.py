"""The benchmark of networks that share no initialisation, end to end on drawn images."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PROGRAM = "rebasin"


@pytest.fixture(scope="module")
def run(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One quick run of the pair of MLPs, and what it left."""
    folder = tmp_path_factory.mktemp("rebasin")
    arguments = ["--quick", "--archs", "mlp", "--members", "2", "--repeats", "1"]
    arguments += ["--cache", str(folder / "cache"), "--json", str(folder / "figures.json")]
    arguments += ["--table", str(folder / "table.md")]
    bench.main(arguments)
    records = json.loads((folder / "figures.json").read_text())["records"]
    return {"folder": folder, "arguments": arguments, "records": records}


def _found(run: dict[str, Any], setting: str) -> dict[str, dict[str, Any]]:
    return {r["row"]: r for r in run["records"] if r["setting"] == setting}


def test_every_row_is_there_and_in_the_table(run: dict[str, Any], bench: ModuleType) -> None:
    for setting in ("same", "split"):
        rows = _found(run, setting)
        wanted = {"endpoints", "ensemble", "average, none", "NP Merge, none", "NP Merge, aligned"}
        wanted |= {"NP Merge, unbounded, aligned", "fine-tuning, none", "fine-tuning, aligned"}
        if setting == "same":
            wanted |= {"NP Merge, aligned, distilled"}
            for row in ("NP Merge, unbounded, aligned", "fine-tuning, aligned"):
                wanted |= {f"{row}, distilled", f"{row}, distilled longer"}
        wanted |= {f"average, {name}" for name in bench.merges.ALIGNMENTS}
        wanted |= {f"average, {name}, REPAIR" for name in bench.merges.ALIGNMENTS}
        assert set(rows) == wanted
        assert all(0 <= row["test"] <= 1 for row in rows.values())
    table = (run["folder"] / "table.md").read_text()
    assert all(f"| {row} | " in table for row in _found(run, "same"))


def test_endpoints_know_their_classes_alone(run: dict[str, Any]) -> None:
    # Ten drawn patterns are easy: a network that saw all ten is far above one that saw five.
    assert _found(run, "same")["endpoints"]["test"] > 0.8
    assert _found(run, "split")["endpoints"]["test"] < 0.55


def test_learning_keeps_the_best_of_start_and_rates_on_selection(run: dict[str, Any]) -> None:
    for record in run["records"]:
        if "tried" in record:
            ranks = [tried["rank"] for tried in record["tried"].values()]
            assert record["rank"] == max([record["start"]["rank"], *ranks])
            by_accuracy = record["rank"] == record["selection"]
            assert by_accuracy != (", distilled" in record["row"])
            if record["row"].endswith("longer"):
                shorter = _found(run, "same")[record["row"].removesuffix(" longer")]
                assert [float(rate) for rate in record["tried"]] == [shorter["rate"]]


def test_rivals_start_from_the_same_network(run: dict[str, Any]) -> None:
    for setting in ("same", "split"):
        rows = _found(run, setting)
        for start in ("aligned", "none"):
            np_merge, tuned = rows[f"NP Merge, {start}"], rows[f"fine-tuning, {start}"]
            assert np_merge["alignment"] == tuned["alignment"]
            assert np_merge["start"]["test"] == pytest.approx(tuned["start"]["test"], abs=0.005)


def test_a_second_run_reads_what_the_first_left(run: dict[str, Any], bench: ModuleType) -> None:
    files = [path for path in (run["folder"] / "cache").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    bench.main(run["arguments"])
    assert {path: path.stat().st_mtime_ns for path in files} == before
    again = json.loads((run["folder"] / "figures.json").read_text())["records"]
    assert again == run["records"]


def test_parts_are_disjoint_and_conditions_hold(bench: ModuleType, tmp_path: Path) -> None:
    pool = bench.Pool("noise", tmp_path, bench.Sizes(1_200, 256, 200, 300))
    parts = pool.parts(0)
    seen = [
        {image.numpy().tobytes() for image in getattr(parts, name).images}
        for name in ("train", "adaptation", "selection", "test", "rest")
    ]
    assert len(set.union(*seen)) == sum(map(len, seen))
    few = bench.merges.Condition(50).apply(parts, 0)
    assert (len(few.adaptation), len(few.selection), len(few.test)) == (50, 20, 300)
    lost = bench.merges.Condition(missing=(3, 4)).apply(parts, 0)
    assert set(lost.adaptation.labels.tolist()) == set(range(10)) - {3, 4}
    assert set(lost.selection.labels.tolist()) == set(range(10)) - {3, 4}
    assert torch.equal(lost.test.labels, parts.test.labels)
    noisy = bench.merges.Condition(noise=0.4).apply(parts, 0)
    wrong = (noisy.adaptation.labels != parts.adaptation.labels).double().mean()
    # 256 draws of probability 0.4: four standard deviations are 0.12.
    assert abs(float(wrong) - 0.4) < 0.12
    assert torch.equal(noisy.test.labels, parts.test.labels)


def test_too_few_images_are_refused(bench: ModuleType, tmp_path: Path) -> None:
    pool = bench.Pool("noise", tmp_path, bench.Sizes(train=24_000))
    with pytest.raises(bench.suite.SuiteError, match="different training images"):
        pool.parts(0)
