"""Scores of single examples: they add up to those of the split, and are those of each alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Model, Uniform
from gradmerge.engine import parts
from gradmerge.training.measures import build_metrics
from gradmerge.training.per_example import ExampleScores, MacroF1, from_arrays, to_arrays
from gradmerge.training.search import Scorer
from networks import seeded
from tiny import SPLITS, module_of, relatives, save_family, sentences, vectors


def once(examples):
    """The score with every example once."""
    return float(examples.resampled(np.ones((1, examples.count), dtype=int))[0])


def with_examples(module, data):
    module.keep_examples()
    return Scorer(module, data).test(), module.examples


def test_classes_add_up_to_the_scores_of_the_split():
    module = module_of(score_experts=False)
    scores, examples = with_examples(module, vectors(count=13))
    for task in ("a", "b"):
        assert set(examples[task]) == {"accuracy", "macro_f1"}
        assert examples[task]["accuracy"].count == 13
        for name in examples[task]:
            # torchmetrics computes in float32
            assert once(examples[task][name]) == pytest.approx(scores[task][name], abs=1e-6)


def test_a_resample_is_scored_like_its_examples_in_a_row():
    generator = np.random.default_rng(0)
    label, found = generator.integers(4, size=30), generator.integers(4, size=30)
    kept = MacroF1(np.arange(30), found, label)
    drawn = generator.multinomial(30, np.full(30, 1 / 30), size=5)
    drawn[0] = (label == 1) | (label == 2)  # no other class occurs, but some are predicted
    for counts, score in zip(drawn, kept.resampled(drawn), strict=True):
        rows = np.repeat(np.arange(30), counts)
        seen = np.union1d(label[rows], found[rows])
        oracle = f1_score(label[rows], found[rows], labels=seen, average="macro", zero_division=0)
        assert score == pytest.approx(oracle, abs=1e-12)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A causal language model with two sources, and texts of several lengths."""
    root = tmp_path_factory.mktemp("texts")
    model = seeded(transformers.GPT2LMHeadModel, vocab_size=32, n_layer=1, n_positions=32)
    paths = save_family(root, relatives(model, scale=0.2))
    rows = {
        stage: [{"text": text[: 12 + 7 * (i % 3)]} for i, text in enumerate(sentences(at, 7))]
        for at, stage in enumerate(SPLITS)
    }
    return paths, rows


@pytest.mark.parametrize("part", [1 << 30, 4 * 32 * 4 * 2], ids=["whole", "in parts"])
def test_bits_per_byte_of_texts_are_those_of_each_text_alone(texts, monkeypatch, part):
    monkeypatch.setattr(parts, "PART", part)
    paths, rows = texts
    recipe = Recipe(
        {k: paths[k] for k in "ab"}, paths["base"], coefficients=Model(), init=Uniform()
    )
    module = MergeModule(recipe, score_experts=False)

    def scored(own):
        data = MergeDataModule({"t": TaskData(own, packing=False)}, 4, 4, check_disjoint=False)
        found, examples = with_examples(module, data)
        return found["t"]["bits_per_byte"], examples["t"]["bits_per_byte"]

    whole, kept = scored(rows)
    assert kept.count == 7
    assert once(kept) == pytest.approx(whole, rel=1e-6)
    for at in (0, 2, 5):
        _, alone = scored({**rows, "test": [rows["test"][at]]})
        # bits alone: bytes per token are a mean over the texts of a split
        assert kept.top[at] == pytest.approx(alone.top[0], rel=1e-5)


def test_spans_pairs_and_similarities_add_up():
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 9), torch.randint(9, (12,))
    cases = {
        "spans": (logits, labels, torch.arange(6).repeat_interleave(2)),
        "pairs": (torch.randn(6, 6), torch.arange(6), torch.arange(6)),
        "masked": (logits, labels, torch.tensor([0, 0, 1, 1, 1, 1, 2, 3, 3, 4, 5, 5])),
        "similarity": (torch.randn(8, 1), torch.randn(8), torch.arange(8)),
    }
    for measure, (rows, wanted, owners) in cases.items():
        metrics, kept = build_metrics(measure, 9), ExampleScores()
        half = len(rows) // 2
        for part in (slice(0, half), slice(half, None)):
            metrics.update(rows[part], wanted[part])
            own = owners[part] - owners[part][0]
            kept.add("t", rows[part], wanted[part], own, measure, 1.0)
            kept.close_batch("t", int(own.max()) + 1)
        expected = metrics.compute()
        for name, examples in kept.compute()["t"].items():
            assert examples.count == int(owners.max()) + 1
            assert once(examples) == pytest.approx(float(expected[name]), abs=1e-6), measure
    found, label = (cases["similarity"][at].flatten().numpy() for at in (0, 1))
    drawn = np.array([[2, 0, 1, 1, 3, 0, 0, 1]])
    rows = np.repeat(np.arange(8), drawn[0])
    oracle = spearmanr(found[rows], label[rows]).statistic
    score = kept.compute()["t"]["spearman"].resampled(drawn)[0]
    assert score == pytest.approx(oracle, abs=1e-9)


def test_scores_of_examples_survive_a_file():
    module = module_of(score_experts=False)
    _, examples = with_examples(module, vectors())
    buffer = io.BytesIO()
    np.savez(buffer, **to_arrays(examples))
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as arrays:
        again = from_arrays({name: arrays[name] for name in arrays.files})
    counts = np.random.default_rng(0).integers(3, size=(4, 12))
    for task, kept in examples.items():
        for name, score in kept.items():
            assert np.array_equal(again[task][name].resampled(counts), score.resampled(counts))
