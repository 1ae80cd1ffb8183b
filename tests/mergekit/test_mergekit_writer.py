"""Coefficients as a mergekit file: order of filters, numbers, names of models, and refusals."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from gradmerge.cli import main
from gradmerge.coefficients import Column, Constant, Element, Group, Model, Partition, Row, Sigmoid
from gradmerge.common.errors import ConfigError, GradmergeError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.state import FitState
from gradmerge.mergekit.writer import mergekit_yaml, write_mergekit
from gradmerge.operators import Linear
from gradmerge.preprocess import ElectSign, Trim
from gradmerge.sources import HuggingFace, InMemory, SafetensorsFile
from gradmerge.sources.lora import Lora
from tiny import Normalised, build, fit, module_of, recipe_of, relatives, write_yaml

# one name stands in another, in its middle and at its end
NAMES = ["a.weight", "xa.weight", "xa.weight.scale", "b.weight"]


def save(folder, kinds=(torch.float32,) * 4):
    folder.mkdir(parents=True)
    tensors = {n: torch.randn(4, 3).to(k) for n, k in zip(NAMES, kinds, strict=True)}
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def p(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name in ("base", "a", "b", "odd+name")}


def recipe(p, **more):
    values = {name: [0.1 * (i + 1), -1 / 3] for i, name in enumerate(NAMES)}
    known = {"sources": {"a": p["a"], "b": p["b"]}, "base": p["base"], "init": Constant(values)}
    return Recipe(**{**known, **more})


def text_of(recipe, **options):
    plan = open_plan(recipe, with_skeleton=False)
    return mergekit_yaml(FitState.start(plan), **options)


def weights(entry):
    """The weight of each name by mergekit's rule: the first filter that is a part of it."""
    weight = entry["parameters"]["weight"]
    if not isinstance(weight, list):
        return dict.fromkeys(NAMES, weight)
    return {
        name: next(w["value"] for w in weight if "filter" not in w or w["filter"] in name)
        for name in NAMES
    }


def test_each_tensor_finds_its_own_number_as_a_float32(p):
    found = yaml.safe_load(text_of(recipe(p)))
    base, first, second = found["models"]
    assert [entry["model"] for entry in found["models"]] == [p["base"], p["a"], p["b"]]
    for i, name in enumerate(NAMES):
        own, other = torch.tensor([0.1 * (i + 1), -1 / 3]).tolist()
        assert weights(first)[name] == own
        assert weights(second)[name] == other
        assert weights(base)[name] == 1 - (own + other)
    assert first["parameters"]["weight"][-1] == {"value": 0.0}
    assert isinstance(second["parameters"]["weight"], float)  # the same everywhere
    settings = {key: found[key] for key in ("merge_method", "base_model", "dtype", "out_dtype")}
    assert settings == {
        "merge_method": "linear",
        "base_model": p["base"],
        "dtype": "float32",
        "out_dtype": "float32",
    }
    assert found["parameters"] == {"normalize": False}


def test_sums_of_directions_are_task_arithmetic(p):
    found = yaml.safe_load(text_of(recipe(p, operator=Linear("directions"))))
    assert found["merge_method"] == "task_arithmetic"
    assert found["base_model"] == p["base"]
    assert found["parameters"] == {"normalize": False, "lambda": 1.0}
    assert [entry["model"] for entry in found["models"]] == [p["a"], p["b"]]


def test_sums_from_zero_and_from_the_mean_have_the_base_at_nothing(p):
    for origin, share in (("zero", 0.25), ("mean", 0.25 + (1 - 0.75) / 2)):
        merge = recipe(p, origin=origin, init=Constant([0.25, 0.5]), coefficients=Model())
        found = yaml.safe_load(text_of(merge))
        assert [entry["parameters"]["weight"] for entry in found["models"]] == [
            0.0,
            share,
            share + 0.25,
        ]
    alone = yaml.safe_load(text_of(recipe(p, base=None)))
    assert alone["base_model"] == p["a"]  # else mergekit takes config and tokenizer by chance
    assert [entry["model"] for entry in alone["models"]] == [p["a"], p["b"]]


def test_a_base_that_is_a_source_is_named_once(p):
    merge = recipe(p, sources={"a": p["a"], "old": p["base"]}, origin="zero")
    found = yaml.safe_load(text_of(merge))
    assert [entry["model"] for entry in found["models"]] == [p["a"], p["base"]]


def test_fixed_tensors_and_groups_are_written_too(p):
    merge = recipe(
        p, frozen={"^b": 0.75}, coefficients=Group(("a",)), init=Constant({"xa": 0.5, "a": 0.25})
    )
    first = yaml.safe_load(text_of(merge))["models"][1]
    group = {"a.weight": 0.25, "xa.weight": 0.5, "xa.weight.scale": 0.5, "b.weight": 0.75}
    assert weights(first) == group


def test_models_are_named_by_whole_path_hub_id_revision_and_adapter(p, monkeypatch, tmp_path):
    from gradmerge.mergekit.writer import _reference

    assert _reference(HuggingFace("org/name", "v1")) == "org/name@v1"
    assert _reference(HuggingFace(p["odd+name"])) == {"model": {"path": p["odd+name"]}}
    assert _reference(Lora("org/x", HuggingFace("org/name"), "v2")) == "org/name+org/x@v2"
    odd = Lora("org/x", HuggingFace(p["odd+name"], "v3"))
    assert _reference(odd) == {
        "model": {"path": p["odd+name"], "revision": "v3"},
        "lora": {"path": "org/x"},
    }
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _reference(HuggingFace("here")) == str((tmp_path / "here").resolve())
    assert _reference(SafetensorsFile("x.safetensors")) is None


def test_what_is_written_is_read_again_as_the_same_merge(p, tmp_path):
    from gradmerge.mergekit.reader import read_mergekit

    for form in ("weights", "directions"):
        path = tmp_path / f"{form}.yaml"
        path.write_text(text_of(recipe(p, operator=Linear(form))))
        plan = open_plan(recipe(p, operator=Linear(form)), with_skeleton=False)
        again = open_plan(read_mergekit(path).recipe, with_skeleton=False)
        for name in NAMES:
            one = FitState.start(plan).materialise(name)
            assert torch.equal(FitState.start(again).materialise(name), one)


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (Column(), "Column"),
        (Row(), "Row"),
        (Element(), "Element"),
        (Partition(), "Partition"),
        (Sigmoid(Column()), "Column"),
    ],
)
def test_coefficients_finer_than_a_tensor_are_refused(factor, name):
    models = relatives(build())
    plan = open_plan(recipe_of(models, coefficients=factor))
    with pytest.raises(ConfigError, match=rf"coefficients: {name} has several per tensor \("):
        mergekit_yaml(FitState.start(plan))


def test_every_reason_is_given_at_once():
    models = relatives(build())
    plan = open_plan(recipe_of(models, preprocess=[Trim(), ElectSign()], private=["head"]))
    with pytest.raises(ConfigError) as caught:
        mergekit_yaml(FitState.start(plan))
    message = str(caught.value)
    assert message.startswith("mergekit cannot express this merge:\n")
    for part in [
        "preprocess: the coefficients belong to directions after Trim, ElectSign, and mergekit",
        "private: each task has its own head.weight, head.bias, and mergekit writes one model",
        "sources.a: mergekit takes folders, hub ids and LoRA adapters on them, got InMemory",
        "sources.base: mergekit takes folders",
    ]:
        assert part in message


def test_the_same_model_twice_is_refused(p):
    with pytest.raises(ConfigError, match="sources: a and again are the same model"):
        text_of(recipe(p, sources={"a": p["a"], "again": p["a"]}))
    with pytest.raises(ConfigError, match="sources: old and base are the same model"):
        text_of(recipe(p, sources={"a": p["a"], "old": p["base"]}))


def test_other_operators_are_refused(p):
    object.__setattr__(merge := recipe(p), "operator", "Slerp")
    plan = open_plan(recipe(p), with_skeleton=False)
    plan.recipe = merge
    with pytest.raises(ConfigError, match="operator: coefficients of str are not weights of a sum"):
        mergekit_yaml(FitState.start(plan))


def test_both_names_of_a_tied_tensor_are_written(tmp_path):
    models = relatives(ARCHITECTURES["llama-tied"][0](), 2)
    paths = {}
    for name, model in zip(("base", "a"), models, strict=True):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
        paths[name] = str(tmp_path / name)
    init = Constant({"embed": 0.25, ".*": 0.5})
    plan = open_plan(Recipe({"a": paths["a"]}, base=paths["base"], init=init))
    assert "lm_head.weight" not in plan.tensors
    found = yaml.safe_load(mergekit_yaml(FitState.start(plan)))["models"][1]
    weight = {w.get("filter"): w["value"] for w in found["parameters"]["weight"]}
    assert weight["lm_head.weight"] == weight["model.embed_tokens.weight"] == 0.25
    assert weight["model.norm.weight"] == 0.5


def test_aligned_vocabularies_are_refused(p):
    plan = open_plan(recipe(p), with_skeleton=False)
    object.__setattr__(plan.recipe, "tokenizer", "union")
    with pytest.raises(ConfigError, match="tokenizer: mergekit aligns vocabularies by its own"):
        mergekit_yaml(FitState.start(plan))


def test_several_stored_dtypes_want_one_stated(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    p = {name: save(tmp_path / name, kinds) for name in ("base", "a", "b")}
    with pytest.raises(ConfigError, match="dtype: mergekit stores all tensors in one, got bfloat"):
        text_of(recipe(p))
    assert yaml.safe_load(text_of(recipe(p), dtype="bfloat16"))["out_dtype"] == "bfloat16"


def test_double_sources_are_computed_in_double(tmp_path):
    p = {name: save(tmp_path / name, (torch.float64,) * 4) for name in ("base", "a", "b")}
    found = yaml.safe_load(text_of(recipe(p)))
    assert (found["dtype"], found["out_dtype"]) == ("float64", "float64")


def test_recomputed_statistics_are_refused_and_means_are_not(tmp_path):
    models = relatives(build(Normalised))
    module, _ = fit(tmp_path, module_of(models))
    merged = module.merged
    plan, buffers = merged.plan, merged.network_buffers.values()
    with pytest.raises(ConfigError, match=r"buffers: norm\.running_mean, norm\.running_var were"):
        mergekit_yaml(FitState(plan, merged.raw), buffers=buffers)
    with pytest.raises(ConfigError) as caught:
        mergekit_yaml(FitState(plan, merged.raw))
    assert "buffers" not in str(caught.value)  # only that the sources are in memory
    assert isinstance(plan.recipe.sources["a"], torch.nn.Module | InMemory)


def test_the_file_s_name_and_place(p, tmp_path):
    plan = open_plan(recipe(p), with_skeleton=False)
    raw = plan.initial_raw()
    path = write_mergekit(FitState(plan, raw), tmp_path / "new" / "mk.yml")
    assert [file.name for file in path.parent.iterdir()] == ["mk.yml"]
    with pytest.raises(ConfigError, match="exists; give another file, or --overwrite true"):
        write_mergekit(FitState(plan, raw), path)
    write_mergekit(FitState(plan, raw), path, overwrite=True)
    with pytest.raises(ConfigError, match=r"expected a name ending in \.yaml or \.yml"):
        write_mergekit(FitState(plan, raw), tmp_path / "folder")
    (tmp_path / "x.yaml").mkdir()
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        write_mergekit(FitState(plan, raw), tmp_path / "x.yaml", overwrite=True)


def test_a_failed_write_leaves_nothing(p, tmp_path, monkeypatch):
    plan = open_plan(recipe(p), with_skeleton=False)
    write_mergekit(FitState.start(plan), tmp_path / "old.yaml")
    kept = (tmp_path / "old.yaml").read_text()

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(GradmergeError, match=r"old\.yaml: cannot be written: the disk is full"):
        write_mergekit(FitState.start(plan), tmp_path / "old.yaml", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.yaml"]
    assert (tmp_path / "old.yaml").read_text() == kept


def test_the_command_refuses_before_any_work(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    recipe = {"sources": {"a": str(tmp_path / "a")}}
    config = write_yaml(tmp_path / "c.yaml", {"recipe": recipe})
    for options, message in [
        (["--output", "folder"], "expected a name ending in .yaml"),
        (["--output", "x.yaml", "--dtype", "int8"], "dtype: expected one of"),
        (["--output", "x.yaml", "--head", "a"], "head: expected none for a mergekit file"),
    ]:
        assert main(["merge", "--config", config, "--mergekit", "true", *options]) == 2
        assert message in capsys.readouterr().err
