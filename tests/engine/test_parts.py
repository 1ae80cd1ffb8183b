"""Logits in parts against all at once, for families that do more than a product with the head."""

from __future__ import annotations

import pytest
import torch
import transformers

from gradmerge import MergeModule, Recipe
from gradmerge.coefficients import Constant
from gradmerge.engine import parts
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import rows_of
from gradmerge.objectives import CrossEntropy, Entropy, KLToSource, Objective
from gradmerge.training.scores import SplitScores
from tiny import trainer_of

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 0.5},
    "Cohere": {"logit_scale": 3.0},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # a head with a bias
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def merged_of(name, memory="resident", **options):
    kind = getattr(transformers, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        models.append(model)
    recipe = Recipe({"a": models[1], "b": models[2]}, base=models[0], init=Constant([0.4, 0.3]))
    return MergedModel(recipe, memory=memory).eval()


def batch_of(seed=0, tokens=11):
    torch.manual_seed(seed)
    ids = torch.randint(1, 61, (3, tokens))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART", 4 * 61 * 3 * 2)  # two positions of three texts


def joined(found):
    """Logits and labels of all parts, sorted by label and logits as rows have no order."""
    logits, labels, _ = (torch.cat(part) for part in zip(*found, strict=True))
    return logits, labels


def in_order(batch, logits, labels):
    """Rows of the parts in the order of the batch: parts are by position, rows by text."""
    kept = batch["labels"][:, 1:] != -100
    positions = kept.any(dim=0).nonzero().flatten()
    places = []
    for part in positions.tensor_split(min(8, -(-len(positions) // 2))):
        texts, columns = kept[:, part].nonzero(as_tuple=True)
        places += list(zip(texts.tolist(), part[columns].tolist(), strict=True))
    order = sorted(range(len(places)), key=places.__getitem__)
    return logits[order], labels[order]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_the_rows_of_all_logits(name, memory):
    merged, batch = merged_of(name, memory, **FAMILIES[name]), batch_of()
    runs, widest = [], []
    merged.skeleton.get_input_embeddings().register_forward_hook(lambda *_: runs.append(1))
    merged.skeleton.get_output_embeddings().register_forward_hook(
        lambda *given: widest.append(given[-1].numel())
    )
    with torch.no_grad():
        expected, labels, _ = rows_of(merged, "a", batch)
        runs.clear()
        widest.clear()
        found = list(parts.in_parts(merged, "a", batch))
    assert len(found) == 4
    assert len(runs) == 1  # the body
    assert max(widest) <= 61 * 3 * 2  # never more than one part
    got, own = in_order(batch, *joined(found))
    assert torch.equal(own, labels)
    texts, _ = in_order(batch, torch.cat([part[2] for part in found]), own)
    kept = batch["labels"][:, 1:] != -100
    assert torch.equal(texts, kept.nonzero()[:, 0])
    # float32: products of other sizes add up in another order
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # the network is as before
    with torch.no_grad():
        again, _, _ = rows_of(merged, "a", batch)
    assert torch.equal(again, expected)


def test_the_sources_own_predictions_are_found_in_parts_too():
    merged, batch = merged_of("Gemma2", final_logit_softcapping=0.5), batch_of()
    with merged.as_source("b", own=True):
        expected, _, _ = rows_of(merged, "b", batch)
        got, _ = in_order(batch, *joined(list(parts.in_parts(merged, "b", batch))))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [CrossEntropy(label_smoothing=0.1), Entropy()])
def test_scores_and_losses_are_those_of_all_logits(objective, monkeypatch, tmp_path):
    merged, objective = merged_of("Llama"), Objective([objective])
    found = []
    for size in (parts.PART, 1 << 40):
        monkeypatch.setattr(parts, "PART", size)
        module, scores = MergeModule.around(merged), SplitScores()
        module.objective, module._scores = objective, scores
        module.trainer = trainer_of(tmp_path)
        scores.begin(merged.skeleton, torch.device("cpu"))
        with torch.no_grad():
            for seed in range(2):
                module.validation_step(batch_of(seed), seed)
        found.append((scores.finish("selection", objective.share, True)[0], scores.experts))
    (first, own), (second, theirs) = found
    assert first["a"].keys() == second["a"].keys()
    for name in first["a"]:
        assert first["a"][name] == pytest.approx(second["a"][name], rel=1e-5)
    assert own["selection"]["a"] == pytest.approx(theirs["selection"]["a"], rel=1e-5)


def test_what_cannot_be_cut_takes_all_logits(monkeypatch):
    merged, batch = merged_of("Llama"), batch_of()
    assert parts.in_parts(merged, "a", batch) is None  # with gradients
    with torch.no_grad():
        assert parts.in_parts(merged, "a", batch) is not None
        monkeypatch.setattr(parts, "PART", 1 << 30)
        assert parts.in_parts(merged, "a", batch) is None  # small
    assert not Objective([Entropy(marginal=1.0)]).adds_over_rows
    assert not Objective([CrossEntropy(), KLToSource()]).adds_over_rows
    assert Objective([CrossEntropy(), Entropy()]).adds_over_rows


def test_a_network_that_ignores_the_request_takes_all_logits(monkeypatch):
    merged, batch = merged_of("Llama"), batch_of()
    forward = merged.skeleton.forward

    def whole(*args, logits_to_keep=0, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(merged.skeleton, "forward", whole)
    with torch.no_grad():
        assert parts.in_parts(merged, "a", batch) is None
