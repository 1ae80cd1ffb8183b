"""The layer-wise driver from the command line, as the shipped files say it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradmerge.cli import main
from tiny import write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "files",
    [["methods/prodistill.yaml"], ["methods/column.yaml", "drivers/layerwise.yaml"]],
    ids=["prodistill", "column"],
)
def test_the_shipped_files_learn_block_by_block(files, world, tmp_path, capsys):
    suite = write_yaml(tmp_path / "suite.yaml", world)
    options = [option for file in files for option in ("--config", str(CONFIGS / file))]
    command = ["fit", "--config", suite, *options, "--driver.steps", "3"]
    assert main(command) == 0
    logs = Path("outputs/logs/version_0")
    with (logs / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["layer/0/loss"]) for row in rows if row["layer/0/loss"]]
    assert len(losses) == 3
    assert rows[0]["init/a"]
    assert rows[0]["init/b"]
    provenance = json.loads(Path("outputs/merged/provenance.json").read_text())
    scores = provenance["results"]["selection"]
    last = rows[-1]
    assert last["step"] == "3"
    assert float(last["selection/loss"]) == pytest.approx(scores["average"]["loss"], rel=1e-5)
    assert float(last["selection/a/accuracy"]) == pytest.approx(scores["a"]["accuracy"], rel=1e-5)
    assert {file.name for file in logs.glob("coefficients.*")} == {
        "coefficients.csv",
        "coefficients.png",
    }
    (block,) = provenance["driver"]["blocks"]
    assert block["name"] == "bert.encoder.layer.0"
    assert block["steps"] == 3
    assert block["first_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert provenance["run"]["yaml"]
    coefficients = load_file("outputs/merged/coefficients.safetensors")
    start = 0.3 if files[0] == "methods/prodistill.yaml" else 0.5
    moved = {name for name, c in coefficients.items() if not torch.allclose(c, torch.tensor(start))}
    assert moved
    assert all(name.startswith("bert.encoder.layer.0.") for name in moved)
    kind = transformers.BertForSequenceClassification
    logits = kind.from_pretrained("outputs/merged")(torch.arange(6)[None]).logits
    assert logits.isfinite().all()
    if files[0] == "methods/prodistill.yaml":
        capsys.readouterr()
        assert main([*command, "--optimizer.lr", "0.5"]) == 2
        assert "holds another job" in capsys.readouterr().err
