"""Folders of torch.distributed.checkpoint as sources, against the state dicts that were saved."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata

from gradmerge import Recipe, merge
from gradmerge.cli import main
from gradmerge.coefficients import Uniform
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.sources import Distributed, as_source
from tiny import relatives, save_family

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def network(tied=False, kind=transformers.LlamaForCausalLM):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def optimised(model):
    """The state of an optimiser that has taken a step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(p.sum() for p in model.parameters()).backward()
    optimiser.step()
    return optimiser.state_dict()


def save(state, folder, config=None, kind="LlamaForCausalLM"):
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    if config is not None:
        config.architectures = [kind]
        config.save_pretrained(folder)
    return str(folder)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "nest",
    [
        lambda state, optim: state,
        lambda state, optim: {**state, "optimizer": optim, "train_state": {"step": torch.ones(1)}},
        lambda state, optim: {"model": state, "optim": optim},
        lambda state, optim: {"app": {"model": state, "optim": optim, "step": torch.tensor(3)}},
        lambda state, optim: {"state_dict": state, "optimizer_0": optim, "rng": torch.ones(4)},
        lambda state, optim: {f"model.{n}": t for n, t in state.items()},
        lambda state, optim: {f"app.model.{n}": t for n, t in state.items()},
        lambda state, optim: {f"module.{n}": t for n, t in state.items()},
        lambda state, optim: {
            "model": {n.replace("layers.0.", "layers.0._fsdp_wrapped_module."): t
                      for n, t in state.items()}
        },
    ],
    ids=["flat", "titan", "model", "app", "lightning", "model.", "app.model.", "module.", "fsdp"],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_told_from_the_rest_by_their_keys(tmp_path, nest, tied):
    model = network(tied)
    state = weights(model)
    path = save(nest(state, optimised(model)), tmp_path / "dcp", model.config)
    opened = as_source(path).open()
    assert opened.infos.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(opened.read(name), tensor)
        assert opened.infos[name].shape == tensor.shape


def test_a_network_whose_names_all_begin_alike_keeps_them(tmp_path):
    """Without a head, all tensors of a Llama for causal language modelling begin with `model.`."""
    model = network(tied=True)
    state = {n: t for n, t in weights(model).items() if not n.startswith("lm_head")}
    path = save({"model": state}, tmp_path / "dcp", model.config)
    assert as_source(path).open().infos.keys() == state.keys()
    body = network(kind=transformers.LlamaModel)
    path = save(
        {f"model.{n}": t for n, t in weights(body).items()},
        tmp_path / "b",
        body.config,
        "LlamaModel",
    )
    assert as_source(path).open().infos.keys() == body.state_dict().keys()


def test_without_a_config_names_stay_and_a_prefix_can_be_given(tmp_path):
    path = save({f"net.{n}": t for n, t in weights(torch.nn.Linear(2, 3)).items()}, tmp_path / "d")
    assert as_source(path).open().infos.keys() == {"net.weight", "net.bias"}
    assert Distributed(path, prefix="net").open().infos.keys() == {"weight", "bias"}
    with pytest.raises(SourceError, match=r"names that start with 'model\.' \(prefix\), got net"):
        Distributed(path, prefix="model").open()


def test_shards_of_several_processes_and_dtypes(tmp_path):
    """Each of two processes saves its rows, as FSDP does; a tensor is read from both."""
    script = tmp_path / "save.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}/sync', rank=rank,\n"
        "                        world_size=2)\n"
        "mesh = init_device_mesh('cpu', (2,))\n"
        "whole = torch.arange(30.0).view(5, 6)\n"
        "state = {n: distribute_tensor(whole.to(d), mesh, [Shard(a)])\n"
        "         for n, d, a in (('rows', torch.float32, 0), ('columns', torch.bfloat16, 1))}\n"
        "dcp.save({'model': state}, checkpoint_id=f'{sys.argv[2]}/dcp')\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, str(script)]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    opened = Distributed(str(tmp_path / "dcp")).open()
    whole = torch.arange(30.0).view(5, 6)
    assert torch.equal(opened.read("rows"), whole)
    assert torch.equal(opened.read("columns"), whole.bfloat16())
    opened.keep()
    assert torch.equal(opened.read("rows"), whole)


def test_merging_is_as_with_folders(tmp_path, capsys):
    """Beside folders of Hugging Face, in a checkpoint of Accelerate, by class with a config."""
    models = relatives(network())
    paths = save_family(tmp_path / "hf", models)
    expected = merge(Recipe({"a": paths["a"], "b": paths["b"]}, init=Uniform()), tmp_path / "one")
    run = tmp_path / "run"
    for name, model in zip("ab", models[1:], strict=True):
        place = run / f"checkpoint-{name}" / "pytorch_model_fsdp_0"
        save({"model": weights(model)}, place)
        assert place.is_dir()
    for file in Path(paths["a"]).iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, run)  # as the trainer does at the end
    folders = [str(run / f"checkpoint-{name}") for name in "ab"]
    recipe = json.dumps({"sources": {"a": folders[0], "b": folders[1]}, "init": "Uniform"})
    assert main(["merge", "--recipe", recipe, "--output", str(tmp_path / "two")]) == 0
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert tokenizers[0] == tokenizers[1]
    mixed = {"a": Distributed(folders[0], config=paths["base"]), "b": paths["b"]}
    three = load_file(
        merge(Recipe(mixed, init=Uniform()), tmp_path / "three") / "model.safetensors"
    )
    torch.testing.assert_close(one, three, rtol=0, atol=0)
    found = json.loads((tmp_path / "two/provenance.json").read_text())["sources"]
    plain = json.loads((expected / "provenance.json").read_text())["sources"]
    assert {n: s["sha256"] for n, s in found.items()} == {n: s["sha256"] for n, s in plain.items()}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Hostile()), r"an object of posix\.system, which is not loaded"),
        (
            pickle.dumps(Metadata({}, storage_data={"x": Hostile()})),
            "not loaded because unpickling",
        ),
        (pickle.dumps({"a": 1}), r"object of builtins|a damaged or other file"),
        (b"", "a damaged or other file"),
        (b"PK", "a damaged or other file|an object of"),
    ],
    ids=["code", "code inside", "other", "empty", "bytes"],
)
def test_metadata_never_runs_code(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        as_source(str(tmp_path)).open()
    assert not (tmp_path / "ran").exists()


def test_damaged_folders_are_refused_by_name(tmp_path):
    state = {"model": weights(torch.nn.Linear(64, 64))}
    path = Path(save(state, tmp_path / "cut"))
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"shards that are complete, but these are not: __0_0"):
        as_source(str(path)).open()
    shard.unlink()
    with pytest.raises(SourceError, match=r"shards that exist, but these are not: __0_0"):
        as_source(str(path)).open()
    path = Path(save(state, tmp_path / "noise"))
    opened = as_source(str(path)).open()
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(os.urandom(shard.stat().st_size))
    with pytest.raises(SourceError, match=r"tensor model\.weight cannot be read"):
        opened.read("weight")
    metadata = dcp.FileSystemReader(save(state, tmp_path / "out")).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = "../noise/__0_0.distcp"
    (tmp_path / "out/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(SourceError, match=r"nothing outside of the folder is read"):
        as_source(str(tmp_path / "out")).open()


def test_several_models_ask_for_a_prefix(tmp_path):
    state = weights(torch.nn.Linear(2, 2))
    path = save({"student": state, "teacher": state}, tmp_path / "two")
    with pytest.raises(
        SourceError, match=r"under student \(2\), teacher \(2\)\. Name it: .*prefix"
    ):
        as_source(path).open()
    assert Distributed(path, prefix="student").open().infos.keys() == state.keys()
    with pytest.raises(SourceError, match=r"expected a folder with \.metadata"):
        Distributed(str(tmp_path / "tow")).open()
    with pytest.raises(ConfigError, match=r"Distributed\.config: .* has no config\.json"):
        Distributed(path, config=str(tmp_path)).open()
