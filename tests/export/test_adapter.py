"""Merges written as LoRA adapters, against PEFT and plain singular value decompositions."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData, export_merged
from gradmerge.cli import main
from gradmerge.coefficients import Column, Constant, Model, Row, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export import adapter
from gradmerge.export.adapter import export_adapter
from gradmerge.export.folder import export_state
from gradmerge.export.push import contents
from gradmerge.preprocess import Trim
from gradmerge.sources import HuggingFace, Lora
from tiny import SPLITS, trainer_of, write_yaml

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=40, intermediate_size=24, num_key_value_heads=1, **SIZES
    )
    return transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config), ["c_attn", "mlp.c_proj"]


def bert():
    config = transformers.BertConfig(vocab_size=40, intermediate_size=24, num_labels=3, **SIZES)
    network = transformers.BertForSequenceClassification(config)
    return network, ["query", "word_embeddings", "pooler.dense"]


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, intermediate_size=24, **SIZES)
    return transformers.ViTForImageClassification(config), ["projection", "q_proj"]


BUILDERS = {each.__name__: each for each in (llama, gpt2, bert, vit)}


def inputs(network):
    if isinstance(network, transformers.ViTForImageClassification):
        return torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).view(2, 3, 8, 8)
    return torch.arange(16).view(2, 8)


def shaken(network, seed, scale=0.1):
    """Change all parameters that are trained, by noise of a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter))
    return network


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """By architecture: a base and two adapters on it, of ranks 2 and 3."""
    found = {}

    def make(name):
        if name in found:
            return found[name]
        root = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        base, targets = BUILDERS[name]()
        base = base.double().eval()
        base.save_pretrained(root / "base")
        for seed, source in enumerate("ab"):
            config = peft.LoraConfig(r=2 + seed, lora_alpha=8, target_modules=targets[seed:])
            model = shaken(peft.get_peft_model(copy.deepcopy(base), config), seed)
            model.save_pretrained(root / source, save_embedding_layers=False)
        found[name] = root
        return root

    return make


def state_of(root, granularity=None, **options):
    """The adapters' merge at random coefficients."""
    base = HuggingFace(str(root / "base"))
    options = {"coefficients": granularity or Tensor(), "init": Constant(0.4), **options}
    recipe = Recipe({name: Lora(str(root / name), base) for name in "ab"}, base=base, **options)
    state = FitState.start(open_plan(recipe))
    generator = torch.Generator().manual_seed(7)
    for raw in state.raw.values():
        raw.add_(0.3 * torch.randn(raw.shape, generator=generator))
    return state


def attached(root, folder):
    """The base with an adapter, by PEFT alone."""
    build = getattr(
        transformers, json.loads((root / "base/config.json").read_text())["architectures"][0]
    )
    base = build.from_pretrained(root / "base", dtype=torch.float64)
    return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


def loaded(folder):
    build = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, build).from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def logits(network, given):
    return network(given).logits


@pytest.mark.parametrize(
    ("name", "granularity"),
    [*((n, Tensor()) for n in BUILDERS), ("llama", Row()), ("gpt2", Column()), ("llama", Model())],
    ids=str,
)
def test_adapters_become_one_adapter_that_computes_the_same(suites, tmp_path, name, granularity):
    root = suites(name)
    state = state_of(root, granularity)
    folder = export_adapter(state, tmp_path / "adapter", dtype="float64")
    whole = loaded(export_state(state, tmp_path / "whole", dtype="float64"))
    network = attached(root, folder)
    given = inputs(whole)
    expected = logits(whole, given)
    torch.testing.assert_close(logits(network, given), expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(logits(loaded(root / "base"), given), expected, rtol=1e-3)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (5, 5)
    assert set(settings["rank_pattern"].values()) <= {2}  # of modules that only one adapts
    torch.testing.assert_close(
        logits(network.merge_and_unload(), given), expected, rtol=1e-9, atol=1e-11
    )


def test_a_written_adapter_is_a_source(suites, tmp_path):
    state = state_of(suites("llama"))
    folder = export_adapter(state, tmp_path / "adapter", dtype="float64")
    again = Lora(str(folder), HuggingFace(str(suites("llama") / "base"))).open()
    for name in state.plan.tensors:
        torch.testing.assert_close(
            again.read(name), state.materialise(name), rtol=1e-12, atol=1e-14, msg=name
        )


def test_a_smaller_rank_is_the_nearest_and_states_its_error(suites, tmp_path):
    root, state = suites("llama"), state_of(suites("llama"))
    folder = export_adapter(state, tmp_path / "adapter", rank=3, dtype="float64")
    network = attached(root, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == 3
    lost, total, worst = 0.0, 0.0, (0.0, "")
    for name in state.learned:
        change = state.materialise(name) - state.plan.read("base", name)
        values = torch.linalg.svdvals(change)
        adapted = network.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        found = adapted.get_delta_weight("default")
        off = torch.linalg.norm(found - change)
        torch.testing.assert_close(off, values[3:].norm(), rtol=1e-8, atol=1e-10, msg=name)
        lost, total = lost + float(off**2), total + float(change.square().sum())
        worst = max(worst, (float(off / change.norm()), name))
    facts = json.loads((folder / "provenance.json").read_text())["adapter"]
    assert facts["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-8)
    assert facts["largest_error"] == [worst[1], pytest.approx(worst[0], rel=1e-8)]
    assert f"{facts['relative_error']:.2e}" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory):
    """A base of three layer types, and two models in which all parameters have changed."""
    root = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    base = bert()[0].double().eval()
    base.save_pretrained(root / "base")
    for seed, name in enumerate("ab"):
        shaken(copy.deepcopy(base), seed, 0.05).save_pretrained(root / name)
    return root


def state_of_folders(root, **options):
    sources = {name: str(root / name) for name in "ab"}
    return FitState.start(open_plan(Recipe(sources, base=str(root / "base"), **options)))


def test_whole_models_become_an_adapter_with_norms_and_biases_stored_whole(fine_tunes, tmp_path):
    state = state_of_folders(fine_tunes, init=Constant(0.4))
    with pytest.raises(ConfigError, match="rank: expected a number, got none, for tensors"):
        export_adapter(state, tmp_path / "none")
    folder = export_adapter(state, tmp_path / "adapter", rank=40, dtype="float64")
    whole = loaded(export_state(state, tmp_path / "whole"))
    network = attached(fine_tunes, folder)
    expected = logits(whole, inputs(whole))
    torch.testing.assert_close(logits(network, inputs(whole)), expected, rtol=1e-9, atol=1e-11)
    saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert "bert.embeddings.LayerNorm" in saved
    assert all(isinstance(whole.get_submodule(m), (nn.LayerNorm, nn.Linear)) for m in saved)


def test_large_matrices_are_as_near_as_all_singular_values_say(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    slow = torch.logspace(0, -1, 60, dtype=torch.float64)
    ends = [torch.linalg.qr(torch.randn(n, 60, generator=generator).double())[0] for n in (80, 90)]
    matrix = ends[0] * slow @ ends[1].T
    monkeypatch.setattr(adapter, "_SMALL", 10)
    found = adapter._nearest(matrix, 8)
    off = torch.linalg.norm(found.left @ found.right - matrix)
    assert float(off) == pytest.approx(found.lost**0.5, rel=1e-6)
    assert float(off) == pytest.approx(float(slow[8:].norm()), rel=1e-3)


def test_what_the_sources_left_alone_is_not_stored(tmp_path):
    """Also where it is tied, or of a module that has no factors."""
    torch.manual_seed(0)
    base, _ = gpt2()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        tuned = copy.deepcopy(base)
        for own, parameter in tuned.named_parameters():
            parameter.requires_grad_("c_attn.weight" in own)
        shaken(tuned, seed).save_pretrained(tmp_path / name)
    folder = export_adapter(state_of_folders(tmp_path), tmp_path / "out", rank=4)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["target_modules"], settings["modules_to_save"]) == (["c_attn"], None)


def test_preprocessed_directions_need_a_rank(suites, tmp_path):
    state = state_of(suites("llama"), preprocess=[Trim(0.5)])
    with pytest.raises(ConfigError, match=r"expected a number, got none.*model\.layers\.0"):
        export_adapter(state, tmp_path / "none")
    folder = export_adapter(state, tmp_path / "adapter", rank=16, dtype="float64")
    whole = loaded(export_state(state, tmp_path / "whole"))
    found = logits(attached(suites("llama"), folder), inputs(whole))
    torch.testing.assert_close(found, logits(whole, inputs(whole)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"origin": "zero"}, "expected origin base, which the adapter is added to, got zero"),
        ({"private": ["lm_head"]}, "expected nothing private, got lm_head"),
        ({"tokenizer": {"source": "union"}}, "expected no tokenizer"),
    ],
)
def test_merges_that_no_adapter_can_hold_are_refused(suites, tmp_path, capsys, options, message):
    root = suites("llama")
    sources = {name: str(root / name) for name in "ab"}
    recipe = {"base": str(root / "base"), "sources": sources, "init": {"class_path": "Uniform"}}
    config = write_yaml(tmp_path / "m.yaml", {"recipe": {**recipe, **options}})
    command = ["merge", "--config", config, "--outputs", "adapter", "--output", str(tmp_path / "o")]
    assert main(command) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_tensors_of_several_modules_are_refused_by_name(tmp_path):
    torch.manual_seed(0)
    base, _ = gpt2()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        shaken(copy.deepcopy(base), seed).save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"wte\.weight \(tied: .*lm_head\.weight"):
        export_adapter(state_of_folders(tmp_path), tmp_path / "out", rank=4)


def test_a_fit_is_exported_as_an_adapter_of_its_coefficients(suites, tmp_path, capsys):
    root, rows = suites("llama"), [{"input_ids": row, "labels": row} for row in inputs(None)]
    state = state_of(root)
    module = MergeModule(state.plan.recipe, learning_rate=0.1)
    task = TaskData(dict.fromkeys(SPLITS, rows), kind="tensors")
    data = MergeDataModule({"a": task}, batch_size=2, check_disjoint=False)
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    places = [str(tmp_path / name) for name in ("fit.ckpt", "out")]
    assert main(["export", *places, "--outputs", "adapter", "--dtype", "float64"]) == 0
    assert "adapter written to" in capsys.readouterr().out
    whole = loaded(export_merged(module.merged, tmp_path / "whole", dtype="float64"))
    found = logits(attached(root, tmp_path / "out"), inputs(whole))
    torch.testing.assert_close(found, logits(whole, inputs(whole)), rtol=1e-9, atol=1e-11)


def test_a_change_without_a_matrix_is_no_adapter(tmp_path):
    torch.manual_seed(0)
    base, _ = llama()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        tuned = copy.deepcopy(base)
        for own, parameter in tuned.named_parameters():
            parameter.requires_grad_("norm" in own)
        shaken(tuned, seed).save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match="no matrix differs from the base's"):
        export_adapter(state_of_folders(tmp_path), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_the_base_is_named_as_peft_does(tmp_path):
    place = tmp_path / "me@work"
    place.mkdir()
    found = [adapter._place_of(label) for label in ("owner/name@v1", "owner/name", str(place))]
    assert [tuple(each.values()) for each in found] == [
        ("owner/name", "v1"), ("owner/name", None), (str(place), None),
    ]  # fmt: skip


def test_the_command_writes_an_adapter_with_a_card_and_no_local_path(suites, tmp_path, capsys):
    root, out = suites("llama"), tmp_path / "out"
    recipe = {
        "base": str(root / "base"),
        "sources": {name: str(root / name) for name in "ab"},
        "init": {"class_path": "Constant", "init_args": {"value": 0.4}},
    }
    config = write_yaml(tmp_path / "m.yaml", {"recipe": recipe})
    command = ["merge", "--config", config, "--outputs", "adapter", "--output", str(out)]
    assert main(command) == 0
    assert "largest rank 5, exact up to rounding" in capsys.readouterr().out
    assert {file.dtype for file in load_file(out / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert "adapter_model.safetensors" in contents(out)  # it may be pushed
    card = ModelCard((out / "README.md").read_text())
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    written = "".join(path.read_text() for path in out.glob("*.[jmhy]*") if path.is_file())
    assert not re.search(re.escape(str(root)), written)
    assert main([*command, "--overwrite", "true", "--rank", "2"]) == 0
    assert "largest rank 2, relative error" in capsys.readouterr().out
    assert main(["merge", "--config", config, "--rank", "2", "--output", str(tmp_path / "x")]) != 0
    assert "rank: expected none with outputs merged, got 2" in capsys.readouterr().err
