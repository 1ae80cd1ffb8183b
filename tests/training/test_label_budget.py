"""`labels_per_task`: which examples keep their labels, how often they come, and what learns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from torch.nn import functional

from gradmerge import MergeDataModule, MergedModel, TaskData
from gradmerge.common.errors import ConfigError
from gradmerge.engine.predict import predict
from gradmerge.objectives import CrossEntropy, KLToSource, Objective
from gradmerge.training.run import describe_data
from networks import seeded
from tiny import (
    SPLITS,
    build,
    module_of,
    recipe_of,
    relatives,
    sentences,
    trainer_of,
    vectors,
    word_tokenizer,
)

BOTH = Objective([CrossEntropy(), KLToSource()])


def prepared(data, merged=None):
    data.attach(merged)
    data.setup()
    return data.examples("adaptation")


def labelled(rows):
    return [i for i in range(len(rows)) if (torch.as_tensor(rows[i]["labels"]) >= 0).any()]


def test_classes_are_balanced_and_fewer_labels_are_some_of_more():
    chosen = {}
    for count in (6, 9, 30):
        data = vectors(count=60, labels_per_task=count, batch_size=count)
        for task, rows in prepared(data).items():
            found = labelled(rows)
            assert len(found) == count
            chosen[task, count] = found
            classes = Counter(int(rows[i]["labels"]) for i in found)
            if count < 30:
                assert set(classes.values()) == {count // 3}
            whole = data.tasks[task].path["adaptation"]
            assert all(rows[i]["labels"] == whole[i]["labels"] for i in found)
            assert all(torch.equal(rows[i]["x"], whole[i]["x"]) for i in range(60))
    for task in "ab":
        assert set(chosen[task, 6]) < set(chosen[task, 9]) < set(chosen[task, 30])
    assert chosen["a", 6] != chosen["b", 6]


@pytest.mark.parametrize(
    ("batch_size", "share", "expected"), [(8, 0.25, 2), (4, 0.5, 2), (6, 0, 1)]
)
def test_every_step_has_its_share_of_labels(batch_size, share, expected):
    data = vectors(count=48, labels_per_task=8, labelled_share=share, batch_size=batch_size)
    prepared(data)
    seen = []
    for batch in data.train_dataloader():
        counts = [(task["labels"] >= 0).sum().item() for task in batch.values()]
        assert counts == [expected, expected]
        seen += [tuple(row.tolist()) for row in batch["a"]["x"][batch["a"]["labels"] < 0]]
    most = Counter(seen).most_common(1)[0][1]
    assert most == 1  # in 48 places at most 40 unlabelled examples: none is repeated


def test_the_stream_does_not_depend_on_batch_size_or_processes():
    orders = []
    for batch_size, world in ((4, 1), (8, 1), (2, 2)):
        data = vectors(count=48, labels_per_task=8, batch_size=batch_size)
        prepared(data)
        stream = data.train_dataloader().stream
        stream.world = world
        found = []
        for step in range(stream.num_steps()):
            shares = []
            for stream.rank in range(world):
                shares.append(stream.indices("a", step))
            found += [index for place in zip(*shares, strict=True) for index in place]
        orders.append(found)
    assert orders[0] == orders[1] == orders[2]


def test_cross_entropy_sees_the_labelled_rows_and_a_teacher_all():
    models = relatives(build())
    merged = MergedModel(recipe_of(models), models[0])
    data = vectors(count=24, labels_per_task=6, labelled_share=0.5, batch_size=8)
    prepared(data, merged)
    batch = next(iter(data.train_dataloader()))["a"]
    found = predict(merged, BOTH, "a", batch, shared=False)
    rows = batch["labels"] >= 0
    assert rows.sum() == 4
    mine, theirs = found.logits, models[1](batch["x"])
    supervised = functional.cross_entropy(mine[rows], batch["labels"][rows])
    log_p, log_q = (functional.log_softmax(x / 2, dim=-1) for x in (theirs, mine))
    distilled = 4 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    torch.testing.assert_close(BOTH.loss(found), supervised + distilled, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "rows", "options"),
    [
        ("completion", [{"prompt": s, "completion": s[:8]} for s in sentences(0, 12)], {}),
        ("causal_lm", [{"text": s} for s in sentences(0, 12)], {"packing": False}),
        ("causal_lm", [{"text": s} for s in sentences(0, 12)], {"max_length": 9}),
    ],
)
def test_tokens_without_labels_are_still_predicted(tmp_path, kind, rows, options):
    models = relatives(seeded(transformers.LlamaForCausalLM), scale=0.1)
    merged = MergedModel(recipe_of(models), models[0])
    described = {"a": TaskData(dict.fromkeys(SPLITS, rows), kind=kind, **options)}
    processor = str(word_tokenizer(tmp_path / "tokenizer"))
    whole, some = (
        MergeDataModule(described, 4, processor=processor, check_disjoint=False, **budget)
        for budget in ({}, {"labels_per_task": 3, "labelled_share": 0.5})
    )
    everything, limited = (prepared(data, merged)["a"] for data in (whole, some))
    assert len(labelled(limited)) == 3
    batch = next(iter(some.train_dataloader()))["a"]
    indices = some.train_dataloader().stream.indices("a", 0)
    assert len(set(indices) & set(labelled(limited))) == 2
    known = some.train_dataloader().stream.collate([everything[i] for i in indices])
    found, expected = (predict(merged, BOTH, "a", b, shared=False) for b in (batch, known))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.teacher, expected.teacher)
    kept = found.labels != -100
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(found.labels[kept], expected.labels[kept])
    lost = [(known["labels"][j, 1:] >= 0).sum() for j, i in enumerate(indices)
            if i not in limited.kept]  # fmt: skip
    assert (~kept).sum() == sum(lost)


def test_pairs_of_texts_are_refused(tmp_path):
    model = seeded(transformers.BertModel)
    rows = [{"anchor": s, "positive": s[::-1]} for s in sentences(0, 6)]
    data = MergeDataModule(
        {"a": TaskData(dict.fromkeys(SPLITS, rows), kind="embeddings")},
        processor=str(word_tokenizer(tmp_path)), check_disjoint=False, labels_per_task=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="task a, adaptation: expected labels that can be left"):
        prepared(data, MergedModel(recipe_of(relatives(model)), model))


def test_no_labels_at_all_and_more_than_there_are(tmp_path):
    assert labelled(prepared(vectors(labels_per_task={"a": 0}))["a"]) == []
    data = vectors(labels_per_task={"b": 100})
    whole = {task: described.path["adaptation"] for task, described in data.tasks.items()}
    assert prepared(data) == whole
    models = relatives(build())
    fitted = module_of(models, Objective([KLToSource()]))
    data = vectors(labels_per_task=0)
    trainer_of(tmp_path, max_steps=1).fit(fitted, datamodule=data)
    supervised = module_of(models, BOTH)
    with pytest.raises(ConfigError, match="task a, adaptation, has no labels, but CrossEntropy"):
        trainer_of(tmp_path, max_steps=1).fit(supervised, datamodule=vectors(labels_per_task=0))


def test_a_fit_says_and_records_the_budget(tmp_path):
    module = module_of(objective=BOTH)
    data = vectors(labels_per_task={"a": 4}, labelled_share=0.5)
    trainer_of(tmp_path, max_steps=2).fit(module, datamodule=data)
    described = module.merged.state.run["data"]
    assert described["labels_per_task"] == {"a": 4}
    assert described["labelled_share"] == 0.5
    assert "labels_per_task" not in describe_data(vectors())
    assert str(data.examples("adaptation")["a"]) == "4 of 12 examples keep their labels"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_per_task": -1}, r"data.labels_per_task: expected 0 labels or more, got -1"),
        ({"labels_per_task": {"aa": 1}}, r"data.labels_per_task: unknown task 'aa' .*'a'\?"),
        ({"labels_per_task": 1, "labelled_share": 2}, "data.labelled_share: expected a share"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        vectors(**options)
