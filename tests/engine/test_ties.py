"""Tied tensors against the average of what transformers loads from each folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from architectures import logits_of
from gradmerge import MergedModel, Recipe, export_merged, merge
from gradmerge.cli import main
from gradmerge.coefficients import Constant
from gradmerge.common.errors import CompatibilityError, SourceError
from gradmerge.preprocess import RandomDrop
from gradmerge.sources import as_source
from gradmerge.sources.ties import may_be_tied

SIZES = {"vocab_size": 32, "pad_token_id": 0}
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PAIRS = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}


def llama(**options):
    config = transformers.LlamaConfig(
        **SIZES, **LAYERS, num_hidden_layers=1, **{"tie_word_embeddings": True, **options}
    )
    return transformers.LlamaForCausalLM(config)


def bert(**options):
    config = transformers.BertConfig(**SIZES, **LAYERS, num_hidden_layers=1, **options)
    return transformers.BertForMaskedLM(config)


def t5(**options):
    config = transformers.T5Config(
        **SIZES, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **options
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(**options):
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    config = transformers.BartConfig(
        **SIZES, **PAIRS, **heads, max_position_embeddings=32, **options
    )
    return transformers.BartForConditionalGeneration(config)


MAKE = {"llama": llama, "bert": bert, "t5": t5, "bart": bart}
# the embedding, its tied names, and the head among them
TIED = {
    "llama": ("model.embed_tokens.weight", ["lm_head.weight"]),
    "bert": (
        "bert.embeddings.word_embeddings.weight",
        ["cls.predictions.decoder.weight"],
    ),
    "t5": (
        "shared.weight",
        ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
    ),
    "bart": (
        "model.shared.weight",
        [
            "lm_head.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
        ],
    ),
}
NAMES = ("base", "a", "b")


def write(folder, name, stored, options=None):
    """Save three relatives; `stored` changes the tensors of each, given its embedding."""
    torch.manual_seed(0)
    model = MAKE[name](**(options or {}))
    for number, own in enumerate(NAMES):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder / own)
        state = load_file(folder / own / "model.safetensors")
        embedding = TIED[name][0]
        state.update(stored(number, state[embedding]))
        save_file(
            {n: t.contiguous() for n, t in state.items() if t is not None},
            folder / own / "model.safetensors",
            {"format": "pt"},
        )
    return {own: str(folder / own) for own in NAMES}


def noise(seed, like):
    return 0.3 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def load(folder):
    kind = json.loads(Path(folder, "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return model.eval()


def average(paths, coefficients):
    """Average what transformers loads, every name a tensor of its own."""
    models = [load(paths[name]) for name in NAMES]
    states = [dict(m.named_parameters(remove_duplicate=False)) for m in models]
    whole = copy.deepcopy(models[1])
    with torch.no_grad():
        for name, start in states[0].items():
            value = start.clone()
            for c, state in zip(coefficients, states[1:], strict=True):
                value += c * (state[name] - start)
            owner, _, own = name.rpartition(".")
            setattr(whole.get_submodule(owner), own, torch.nn.Parameter(value))
    return whole


def inputs_of(name):
    ids = torch.tensor([[5, 6, 7, 8]])
    return (
        {"input_ids": ids}
        if name in ("llama", "bert")
        else {"input_ids": ids, "decoder_input_ids": ids}
    )


@torch.no_grad()
def logits(model, name):
    return logits_of(model(**inputs_of(name)))


def all_of(name, values):
    """Store every tied name as given for a checkpoint's number and embedding."""
    return lambda number, embedding: {other: values(number, embedding) for other in TIED[name][1]}


def head(name, values):
    return lambda number, embedding: {TIED[name][1][0]: values(number, embedding)}


def own(number, embedding):
    return embedding + noise(number, embedding)


def own_in(*numbers):
    return lambda number, embedding: own(number, embedding) if number in numbers else None


def copy_in(*numbers):
    return lambda number, embedding: embedding.clone() if number in numbers else None


# case -> tensors that are stored, and how many of the tied names are tensors of the merge
CASES = {
    "none stored": (head, copy_in(), 0),
    "copies in all": (all_of, copy_in(0, 1, 2), 0),
    "a copy in the base": (head, copy_in(0), 0),
    "copies in the sources": (all_of, copy_in(1, 2), 0),
    "a copy in one source": (head, copy_in(2), 0),
    "own in all": (head, own_in(0, 1, 2), 1),
    "own in one source": (head, own_in(2), 1),
    "own in the base": (head, own_in(0), 1),
    "all own in one source": (all_of, own_in(1), 9),
}


USUAL = ("copies in the sources", "own in one source", "all own in one source")


@pytest.mark.filterwarnings("ignore:.*ties.*:UserWarning")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(n, c, marks=[] if n == "llama" or c in USUAL else pytest.mark.nightly)
        for n in MAKE
        for c in CASES
    ],
)
def test_merges_are_the_average_of_what_transformers_loads(tmp_path, name, case):
    where, values, count = CASES[case]
    paths = write(tmp_path, name, where(name, values))
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], init=Constant(0.4))
    expected = logits(average(paths, [0.4, 0.4]), name)
    merged = MergedModel(recipe)
    torch.testing.assert_close(logits(merged, name), expected, rtol=1e-5, atol=1e-5)
    static = merge(recipe, tmp_path / "static")
    learned = export_merged(merged, tmp_path / "learned")
    for folder in (static, learned):
        torch.testing.assert_close(logits(load(folder), name), expected, rtol=1e-5, atol=1e-5)
    stored = [load_file(folder / "model.safetensors") for folder in (static, learned)]
    assert stored[0].keys() == stored[1].keys()
    assert sum(n in stored[0] for n in TIED[name][1]) == min(count, len(TIED[name][1]))
    assert all(torch.equal(tensor, stored[1][n]) for n, tensor in stored[0].items())
    for source in "ab":  # teachers
        with merged.as_source(source):
            found = logits(merged, name)
        torch.testing.assert_close(found, logits(load(paths[source]), name), rtol=1e-5, atol=1e-5)
    kept = [p for p in merged.plan.warnings if p.kind == "ties"]
    assert len(kept) == min(count, len(TIED[name][1]))


def settings(folder, **fields):
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.filterwarnings("ignore:.*ties.*:UserWarning")
@pytest.mark.parametrize("loose", [["a"], ["base"], ["base", "a", "b"]], ids=str)
def test_a_config_that_ties_nothing_keeps_a_head_apart(tmp_path, loose):
    """Even one that is equal to the embedding; the others tie theirs, and store none."""
    numbers = [NAMES.index(name) for name in loose]
    paths = write(tmp_path, "llama", head("llama", copy_in(*numbers)))
    for name in loose:
        settings(paths[name], tie_word_embeddings=False)
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], init=Constant(0.4))
    expected = logits(average(paths, [0.4, 0.4]), "llama")
    merged = MergedModel(recipe)
    torch.testing.assert_close(logits(merged, "llama"), expected, rtol=1e-5, atol=1e-5)
    folder = merge(recipe, tmp_path / "static")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    torch.testing.assert_close(logits(load(folder), "llama"), expected, rtol=1e-5, atol=1e-5)


def test_an_untied_head_that_is_stored_nowhere_is_missed(tmp_path):
    paths = write(tmp_path, "llama", head("llama", copy_in()))
    settings(paths["a"], tie_word_embeddings=False)
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"])
    with pytest.raises(CompatibilityError, match=r"a: lm_head\.weight"):
        merge(recipe, tmp_path / "static")
    for name in NAMES:
        settings(paths[name], tie_word_embeddings=False)
    with pytest.raises(CompatibilityError, match=r"have no tensor: lm_head\.weight"):
        MergedModel(recipe)


@pytest.mark.filterwarnings("ignore:.*ties.*:UserWarning")
def test_the_setting_of_t5_that_scales_its_outputs_is_kept(tmp_path):
    """T5 v1.1: its class ties all the same, and only the values keep the head apart."""
    paths = write(tmp_path, "t5", head("t5", own_in(0, 1, 2)), {"tie_word_embeddings": False})
    for name in NAMES:  # as older versions wrote it
        settings(paths[name], tie_word_embeddings=False)
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], init=Constant(0.4))
    expected = logits(average(paths, [0.4, 0.4]), "t5")
    torch.testing.assert_close(logits(MergedModel(recipe), "t5"), expected, rtol=1e-5, atol=1e-5)
    folder = merge(recipe, tmp_path / "static")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load(folder), "t5"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*ties.*:UserWarning")
@pytest.mark.parametrize("numbers", [(), (0,), (0, 1, 2)], ids=str)
def test_a_private_head_is_that_of_its_task(tmp_path, numbers):
    """Of a tied model it is the task's own embedding, wherever copies are stored."""
    paths = write(tmp_path, "llama", head("llama", copy_in(*numbers)))
    recipe = Recipe(
        {"a": paths["a"], "b": paths["b"]},
        paths["base"],
        init=Constant(0.4),
        private=["^lm_head"],
    )
    folder = merge(recipe, tmp_path / "static")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    embeddings = [load(paths[name]).model.embed_tokens.weight for name in NAMES]
    middle = embeddings[0] + 0.4 * (embeddings[1] + embeddings[2] - 2 * embeddings[0])
    merged = MergedModel(recipe)
    for task, own_embedding in zip("ab", embeddings[1:], strict=True):
        found = load(folder / "tasks" / task)
        assert torch.equal(found.lm_head.weight, own_embedding)
        torch.testing.assert_close(found.model.embed_tokens.weight, middle, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            expected = merged(**inputs_of("llama"), task=task).logits
        torch.testing.assert_close(logits(found, "llama"), expected, rtol=1e-5, atol=1e-5)


def test_copies_get_the_random_choices_of_their_original(tmp_path):
    """Merged one by one they would become different."""
    paths = write(tmp_path, "llama", head("llama", copy_in(0, 1, 2)))
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], preprocess=[RandomDrop(0.5)])
    stored = load_file(merge(recipe, tmp_path / "static") / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert load(tmp_path / "static").lm_head.weight.equal(stored["model.embed_tokens.weight"])


def test_a_module_that_is_not_of_transformers_cannot_be_untied(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    own = {"embed.weight": torch.randn(6, 4), "head.weight": torch.randn(6, 4)}
    alike = {name: own["embed.weight"].clone() for name in own}
    merged = MergedModel(Recipe({"a": alike, "b": Tied()}), module=Tied())
    assert list(merged.plan.tensors) == ["embed.weight"]
    with pytest.raises(
        SourceError, match=r"expected one tensor for embed\.weight and head\.weight"
    ):
        MergedModel(Recipe({"a": own, "b": Tied()}), module=Tied())


def test_headers_tell_when_ties_cannot_matter(tmp_path):
    """Then a merge without a network does not wait for the import of transformers."""
    paths = write(tmp_path / "tied", "llama", head("llama", copy_in()))
    opened = {name: as_source(path).open() for name, path in paths.items()}
    assert not may_be_tied(opened, [])
    assert may_be_tied(opened, ["^lm_head"])
    untied = write(
        tmp_path / "untied", "llama", head("llama", own_in(0, 1, 2)), {"tie_word_embeddings": False}
    )
    assert not may_be_tied({n: as_source(path).open() for n, path in untied.items()}, [])
    for name in NAMES:  # the default of the class
        settings(untied[name], tie_word_embeddings=True)
    assert may_be_tied({n: as_source(path).open() for n, path in untied.items()}, [])
    other = write(tmp_path / "other", "llama", head("llama", copy_in(2)))
    assert may_be_tied({n: as_source(path).open() for n, path in other.items()}, [])


@pytest.mark.parametrize("outputs", ["mergekit", "compact"])
def test_forms_that_name_stored_tensors_are_refused_where_one_is_not_stored(
    tmp_path, outputs, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    paths = write(tmp_path, "llama", head("llama", own_in(1)))
    recipe = {"sources": {"a": paths["a"], "b": paths["b"]}, "base": paths["base"]}
    if outputs == "mergekit":
        config, options = {"recipe": recipe}, ["--mergekit", "true", "--output", "out.yaml"]
    else:
        steps = [{"class_path": "Unify"}]
        config = {"recipe": {**recipe, "preprocess": steps}}
        options = ["--outputs", "compact", "--output", "out"]
    (tmp_path / "merge.yaml").write_text(json.dumps(config))
    assert main(["merge", "--config", str(tmp_path / "merge.yaml"), *options]) == 2
    assert "stored as the tensor that it is tied to" in capsys.readouterr().err
