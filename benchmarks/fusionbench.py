"""Merge a suite with FusionBench's AdaMerging: the same checkpoints, heads and batches as ours.

    python benchmarks/fusionbench.py text4 --python PEER/bin/python [--steps 500] [--seeds 0 1 2]
    gradmerge compare SUITE.yaml METHOD... outputs/fusionbench-text4/seed0/layer_wise

FusionBench 0.2.33 (MIT, https://github.com/tanganke/fusion_bench) runs in an environment of its
own, made once with ``pip install torch==2.13.0`` and ``pip install fusion-bench==0.2.33``; without
``--python``, or where it cannot be imported, the program says so and ends. Its layer-wise and
task-wise algorithms run as they are, on the batches that `MergeDataModule` yields for the seed
(adaptation split), with the published settings: Adam 1e-3, start 0.3, entropy summed over tasks.
Dropout is off, which FusionBench would leave on. The encoder of the last step is written with the
tasks' own heads, as a row for `gradmerge compare`.
"""

from __future__ import annotations

import argparse
import json
import shutil
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


def write_inputs(cli: Any, folder: Path, options: argparse.Namespace, kind: str) -> None:
    """Write the batches of a fit and the places of all models."""
    from safetensors.torch import save_file

    cli.datamodule.attach(cli.model.merged)
    cli.datamodule.setup("fit")
    loader, steps = cli.datamodule.train_dataloader(), options.steps
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
    harness.write_json(folder / "job.json", {**given, "steps": steps, "rate": options.rate})


def adapt(suite: str, seed: int, options: argparse.Namespace, kind: str, target: Path) -> None:
    """Adapt with FusionBench, and write the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(opened(suite, seed, options.cache, folder), folder, options, kind)
        began = time.perf_counter()
        subprocess.run([str(options.python), __file__, "--peer", str(folder)], check=True)
        print(f"{kind}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "merged", target)


# ---- in FusionBench's environment ----------------------------------------------------------------


def peer(folder: Path) -> None:
    """Run FusionBench's own loop on the batches of a folder, and write the merged encoder."""
    import lightning
    import torch
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_bench.method.adamerging.task_wise_adamerging import TaskWiseAdaMergingAlgorithm
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    experts = {name: harness.classifier(path, **off) for name, path in job["sources"].items()}
    heads = {name: model.classifier.requires_grad_(False) for name, model in experts.items()}
    base = harness.classifier(next(iter(job["sources"].values())), job["base"], **off).base_model
    steps: dict[str, Any] = {}
    kinds = {"layer_wise": LayerWiseAdaMergingAlgorithm, "task_wise": TaskWiseAdaMergingAlgorithm}

    class Pool:
        model_names = tuple(experts)

        def load_model(self, name: str) -> Any:
            if name == "_pretrained_":
                return base
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
            found = module(**inputs)
            pooled = found.get("pooler_output")
            return heads[task](found.last_hidden_state[:, 0] if pooled is None else pooled)

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
    harness.write_classifiers(folder / "merged", merged.state_dict(), job["sources"])


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
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, help="default: outputs/fusionbench-SUITE")
    options = parser.parse_args()
    harness.quieten()
    if reason := importable(options.python):
        print(f"skipped: {reason}")
        return None

    output = options.output or harness.ROOT / "outputs" / f"fusionbench-{options.suite}"
    for seed in options.seeds:
        harness.build_suite(options.suite, seed, options.cache)
        for kind in options.kinds:
            if not (target := output / f"seed{seed}" / kind).is_dir():
                adapt(options.suite, seed, options, kind, target)
            print(target)
    return None


if __name__ == "__main__":
    main()
