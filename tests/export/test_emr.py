"""Outputs of EMR-Merging against the formula: the compact form and the folders per task."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from architectures import logits_of
from gradmerge import Recipe
from gradmerge.alignment import WeightMatching
from gradmerge.cli import main
from gradmerge.cli.commands import merge, unpack
from gradmerge.coefficients import Model, Uniform
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.engine.opening import open_plan
from gradmerge.export.emr import export_compact, task_checkpoints
from gradmerge.preprocess import RandomDrop, Site, Trim, Unify
from gradmerge.sources import EMR, HuggingFace, Vocabulary, as_source
from tiny import relatives, save_family

FAMILIES = ["llama", "resnet"]


def resnets(dtype):
    """Networks with different BatchNorm statistics."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return relatives(transformers.ResNetForImageClassification(config).to(dtype))


def saved(family, tmp_path, name="llama", dtype=torch.float32):
    models, inputs = (resnets(dtype), {}) if name == "resnet" else family(name, dtype=dtype)
    return models, inputs, save_family(tmp_path, models, tokenizer=name == "llama")


def recipe_of(paths, **options):
    factors = {"preprocess": [Unify()], "coefficients": Model(), "init": Uniform(), **options}
    sources = {name: paths[name] for name in "ab"}
    return Recipe(sources, base=paths["base"], **factors)


def by_formula(models, prepare=lambda d: d, scales=None):
    """`A + r_k M_k (.) u` of every task in float32, and the scales, from the models in memory."""
    base, *sources = (model.state_dict() for model in models)
    names = [name for name, _ in models[0].named_parameters()]
    directions = {}
    for name in names:
        stacked = torch.stack([source[name].float() for source in sources])
        directions[name] = prepare(stacked - base[name].float())
    vectors, masks = {}, {}
    own, kept = np.zeros(len(sources)), np.zeros(len(sources))
    for name, stacked in directions.items():
        sign = torch.where(stacked.sum(dim=0) > 0, 1.0, -1.0)
        agrees = stacked * sign > 0
        vectors[name] = sign * (stacked.abs() * agrees).max(dim=0).values
        masks[name] = agrees
        own += [float(d.double().abs().sum()) for d in stacked]
        kept += [float((m * vectors[name]).double().abs().sum()) for m in agrees]
    scales = own / kept if scales is None else scales
    tasks = []
    for k, source in enumerate(sources):
        task = dict(source)
        for name in names:
            moved = vectors[name] * masks[name][k] * float(scales[k])
            task[name] = (base[name].float() + moved).to(base[name].dtype)
        tasks.append(task)
    return tasks, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_give_the_tasks_of_the_formula_bit_for_bit(family, tmp_path, name, dtype):
    models, _, paths = saved(family, tmp_path, name, dtype)
    merge(recipe_of(paths), outputs="tasks", output=str(tmp_path / "tasks"))
    merge(recipe_of(paths), outputs="compact", output=str(tmp_path / "compact"))
    unpack(str(tmp_path / "compact"), str(tmp_path / "unpacked"))
    stored = json.loads((tmp_path / "compact" / "emr.json").read_text())["scales"]
    _, scales = by_formula(models)
    assert list(stored.values()) == pytest.approx(scales.tolist(), rel=1e-9)
    expected, _ = by_formula(models, scales=list(stored.values()))
    names = load_file(f"{paths['base']}/model.safetensors").keys()
    for task, state in zip("ab", expected, strict=True):
        direct = load_file(tmp_path / "tasks" / task / "model.safetensors")
        again = load_file(tmp_path / "unpacked" / task / "model.safetensors")
        assert direct.keys() == again.keys() == names
        for key, value in direct.items():
            assert value.dtype == state[key].dtype, key
            assert torch.equal(value, again[key]), key
            assert torch.equal(value, state[key]), key


def parts_of(models, names):
    """The models' tensors of these names alone, as networks for `by_formula`."""

    class Part:
        def __init__(self, model):
            self.tensors = {name: model.get_parameter(name).detach() for name in names}

        def state_dict(self):
            return dict(self.tensors)

        def named_parameters(self):
            return self.tensors.items()

    return [Part(model) for model in models]


@pytest.mark.usefixtures("own_folder")
def test_frozen_tensors_are_the_same_in_all_tasks(family, tmp_path):
    models, _ = family("llama")
    same = "model.layers.0.mlp.up_proj.weight"
    for model in models[1:]:
        model.get_parameter(same).data = models[0].get_parameter(same).detach().clone()
    paths = save_family(tmp_path, models)
    at_origin, moved = {"norm": "origin"}, {"q_proj": "mean", "v_proj": 0.7}
    merge(recipe_of(paths, frozen={**at_origin, **moved}), outputs="tasks", output="tasks")
    merge(recipe_of(paths, frozen=at_origin), outputs="tasks", output="origin")
    merge(recipe_of(paths, frozen=at_origin), outputs="compact", output="compact")
    unpack("compact", "unpacked")
    names = [name for name, _ in models[0].named_parameters()]
    for folder, patterns in (("tasks", ("norm", "q_proj", "v_proj")), ("origin", ("norm",))):
        free = [name for name in names if not any(p in name for p in patterns)]
        expected, _ = by_formula(parts_of(models[:3], free))
        for task, state in zip("ab", expected, strict=True):
            found = load_file(f"{folder}/{task}/model.safetensors")
            for name in names:
                base, *others = (model.get_parameter(name).detach() for model in models[:3])
                factor = 0.5 if "q_proj" in name else 0.7 if "v_proj" in name else 0.0
                theta = state.get(name, base + factor * sum(other - base for other in others))
                torch.testing.assert_close(found[name], theta, rtol=0, atol=1e-6)
    kept = {name for name in names if "norm" in name} | {same}
    assert set(json.loads(Path("compact/emr.json").read_text())["unchanged"]) == kept
    assert load_file("compact/unified.st").keys() == set(names) - kept
    for task in "ab":
        pair = [load_file(f"{f}/{task}/model.safetensors") for f in ("origin", "unpacked")]
        assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())


def test_a_compact_folder_of_older_versions_is_read(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    merge(recipe_of(paths), outputs="compact", output=str(tmp_path / "compact"))
    assert not list((tmp_path / "compact").rglob("*.safetensors"))
    unpack(str(tmp_path / "compact"), str(tmp_path / "now"))
    for file in (tmp_path / "compact").rglob("*.st"):
        file.rename(file.with_suffix(".safetensors"))
    unpack(str(tmp_path / "compact"), str(tmp_path / "then"))
    for task in "ab":
        now, then = (load_file(tmp_path / f / task / "model.safetensors") for f in ("now", "then"))
        assert all(torch.equal(tensor, then[name]) for name, tensor in now.items())


def test_a_mask_takes_one_bit_per_entry(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    merge(recipe_of(paths), outputs="compact", output=str(tmp_path / "compact"))
    shared = load_file(tmp_path / "compact" / "unified.st")
    for task in "ab":
        path = tmp_path / "compact" / "tasks" / task / "masks.st"
        masks = load_file(path)
        assert masks.keys() == shared.keys()
        for name, packed in masks.items():
            assert packed.dtype == torch.uint8
            assert packed.numel() == -(-shared[name].numel() // 8)
            bits = np.unpackbits(packed.numpy())[: shared[name].numel()]
            kept = torch.from_numpy(bits).bool().view(shared[name].shape)
            assert (shared[name][kept] != 0).all()
        entries = sum(tensor.numel() for tensor in shared.values())
        header = path.read_bytes()[:8]
        size = path.stat().st_size - 8 - int.from_bytes(header, "little")
        assert entries / 8 <= size <= entries / 8 + len(shared)


def test_tasks_load_with_transformers_and_are_sources(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models, inputs, paths = saved(family, tmp_path)
    merge(recipe_of(paths), outputs="compact", output=str(tmp_path / "compact"))
    unpack(str(tmp_path / "compact"), str(tmp_path / "out"), tasks=["b"], dtype="float32")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".gradmerge", "b"]
    expected, _ = by_formula(models)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "b")
    models[2].load_state_dict(expected[1])
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(network(**inputs)), logits_of(models[2](**inputs)), rtol=1e-5, atol=1e-6
        )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "b")) > 3
    provenance = json.loads((tmp_path / "out" / "b" / "provenance.json").read_text())
    assert provenance["unpacked"]["scales"].keys() == {"a", "b"}
    # the compact form itself, as a source
    source = as_source(str(tmp_path / "compact" / "tasks" / "b"))
    assert source == EMR(str(tmp_path / "compact"), "b")
    opened = source.open()
    stored = load_file(tmp_path / "out" / "b" / "model.safetensors")
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in stored.items())
    assert opened.fingerprint() != EMR(str(tmp_path / "compact"), "a").open().fingerprint()


def test_heads_stay_with_their_task(family, tmp_path):
    models, _, paths = saved(family, tmp_path)
    recipe = recipe_of(paths, private=["lm_head"])
    merge(recipe, outputs="compact", output=str(tmp_path / "compact"))
    merge(recipe, outputs="tasks", output=str(tmp_path / "tasks"))
    assert "lm_head.weight" not in load_file(tmp_path / "compact" / "unified.st")
    unpack(str(tmp_path / "compact"), str(tmp_path / "out"))
    for task, model in zip("ab", models[1:], strict=True):
        found = load_file(tmp_path / "out" / task / "model.safetensors")
        assert torch.equal(found["lm_head.weight"], model.state_dict()["lm_head.weight"])
        direct = load_file(tmp_path / "tasks" / task / "model.safetensors")
        assert all(torch.equal(found[name], direct[name]) for name in direct)
        assert not (tmp_path / "out" / task / "tasks").exists()


def test_steps_before_the_election_count(family, tmp_path):
    models, _, paths = saved(family, tmp_path)

    def trimmed(stacked):
        from gradmerge.preprocess import Site

        return Trim(0.3)(stacked, Site("x", ("a", "b")))

    expected, _ = by_formula(models, prepare=trimmed)
    recipe = recipe_of(paths, preprocess=[Trim(0.3), Unify()])
    merge(recipe, outputs="compact", output=str(tmp_path / "compact"))
    opened = EMR(str(tmp_path / "compact"), "a", HuggingFace(paths["base"])).open()
    for name in opened.infos:
        torch.testing.assert_close(opened.read(name), expected[0][name], rtol=2e-7, atol=1e-9)


def test_the_command_line(family, tmp_path, capsys, monkeypatch):
    saved(family, tmp_path)
    monkeypatch.chdir(tmp_path)
    sources = [f"--recipe.sources.{name}={name}" for name in "ab"]
    factors = ["--recipe.base=base", "--recipe.preprocess+=Unify", *sources]
    assert main(["merge", *factors, "--outputs", "compact", "--output", "compact"]) == 0
    monkeypatch.chdir("/")  # the base is found from everywhere
    assert main(["unpack", str(tmp_path / "compact"), str(tmp_path / "out")]) == 0
    assert "2 tasks" in capsys.readouterr().out
    assert main(["unpack", str(tmp_path / "compact"), str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["unpack", str(tmp_path / "a"), str(tmp_path / "other")]) == 2
    assert "expected emr.json" in capsys.readouterr().err


def test_another_base_is_refused(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    merge(recipe_of(paths), outputs="compact", output=str(tmp_path / "compact"))
    with pytest.raises(SourceError, match="expected a base with fingerprint"):
        unpack(str(tmp_path / "compact"), str(tmp_path / "out"), base=paths["a"])
    models, _ = family("bert", dtype=torch.float32)
    models[0].save_pretrained(tmp_path / "bert")
    with pytest.raises(SourceError, match="the files do not fit the base"):
        unpack(str(tmp_path / "compact"), str(tmp_path / "out"), base=str(tmp_path / "bert"))
    with pytest.raises(SourceError, match=r"unknown task 'c' \(choose from a, b\)"):
        EMR(str(tmp_path / "compact"), "c").open()
    assert not (tmp_path / "out").exists()


def test_tasks_say_how_their_sources_were_aligned(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    factors = {"coefficients": Model(), "init": Uniform(), "preprocess": [Trim(0.5)]}
    recipe = Recipe([paths["a"], paths["b"]], alignment=WeightMatching(reference="a"), **factors)
    found = {}
    for outputs in ("merged", "tasks"):
        merge(recipe, outputs=outputs, output=str(tmp_path / outputs))
        place = tmp_path / outputs / ("a" if outputs == "tasks" else "")
        found[outputs] = json.loads((place / "provenance.json").read_text())["alignment"]
    assert found["tasks"] == found["merged"]
    assert found["tasks"]["reference"] == "a"


def test_what_has_no_such_form_is_refused(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="expected Unify as the last preprocess"):
        merge(recipe_of(paths, preprocess=[Trim()]), outputs="compact", output=out)
    with pytest.raises(ConfigError, match="expected a preprocess"):
        merge(recipe_of(paths, preprocess=[]), outputs="tasks", output=out)
    with pytest.raises(ConfigError, match=r"frozen at the origin.*got norm, frozen elsewhere"):
        merge(recipe_of(paths, frozen={"norm": "mean"}), outputs="compact", output=out)
    with pytest.raises(ConfigError, match="expected origin base"):
        merge(recipe_of(paths, origin="mean"), outputs="compact", output=out)
    for outputs in ("tasks", "compact"):
        with pytest.raises(ConfigError, match="head: expected none with outputs"):
            merge(recipe_of(paths), outputs=outputs, output=out, head="a")
    with pytest.raises(ConfigError, match="dtype: expected none with outputs compact, got"):
        merge(recipe_of(paths), outputs="compact", output=out, dtype="bfloat16")
    merge(recipe_of(paths), outputs="compact", output=str(tmp_path / "compact"))
    with pytest.raises(ConfigError, match="tasks: unknown task 'c'"):
        unpack(str(tmp_path / "compact"), out, tasks=["c"])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*")), "nothing half done is left"


def test_a_failure_on_the_way_leaves_nothing(family, tmp_path, monkeypatch):
    _, _, paths = saved(family, tmp_path)
    plan = open_plan(recipe_of(paths), with_skeleton=False)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("gradmerge.export.emr.write_config", fail)
    with pytest.raises(OSError, match="disk full"):
        export_compact(plan, tmp_path / "compact")
    assert not [p for p in tmp_path.iterdir() if "compact" in p.name]


@pytest.mark.parametrize("step", [Trim(0.5), RandomDrop(0.5)])
def test_tasks_of_selected_directions(family, tmp_path, step):
    """Steps that only select store no directions, but tasks are the base plus their own as well."""
    _, _, paths = saved(family, tmp_path)
    plan = open_plan(recipe_of(paths, preprocess=[step]), with_skeleton=False)
    tasks = task_checkpoints(plan)
    for name in plan.tensors:
        directions = torch.stack([plan.read(s, name) - plan.read("base", name) for s in "ab"])
        directions = step(directions, Site(name, ("a", "b")))
        for task, direction in zip("ab", directions, strict=True):
            got = tasks[task].read(name)
            torch.testing.assert_close(got, plan.read("base", name) + direction)


def test_a_task_as_a_source_checks_its_base(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    export_compact(open_plan(recipe_of(paths), with_skeleton=False), tmp_path / "compact")
    name = "model.norm.weight"
    EMR(str(tmp_path / "compact"), "a").open().read(name)
    other = EMR(str(tmp_path / "compact"), "a", base=HuggingFace(str(paths["b"]))).open()
    with pytest.raises(SourceError, match="expected a base with fingerprint"):
        other.read(name)


def test_a_compact_form_of_aligned_tokens_is_refused(family, tmp_path):
    _, _, paths = saved(family, tmp_path)
    plan = open_plan(recipe_of(paths, tokenizer=Vocabulary("base")), with_skeleton=False)
    with pytest.raises(ConfigError, match="expected no tokenizer, which aligns the base's rows"):
        export_compact(plan, tmp_path / "compact")
