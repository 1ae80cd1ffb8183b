"""The main job on real data: build experts, learn merges, compare, export, plot.

    python scripts/quickstart.py lm            four text domains, a byte-level Llama
    python scripts/quickstart.py vision        four image tasks, labelled and unlabelled
    python scripts/quickstart.py chat          three tasks in chat, SmolLM2-135M-Instruct with LoRA

For each seed the suite is built (or found in the cache), baselines and learned merges are scored on
the test split, and a table, `results.json`, a heat map and the exported folder of the best learned
merge are written to `outputs/quickstart-SUITE/`. Every choice (task arithmetic's scale, a learned
merge's step) is made on the selection split.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import harness

SCALES = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0]
# The learned merges of each suite: a name, a file of configs/methods and its learning rate.
METHODS = {
    "lm": (("learned, Tensor", "tensor", 0.05), ("learned, Column", "column", 0.05)),
    "vision": (
        ("learned, Tensor, labels", "tensor", 0.05),
        ("learned, Column, labels", "column", 0.05),
        ("learned, Tensor, no labels", "entropy", 0.02),
    ),
    "chat": (("learned, Tensor", "tensor", 0.05), ("learned, Column", "column", 0.05)),
}


@dataclass
class Row:
    """One method's scores on the test split."""

    name: str
    scores: dict[str, float]
    coefficients: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def average(self) -> float:
        """Mean over tasks."""
        return sum(self.scores.values()) / len(self.scores)


@dataclass
class Run:
    """One suite and seed: its configuration, data and merges."""

    name: str
    seed: int
    cache: Path
    output: Path

    def learn(self, method: str, *options: str, run: bool = True) -> Any:
        """Run `gradmerge fit` with a method, or only open its merge and data."""
        from gradmerge.cli.main import learn

        with tempfile.TemporaryDirectory() as folder:
            suite = harness.suite_file(self.name, self.seed, self.cache, Path(folder))
            own = harness.CONFIGS / "methods" / f"{method}.yaml"
            given = ["fit"] if run else []
            given += ["--config", str(suite), "--config", str(own), *options]
            given += ["--trainer.default_root_dir", str(self.output / "runs" / method)]
            return learn([*given, "--trainer.enable_model_summary", "false"], run=run)

    def by_task(self, scores: dict[str, Any]) -> dict[str, float]:
        """Return the suite's metric of each task."""
        metric = harness.SUITES[self.name].metric
        return {task: found[metric] for task, found in scores.items() if task != "average"}

    def baselines(self) -> list[Row]:
        """Score base, experts, uniform average and tuned task arithmetic; last, the upper bound."""
        from gradmerge import MergeModule
        from gradmerge.coefficients import Constant, Model
        from gradmerge.search import Scales
        from gradmerge.training.search import Scorer, set_coefficients

        cli = self.learn("tensor", run=False)
        recipe = replace(cli.model.recipe, coefficients=Model(), init=Constant(1.0))
        module = MergeModule(recipe, score_experts=False, dtype=cli.model.hparams["dtype"])
        sources = list(recipe.sources)

        def test(*coefficients: float) -> dict[str, float]:
            set_coefficients(module.merged, Constant(list(coefficients)))
            return self.by_task(harness.tested(module, cli.datamodule))

        rows = [Row("base", test(*[0.0] * len(sources)))]
        upper = {}
        for source in sources:
            scores = test(*(float(source == other) for other in sources))
            rows.append(Row(f"expert {source}", scores))
            upper[source] = scores[source]
        rows.append(Row("uniform average", test(*[1 / len(sources)] * len(sources))))
        start = time.perf_counter()
        chosen, _ = Scorer(module, cli.datamodule).search(Scales(SCALES))
        scores, note = test(*[chosen.factor] * len(sources)), f"scale {chosen.factor:g}"
        seconds = time.perf_counter() - start
        rows.append(Row("task arithmetic", scores, len(sources), seconds, note))
        return [*rows, Row("upper bound", upper, note="each expert on its own task")]

    def compare(self) -> list[Row]:
        """Build, compare, learn, export and plot."""
        harness.build_suite(self.name, self.seed, self.cache, quiet=False)
        say(f"scoring the baselines of {self.name}, seed {self.seed}")
        *rows, upper = self.baselines()
        learned = []
        for name, method, rate in METHODS[self.name]:
            say(f"learning: {name}")
            start = time.perf_counter()
            cli = self.learn(method, f"--optimizer.init_args.lr={rate}")
            seconds = time.perf_counter() - start
            cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)
            count = sum(p.numel() for p in cli.model.parameters())
            scores = self.by_task(cli.model.results["test"])
            rows.append(Row(name, scores, count, seconds, f"learning rate {rate:g}"))
            learned.append((rows[-1].average, cli.model))
        choose = max if harness.SUITES[self.name].higher_is_better else min
        self.finish(choose(learned, key=lambda found: found[0])[1])
        return [*rows, upper]

    def finish(self, module: Any) -> None:
        """Export the best learned merge, draw its coefficients, show a sample."""
        from gradmerge import export_merged
        from gradmerge.export.plots import CoefficientTable, heat_map, png

        merged, folder = module.merged, self.output / f"merged-seed{self.seed}"
        about = {"seed": self.seed, "suite": self.name}
        known = {"results": module.results, "history": module.history, "extra": about}
        export_merged(merged, folder, overwrite=True, **known)
        if drawn := png(heat_map, CoefficientTable.of(merged.state)):
            (self.output / "coefficients.png").write_bytes(drawn)
        if self.name == "lm":
            sample(folder)
        elif self.name == "chat":
            answer(folder, self.cache / f"chat-seed{self.seed}")


def answer(folder: Path, suite: Path) -> None:
    """Answer a question of each task with the exported folder, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(f"\nanswers of {folder.name}, by transformers alone:")
    for path in sorted(suite.glob("data/*/test.jsonl")):
        asked, wanted = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["messages"]
        inputs = tokenizer.apply_chat_template(
            [asked], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{asked['content']}\n-> {new} (expected {wanted['content']})\n")


def sample(folder: Path) -> None:
    """Continue a text with the exported folder, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("The film is", return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.6, top_k=20)
    print(f"\nsample of {folder.name}, by transformers alone:\n{tokenizer.decode(out[0])}\n")


def render(results: Sequence[list[Row]]) -> str:
    """Return the table: means over seeds, with the standard deviation where there are several."""
    tasks = list(results[0][0].scores)
    lines = []
    for rows in zip(*results, strict=True):
        cells = [f"{statistics.mean(r.scores[t] for r in rows):.3f}" for t in tasks]
        seconds = statistics.mean(r.seconds for r in rows)
        cells += [harness.spread([r.average for r in rows])]
        cells += [str(rows[0].coefficients or "")]
        cells += [f"{seconds:.1f}" if seconds else "", rows[0].note if len(rows) == 1 else ""]
        lines.append([rows[0].name, *cells])
    return harness.table(
        ["method", *tasks, "average", "coefficients", "seconds", "note"], lines, pad=True
    )


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", nargs="?", default="lm", choices=harness.SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cache", type=Path, default=harness.ROOT / ".cache" / "suites")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    name, suite = options.suite, harness.SUITES[options.suite]
    output = (options.output or harness.ROOT / "outputs" / f"quickstart-{name}").resolve()
    output.mkdir(parents=True, exist_ok=True)
    harness.quieten()
    start = time.perf_counter()
    results, records = [], []
    for seed in options.seeds:
        results.append(Run(name, seed, options.cache.resolve(), output).compare())
        for row in results[-1]:
            found = {"seed": seed, "average": row.average, "metric": suite.metric}
            records.append({**asdict(row), "seconds": round(row.seconds, 2), **found})
        harness.write_json(output / "results.json", records)
    title = f"test split, {suite.unit}, {len(results)} seed(s)"
    text = f"{title}\n\n{render(results)}\n"
    (output / "table.md").write_text(text)
    print(f"\n{text}")
    shown = os.path.relpath(output)
    print(f"table.md, results.json, coefficients.png and the merged folders are in {shown}")
    print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
