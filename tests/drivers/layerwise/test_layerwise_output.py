"""What the layer-wise driver writes and logs, and which blocks it takes."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import partial

import pytest
import torch
import transformers
import wandb
from lightning.pytorch.loggers import WandbLogger
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from gradmerge import Recipe
from gradmerge.coefficients import Constant, Element, Tensor
from gradmerge.drivers import LayerWise
from gradmerge.drivers.wandb import finish_wandb_run
from gradmerge.training import ExportAtEnd
from layerwise_jobs import ADAM, Stack, data_of, job_of, network_of
from networks import seeded
from tiny import build, recipe_of, relatives, save_family

pytestmark = pytest.mark.usefixtures("small_collections")


def test_the_export_is_the_merged_network_and_says_what_it_is(tmp_path):
    models, kind, names = network_of("llama", torch.float32)
    paths = save_family(tmp_path / "models", models, tokenizer=False)
    recipe = Recipe(
        {name: paths[name] for name in "ab"},
        base=paths["base"],
        coefficients=Element(),
        init=Constant(0.3),
    )
    data = data_of(kind)
    folder = LayerWise(steps=3).run(job_of(tmp_path / "run", recipe, data, ADAM))
    coefficients = load_file(folder / "coefficients.st")
    base, *experts = [dict(model.named_parameters()) for model in models]
    theta = {
        name: base[name]
        + sum(coefficients[name][k] * (experts[k][name] - base[name]) for k in (0, 1))
        for name in base
    }
    tokens = torch.arange(3, 15).view(2, 6)
    expected = functional_call(models[0], theta, (), {"input_ids": tokens}).logits
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    moved = [name for name, c in coefficients.items() if not bool((c == 0.3).all())]
    assert {
        name.split(".self_attn")[0].split(".mlp")[0].split(".input")[0].split(".post")[0]
        for name in moved
    } == {*names, "model.norm.weight", "lm_head.weight"}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["driver"]["kept_at_start"] == ["model.embed_tokens.weight"]
    steps = [block["name"] for block in provenance["driver"]["blocks"]]
    assert steps == [*names, "(after the last block)"]
    assert provenance["run"]["optimizers"][0]["class_path"] == "torch.optim.adam.Adam"


def test_blocks_may_be_named_and_those_of_a_sequential_network_are_its_members(tmp_path):
    torch.manual_seed(0)
    members = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)]
    models = relatives(nn.Sequential(OrderedDict(zip("abcde", members, strict=True))), scale=0.1)
    for driver, kept in (
        (LayerWise(steps=2), set()),
        (LayerWise(steps=2, blocks=["[c-d]"]), {"a"}),
    ):
        data = data_of("input", dtype=torch.float32)
        job = job_of(
            tmp_path / str(len(kept)), recipe_of(models, coefficients=Element()), data, ADAM
        )
        folder = driver.run(job)
        coefficients = load_file(folder / "coefficients.st")
        still = {name[0] for name, c in coefficients.items() if bool((c == 0.3).all())}
        assert still == kept


@pytest.mark.parametrize("name", ["", "mine"])
def test_all_blocks_log_to_one_wandb_run(tmp_path, monkeypatch, name):
    """A run that ended with the first block's trainer would reject what the second logs."""
    for variable, value in {
        "MODE": "offline",
        "SILENT": "true",
        "RUN_GROUP": "",
        "NAME": name,
    }.items():
        monkeypatch.setenv(f"WANDB_{variable}", value)
    torch.manual_seed(0)
    recipe = recipe_of(relatives(build(Stack), 3), coefficients=Tensor())
    logger = partial(WandbLogger, project="gradmerge", save_dir=tmp_path, offline=True)
    job = job_of(tmp_path / "job", recipe, data_of(dtype=torch.float32), ADAM, lambda _: [logger()])
    job.output = ExportAtEnd(str(tmp_path / "out"), log_artifact=True)
    logged, log = [], wandb.sdk.wandb_run.Run.log_artifact

    def noted(run, artifact):
        logged.append((run.name, artifact))
        return log(run, artifact)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log_artifact", noted)
    LayerWise(steps=2).run(job)
    finish_wandb_run()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    ((got, artifact),) = logged
    assert got == (name or "job")
    assert artifact.name.startswith("merged-model")
    assert "model.safetensors" in artifact.manifest.entries


def test_a_head_that_is_tied_to_the_embedding_keeps_its_start_and_a_line_says_so(tmp_path):
    sizes = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    models = relatives(seeded(transformers.LlamaForCausalLM, **sizes), scale=0.1)
    job = job_of(tmp_path, recipe_of(models), data_of("tokens", dtype=torch.float32), ADAM)
    coefficients = load_file(LayerWise(steps=2).run(job) / "coefficients.st")
    tied = "model.embed_tokens.weight"
    assert any(f"{tied}: not learned after the last block" in line for line in job.said)
    assert {name for name, c in coefficients.items() if bool((c == 0.3).all())} == {tied}


def test_all_outputs_of_a_network_without_logits_are_matched(tmp_path):
    """Start and end of an answer are two outputs; a pooler is one beside the hidden states."""
    sizes = {"max_position_embeddings": 16, "num_hidden_layers": 1}
    for kind, end in (("BertForQuestionAnswering", "qa_outputs"), ("BertModel", "pooler.dense")):
        models = relatives(seeded(getattr(transformers, kind), **sizes), scale=0.1)
        job = job_of(
            tmp_path / kind, recipe_of(models), data_of("padded", dtype=torch.float32), ADAM
        )
        folder = LayerWise(steps=4).run(job)
        found = json.loads((folder / "provenance.json").read_text())["driver"]["blocks"][-1]
        assert found["name"] == "(after the last block)"
        assert found["loss"] < found["first_loss"]
        moved = load_file(folder / "coefficients.st")
        assert not bool((moved[f"{end}.weight"] == 0.3).any())


def test_each_task_has_its_own_head(tmp_path):
    models, kind, _ = network_of("bert", torch.float32)
    recipe = recipe_of(models, coefficients=Tensor(), private=["classifier", "bert.pooler"])
    job = job_of(tmp_path, recipe, data_of(kind), ADAM)
    folder = LayerWise(steps=2).run(job)
    heads = [load_file(folder / "tasks" / t / "model-00002-of-00002.safetensors") for t in "ab"]
    for head, model in zip(heads, models[1:], strict=True):
        own = model.state_dict()
        assert head
        assert all(torch.equal(value, own[name]) for name, value in head.items())
