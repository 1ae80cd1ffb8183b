"""Published methods as they ship, in a tiny form, and optimisers of other packages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from folds import tensors
from gradmerge.cli import main
from gradmerge.cli.main import learn
from gradmerge.coefficients import Mixup
from gradmerge.engine.state import FitState
from gradmerge.optimisers import SAM, MoFO
from tiny import write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"


def method(name, kind="methods"):
    return str(CONFIGS / kind / f"{name}.yaml")


@pytest.fixture
def fit(world, tmp_path):
    """Fit the tiny suite with files and options after it."""

    def run(*arguments, steps="2"):
        suite = write_yaml(tmp_path / "suite.yaml", world)
        return learn(["fit", "--config", suite, *arguments, "--trainer.max_steps", steps])

    return run


def starts(found):
    return found.model.merged.plan.initial_raw()


def moved(found):
    """Tensors of raw coefficients that training has changed."""
    raw = found.model.merged.raw
    return [
        key for key, value in starts(found).items() if not torch.equal(raw[key].detach(), value)
    ]


ELSEWHERE = {
    "concrete_adamerging": "test_concrete_adamerging_learns_inside_the_mask: after a first fit",
    "np_merge": "test_aligned_merges.py: two networks of its own",
    "np_merge_joint": "test_aligned_merges.py: three of its own",
    "prodistill": "test_layerwise_cli.py: by a driver",
}
LEARNED = sorted(p.stem for p in (CONFIGS / "methods").glob("*.yaml") if p.stem not in ELSEWHERE)


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_family_learns_and_is_exported(fit, world, tmp_path, name):
    """What is exported is what was learned: its weights, and its predictions once it is read."""
    if name == "regmean_tensor":
        suite = write_yaml(tmp_path / "first.yaml", world)
        collect = ["collect", "--config", suite, "--config", method(name)]
        assert main([*collect, "--output", "regmean-statistics"]) == 0
    found = fit("--config", method(name), "--trainer.logger", "false")
    assert found.trainer.global_step == 2
    assert moved(found)
    own = yaml.safe_load(Path(method(name)).read_text())
    stated = own["optimizer"]["class_path"].rpartition(".")[2]
    assert type(found.trainer.optimizers[0]).__name__ == stated
    found.trainer.save_checkpoint("last.ckpt")
    assert main(["export", "last.ckpt", "merged"]) == 0
    merged = found.model.merged
    weights = tensors(Path("merged"))
    assert weights.keys() == {*merged.plan.tensors, *merged.plan.private}
    for key in merged.plan.tensors.keys() - merged.plan.ranks.keys():  # the task's own is added
        assert torch.equal(weights[key], merged.state.materialise(key)), key
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    read = transformers.BertForSequenceClassification.from_pretrained("merged").eval()
    with torch.no_grad():
        expected = merged(**inputs, task="a").logits
        torch.testing.assert_close(read(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_concrete_adamerging_learns_inside_the_mask(fit, world):
    first = fit("--config", method("concrete_mask"), "--optimizer.lr", "0.5")
    merged = first.model.merged
    first.trainer.save_checkpoint("mask.ckpt")
    assert main(["export", "mask.ckpt", "outputs/concrete_mask"]) == 0
    found = fit("--config", method("concrete_adamerging"))
    base, a, b = tensors_of(world)
    start = starts(found)
    for name in merged.state.learned:
        (z,) = merged.plan.z(name, merged.raw).detach()
        mask = torch.sigmoid(2 * z)
        mask = mask / mask.mean() if z.numel() > 1 else 2 * mask
        expected = base[name] + 0.3 * mask * (a[name] + b[name] - 2 * base[name])
        plan = found.model.merged.plan
        inside = FitState(plan, start).materialise(name)
        torch.testing.assert_close(inside, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(merged.state.materialise(name), inside, rtol=0, atol=1e-6)
    assert all(raw.shape[0] == 1 for raw in merged.raw.values())
    assert any(raw.std() > 0.1 for raw in merged.raw.values())
    assert moved(found) == ["tensor"]


def tensors_of(world):
    """Weights of the base and of the sources."""
    recipe = world["model"]["recipe"]
    places = (recipe["base"], *recipe["sources"].values())
    return [load_file(Path(place) / "model.safetensors") for place in places]


def test_adarank_masks_components_and_learns_a_coefficient_of_every_tensor(fit, world):
    found = fit("--config", method("adarank"))
    plan, raw = found.model.merged.plan, found.model.merged.raw
    slots = plan.layout.slots
    masked = [name for name, slot in slots.items() if slot.kind == "component"]
    assert len(masked) > 4
    assert all(len(plan.tensors[name].shape) == 2 for name in masked)
    assert not any("embed" in name and "LayerNorm" not in name for name in masked)
    base, *sources = (
        load_file(Path(path) / "model.safetensors")
        for path in (
            world["model"]["recipe"]["base"],
            *world["model"]["recipe"]["sources"].values(),
        )
    )
    start = starts(found)
    for name in plan.learned:
        expected = base[name] + 0.3 * sum(source[name] - base[name] for source in sources)
        torch.testing.assert_close(
            FitState(plan, start).materialise(name), expected, rtol=0, atol=1e-6
        )
    for name in (*masked, "bert.encoder.layer.0.output.LayerNorm.weight"):
        key = slots[name].key
        now, then = (table[key].detach().reshape(2, -1)[:, 0] for table in (raw, start))
        torch.testing.assert_close(then, torch.full((2,), 0.3))
        assert ((now - then).abs() > 1e-4).all(), f"{name}: its coefficient learns"
    key = slots[masked[0]].key
    assert not torch.equal(raw[key][:, 1:], start[key][:, 1:]), "its masks learn"


def test_cart_and_masks_alone_are_adarank_with_the_options_of_its_head(fit, tmp_path):
    found = fit(
        *("--config", method("adarank"), "--model.recipe.origin", "mean"),
        *("--model.recipe.init.init_args.factor", "2.3"),
        *("--model.recipe.coefficients.init_args.start", "2.3"),
        *("--model.recipe.init.init_args.inner.init_args.share", "0.16"),
    )
    start = starts(found)
    key = next(key for key in start if key.endswith("dense/weight"))
    assert (start[key][:, 1] > 0).all()
    assert (start[key][:, 2:] < 0).all()  # one of eight components
    scales = [value.reshape(2, -1)[:, 0] for value in start.values()]
    torch.testing.assert_close(torch.cat(scales), torch.full((2 * len(scales),), 2.3))

    masks = {
        "coefficients": {"class_path": "HardMask", "init_args": {"inner": "Component"}},
        "init": {"class_path": "LeadingComponents", "init_args": {"share": 1.0}},
        "operator": {"class_path": "Components", "init_args": {"scale": 0.3}},
    }
    alone = write_yaml(tmp_path / "masks.yaml", {"model": {"recipe": masks}})
    found = fit("--config", method("adarank"), "--config", alone)
    values = torch.cat([c.flatten() for c in found.model.merged.coefficients().values()])
    assert values.unique().tolist() == [1.0]


def test_dam_starts_at_the_mean_of_everything_biases_too(fit, world):
    """Acceptance: the published code starts biases at their sum instead."""
    found = fit("--config", method("dam"))
    plan = found.model.merged.plan
    paths = world["model"]["recipe"]["sources"].values()
    sources = [load_file(Path(path) / "model.safetensors") for path in paths]
    start = starts(found)
    biases = [name for name in plan.learned if name.endswith("bias")]
    assert biases
    for name in plan.tensors:
        mean = sum(source[name] for source in sources) / len(sources)
        torch.testing.assert_close(FitState(plan, start).materialise(name), mean, rtol=0, atol=1e-6)
    assert all("embed" in n or "norm" in n.lower() for n in plan.fixed if "pooler" not in n)


@pytest.mark.parametrize("suite", ["lm", "vision"])
def test_the_loss_of_dam_is_the_published_one_over_the_number_of_tasks(suite):
    """Acceptance: 0.01 and clipping at 1 beside a sum over tasks and layers."""
    own = yaml.safe_load(Path(method("dam")).read_text())
    tasks = yaml.safe_load(Path(method(suite, "suites")).read_text())["data"]["tasks"]
    (similarity,) = own["model"]["objective"]["regularisers"]
    assert similarity["init_args"] == {"weight": 0.01 / len(tasks), "reduce": "sum"}
    assert own["trainer"]["gradient_clip_val"] == 1 / len(tasks)


def test_dam_takes_mofo_as_its_head_says(fit):
    options = ["--optimizer", "gradmerge.optimisers.MoFO", "--optimizer.lr", "0.001"]
    found = fit("--config", method("dam"), *options, steps="1")
    (optimiser,) = found.trainer.optimizers
    assert type(optimiser) is MoFO
    start, checked = starts(found), 0
    for key, raw in found.model.merged.raw.items():
        if raw.grad is not None and raw.grad.count_nonzero() == raw.numel() > 4:
            share = float((raw.detach() != start[key]).float().mean())
            assert 0.3 <= share < 0.5, key
            checked += 1
    assert checked > 3


def test_atlas_x_k_is_atlas_with_the_options_of_its_head(fit):
    options = ["--model.recipe.coefficients", "Partition"]
    options += ["--model.recipe.coefficients.num_parts", "10"]
    found = fit("--config", method("atlas"), *options)
    slots = found.model.merged.plan.layout.slots.values()
    assert {slot.kind for slot in slots} == {"partition"}
    assert max(slot.shape[0] for slot in slots) == 10
    assert all((raw == 0).all() for raw in starts(found).values())


def test_the_penalty_of_atlas_parses_as_its_head_says(fit, tmp_path):
    penalty = {"class_path": "Lp", "init_args": {"p": 1, "weight": 0.5}}
    more = write_yaml(tmp_path / "lp.yaml", {"model": {"objective": {"regularisers": [penalty]}}})
    found = fit("--config", method("atlas"), "--config", more)
    assert found.trainer.callback_metrics["train/penalty"] > 0


def test_a_prior_by_importance_is_measured_and_kept(fit, tmp_path):
    prior = {"class_path": "FisherToInit", "init_args": {"weight": 2.0, "batches": 2}}
    factors = {"class_path": "Sigmoid", "init_args": {"inner": {"class_path": "Element"}}}
    recipe = {"coefficients": factors}
    model = {"recipe": recipe, "objective": {"regularisers": [prior]}}
    found = fit("--config", write_yaml(tmp_path / "prior.yaml", {"model": model}))
    assert found.trainer.callback_metrics["train/penalty"] > 0
    found.trainer.save_checkpoint("last.ckpt")
    saved = torch.load("last.ckpt", weights_only=True)["gradmerge"]["regularisation"]
    assert {key: value.shape for key, value in saved.items()} == {
        key: raw.shape for key, raw in found.model.merged.raw.items()
    }


def test_sam_takes_a_schedule_and_options_of_its_base(fit, tmp_path):
    base = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR"}
    more = write_yaml(
        tmp_path / "more.yaml",
        {
            "optimizer": {"class_path": "SAM", "init_args": {"lr": 0.4, "base": base}},
            "lr_scheduler": {**schedule, "init_args": {"step_size": 1, "gamma": 0.5}},
        },
    )
    found = fit("--config", method("samerging"), "--config", more)
    (optimiser,) = found.trainer.optimizers
    assert type(optimiser) is SAM
    assert type(optimiser.base) is torch.optim.SGD
    group = optimiser.base.param_groups[0]
    assert (group["momentum"], group["lr"]) == (0.9, 0.1)
    (described,) = found.model.merged.state.run["optimizers"]
    assert described["class_path"] == "gradmerge.optimisers.SAM"
    assert described["init_args"]["rho"] == 0.07
    assert described["init_args"]["base"] == "torch.optim.sgd.SGD"


# ---- optimisers of other packages ---------------------------------------------------------------


ELEMENT = {"model": {"recipe": {"coefficients": {"class_path": "Element"}}}}
EIGHT_BIT = {
    "torchao": "torchao.optim.AdamW8bit",
    "bitsandbytes": "bitsandbytes.optim.AdamW8bit",
}


def test_adafactor_holds_less_than_a_number_a_coefficient(fit, tmp_path):
    rates = {"lr": 0.01, "relative_step": False, "scale_parameter": False}
    spec = {"class_path": "transformers.optimization.Adafactor", "init_args": rates}
    found = fit("--config", write_yaml(tmp_path / "o.yaml", ELEMENT, {"optimizer": spec}))
    (optimiser,) = found.trainer.optimizers
    assert moved(found)
    sizes = [
        (raw.numel(), sum(v.numel() for v in optimiser.state[raw].values() if torch.is_tensor(v)))
        for raw in found.model.merged.raw.values()
        if raw.dim() == 3
    ]
    coefficients, state = (sum(column) for column in zip(*sizes, strict=True))
    assert 0 < state < 0.5 * coefficients


@pytest.mark.parametrize("package", EIGHT_BIT)
def test_adam_in_eight_bits_where_it_is_installed(fit, tmp_path, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    spec = {"class_path": EIGHT_BIT[package], "init_args": {"lr": 0.01}}
    found = fit("--config", write_yaml(tmp_path / "o.yaml", ELEMENT, {"optimizer": spec}))
    assert moved(found)
    assert all(raw.isfinite().all() for raw in found.model.merged.raw.values())


@pytest.mark.parametrize("package", EIGHT_BIT)
def test_a_package_that_is_missing_is_named_with_its_command(fit, tmp_path, package, capsys):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    spec = {"class_path": EIGHT_BIT[package], "init_args": {"lr": 0.01}}
    with pytest.raises(SystemExit, match="2"):
        fit("--config", write_yaml(tmp_path / "o.yaml", {"optimizer": spec}))
    command = {"torchao": "gradmerge[eight-bit]", "bitsandbytes": "bitsandbytes"}[package]
    message = capsys.readouterr().err
    assert f"{package} is not installed: pip install '{command}'" in message
    assert "Did you mean" not in message


# ---- M3 as a search -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m3", "task_arithmetic", "ties", "dare_linear"])
def test_draws_search_after_any_static_file(world, tmp_path, capsys, name):
    files = [write_yaml(tmp_path / "suite.yaml", world), method(name, "static")]
    files += [method("m3_draws", "static")]
    command = ["merge", *(word for file in files for word in ("--config", file))]
    options = ["--search.init_args.num_draws", "3", "--search.init_args.metric", "loss"]
    assert main([*command, *options, "--output", "merged"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0][2:] for line in out.splitlines()[:3]] == [
        "Mixup 0",
        "Mixup 1",
        "Mixup 2",
    ]
    found = json.loads(Path("merged/provenance.json").read_text())
    chosen = found["search"]["chosen"]["init_args"]
    assert found["recipe"]["init_args"]["init"]["init_args"] == chosen
    again = write_yaml(
        tmp_path / "again.yaml",
        {"model": {"recipe": {"init": {"class_path": "Mixup", "init_args": chosen}}}},
    )
    start = ["--config", files[0], "--config", files[1], "--config", again]
    assert main(["merge", *start, "--output", "again"]) == 0
    first, second = (load_file(f"{folder}/model.safetensors") for folder in ("merged", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    coefficients = load_file("merged/coefficients.st")
    ratio = Mixup(**chosen)
    total = next(iter(coefficients.values())).sum()
    assert float(total) == pytest.approx(ratio.scale, abs=1e-6)
