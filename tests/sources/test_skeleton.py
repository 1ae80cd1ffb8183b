"""Networks without weights, and the places of tensors in a module by their names in the files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

from architectures import ARCHITECTURES, logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Constant, Model, Tensor
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.engine.opening import open_plan
from gradmerge.sources import HuggingFace
from gradmerge.sources.skeleton import (
    Network,
    bind,
    build_skeleton,
    input_axis,
    strip_weights,
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model


def clip():
    text = {**SMALL, "vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )


def clip_batch():
    return {**ARCHITECTURES["llama"][1](), **ARCHITECTURES["vit"][1]()}


def masked_bert():
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL)
    return transformers.BertForMaskedLM(config)


MODELS = {
    **{name: ARCHITECTURES[name] for name in ("llama", "llama-tied", "gpt2", "bert", "t5", "vit")},
    "resnet": (resnet, ARCHITECTURES["vit"][1]),
    "clip": (clip, clip_batch),
    "bert-masked": (masked_bert, ARCHITECTURES["bert"][1]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Yield every model with random weights, and its folder."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, (build, batch) in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():  # heads and biases that start at zero would hide a wrong binding
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        found[name] = (model, root / name, batch())
    return found


def output_of(model, inputs):
    output = model(**inputs)
    return (
        getattr(output, "logits_per_image", None)
        if "CLIP" in type(output).__name__
        else logits_of(output)
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_bound_to_the_place_that_transformers_loads_it_to(saved, name):
    """Oracle: the values of `from_pretrained` at each place of the module."""
    model, folder, _ = saved[name]
    checkpoint = HuggingFace(str(folder)).open()
    loaded = type(model).from_pretrained(folder)
    binding = bind(build_skeleton(folder), list(checkpoint.infos))
    assert binding.missing == binding.unused == ()
    assert not binding.ties
    places = [place for found in binding.parameters.values() for place in found]
    every = [n for n, _ in loaded.named_parameters(remove_duplicate=False)]
    assert sorted(places) == sorted(every)
    for file_name, found in binding.parameters.items():
        for place in found:
            assert torch.equal(checkpoint.read(file_name), loaded.get_parameter(place)), place
    persistent = {n for n, _ in loaded.named_buffers()} & set(loaded.state_dict())
    assert set(binding.buffers.values()) == persistent
    for file_name, place in binding.buffers.items():
        assert torch.equal(checkpoint.read(file_name), loaded.get_buffer(place))


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", MODELS)
def test_one_source_at_one_is_that_source(saved, name, memory):
    model, folder, inputs = saved[name]
    recipe = Recipe(sources={"a": str(folder)}, coefficients=Model(), init=Constant(1.0))
    merged = MergedModel(recipe, memory=memory)
    with torch.no_grad():
        torch.testing.assert_close(
            output_of(merged, inputs), output_of(model, inputs), rtol=0, atol=0
        )


def test_tied_weights_are_known_and_kept_tied(saved):
    embedding, bert = "model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight"
    stacks = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    for name, file_name, others in (
        ("llama-tied", embedding, {"lm_head.weight"}),
        ("gpt2", "transformer.wte.weight", {"lm_head.weight"}),
        ("t5", "shared.weight", {*stacks, "lm_head.weight"}),
        ("bert-masked", bert, {"cls.predictions.decoder.weight"}),
        ("bert-masked", "cls.predictions.bias", {"cls.predictions.decoder.bias"}),
    ):
        skeleton = build_skeleton(saved[name][1])
        names = list(HuggingFace(str(saved[name][1])).open().infos)
        assert set(bind(skeleton, names).parameters[file_name]) == {file_name, *others}


def test_file_that_holds_a_tied_tensor_twice(saved):
    """In any order of names, it is merged under the name that transformers saves."""
    _, folder, _ = saved["llama-tied"]
    names = [*HuggingFace(str(folder)).open().infos]
    for given in (["lm_head.weight", *names], [*names, "lm_head.weight"]):
        binding = bind(build_skeleton(folder), given)
        assert dict(binding.ties) == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in binding.parameters
        assert set(binding.parameters) == set(names)
    only_alias = [n for n in names if "embed" not in n] + ["lm_head.weight"]
    binding = bind(build_skeleton(folder), only_alias)
    assert binding.missing == ()
    assert "lm_head.weight" in binding.parameters


@pytest.mark.parametrize("base_has_prefix", [True, False])
def test_prefix_of_the_base_model(saved, base_has_prefix):
    model, _, _ = saved["bert"]
    head = model.classifier.state_dict(prefix="classifier.")
    if base_has_prefix:
        module, names = model.bert, list(model.state_dict())
    else:
        module, names = model, list(model.bert.state_dict())
    binding = bind(module, names)
    if base_has_prefix:
        assert binding.missing == ()
        assert sorted(binding.unused) == sorted(head)
        assert binding.parameters["bert.pooler.dense.weight"] == ("pooler.dense.weight",)
    else:
        assert sorted(binding.missing) == sorted(head)
        assert binding.parameters["pooler.dense.weight"] == ("bert.pooler.dense.weight",)


def test_binding_is_by_name_not_by_position(saved):
    _, folder, _ = saved["llama"]
    names = list(HuggingFace(str(folder)).open().infos)
    forward, backward = (bind(build_skeleton(folder), n) for n in (names, names[::-1]))
    assert dict(forward.parameters) == dict(backward.parameters)
    assert all(places == (name,) for name, places in forward.parameters.items())


def test_experts_that_are_stored_apart_are_parts_of_one_parameter(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=32, num_local_experts=2, num_key_value_heads=1, **SMALL
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = HuggingFace(str(tmp_path)).open()
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    binding = bind(build_skeleton(tmp_path), list(shapes), shapes)
    assert not any((binding.missing, binding.unused, binding.failed, binding.split))
    fused = binding.fused["model.layers.0.mlp.experts.gate_up_proj"].parts
    experts = "model.layers.0.block_sparse_moe.experts"
    assert set(fused) == {f"{experts}.{e}.{w}.weight" for e in (0, 1) for w in ("w1", "w3")}
    assert {name: window.shape for name, window in fused.items()} == {n: shapes[n] for n in fused}


def test_parameter_without_a_tensor_is_refused(saved):
    model, _, _ = saved["bert"]
    sources = {"a": {n: t for n, t in model.state_dict().items() if n != "classifier.weight"}}
    with pytest.raises(
        SourceError, match=r"(?s)1 parameters of BertFor.*classifier\.weight.*random"
    ):
        open_plan(Recipe(sources=sources), model)


# ---- building -----------------------------------------------------------------------------------


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def test_skeleton_takes_no_memory_and_keeps_computed_buffers(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=1 << 16,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    build_skeleton(tmp_path)  # imports
    before = private_bytes()
    skeleton = build_skeleton(tmp_path)
    size = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    assert size > 1 << 30
    assert private_bytes() - before < 64 << 20
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in skeleton.parameters())
    assert not skeleton.training


@pytest.mark.parametrize("name", MODELS)
def test_buffers_that_no_file_holds_equal_those_of_a_built_model(saved, name):
    model, folder, _ = saved[name]
    skeleton = build_skeleton(folder)
    kept = set(model.state_dict())
    computed = {n: b for n, b in model.named_buffers() if n not in kept}
    assert {n for n, _ in skeleton.named_buffers()} == {n for n, _ in model.named_buffers()}
    for buffer_name, buffer in computed.items():
        assert torch.equal(skeleton.get_buffer(buffer_name), buffer)
    assert computed or name not in ("llama", "llama-tied", "bert", "clip")


def test_building_leaves_torch_as_it_was(saved):
    original = nn.Module.register_parameter
    build_skeleton(saved["bert"][1])
    assert nn.Module.register_parameter is original
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def edit_config(folder, target, **changes):
    target.mkdir()
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_unknown_architectures(saved, tmp_path):
    folder = saved["bert"][1]
    with pytest.raises(
        SourceError,
        match=r"BertForSequenceClasification is not in.*mean 'BertForSequenceClassification'",
    ):
        build_skeleton(
            edit_config(folder, tmp_path / "a", architectures=["BertForSequenceClasification"])
        )
    with pytest.raises(SourceError, match="expected `architectures` to name the model class"):
        build_skeleton(edit_config(folder, tmp_path / "b", architectures=None))
    with pytest.raises(SourceError, match=r"(?s)cannot read its config.*trust_remote_code: true"):
        build_skeleton(edit_config(folder, tmp_path / "c", model_type="novel"))


def test_code_of_a_model_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own_code.py").write_text(
        f"""
from pathlib import Path
import torch
from transformers import PretrainedConfig, PreTrainedModel

Path({str(ran)!r}).touch()

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 2)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""
    )
    config = {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    assert Recipe(sources={"a": "x"}).trust_remote_code is False
    with pytest.raises(SourceError, match="trust_remote_code"):
        build_skeleton(tmp_path / "model")
    assert not ran.exists()
    skeleton = build_skeleton(tmp_path / "model", trust_remote_code=True)
    assert ran.exists()
    assert {n: tuple(p.shape) for n, p in skeleton.named_parameters()} == {
        "layer.weight": (2, 3),
        "layer.bias": (2,),
    }


# ---- the user's own module ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "t5", "convolutions"])
def test_strip_weights_leaves_the_module_alone_and_keeps_ties(family, name):
    module = family(name)[0][0].train()
    before = copy.deepcopy(module.state_dict())
    identities = {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)}
    skeleton = strip_weights(module)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert module.training
    assert not skeleton.training
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert identities == {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)}
    assert all(p.requires_grad for p in module.parameters())

    def ties(network):
        groups = {}
        for n, p in network.named_parameters(remove_duplicate=False):
            groups.setdefault(id(p), set()).add(n)
        return sorted(map(sorted, groups.values()))

    assert ties(skeleton) == ties(module)
    for (key, ours), (_, theirs) in zip(
        skeleton.named_buffers(), module.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), key
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda layer: torch.nn.utils.weight_norm(layer), "weight_norm"),
        (lambda layer: torch.nn.utils.spectral_norm(layer), "spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune"),
    ],
)
def test_weights_that_are_computed_before_a_call_are_refused_by_name(compute, name):
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2)]
    for model in models:
        compute(model[1])
        model(torch.ones(3, 4))
    match = rf"expected a parameter, but 1\.weight is computed .*old torch\.nn\.utils\.{name}\)"
    with pytest.raises(ConfigError, match=match):
        MergedModel(Recipe(dict(zip("ab", models, strict=True))))


class Keeps(nn.Module):
    """Keeps what it computed, as `kept` has it."""

    def __init__(self, kept):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.kept, self.last, self.weight_mask = kept, None, None

    def forward(self, x):
        y = self.inner(x)
        self.last = self.kept(y)
        return y


@pytest.mark.parametrize("kept", [lambda y: y, lambda y: {"all": [y]}], ids=["tensor", "nested"])
def test_an_activation_that_a_network_kept_is_to_be_dropped(kept):
    """The message does not name unused utilities of torch; without the tensor, it merges."""
    models = [Keeps(kept) for _ in range(2)]
    for model in models:
        model(torch.ones(3, 4))
    with pytest.raises(
        ConfigError, match=r"Keeps: expected a parameter, but last is computed.*set it to None"
    ) as error:
        MergedModel(Recipe(dict(zip("ab", models, strict=True))))
    assert "torch.nn.utils" not in str(error.value)
    for model in models:
        model.last = None
    merged = MergedModel(Recipe(dict(zip("ab", models, strict=True))))
    assert merged(torch.ones(3, 4)).shape == (3, 2)


def test_merging_does_not_change_the_users_modules(family):
    models, inputs = family("convolutions", dtype=torch.float32)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    merged = MergedModel(
        Recipe(sources={"a": models[1], "b": models[2]}, base=models[0], coefficients=Tensor())
    )
    merged(**inputs).sum().backward()
    for model, state in zip(models, before, strict=True):
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert not any("_gradmerge" in key for m in model.modules() for key in m.__dict__)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize(
    ("module", "name", "axis"),
    [
        (nn.Linear(2, 3), "weight", 1),
        (nn.Conv2d(2, 3, 1), "weight", 1),
        (nn.ConvTranspose2d(2, 3, 1), "weight", 0),
        (transformers.pytorch_utils.Conv1D(3, 2), "weight", 0),
        (nn.Embedding(5, 4), "weight", 1),
        (nn.LSTM(2, 3), "weight_ih_l0", 1),
    ],
)
def test_input_axis_is_the_one_the_layer_contracts(module, name, axis):
    sizes = {"Embedding": 4}
    assert input_axis(module, name) == axis
    assert getattr(module, name).shape[axis] == sizes.get(type(module).__name__, 2)


def test_binding_reports_missing_by_the_nearest_name(saved):
    model, folder, _ = saved["llama"]
    state = {n.replace("up_proj", "up_project"): t for n, t in model.state_dict().items()}
    with pytest.raises(SourceError, match=r"up_proj\.weight.*Did you mean .*up_project\.weight"):
        Network.bound(build_skeleton(folder), list(state), "in memory")
