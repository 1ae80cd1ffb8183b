"""The text suites: splits without overlap, also between tasks that share texts, and the probe."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

PROGRAM = "suites.text8"


@pytest.fixture(name="form")
def small(bench: ModuleType) -> Any:
    sizes = {"test": 40, "selection": 20, "adaptation": 80, "train": 60}
    return replace(bench.QUICK, texts=sizes)


def rows(count, classes):
    return ((f"text  number {i}\nof {count}", f"class {i % classes}") for i in range(count))


def test_a_text_is_in_the_same_split_of_every_task(bench, form):
    wide = bench.split(rows(400, 5), 3, "wide", form)
    # the same texts, of which another task has a part, in another order and spacing
    part = [(" ".join(text.split()), "one") for text, _ in rows(400, 5)][100:][::-1]
    narrow = bench.split(iter(part), 3, "narrow", form)
    for name, found in narrow.items():
        assert 0 < len(found) <= form.texts[name]
        for other, texts in wide.items():
            if other != name:
                assert not {t for t, _ in found} & {t for t, _ in texts}
    everything = [text for found in wide.values() for text, _ in found]
    assert len(set(everything)) == len(everything)
    assert bench.split(rows(400, 5), 4, "wide", form) != wide


def test_a_class_without_training_texts_is_left_out(bench, form):
    found = bench.split(rows(300, 299), 0, "rare", form)
    known = {answer for _, answer in found["train"]}
    assert all(answer in known for kept in found.values() for _, answer in kept)


def test_a_text_counts_once_whatever_follows_it(bench, form):
    long = " ".join(["word"] * (form.tokens + 5))
    twice = iter([(long + " a", "x"), (long + " b", "y"), *rows(100, 2)])
    found = bench.split(twice, 0, "long", form)
    assert sum(text.startswith("word") for kept in found.values() for text, _ in kept) <= 1


def test_the_probe_is_the_minimum_of_the_penalised_loss(bench):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    texts = bench.Texts.__new__(bench.Texts)
    texts.tokens = [torch.randint(1, 50, (5 + i % 4,)).tolist() for i in range(90)]
    texts.labels = torch.arange(90) % 3
    bench.fit_probe(model, texts, 90)
    inputs, labels = texts.batch(range(90))
    with torch.no_grad():
        pooled = model.bert(**inputs).pooler_output
    loss = torch.nn.functional.cross_entropy(model.classifier(pooled), labels)
    loss = loss + bench.PENALTY * model.classifier.weight.square().sum()
    loss.backward()
    # gradient zero at the minimum; a head of zeros has one of about 0.05
    assert model.classifier.weight.grad.abs().max() == pytest.approx(0, abs=1e-3)
