"""The main job on real data: build experts, learn merges, compare, export, plot.

    python scripts/quickstart.py lm            four text domains, a byte-level Llama
    python scripts/quickstart.py vision        four image tasks, labelled and unlabelled

For each seed the suite is built (or found in the cache), baselines and learned merges are scored on
the test split, and a table, `results.json`, a heat map and the exported folder of the best learned
merge are written to `outputs/quickstart-SUITE/`. Every choice (task arithmetic's scale, a learned
merge's learning rate and step) is made on the selection split.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suite_files import suite_file

ROOT = Path(__file__).resolve().parent.parent
SCALES = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0]


@dataclass(frozen=True)
class Method:
    """A learned merge: a configuration and the learning rates that it is tuned over."""

    name: str
    config: str
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Suite:
    """What a suite is scored by, and which learned merges are shown."""

    metric: str
    higher_is_better: bool
    unit: str
    methods: tuple[Method, ...]
    digits: int = 3


SUITES = {
    "lm": Suite(
        metric="bits_per_byte",
        higher_is_better=False,
        unit="bits per byte (lower is better)",
        methods=(
            Method("learned, Tensor", "tensor", (0.05,)),
            Method("learned, Column", "column", (0.05,)),
        ),
    ),
    "vision": Suite(
        metric="accuracy",
        higher_is_better=True,
        unit="accuracy (higher is better)",
        methods=(
            Method("learned, Tensor, labels", "tensor", (0.05,)),
            Method("learned, Column, labels", "column", (0.05,)),
            Method("learned, Tensor, no labels", "entropy", (0.02,)),
        ),
    ),
}


@dataclass
class Row:
    """One method's scores on the test split."""

    name: str
    scores: dict[str, float]
    coefficients: int = 0
    seconds: float = 0.0
    note: str = ""
    average: float = field(init=False)

    def __post_init__(self) -> None:
        self.average = sum(self.scores.values()) / len(self.scores)


class SuiteRun:
    """One suite and seed: its configuration, data and baselines."""

    def __init__(self, name: str, seed: int, cache: Path, output: Path) -> None:
        self.name, self.suite, self.seed = name, SUITES[name], seed
        self.cache, self.output = cache, output
        self.output.mkdir(parents=True, exist_ok=True)
        self.config = suite_file(name, seed, cache, Path(tempfile.mkdtemp()))

    def build(self) -> None:
        """Experts and data, from the cache or new."""
        command = [sys.executable, str(ROOT / "scripts" / "suites" / f"{self.name}.py")]
        subprocess.run([*command, "--cache", str(self.cache), "--seed", str(self.seed)], check=True)

    def command(self, method: str, *options: str) -> list[str]:
        """Arguments of `gradmerge fit` for a method."""
        return [
            "fit",
            "--config",
            str(self.config),
            "--config",
            str(ROOT / "configs" / "methods" / f"{method}.yaml"),
            "--trainer.default_root_dir",
            str(self.output / "runs" / method),
            "--trainer.enable_model_summary",
            "false",
            *options,
        ]

    def baselines(self) -> tuple[list[Row], float]:
        """Base, experts, uniform average, tuned task arithmetic, upper bound; and the chosen
        scale.
        """
        import lightning
        import torch

        from gradmerge import MergeModule
        from gradmerge.cli.main import learn
        from gradmerge.coefficients import Constant, Model

        cli = learn(self.command("tensor")[1:], run=False)
        recipe, data = cli.model.recipe, cli.datamodule
        one_scale = replace(recipe, coefficients=Model(), init=Constant(0.0))
        module = MergeModule(one_scale, score_experts=False)
        module.merged.requires_grad_(False)
        trainer = lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        num = len(module.merged.plan.sources)

        def score(coefficients: list[float], stage: str) -> dict[str, float]:
            module.merged.raw["model"].data.copy_(torch.tensor(coefficients)[:, None])
            run = trainer.validate if stage == "selection" else trainer.test
            run(module, data, verbose=False)
            found = module.results[stage]
            return {task: found[task][self.suite.metric] for task in module.tasks}

        rows = [Row("base", score([0.0] * num, "test"))]
        upper = {}
        for k, source in enumerate(module.merged.plan.sources):
            one = [float(k == j) for j in range(num)]
            scores = score(one, "test")
            rows.append(Row(f"expert {source}", scores))
            upper[source] = scores[source]
        rows.append(Row("uniform average", score([1 / num] * num, "test")))
        start = time.perf_counter()
        tuned = {}
        for scale in SCALES:
            chosen = score([scale] * num, "selection")
            tuned[scale] = sum(chosen.values()) / num
        best = (max if self.suite.higher_is_better else min)(tuned, key=lambda s: tuned[s])
        row = Row("task arithmetic", score([best] * num, "test"), num, note=f"scale {best:g}")
        row.seconds = time.perf_counter() - start
        rows.append(row)
        return [*rows, Row("upper bound", upper, note="each expert on its own task")], best

    def learn(self, method: Method) -> tuple[Row, Any]:
        """The best of a method's learning rates by the selection split, scored on the test
        split.
        """
        import torch

        from gradmerge.cli.main import learn

        start = time.perf_counter()
        better = (lambda a, b: a > b) if self.suite.higher_is_better else (lambda a, b: a < b)
        best: tuple[float, float, Any] | None = None
        for rate in method.rates:
            options = [f"--optimizer.init_args.lr={rate}"]
            cli = learn(self.command(method.config, *options))
            path = cli.trainer.checkpoint_callback.best_model_path
            state = torch.load(path, weights_only=True)
            selection = state["gradmerge"]["results"]["selection"]["average"]
            value = (
                selection["loss"] if method.config == "entropy" else selection[self.suite.metric]
            )
            if best is None or (
                value < best[0] if method.config == "entropy" else better(value, best[0])
            ):
                best = (value, rate, (cli, path))
        assert best is not None
        seconds = time.perf_counter() - start
        _, rate, (cli, path) = best
        cli.trainer.test(cli.model, cli.datamodule, ckpt_path=path, verbose=False)
        found = cli.model.results["test"]
        scores = {task: found[task][self.suite.metric] for task in cli.model.tasks}
        count = sum(p.numel() for p in cli.model.parameters())
        return Row(method.name, scores, count, seconds, note=f"learning rate {rate:g}"), cli


def run(name: str, seed: int, cache: Path, output: Path) -> list[Row]:
    """Build, compare, learn, export and plot for one seed."""
    suite_run = SuiteRun(name, seed, cache, output)
    suite_run.build()
    say(f"scoring the baselines of {name}, seed {seed}")
    rows, _ = suite_run.baselines()
    upper = rows.pop()
    best: tuple[float, Any] | None = None
    for method in suite_run.suite.methods:
        say(f"learning: {method.name}")
        row, cli = suite_run.learn(method)
        rows.append(row)
        sign = 1 if suite_run.suite.higher_is_better else -1
        if best is None or sign * row.average > best[0]:
            best = (sign * row.average, cli)
    rows.append(upper)
    assert best is not None
    finish(suite_run, best[1], rows)
    return rows


def finish(suite_run: SuiteRun, cli: Any, rows: list[Row]) -> None:
    """Export the best learned merge, draw its coefficients, show a sample."""
    from gradmerge.export.folder import export_merged
    from gradmerge.training.callbacks import coefficient_table, heat_map

    merged, folder = cli.model.merged, suite_run.output / f"merged-seed{suite_run.seed}"
    export_merged(
        merged,
        folder,
        overwrite=True,
        results=cli.model.results,
        extra={"seed": suite_run.seed, "suite": suite_run.name},
    )
    names, table = coefficient_table(merged.plan, merged.raw)
    heat_map(table, names, merged.plan.source_names, suite_run.output / "coefficients.png")
    records = [
        {
            "name": row.name,
            "seed": suite_run.seed,
            "scores": row.scores,
            "average": row.average,
            "coefficients": row.coefficients,
            "seconds": round(row.seconds, 2),
            "note": row.note,
            "metric": suite_run.suite.metric,
        }
        for row in rows
    ]
    (suite_run.output / f"results-seed{suite_run.seed}.json").write_text(
        json.dumps(records, indent=2)
    )
    if suite_run.name == "lm":
        sample(folder)


def sample(folder: Path) -> None:
    """A text continued by the exported folder, with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = "The film is"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.6, top_k=20)
    print(f"\nsample of {folder.name}, by transformers alone:\n{tokenizer.decode(out[0])}\n")


def render(suite: Suite, results: dict[int, list[Row]]) -> str:
    """The table: mean over seeds, with the standard deviation where there are several."""
    first = next(iter(results.values()))
    tasks = list(first[0].scores)
    lines = [f"test split, {suite.unit}, {len(results)} seed(s)", ""]
    header = f"{'method':28s}" + "".join(f"{t[:10]:>12s}" for t in tasks) + f"{'average':>16s}"
    lines += [header + f"{'coefficients':>14s}{'seconds':>9s}", "-" * (len(header) + 23)]
    for i, row in enumerate(first):
        rows = [r[i] for r in results.values()]
        averages = [r.average for r in rows]
        spread = f" ±{statistics.stdev(averages):.3f}" if len(rows) > 1 else ""
        cells = [statistics.mean(r.scores[t] for r in rows) for t in tasks]
        line = f"{row.name:28s}" + "".join(f"{c:12.{suite.digits}f}" for c in cells)
        line += f"{statistics.mean(averages):.{suite.digits}f}{spread}".rjust(16)
        seconds = statistics.mean(r.seconds for r in rows)
        line += f"{row.coefficients or '':>14}" + (f"{seconds:9.1f}" if seconds else " " * 9)
        lines.append(f"{line}  {row.note}" if len(rows) == 1 else line)
    return "\n".join(lines)


def markdown(results: dict[int, list[Row]], digits: int) -> str:
    """The same table for the documentation."""
    first = next(iter(results.values()))
    tasks = list(first[0].scores)
    lines = [f"| method | {' | '.join(tasks)} | average | coefficients |"]
    lines.append("|---" * (len(tasks) + 3) + "|")
    for i, row in enumerate(first):
        rows = [r[i] for r in results.values()]
        averages = [r.average for r in rows]
        spread = f" ± {statistics.stdev(averages):.{digits}f}" if len(rows) > 1 else ""
        cells = [f"{statistics.mean(r.scores[t] for r in rows):.{digits}f}" for t in tasks]
        average = f"{statistics.mean(averages):.{digits}f}{spread}"
        lines.append(f"| {row.name} | {' | '.join(cells)} | {average} | {row.coefficients or ''} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", nargs="?", default="lm", choices=SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "suites")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    output = (options.output or ROOT / "outputs" / f"quickstart-{options.suite}").resolve()
    quieten()
    start = time.perf_counter()
    results = {
        seed: run(options.suite, seed, options.cache.resolve(), output) for seed in options.seeds
    }
    suite = SUITES[options.suite]
    table = render(suite, results)
    (output / "table.txt").write_text(table + "\n")
    (output / "table.md").write_text(markdown(results, suite.digits) + "\n")
    everything = []
    for seed in options.seeds:
        everything += json.loads((output / f"results-seed{seed}.json").read_text())
    (output / "results.json").write_text(json.dumps(everything, indent=2) + "\n")
    print(f"\n{table}\n")
    shown = os.path.relpath(output)
    print(f"table.txt, results.json, coefficients.png and the merged folders are in {shown}")
    print(f"took {time.perf_counter() - start:.0f} s")


def quieten() -> None:
    """Only what the reader of a quickstart needs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # Both set their own level when they are imported, so they are imported first.
    import transformers

    transformers.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
