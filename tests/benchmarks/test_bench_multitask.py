"""Multi-task fine-tuning: one network under fixed heads, and the folders that are compared."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

PROGRAM = "multitask"


@pytest.fixture(name="places")
def folders(tmp_path):
    """A base, and two experts that differ from it in one layer and have other heads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    sizes |= {"num_hidden_layers": 2, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    base = BertModel(BertConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    experts = {}
    for task, classes in (("a", 2), ("b", 3)):
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=classes))
        model.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.bert.encoder.layer[1].parameters():
                parameter.add_(0.1)
            model.classifier.weight.mul_(30)  # else hardly anything depends on the network
        model.save_pretrained(tmp_path / task)
        experts[task] = str(tmp_path / task)
    return str(tmp_path / "base"), experts


def batch(task, classes):
    torch.manual_seed(len(task) + classes)
    ids = torch.randint(0, 30, (6, 5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % classes}


def test_the_tasks_train_what_experts_changed_of_one_network_under_their_heads(bench, places):
    base, experts = places
    models = bench.networks(base, experts)
    network = models["a"].base_model
    assert models["b"].base_model is network
    free = {name for name, p in network.named_parameters() if p.requires_grad}
    assert free == {n for n, _ in network.named_parameters() if n.startswith("encoder.layer.1.")}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    heads = {task: model.classifier.weight.clone() for task, model in models.items()}
    data = {"a": batch("a", 2), "b": batch("b", 3)}
    first = float(bench.loss_of(models, data).detach())
    bench.train(models, itertools.repeat(data, 20), 20, 1e-2)
    assert float(bench.loss_of(models, data).detach()) < first - 0.05
    moved = {name for name, value in network.state_dict().items() if not value.equal(before[name])}
    assert moved <= free
    assert {f"encoder.layer.1.{part}.dense.weight" for part in ("intermediate", "output")} <= moved
    assert all(models[task].classifier.weight.equal(head) for task, head in heads.items())


def test_a_network_is_written_under_the_heads_of_all_tasks(bench, places, tmp_path):
    base, experts = places
    network = bench.networks(base, experts)["a"].base_model
    bench.harness.write_classifiers(tmp_path / "out", network.state_dict(), experts)
    for task, place in experts.items():
        found = BertForSequenceClassification.from_pretrained(tmp_path / "out/tasks" / task)
        own = BertForSequenceClassification.from_pretrained(place)
        assert found.classifier.weight.equal(own.classifier.weight)
        plain = BertModel.from_pretrained(base)
        assert all(v.equal(plain.state_dict()[k]) for k, v in found.bert.state_dict().items())


def test_batches_go_on_after_an_epoch(bench):
    assert list(bench.steps_of([1, 2, 3], 7)) == [1, 2, 3, 1, 2, 3, 1]
    assert list(bench.steps_of([1, 2, 3], 0)) == []
