"""`Lora` against PEFT: what `merge_and_unload` gives is what is read."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from architectures import ARCHITECTURES
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Constant, Tensor
from gradmerge.common.errors import CompatibilityError, SourceError
from gradmerge.engine.opening import open_plan
from gradmerge.sources import HuggingFace, InMemory, Lora, as_source
from gradmerge.sources.lora import LoraCheckpoint

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.table = nn.Embedding(7, 5)
        self.square = nn.Linear(5, 5)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Make every trainable tensor (A, B, biases, saved modules) random, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def make(tmp_path, architecture, seed=1, **options):
    """Save a base and an adapter; return them with PEFT's own merge of the two."""
    torch.manual_seed(0)
    base = architecture().eval()
    folder = tmp_path / "base"
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(folder)
        source = HuggingFace(str(folder))
    else:
        source = InMemory(copy.deepcopy(base))
    model = randomised(peft.get_peft_model(base, peft.LoraConfig(**options)), seed)
    adapter = tmp_path / f"adapter{seed}"
    model.save_pretrained(adapter)
    return Lora(str(adapter), source), model.merge_and_unload()


def assert_reads(checkpoint, merged, rename=lambda name: name):
    """Products and sums in float32, whose order may differ from PEFT's: few roundings near 1."""
    expected = {rename(name): tensor for name, tensor in merged.state_dict().items()}
    assert set(checkpoint.infos) <= set(expected)
    for name in checkpoint.infos:
        got = checkpoint.read(name)
        assert got.shape == checkpoint.infos[name].shape
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def changed(checkpoint) -> set[str]:
    base = checkpoint._base
    return {
        name
        for name in checkpoint.infos
        if name not in base.infos or not torch.equal(checkpoint.read(name), base.read(name))
    }


llama, gpt2 = ARCHITECTURES["llama"][0], ARCHITECTURES["gpt2"][0]

CASES = {
    "linear": (llama, {"r": 3, "target_modules": ["q_proj", "down_proj", "lm_head"]}, 5),
    "rslora": (llama, {"r": 4, "use_rslora": True, "target_modules": ["q_proj"]}, 2),
    "patterns": (
        llama,
        {
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 4, "up_proj": 3},
            "alpha_pattern": {"v_proj": 16, "^model.layers.1.mlp.up_proj": 1},
        },
        6,
    ),
    "embedding": (llama, {"r": 2, "target_modules": ["embed_tokens", "k_proj"]}, 3),
    "saved modules": (
        llama,
        {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        4,
    ),
    "conv1d": (gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj", "wte"]}, None),
    "conv1d with biases": (
        gpt2,
        {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all"},
        None,
    ),
    "convolution": (
        Convolution,
        {"r": 2, "target_modules": ["conv", "point", "table", "square"], "bias": "lora_only"},
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_merges(tmp_path, case):
    architecture, options, num_changed = CASES[case]
    source, merged = make(
        tmp_path, architecture, lora_alpha=options.pop("lora_alpha", 5), **options
    )
    checkpoint = source.open()
    assert_reads(checkpoint, merged)
    assert changed(checkpoint)
    if num_changed is not None:
        assert len(changed(checkpoint)) == num_changed


def test_square_layers_beside_linear_ones(tmp_path):
    """PEFT saves one `fan_in_fan_out` for the adapter, here that of the head, not of Conv1D."""

    def architecture():
        config = transformers.GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            num_labels=16,
            pad_token_id=0,
        )
        return transformers.GPT2ForSequenceClassification(config)

    source, merged = make(tmp_path, architecture, r=2, target_modules=["attn.c_proj", "score"])
    settings = json.loads((tmp_path / "adapter1" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is False
    assert_reads(source.open(), merged)


def test_tied_embedding_stays_tied(tmp_path):
    """The base in safetensors has one tensor for both; the update applies to both, as in PEFT."""
    source, merged = make(
        tmp_path, ARCHITECTURES["llama-tied"][0], r=2, target_modules=["embed_tokens", "q_proj"]
    )
    checkpoint = source.open()
    assert "lm_head.weight" not in checkpoint.infos
    assert_reads(checkpoint, merged)
    assert "model.embed_tokens.weight" in changed(checkpoint)


def test_adapter_on_a_tied_head_is_refused(tmp_path):
    source, _ = make(tmp_path, ARCHITECTURES["llama-tied"][0], r=2, target_modules=["lm_head"])
    with pytest.raises(
        SourceError, match=r"lm_head.lora_A.*The base ties lm_head to its embeddings"
    ):
        source.open()


def test_names_that_transformers_changes_between_file_and_module(tmp_path):
    """In ViT's files it is `attention.attention.query`, in its module and the adapter `q_proj`."""
    source, merged = make(
        tmp_path,
        ARCHITECTURES["vit"][0],
        r=2,
        target_modules=["q_proj", "fc1"],
        modules_to_save=["classifier"],
    )
    checkpoint = source.open()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in changed(checkpoint)
    merged.save_pretrained(tmp_path / "merged")
    expected = HuggingFace(str(tmp_path / "merged")).open()
    assert set(checkpoint.infos) == set(expected.infos)
    for name in expected.infos:
        torch.testing.assert_close(checkpoint.read(name), expected.read(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_prefix", [True, False], ids=["base has prefix", "base has none"])
def test_prefix_of_the_head_model(tmp_path, with_prefix):
    """A BertModel's adapter on a classifier's base and the other way around."""
    classifier = ARCHITECTURES["bert"][0]().eval()
    (classifier if with_prefix else classifier.bert).save_pretrained(tmp_path / "base")
    inside = copy.deepcopy(classifier.bert if with_prefix else classifier)
    model = peft.get_peft_model(inside, peft.LoraConfig(r=2, target_modules=["query"]))
    randomised(model, 3).save_pretrained(tmp_path / "adapter")
    checkpoint = Lora(str(tmp_path / "adapter"), HuggingFace(str(tmp_path / "base"))).open()
    merged = model.merge_and_unload()
    bert = merged if with_prefix else merged.bert
    for name in changed(checkpoint):
        expected = bert.state_dict()[name.removeprefix("bert.")]
        torch.testing.assert_close(checkpoint.read(name), expected, rtol=1e-5, atol=1e-6)
    assert len(changed(checkpoint)) == 2


def test_low_precision_base_keeps_the_update(tmp_path):
    """A small update is not rounded away: bfloat16 base, float32 sum; float64 stays float64."""
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    wide = HuggingFace(source.base.path).open()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        state = {n: wide.read(n).to(dtype) for n in wide.infos}
        checkpoint = Lora(source.path, InMemory(state)).open()
        got = checkpoint.read(name)
        assert got.dtype == expected
        assert checkpoint.infos[name].dtype == dtype
        update = got - state[name].to(expected)
        torch.testing.assert_close(
            update, checkpoint.delta(name).to(expected), rtol=1e-5, atol=1e-6
        )


def test_new_head_differs_in_shape_and_is_suggested_as_private(tmp_path):
    """The base has no classifier; the adapter has one (`modules_to_save`)."""
    state = ARCHITECTURES["bert"][0]().state_dict()
    base = InMemory({n: t for n, t in state.items() if "classifier" not in n})
    saved, model = tmp_path / "saved", ARCHITECTURES["bert"][0]()
    options = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    randomised(peft.get_peft_model(model, options), 2).save_pretrained(saved)
    checkpoint = Lora(str(saved), base).open()
    assert checkpoint.infos["classifier.weight"].shape == (2, 16)
    with pytest.raises(
        CompatibilityError, match=r"(?s)classifier.weight.*private: \['\^classifier"
    ):
        open_plan(Recipe(sources={"a": Lora(str(saved), base)}, base=base), with_skeleton=False)
    plan = open_plan(
        Recipe(sources={"a": Lora(str(saved), base)}, base=base, private=["^classifier"]),
        with_skeleton=False,
    )
    assert not any("classifier" in name for name in plan.tensors)


# ---- refusals -----------------------------------------------------------------------------------


def edited(source, tmp_path, **settings):
    path = tmp_path / "adapter1" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"target_parameters": ["experts"]}, "target_parameters is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"bias": "some"}, "bias is 'some'"),
    ],
)
def test_other_kinds_are_refused_with_advice(tmp_path, settings, message):
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    with pytest.raises(SourceError, match=rf"{message}.*merge_and_unload\(\)\.save_pretrained"):
        edited(source, tmp_path, **settings).open()


def test_a_real_dora_adapter_is_refused(tmp_path):
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(SourceError, match="use_dora is set: its update is not low-rank"):
        source.open()


def test_all_problems_are_named_together(tmp_path):
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    with pytest.raises(SourceError, match=r"peft_type is IA3.*use_dora is set.*lora_bias is set"):
        edited(source, tmp_path, peft_type="IA3", use_dora=True, lora_bias=True).open()


def test_adapter_of_another_base_is_refused(tmp_path):
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    state = HuggingFace(source.base.path).open()
    other = {n: state.read(n) for n in state.infos}
    other[name] = torch.zeros(20, 16)
    with pytest.raises(
        SourceError, match=rf"do not fit the base.*{name}: factors for 16 x 16, base \(20, 16\)"
    ):
        Lora(source.path, InMemory(other)).open()
    del other[name]
    with pytest.raises(SourceError, match=r"belong to no tensor of the base.*Did you mean"):
        Lora(source.path, InMemory(other)).open()
    with pytest.raises(SourceError, match=r"layers.1.*belong to no|belong to no.*layers"):
        Lora(source.path, InMemory(gpt2())).open()


def test_another_adapter_on_the_same_base_is_no_base(tmp_path):
    """It would fit: all shapes are those of the base. An adapter trained on the other one is."""
    options = {"r": 2, "target_modules": ["q_proj"]}
    first, _ = make(tmp_path, llama, seed=1, **options)
    second, _ = make(tmp_path, llama, seed=2, **options)
    edited(first, tmp_path, base_model_name_or_path="the/base")
    settings = tmp_path / "adapter2" / "adapter_config.json"
    given = json.loads(settings.read_text())
    settings.write_text(json.dumps({**given, "base_model_name_or_path": "the/base"}))
    wrong = r"expected the base .*names the/base\), got .*adapter1, another adapter"
    with pytest.raises(SourceError, match=wrong):
        Lora(second.path, first).open()
    settings.write_text(json.dumps({**given, "base_model_name_or_path": first.path}))
    assert Lora(second.path, first).open().infos


def test_half_a_pair_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    path = tmp_path / "adapter1" / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if "layers.1" not in n or "lora_B" not in n}
    save_file(kept, path)
    with pytest.raises(
        SourceError, match=r"layers.1.self_attn.q_proj.weight: only .*lora_A.weight"
    ):
        source.open()


def test_missing_files(tmp_path):
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    with pytest.raises(SourceError, match="expected a folder or file, but none exists"):
        Lora(str(tmp_path / "none"), source.base).open()
    (tmp_path / "adapter1" / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"expected adapter_model.safetensors.*is a pickle"):
        source.open()
    with pytest.raises(SourceError, match="This is a LoRA adapter: give it as `class_path: Lora`"):
        HuggingFace(source.path).open()


# ---- resolving ----------------------------------------------------------------------------------


def test_folder_is_recognised_and_names_its_base(tmp_path):
    source, merged = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    edited(source, tmp_path, base_model_name_or_path=source.base.path)
    found = as_source(source.path)
    assert isinstance(found, Lora)
    assert found.base == source.base
    assert_reads(found.open(), merged)
    assert as_source(source.path, InMemory({})).base == InMemory({})
    edited(source, tmp_path, base_model_name_or_path="owner/name", revision="v2")
    base = as_source(source.path).base
    assert isinstance(base, HuggingFace)
    assert (base.path, base.revision) == ("owner/name", "v2")
    with pytest.raises(
        SourceError, match=r"only what you name yourself is downloaded; .* names it"
    ):
        base.open()
    edited(source, tmp_path, base_model_name_or_path=None)
    with pytest.raises(SourceError, match="does not name the base that the adapter was trained on"):
        as_source(source.path)


def test_fingerprint_sees_base_factors_and_scale(tmp_path):
    source, _ = make(tmp_path, llama, r=2, target_modules=["q_proj"])
    prints = [source.open().fingerprint(), source.base.open().fingerprint()]
    assert source.open().fingerprint() == prints[0]
    base = source.base.open()
    other = {n: base.read(n).clone() for n in base.infos}
    other["lm_head.weight"][0, 0] += 1
    prints.append(Lora(source.path, InMemory(other)).open().fingerprint())
    prints.append(edited(source, tmp_path, lora_alpha=9).open().fingerprint())
    assert len(set(prints)) == 4


# ---- end to end ---------------------------------------------------------------------------------


def test_two_adapters_train_like_their_dense_models(tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    adapters, dense = {}, {}
    for seed, name in ((1, "a"), (2, "b")):
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        model = randomised(peft.get_peft_model(copy.deepcopy(base), options), seed)
        model.save_pretrained(tmp_path / f"adapter_{name}")
        model.merge_and_unload().save_pretrained(tmp_path / f"dense_{name}")
        adapters[name] = str(tmp_path / f"adapter_{name}")
        dense[name] = str(tmp_path / f"dense_{name}")
    inputs = ARCHITECTURES["llama"][1]()
    losses, grads = [], []
    for sources in (adapters, dense):
        recipe = Recipe(
            sources=sources,
            base=str(tmp_path / "base"),
            coefficients=Tensor(),
            init=Constant([0.4, 0.2]),
        )
        merged = MergedModel(recipe)
        loss = merged(**inputs).logits.logsumexp(-1).sum()
        loss.backward()
        losses.append(loss.detach())
        slots = merged.plan.layout.slots
        grads.append(
            {name: slot.read({"tensor": merged.raw["tensor"].grad}) for name, slot in slots.items()}
        )
        kinds = [isinstance(c, LoraCheckpoint) for c in merged.plan.sources.values()]
        assert all(kinds) == (sources is adapters)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    ours, theirs = (torch.stack([found[name] for name in grads[0]]) for found in grads)
    assert theirs.abs().max() > 0
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= 1e-4, error  # both sides round in float32
