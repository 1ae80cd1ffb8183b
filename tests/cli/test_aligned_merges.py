"""Merges of sources that share no initialisation, by calling `main`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradmerge.alignment.opening import traced_spec
from gradmerge.cli import learn, main
from gradmerge.sources.memory import persistent_tensors
from gradmerge.sources.skeleton import strip_weights
from tiny import save_family, write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"


def strangers(world, folder):
    """Two networks of the world's architecture, and the second with its units permuted."""
    config = transformers.AutoConfig.from_pretrained(world["model"]["recipe"]["base"])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(transformers.BertForSequenceClassification(config).eval())
    other = copy.deepcopy(found[1])
    spec = traced_spec(strip_weights(other), list(persistent_tensors(other)))
    maps = spec.random(3)
    with torch.no_grad():
        for name, tensor in persistent_tensors(other).items():
            tensor.copy_(spec.apply(maps, name, tensor.clone()))
    save_family(folder, [*found, other])
    return found[1], spec


def test_rebasin_of_two_orders_of_one_network_is_that_network(world, tmp_path):
    net, spec = strangers(world, tmp_path)
    sources = {name: str(tmp_path / name) for name in "ab"}
    suite = write_yaml(tmp_path / "suite.yaml", {"model": {"recipe": {"sources": sources}}})
    method = str(CONFIGS / "static" / "rebasin.yaml")
    assert main(["merge", "--config", suite, "--config", method, "--output", "merged"]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokens = torch.randint(3, 32, (4, 7))
    with torch.no_grad():
        gap = (merged(tokens).logits - net(tokens).logits).abs().max()
    assert float(gap) <= 1e-6
    kept = json.loads(Path("merged/provenance.json").read_text())["alignment"]
    assert kept["groups"] == {name: group.size for name, group in spec.groups.items()}
    assert kept["reference"] == "a"
    assert max(kept["moved"]["b"].values()) > 0.5
    assert kept["objective"]["b"][-1] > kept["objective"]["b"][0]


def test_np_merge_learns_saves_and_exports(world, tmp_path):
    strangers(world, tmp_path)
    sources = {"a": str(tmp_path / "base"), "b": str(tmp_path / "a")}
    own = {
        "model": {"recipe": {"sources": sources, "base": None}},
        "data": world["data"],
        "trainer": {**world["trainer"], "val_check_interval": 2, "check_val_every_n_epoch": None},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.ConstantLR",
            "init_args": {"factor": 1.0},
        },
    }
    method = str(CONFIGS / "methods" / "np_merge.yaml")
    suite = write_yaml(tmp_path / "suite.yaml", own)
    found = learn(["fit", "--config", method, "--config", suite])
    plan = found.model.merged.plan
    assert plan.order is not None
    assert plan.order.report["method"] == "WeightMatching"
    moved = plan.order.report["moved"]["b"]
    assert any(share > 0 for share in moved.values())
    raw = found.model.merged.raw
    assert sum(value.numel() for value in raw.values()) == sum(
        plan.reference.infos[name].num_elements for name in plan.tensors
    )
    checkpoint = found.trainer.checkpoint_callback.best_model_path
    assert checkpoint
    assert main(["export", checkpoint, "merged"]) == 0
    written = load_file("merged/model.safetensors")
    one, two = (plan.sources[name] for name in "ab")
    for name, tensor in written.items():
        low = torch.minimum(one.read(name), two.read(name))
        high = torch.maximum(one.read(name), two.read(name))
        assert bool(((tensor >= low - 1e-6) & (tensor <= high + 1e-6)).all()), name
    kept = json.loads(Path("merged/provenance.json").read_text())
    assert kept["alignment"]["moved"]["b"] == moved


def test_a_written_specification_stands_in_the_configuration(world, tmp_path, capsys):
    net, _ = strangers(world, tmp_path)
    sources = {name: str(tmp_path / name) for name in "ab"}
    inner = "bert.encoder.layer.0"
    written = {
        "tensors": {
            f"{inner}.intermediate.dense.weight": ["hidden", None],
            f"{inner}.intermediate.dense.bias": ["hidden"],
            f"{inner}.output.dense.weight": [None, "hidden"],
        }
    }
    alignment = {"class_path": "WeightMatching", "init_args": {"spec": written, "seed": 3}}
    recipe = {"sources": sources, "alignment": alignment, "coefficients": "Model"}
    recipe["init"] = "Uniform"
    config = write_yaml(tmp_path / "own.yaml", {"model": {"recipe": recipe}})
    assert main(["merge", "--config", config, "--output", "merged"]) == 0
    kept = json.loads(Path("merged/provenance.json").read_text())
    hidden = net.config.intermediate_size
    assert kept["alignment"]["groups"] == {"hidden": hidden}
    assert kept["recipe"]["init_args"]["alignment"]["init_args"]["spec"] == written
    written["tensors"][f"{inner}.output.dense.weight"] = ["hidden", None]
    config = write_yaml(tmp_path / "own.yaml", {"model": {"recipe": recipe}})
    assert main(["merge", "--config", config, "--output", "wrong"]) == 2
    text = capsys.readouterr().err
    assert "permuting units changes what BertForSequenceClassification computes" in text
    assert "change it by themselves: hidden" in text
