"""Score FusionBench's AdaMerging on a text suite: the same checkpoints, heads and batches as ours.

    python benchmarks/fusionbench.py text4 --python PEER/bin/python [--steps 500] [--seeds 0 1 2]

FusionBench 0.2.33 (MIT, https://github.com/tanganke/fusion_bench) runs in an environment of its
own, made once with ``pip install torch==2.13.0`` and ``pip install fusion-bench==0.2.33``; without
``--python``, or where it cannot be imported, the program says so and ends. Its layer-wise and
task-wise algorithms run as they are, on the batches that `MergeDataModule` yields for the seed
(adaptation split), with the published settings: Adam 1e-3, start 0.3, entropy summed over tasks.
Dropout is off, which FusionBench would leave on. The merged encoder of the last step is scored on
the test split as ours is, with the tasks' own heads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import harness

KINDS = ("layer_wise", "task_wise")


# ---- in our environment --------------------------------------------------------------------------


def opened(suite: str, seed: int, cache: Path, folder: Path) -> Any:
    """Return the opened suite, with one coefficient per tensor."""
    from gradmerge.cli.main import learn

    file = harness.suite_file(suite, seed, cache, folder)
    own = harness.CONFIGS / "methods" / "adamerging.yaml"
    return learn(
        ["--config", str(file), "--config", str(own), "--trainer.enable_model_summary=false"],
        run=False,
    )


def write_inputs(cli: Any, folder: Path, steps: int, rate: float, kind: str) -> None:
    """Write the batches of a fit and the places of all models."""
    from safetensors.torch import save_file

    cli.datamodule.attach(cli.model.merged)
    cli.datamodule.setup("fit")
    loader = cli.datamodule.train_dataloader()
    batches: list[Any] = []
    while len(batches) < steps:  # an iterator ends with an epoch, and the next one goes on
        batches += islice(loader, steps - len(batches))
    for step, batch in enumerate(batches):
        tensors = {
            f"{task}/{name}": value.contiguous()
            for task, inputs in batch.items()
            for name, value in inputs.items()
            if name != "labels"
        }
        save_file(tensors, folder / f"{step}.safetensors")
    recipe = cli.model.recipe
    given = {"base": recipe.base, "sources": dict(recipe.sources), "kind": kind}
    harness.write_json(folder / "job.json", {**given, "steps": steps, "rate": rate})


def scored(cli: Any, merged: Path) -> dict[str, Any]:
    """Return the test scores of an encoder under the tasks' own heads."""
    from dataclasses import replace

    from gradmerge import MergeDataModule, MergeModule, Recipe
    from gradmerge.coefficients import Constant, Model

    experts = cli.model.recipe.sources
    recipe = Recipe(
        sources={"merged": str(merged)},
        base=cli.model.recipe.base,
        heads={f"head-{name}": source for name, source in experts.items()},
        private=cli.model.recipe.private,
        coefficients=Model(),
        init=Constant(1.0),
    )
    tasks = {n: replace(t, source=f"head-{n}") for n, t in cli.datamodule.tasks.items()}
    data = MergeDataModule(tasks, eval_batch_size=cli.datamodule.eval_batch_size)
    module = MergeModule(recipe, score_experts=False)
    harness.quiet_trainer(precision=cli.trainer.precision).test(module, data, verbose=False)
    return module.results["test"]


def compare(suite: str, seed: int, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Adapt with FusionBench and score the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cli = opened(suite, seed, options.cache, folder)
        write_inputs(cli, folder, options.steps, options.rate, kind)
        began = time.perf_counter()
        command = [str(options.python), __file__, "--peer", str(folder)]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        found = scored(cli, folder / "merged")
    accuracy = {task: scores["accuracy"] for task, scores in found.items()}
    return {"score": accuracy.pop("average"), "tasks": accuracy, "seconds": round(seconds, 1)}


# ---- in FusionBench's environment ----------------------------------------------------------------


def peer(folder: Path) -> None:
    """Run FusionBench's own loop on the batches of a folder, and write the merged encoder."""
    import lightning
    import torch
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_bench.method.adamerging.task_wise_adamerging import TaskWiseAdaMergingAlgorithm
    from omegaconf import OmegaConf
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    classify = AutoModelForSequenceClassification.from_pretrained
    experts = {name: classify(path, **no_dropout) for name, path in job["sources"].items()}
    heads = {name: model.classifier.requires_grad_(False) for name, model in experts.items()}
    steps: dict[str, Any] = {}
    kinds = {"layer_wise": LayerWiseAdaMergingAlgorithm, "task_wise": TaskWiseAdaMergingAlgorithm}

    class Pool:
        model_names = tuple(experts)

        def load_model(self, name: str) -> Any:
            if name == "_pretrained_":
                return AutoModel.from_pretrained(job["base"], **no_dropout)
            return experts[name].base_model

    class Algorithm(kinds[job["kind"]]):  # type: ignore[misc]
        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

        def get_shuffled_test_loader_iter(self, task: str) -> Any:
            step = steps[task] = steps.get(task, -1) + 1
            found = load_file(folder / f"{step}.safetensors")
            own = {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{task}/")}
            return iter([(own, None)])

        def compute_logits(self, module: Any, batch: Any, task: str) -> Any:
            inputs = batch if isinstance(batch, dict) else batch[0]
            inputs = inputs[0] if isinstance(inputs, tuple) else inputs
            return heads[task](module(**inputs).pooler_output)

    config = {
        "weights": None,
        "init_values": 0.3,
        "clamp_weights": True,
        "tie_weights": True,
        "strict": False,
        "optimizer": "adam",
        "lr": job["rate"],
        "max_steps": job["steps"],
        "fast_dev_run": False,
        "save_merging_weights": False,
    }
    algorithm = Algorithm(OmegaConf.create(config))
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    algorithm._fabric = algorithm._fabric_instance = fabric
    fabric.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    merged = algorithm.run(Pool())
    # a classifier, as our sources are; its own head is not used
    whole = classify(next(iter(job["sources"].values())))
    whole.base_model.load_state_dict(merged.state_dict())
    whole.save_pretrained(folder / "merged")


def importable(python: Path | None) -> str | None:
    """Return the reason why FusionBench cannot run, None if it can."""
    if python is None:
        return "no --python was given (an environment with fusion-bench==0.2.33)"
    code = "import fusion_bench.method.adamerging.layer_wise_adamerging"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        return peer(Path(sys.argv[2]))
    parser = harness.suite_parser(__doc__)
    parser.add_argument("--python", type=Path, help="interpreter of FusionBench's environment")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    harness.quieten()
    if reason := importable(options.python):
        print(f"skipped: {reason}")
        return None

    def score(kind: str, seed: int) -> dict[str, Any]:
        return compare(options.suite, seed, options, kind)

    found = harness.compare(options.suite, KINDS, options, score)
    seconds = {"seconds": lambda r: harness.spread([x["seconds"] for x in r], 0)}
    print(harness.ranking(options.suite, found, seconds))
    return None


if __name__ == "__main__":
    main()
