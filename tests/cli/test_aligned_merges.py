"""Merges of sources that share no initialisation, by calling `main`."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradmerge.alignment.align import traced_spec
from gradmerge.cli import main
from gradmerge.cli.main import learn
from gradmerge.engine.state import FitState
from gradmerge.sources.in_memory import persistent_tensors
from gradmerge.sources.skeleton import Network, strip_weights
from tiny import save_family, write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"
NP_MERGE = CONFIGS / "methods" / "np_merge.yaml"
OPTION = re.compile(r"^( *)# ((regularisers|optimizer): .*)$", re.MULTILINE)


def strangers(world, folder):
    """Two networks of the world's architecture, and the second with its units permuted."""
    config = transformers.AutoConfig.from_pretrained(world["model"]["recipe"]["base"])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(transformers.BertForSequenceClassification(config).eval())
    other = copy.deepcopy(found[1])
    spec = traced_spec(Network.bound(strip_weights(other), list(persistent_tensors(other))))
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


def of_strangers(world, folder, names="ab"):
    """A suite of two or three networks that share no initialisation, to go after a method."""
    strangers(world, folder)
    sources = {
        name: str(folder / path) for name, path in zip(names, ("base", "a", "b"), strict=False)
    }
    own = {
        "model": {"recipe": {"sources": sources, "base": None}},
        "data": world["data"],
        "trainer": {**world["trainer"], "val_check_interval": 2, "check_val_every_n_epoch": None},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.ConstantLR",
            "init_args": {"factor": 1.0},
        },
    }
    return write_yaml(folder / "suite.yaml", own)


def test_np_merge_learns_saves_and_exports(world, tmp_path):
    suite = of_strangers(world, tmp_path)
    found = learn(["fit", "--config", str(NP_MERGE), "--config", suite])
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


@pytest.mark.parametrize("option", OPTION.finditer(NP_MERGE.read_text()), ids=lambda m: m[2][:60])
def test_a_line_that_np_merge_offers_works_as_it_is_written(world, tmp_path, option):
    """The comment sign is taken away; an optimiser takes the place of the one in use."""
    text = NP_MERGE.read_text()
    own = option[1] + option[2]
    if option[3] == "optimizer":
        (used,) = re.findall(r"^optimizer: .*$", text, re.MULTILINE)
        text = text.replace(option[0], "").replace(used, own)
    else:
        text = text.replace(option[0], own)
    if "torchao" in own and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    (tmp_path / "method.yaml").write_text(text)
    suite = of_strangers(world, tmp_path)
    found = learn(["fit", "--config", str(tmp_path / "method.yaml"), "--config", suite])
    assert found.trainer.global_step > 0
    stated = re.search(r"class_path: [\w.]*?(\w+),", own)[1]
    if option[3] == "optimizer":
        assert type(found.trainer.optimizers[0]).__name__ == stated
    else:
        assert [type(r).__name__ for r in found.model.objective.regularisers] == [stated]
        assert found.trainer.callback_metrics["train/penalty"] > 0
    start = found.model.merged.plan.initial_raw()
    assert any(not torch.equal(raw, start[key]) for key, raw in found.model.merged.raw.items())


def test_np_merge_of_three_at_once_learns_shares_of_each_weight(world, tmp_path):
    suite = of_strangers(world, tmp_path, names="abc")
    method = str(CONFIGS / "methods" / "np_merge_joint.yaml")
    found = learn(["fit", "--config", method, "--config", suite])
    plan, raw = found.model.merged.plan, found.model.merged.raw
    moved = plan.order.report["moved"]
    assert all(max(moved[name].values()) > 0 for name in "bc")
    start = plan.initial_raw()
    assert any(not torch.equal(now, start[key]) for key, now in raw.items())
    for name in plan.learned:
        aligned = [plan.sources[k].read(name) for k in "abc"]
        mean = sum(aligned) / 3
        torch.testing.assert_close(FitState(plan, start).materialise(name), mean, rtol=0, atol=1e-6)
        shares = FitState(plan, raw).coefficient(name).detach()
        assert shares.shape == (3, *aligned[0].shape)
        torch.testing.assert_close(shares.sum(0), torch.ones_like(mean), rtol=0, atol=1e-6)
    checkpoint = found.trainer.checkpoint_callback.best_model_path
    assert main(["export", checkpoint, "merged"]) == 0
    assert all(t.isfinite().all() for t in load_file("merged/model.safetensors").values())


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
