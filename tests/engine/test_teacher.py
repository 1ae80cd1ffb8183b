"""Teachers: hidden states against hooks of plain networks, and outputs that are kept on disk."""

from __future__ import annotations

import copy
import os
import sqlite3

import pytest
import torch
import transformers
from torch.func import functional_call

from gradmerge import MergedModel, MergeModule, Recipe
from gradmerge.coefficients import Constant
from gradmerge.common.errors import ConfigError
from gradmerge.engine.predict import predict
from gradmerge.engine.teacher import Teacher
from gradmerge.engine.teacher_store import TeacherStore
from gradmerge.objectives import (
    CrossEntropy,
    Entropy,
    HardLabels,
    HiddenStates,
    KLToSource,
    Objective,
    Predictions,
)
from networks import seeded
from processes import dies
from tiny import build, fit, module_of, raws, relatives, trainer_of, validate, vectors

BERT = transformers.BertForSequenceClassification
LLAMA = transformers.LlamaForCausalLM
BLOCKS = {BERT: "bert.encoder.layer", LLAMA: "model.layers"}


def merged_of(kind, dtype=torch.float64, memory="resident", recompute=False):
    """A merge of two relatives, and the three networks."""
    models = [model.to(dtype) for model in relatives(seeded(kind, pad_token_id=0))]
    recipe = Recipe({"a": models[1], "b": models[2]}, base=models[0], init=Constant([0.4, 0.3]))
    merged = MergedModel(recipe, memory=memory, dtype=dtype)
    if recompute:
        merged.enable_activation_checkpointing()
    return merged, models


def texts(lengths, width=None, seed=0, labels=None):
    """Padded texts, each the same whatever the others are."""
    width = width or max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + length)
        ids[i, :length] = torch.randint(1, 32, (length,), generator=generator)
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, **(labels or {})}


def states(network, blocks, batch, theta=None):
    """Outputs of a plain network's blocks at all tokens that are not padding."""
    found, mask = [], batch["attention_mask"] != 0
    for block in network.get_submodule(blocks):
        block.register_forward_hook(
            lambda *given: found.append(given[-1] if torch.is_tensor(given[-1]) else given[-1][0])
        )
    functional_call(network, theta or {}, (), batch)
    return [state[mask] for state in found]


# ---- hidden states ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "memory", "recompute"),
    [
        (BERT, "resident", False),
        (BERT, "streamed", True),
        (LLAMA, "streamed", False),
        (LLAMA, "resident", True),
    ],
)
def test_hidden_states_are_those_of_both_networks_and_pull_on_the_coefficients(
    kind, memory, recompute
):
    merged, models = merged_of(kind, memory=memory, recompute=recompute)
    batch = texts([5, 3])
    predictions = predict(merged, Objective([HiddenStates()]), "b", batch, shared=False)
    loss = HiddenStates().loss(predictions)
    loss.backward()

    base, *own = (dict(model.named_parameters()) for model in models)
    tensors = list(merged.plan.tensors)
    z = merged.raw["tensor"].detach().clone().requires_grad_()
    theta = {
        n: base[n].detach() + sum(z[k, i] * (own[k][n] - base[n]).detach() for k in range(2))
        for i, n in enumerate(tensors)
    }
    plain = states(copy.deepcopy(models[0]), BLOCKS[kind], batch, theta)
    with torch.no_grad():
        teacher = states(copy.deepcopy(models[2]), BLOCKS[kind], batch)
    assert list(predictions.hidden) == [f"{BLOCKS[kind]}.{i}" for i in range(2)]
    for got, expected in zip(predictions.hidden.values(), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for got, expected in zip(predictions.teacher_hidden.values(), teacher, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    expected = sum((a - b).square().mean() for a, b in zip(plain, teacher, strict=True)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected.backward()
    assert z.grad.abs().max() > 1e-4
    torch.testing.assert_close(merged.raw["tensor"].grad, z.grad, rtol=1e-8, atol=1e-12)


def test_modules_within_recomputed_blocks_can_be_compared():
    found = []
    for recompute in (False, True):
        merged, _ = merged_of(BERT, recompute=recompute)
        term = HiddenStates(layers=(r"attention\.self$", "pooler"), reduce="sum")
        predictions = predict(merged, Objective([term]), "a", texts([4, 6]), shared=False)
        names = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
        assert list(predictions.hidden) == [*names, "bert.pooler"]
        assert predictions.hidden["bert.pooler"].shape == (2, 8)
        term.loss(predictions).backward()
        found.append(merged.raw["tensor"].grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


def test_layers_that_do_not_exist_are_named_before_anything_runs():
    with pytest.raises(
        ConfigError,
        match=r"HiddenStates.layers: 'boddy' matches no module of Perceptron. Did you mean 'body'",
    ):
        module_of(objective=HiddenStates(layers=("boddy",)))
    with pytest.raises(ConfigError, match=r"HiddenStates.layers: .* matches no module of Percep"):
        module_of(objective=HiddenStates())


def test_a_fit_brings_hidden_states_nearer_and_scores_their_loss(tmp_path):
    module = module_of(objective=HiddenStates(layers=("body",)), learning_rate=0.05)
    data = vectors(batch_size=12)
    before = validate(trainer_of(tmp_path), module, data)["selection/loss"]
    expected = []
    for task in "ab":
        rows = data.tasks[task].path["selection"]
        x = torch.stack([row["x"] for row in rows])
        weights, own = module.merged.state.materialise, dict(module.merged.plan.serving)[task]
        merged, expert = (
            x @ read("body.weight").T + read("body.bias") for read in (weights, own.read)
        )
        expected.append((merged - expert).square().mean())
    assert before == pytest.approx(0.1 * float(sum(expected)) / 2, rel=1e-5)
    fit(tmp_path, module, data, max_steps=30)
    assert validate(trainer_of(tmp_path), module, data)["selection/loss"] < 0.9 * before


# ---- kept outputs -----------------------------------------------------------------------------


def counted(merged):
    """Numbers of examples that have run through the network with given weights, by pass."""
    counts = []

    def count(module, args, kwargs):
        if merged._given is not None:
            counts.append(len(next(v for v in kwargs.values() if torch.is_tensor(v))))

    merged.register_forward_pre_hook(count, with_kwargs=True)
    return counts


TERMS = [KLToSource(), KLToSource(top_k=3), HardLabels(), HiddenStates(reduce="sum")]


@pytest.mark.parametrize("kind", [BERT, LLAMA])
def test_each_example_runs_through_its_source_once_whatever_it_is_padded_with(kind):
    merged, _ = merged_of(kind)
    objective = Objective(TERMS)
    teacher = Teacher(merged, objective, TeacherStore(0.01))
    counts = counted(merged)
    rounds = [([5, 3], 2), ([3, 5, 4], 1), ([4, 3, 5], 0), ([9, 3, 4], 1), ([9], 0)]
    for lengths, new in rounds:
        for width in (None, 12):
            counts.clear()
            batch = texts(lengths, width)
            if kind is LLAMA:
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                batch["labels"][:, 1] = -100
            found = predict(merged, objective, "a", batch, False, teacher)
            assert sum(counts) == (new if width is None else 0)
            expected = predict(merged, objective, "a", batch, False)
            for term in TERMS:
                torch.testing.assert_close(
                    term.loss(found), term.loss(expected), rtol=1e-9, atol=1e-12, msg=str(term)
                )


def test_an_example_is_asked_again_for_what_outputs_depend_on():
    store = TeacherStore(0.01)
    batch = texts([5, 3])

    def new(objective=None, task="a", batch=batch, merged=None):
        merged = merged or merged_of(BERT)[0]
        counts = counted(merged)
        objective = objective or Objective([KLToSource(top_k=2)])
        predict(merged, objective, task, batch, False, Teacher(merged, objective, store))
        return sum(counts)

    assert new() == 2
    assert new() == 0  # another model of the same sources
    assert new(task="b") == 2  # another source
    assert new(Objective([KLToSource(top_k=3)])) == 2
    assert new(Objective([KLToSource(1.0, 1.0, 2)])) == 2
    assert new(Objective([KLToSource()])) == 2
    assert new(merged=merged_of(BERT, torch.float32)[0]) == 2  # another dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert new(merged=merged_of(BERT, torch.float32)[0]) == 2
    flipped = {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}
    assert new(batch=flipped) == 2
    left = {name: value.flip(1) for name, value in batch.items()}
    assert new(batch=left) == 2  # the same lengths, other texts
    moved = {name: torch.nn.functional.pad(value, (1, 0)) for name, value in batch.items()}
    assert new(batch=moved) == 2  # the same texts at other positions
    other = merged_of(BERT)[1]
    with torch.no_grad():
        other[1].classifier.bias[0] += 1e-3
    changed = Recipe({"a": other[1], "b": other[2]}, base=other[0])
    assert new(merged=MergedModel(changed, dtype=torch.float64)) == 2  # other weights
    assert new() == 0


def test_a_fit_with_a_cache_learns_the_same_and_asks_each_source_once(tmp_path):
    found = {}
    for gigabytes in (0.0, 0.01):
        module = module_of(
            objective=KLToSource(),
            teacher_cache=gigabytes,
            score_experts=False,
            learning_rate=0.1,
        )
        counts = counted(module.merged)
        fit(tmp_path, module, max_steps=9, val_check_interval=3, check_val_every_n_epoch=None)
        found[gigabytes] = raws(module)["tensor"], sum(counts)
    assert (found[0.0][0] - 0.3).abs().max() > 1e-2
    torch.testing.assert_close(found[0.01][0], found[0.0][0], rtol=0, atol=1e-6)
    # two tasks of 12 examples for training and 12 for selection
    assert found[0.01][1] == 2 * (12 + 12)
    assert found[0.0][1] == 2 * (9 * 4 + 4 * 12)


def test_rows_that_depend_on_the_batch_are_not_kept():
    """Pairs of texts are compared with all others of their batch."""
    models = relatives(seeded(transformers.BertModel, pad_token_id=0))
    merged = MergedModel(Recipe({"a": models[1], "b": models[2]}, base=models[0]))
    objective = Objective([KLToSource()])
    teacher, counts = Teacher(merged, objective, TeacherStore(0.01)), counted(merged)
    for _ in range(2):
        predict(merged, objective, "a", texts([5, 3, 4, 2]), False, teacher)
    assert counts == [4, 4]


# ---- the file ---------------------------------------------------------------------------------


def entry(value, size=1000):
    return {"x": torch.full((size,), float(value)), "y": torch.tensor([value])}


def test_entries_are_read_as_they_were_written(tmp_path):
    store = TeacherStore(1.0, tmp_path)
    kept = {"a": draw_of(torch.bfloat16), "b": draw_of(torch.int32), "c": torch.empty(0, 3)}
    store.write({b"1": kept, b"2": entry(2)})
    store.write({b"1": entry(7)})  # known already
    for reader in (store, TeacherStore(1.0, tmp_path)):
        first, missing, second = reader.read([b"1", b"3", b"2"])
        assert missing is None
        assert torch.equal(second["y"], torch.tensor([2]))
        for name, value in kept.items():
            assert first[name].dtype == value.dtype
            assert torch.equal(first[name], value)


def draw_of(dtype):
    return (10 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1))).to(dtype)


def test_the_file_stops_growing_at_its_limit(tmp_path):
    store = TeacherStore(2e-4, tmp_path)  # 200 kB
    entries = {bytes([i]): entry(i) for i in range(100)}

    def fill():
        for key, value in entries.items():
            store.write({key: value})

    message = r"(?s)has the 0.0002 GB that it may.*Raise model.teacher_cache"
    with pytest.warns(UserWarning, match=message) as seen:
        fill()
    assert len(seen) == 1
    found = store.read([bytes([i]) for i in range(100)])
    kept = [i for i, one in enumerate(found) if one is not None]
    assert 20 < len(kept) < 60
    assert kept == list(range(len(kept)))
    assert all(torch.equal(found[i]["x"], entry(i)["x"]) for i in kept)
    store._connection().close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200_000


def test_a_full_cache_still_teaches():
    merged, _ = merged_of(BERT)
    objective = Objective([KLToSource()])
    teacher = Teacher(merged, objective, TeacherStore(1e-6))
    batch = texts([5, 3])
    teacher.store.is_full = True
    counts = counted(merged)
    for _ in range(2):
        found = predict(merged, objective, "a", batch, False, teacher)
        assert torch.equal(found.teacher, predict(merged, objective, "a", batch, False).teacher)
    assert counts == [2] * 4


def test_a_process_that_is_killed_while_it_writes_leaves_no_entry(tmp_path):
    def killed():
        store = TeacherStore(1.0, tmp_path)
        store.write({b"whole": entry(1)})
        connection = store._connection()
        connection.execute("PRAGMA cache_spill = 1")
        connection.execute("PRAGMA cache_size = 1")  # pages reach the disk before they are valid
        connection.execute("BEGIN")
        for i in range(50):
            connection.execute("INSERT INTO entries VALUES (?, ?)", (bytes([i]), b"x" * 5000))
        os._exit(9)

    dies(killed)
    store = TeacherStore(1.0, tmp_path)
    whole, *others = store.read([b"whole", *(bytes([i]) for i in range(50))])
    assert torch.equal(whole["y"], torch.tensor([1]))
    assert others == [None] * 50
    store.write({bytes([0]): entry(0)})
    assert torch.equal(store.read([bytes([0])])[0]["x"], entry(0)["x"])


def test_several_processes_may_write_and_read_at_once(tmp_path):
    keys = [bytes([i]) for i in range(40)]

    def work():
        store = TeacherStore(1.0, tmp_path)
        for i, key in enumerate(keys):
            store.write({key: entry(i)})
            (one,) = store.read([key])
            assert torch.equal(one["x"], entry(i)["x"])
        os._exit(0)

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = TeacherStore(1.0, tmp_path).read(keys)
    assert all(torch.equal(one["x"], entry(i)["x"]) for i, one in enumerate(found))


def test_what_is_no_cache_is_refused(tmp_path):
    (tmp_path / "teacher.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match=r"teacher_cache: expected a file of .*not a database"):
        TeacherStore(1.0, tmp_path)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"teacher_cache: expected a number of gigabytes"):
            module_of(teacher_cache=value)


def test_a_value_that_is_no_entry_is_refused(tmp_path):
    store = TeacherStore(1.0, tmp_path)
    store.write({b"1": entry(1)})
    with sqlite3.connect(tmp_path / "teacher.sqlite3") as connection:
        connection.execute("UPDATE entries SET value = ?", (b"\x80\x04K\x01.",))  # a pickle
    with pytest.raises(ConfigError, match=r"(?s)teacher_cache: .*Delete it if it is damaged"):
        store.read([b"1"])


def test_a_checkpoint_does_not_say_where_to_write(tmp_path):
    world = relatives(build())
    module = module_of(world, objective=KLToSource(), teacher_cache=0.01)
    _, trainer = fit(tmp_path, module, max_steps=1)
    path = tmp_path / "fit.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert not [name for name in saved["hyper_parameters"] if name.startswith("teacher")]
    saved["hyper_parameters"] |= {"teacher_cache": 1.0, "teacher_cache_folder": str(tmp_path / "x")}
    torch.save(saved, path)
    recipe = Recipe({"a": world[1], "b": world[2]}, base=world[0], init=Constant(0.3))
    again = MergeModule.load_from_checkpoint(path, recipe=recipe)
    assert again.teacher.store is None
    assert not (tmp_path / "x").exists()


def test_without_a_teacher_nothing_is_asked():
    merged, _ = merged_of(BERT)
    counts = counted(merged)
    for term in (Entropy(), CrossEntropy()):
        batch = texts([5, 3], labels={"labels": torch.tensor([0, 1])})
        found = predict(merged, Objective([term]), "a", batch, False)
        assert isinstance(found, Predictions)
        assert found.teacher is None
    assert counts == []
