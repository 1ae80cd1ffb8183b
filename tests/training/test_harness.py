"""Benchmarks through lm-evaluation-harness: folders, checkpoints and fits, with local tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import ModelCheckpoint

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.cli import main
from gradmerge.coefficients import Column, Constant
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.errors import ConfigError
from gradmerge.training import EvaluateEvery, ExportAtEnd
from gradmerge.training.harness import Harness
from gradmerge.training.logs import CSVLogger
from harness_tasks import TASKS, save_llamas, write_tasks
from networks import seeded
from tiny import raws, sentences, trainer_of

pytest.importorskip("lm_eval", reason="needs the extra `eval`")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return str(write_tasks(tmp_path_factory.mktemp("tasks") / "own"))


def module_on(paths, **options):
    sources = {name: paths[name] for name in "ab"}
    recipe = Recipe(sources, base=paths["base"], coefficients=Column(), init=Constant(0.4))
    return MergeModule(recipe, **options)


def texts():
    rows = {
        task: {
            split: [{"text": text} for text in sentences(10 * i + j, 8)]
            for j, split in enumerate(("adaptation", "selection", "test"))
        }
        for i, task in enumerate("ab")
    }
    described = {
        task: TaskData(path=splits, kind="causal_lm", max_length=8) for task, splits in rows.items()
    }
    return MergeDataModule(described, batch_size=4, check_disjoint=False)


def fitted(root, paths, callbacks=(), memory="resident", **options):
    """A short fit with a checkpoint per validation; returns the module and its trainer."""
    keep = ModelCheckpoint(root / "checkpoints", save_top_k=-1, filename="{step}")
    trainer = trainer_of(root, callbacks=[*callbacks, keep], **{"max_steps": 4, **options})
    module = module_on(paths, memory=memory, learning_rate=0.3)
    torch.manual_seed(3)
    trainer.fit(module, datamodule=texts())
    return module, trainer


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def fit_and_export(request, tmp_path_factory):
    """A checkpoint of a fit, and the folder that is exported from it."""
    root = tmp_path_factory.mktemp("fit")
    _, trainer = fitted(root, save_llamas(root / "models", request.param))
    checkpoint = trainer.checkpoint_callback.best_model_path
    assert main(["export", checkpoint, str(root / "merged")]) == 0
    return Path(checkpoint), root / "merged"


def evaluate(model, tasks, *options):
    return main(["evaluate", str(model), "--tasks", TASKS, "--include_path", tasks, *options])


def test_a_checkpoint_scores_as_the_folder_exported_from_it(fit_and_export, tasks, capsys):
    checkpoint, folder = fit_and_export
    before = (folder / "README.md").read_text()
    assert evaluate(checkpoint, tasks) == 0
    of_checkpoint = capsys.readouterr().out
    assert evaluate(folder, tasks) == 0
    of_folder = capsys.readouterr().out
    # one table each, then the place of the scores
    assert of_checkpoint.splitlines()[:-1] == of_folder.splitlines()[:-1]
    kept = json.loads(checkpoint.with_suffix(".scores.json").read_text())["scores"]["lm-eval"]
    found = json.loads((folder / "provenance.json").read_text())
    assert found["results"]["lm-eval"] == kept
    assert kept.keys() == set(TASKS.split(","))
    assert 0 < kept["tiny_choice"]["acc"] < 1
    assert 0 < kept["tiny_words"]["chrf"] < 100  # of the letters of generated words
    described = found["evaluation"]["lm-eval"]
    assert described["tasks"]["tiny_choice"]["version"] == 2.0
    assert described["tasks"]["tiny_choice"]["examples"] == 12

    card = ModelCard.load(folder / "README.md")
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert scores["tiny_text", "bits_per_byte"] == kept["tiny_text"]["bits_per_byte"]
    assert {r.dataset_split for r in card.data.eval_results} >= {"lm-eval"}
    # everything but scores and metadata is as it was
    sections = card.text.split("## Coefficients")
    assert sections[1] == before.split("## Coefficients")[1]
    assert "| lm-eval |" in sections[0]


def test_scores_are_those_that_plain_transformers_gives(fit_and_export, tasks):
    """The oracle adds up the log-probabilities of the words in float32 without lm-eval."""
    checkpoint, folder = fit_and_export
    assert evaluate(checkpoint, tasks) == 0
    kept = json.loads(checkpoint.with_suffix(".scores.json").read_text())["scores"]["lm-eval"]
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def read(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return ids[0], network(ids).logits[0].float().log_softmax(-1)

    rows = [json.loads(line) for line in (Path(tasks) / "rows.jsonl").open()]
    right = bits = size = 0
    for row in rows:
        _, after = read(row["question"])
        choices = [tokenizer(choice).input_ids[-1] for choice in row["choices"]]
        right += int(after[-1, choices].argmax() == row["answer"])
        ids, after = read("<s> " + row["text"])
        bits -= float(after[:-1].gather(1, ids[1:, None]).sum()) / math.log(2)
        size += len(row["text"].encode())
    assert kept["tiny_choice"]["acc"] == pytest.approx(right / len(rows))
    # batches are padded, and bfloat16 rounds logits to 8 bits
    assert kept["tiny_text"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-3)


def test_lm_eval_itself_scores_a_checkpoint_by_the_name_gradmerge(fit_and_export, tasks):
    import lm_eval

    import gradmerge.training.harness_model  # noqa: F401 - registers the name

    checkpoint, _ = fit_and_export
    manager = lm_eval.tasks.TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate(
        "gradmerge",
        {"checkpoint": str(checkpoint)},
        tasks=TASKS.split(","),
        num_fewshot=2,
        batch_size=8,
        task_manager=manager,
    )["results"]
    assert evaluate(checkpoint, tasks, "--num_fewshot", "2") == 0
    kept = json.loads(checkpoint.with_suffix(".scores.json").read_text())["scores"]
    for task, values in kept["lm-eval, 2-shot"].items():
        assert values == {name: found[task][f"{name},none"] for name in values}


def test_scores_of_a_checkpoint_reach_the_next_export(fit_and_export, tasks, tmp_path):
    checkpoint, _ = fit_and_export
    assert evaluate(checkpoint, tasks, "--limit", "3", "--num_fewshot", "1") == 0
    assert main(["export", str(checkpoint), str(tmp_path / "again")]) == 0
    found = json.loads((tmp_path / "again" / "provenance.json").read_text())["results"]
    assert "lm-eval, 1-shot, first 3" in found
    assert "| lm-eval, 1-shot, first 3 |" in (tmp_path / "again" / "README.md").read_text()


def test_evaluations_of_other_tasks_are_added_and_repeated_ones_replaced(fit_and_export, tasks):
    _, folder = fit_and_export
    for names in ("tiny_choice", "tiny_text", "tiny_choice"):
        options = ["--tasks", names, "--include_path", tasks, "--limit", "2"]
        assert main(["evaluate", str(folder), *options]) == 0
    card = ModelCard.load(folder / "README.md")
    found = [r for r in card.data.eval_results if r.dataset_split == "lm-eval, first 2"]
    assert sorted({r.dataset_name for r in found}) == ["tiny_choice", "tiny_text"]
    assert card.text.count("## Scores") == card.text.count("| lm-eval, first 2 |") == 1


def test_scores_are_logged_to_wandb(fit_and_export, tasks, tmp_path, monkeypatch):
    import wandb

    summaries, update = [], wandb.sdk.wandb_summary.SummaryDict.update
    monkeypatch.setattr(
        wandb.sdk.wandb_summary.SummaryDict,
        "update",
        lambda self, values: (summaries.append(values), update(self, values))[1],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, folder = fit_and_export
    assert evaluate(folder, tasks, "--wandb", "mine", "--record", "false") == 0
    (logged,) = summaries
    assert logged.keys() >= {"eval/tiny_choice/acc", "eval/tiny_text/bits_per_byte"}
    assert list(Path("wandb").glob("offline-run-*/*.wandb"))
    assert wandb.run is None


def test_a_fit_is_evaluated_every_n_validations_and_learns_the_same(tmp_path, tasks):
    paths = save_llamas(tmp_path / "models")
    options = {"max_steps": 6, "memory": "streamed"}
    plain, _ = fitted(tmp_path / "plain", paths, **options)
    every = EvaluateEvery(TASKS, 2, limit=None, include_path=tasks)
    output = ExportAtEnd(str(tmp_path / "merged"))
    logger = CSVLogger(tmp_path, name="logs")
    module, trainer = fitted(
        tmp_path / "fit", paths, [every, output], logger=logger, log_every_n_steps=1, **options
    )
    assert all(torch.equal(raws(plain)[key], value) for key, value in raws(module).items())
    steps = [step for step, _ in module.history.points("eval/tiny_choice/acc")]
    validations = [step for step, _ in module.history.points("selection/loss") if step]
    assert steps == validations[::2]
    assert "eval/tiny_text/bits_per_byte" in trainer.callback_metrics
    # a checkpoint has the scores of its own coefficients, or none
    for path in (tmp_path / "fit" / "checkpoints").glob("*.ckpt"):
        saved = load_checkpoint(path)
        scored = saved["global_step"] in steps
        assert ("lm-eval" in saved["gradmerge"]["results"]) == scored
        if scored:
            assert evaluate(path, tasks) == 0
            kept = json.loads(path.with_suffix(".scores.json").read_text())["scores"]["lm-eval"]
            for task, values in saved["gradmerge"]["results"]["lm-eval"].items():
                assert values == pytest.approx(kept[task], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ""}, "tasks: expected names of tasks, got none"),
        ({"limit": 0}, "limit: expected a number of at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot: expected a number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected a number of at least 1, got 0"),
        ({"include_path": "nowhere"}, "include_path: expected a folder of task files, got nowhere"),
    ],
)
def test_mistakes_are_named(tasks, options, words):
    given = {"tasks": TASKS, "include_path": tasks, **options}
    with pytest.raises(ConfigError, match=words):
        _ = Harness(**given).manager


def test_unknown_tasks_are_named_with_the_nearest(tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    index = TaskManager.__init__  # without lm-eval's own tasks, which take ten seconds to index
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, include_path, include_defaults=True: index(
            self, include_path=include_path, include_defaults=False
        ),
    )
    with pytest.raises(ConfigError, match=r"unknown tiny_choise; .*Did you mean 'tiny_choice'"):
        _ = Harness("tiny_text,tiny_choise", include_path=tasks).manager


def test_classifiers_are_no_language_models(tmp_path, capsys):
    model = seeded(transformers.BertForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path / "model")
    options = ["--tasks", "arc_easy"]
    assert main(["evaluate", str(tmp_path / "model"), *options]) == 2
    assert "expected a language model" in capsys.readouterr().err


def test_task_files_of_a_configuration_need_trust(tmp_path, tasks, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = save_llamas(tmp_path / "models")
    data = {"path": [{"text": t} for t in sentences(1, 8)], "kind": "causal_lm"}
    Path("data.jsonl").write_text("\n".join(json.dumps(row) for row in data["path"]))
    task = {"path": "json", "data_files": "data.jsonl", "kind": "causal_lm", "max_length": 8}
    init = {"tasks": "tiny_choice", "include_path": tasks, "limit": 2}
    callback = {"class_path": "EvaluateEvery", "init_args": init}
    best = {"monitor": "eval/tiny_choice/acc", "mode": "max", "dirpath": "best"}
    keep = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best}
    config = {
        "model": {"recipe": {"base": paths["base"], "sources": {"a": paths["a"]}}},
        "data": {"tasks": {"a": task}, "check_disjoint": False},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "callbacks": [callback, keep],
            "val_check_interval": 1,
        },
    }
    Path("fit.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "fit.yaml"]) == 2
    assert "--allow_modules lm_eval" in capsys.readouterr().err
    assert main(["fit", "--config", "fit.yaml", "--allow_modules", "lm_eval"]) == 0
    assert "lm-eval, first 2" in capsys.readouterr().out
    assert list(Path("best").glob("*.ckpt"))
