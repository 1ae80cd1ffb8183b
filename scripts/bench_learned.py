"""Learned merges on a quickstart suite, tuned alike on the selection split.

    python scripts/bench_learned.py vision --seeds 3 4 5 --json learned-vision.json

Each method is a file of configs/methods on the suite's own length of training. Its learning rate is
tuned: a third of what the file states, that, and three times that; the rate and the step are chosen
on the selection split, by the score, or by the loss where the method sees no labels. The best is
scored on the test split, which nothing else reads. Every fit is a process of its own: `seconds` is
the time of one fit with its validations, `memory` how far its anonymous memory rose (mapped files
do not count). Finished fits are kept in the cache, so that a stopped run continues.

The suite's schedule ends at 0.06 of each rate, as it does for the rate that it was written for.
`adaptation` is how many examples were learned from, and whether their labels were read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import yaml

from measuring import measured

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "configs" / "methods"
METRICS = {"lm": ("bits_per_byte", False, 3), "vision": ("accuracy", True, 3)}
FACTORS = (1 / 3, 1.0, 3.0)
_OWN = {
    "lm": ("tensor", "column", "dam", "learned_soup", "atlas", "supermerge", "samerging"),
    "vision": (
        "tensor",
        "column",
        "entropy",
        "adamerging",
        "adamerging_pp",
        "dam",
        "learned_soup",
        "atlas",
        "supermerge",
        "samerging",
        "adarank",
    ),
}


def suite_file(suite: str, seed: int, cache: Path, folder: Path) -> Path:
    """The shipped configuration, for another seed."""
    text = (ROOT / "configs" / "suites" / f"{suite}.yaml").read_text()
    text = text.replace(".cache/suites", str(cache))
    text = text.replace(f"{suite}-seed0", f"{suite}-seed{seed}")
    text = text.replace("seed_everything: 0", f"seed_everything: {seed}")
    path = folder / f"{suite}-seed{seed}.yaml"
    path.write_text(text)
    return path


def stated_rate(method: str) -> float:
    """The learning rate of a method's file."""
    found = yaml.safe_load((METHODS / f"{method}.yaml").read_text())
    return float(found["optimizer"]["init_args"]["lr"])


def fit(suite: str, seed: int, method: str, rate: float, cache: Path) -> dict[str, Any]:
    """One fit and its scores; runs in a process of its own."""
    import logging
    import warnings

    import torch
    import transformers

    from gradmerge.cli import learn

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    metric = METRICS[suite][0]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--config", str(suite_file(suite, seed, cache, Path(folder)))]
        options += ["--config", str(METHODS / f"{method}.yaml")]
        options += [f"--optimizer.init_args.lr={rate}", "--trainer.default_root_dir", folder]
        options += [f"--lr_scheduler.init_args.eta_min={0.06 * rate}"]
        options += ["--trainer.enable_progress_bar", "false"]
        options += ["--trainer.enable_model_summary", "false"]
        cost: dict[str, float] = {}
        with measured(cost):
            cli = learn(["fit", *options])
        path = cli.trainer.checkpoint_callback.best_model_path
        chosen = torch.load(path, weights_only=True)["gradmerge"]["results"]["selection"]
        cli.trainer.test(cli.model, cli.datamodule, ckpt_path=path, verbose=False)
    module, data = cli.model, cli.datamodule
    drawn = data.batch_size * int(cli.trainer.global_step)
    return {
        "selection": chosen["average"][metric],
        "loss": chosen["average"]["loss"],
        "score": module.results["test"]["average"][metric],
        "coefficients": sum(p.numel() for p in module.merged.parameters()),
        "labels": module.objective.needs_labels,
        "examples": sum(min(drawn, len(split)) for split in data.examples("adaptation").values()),
        "seconds": cost["wall"],
        "memory": cost["memory"],
    }


def cell(args: argparse.Namespace, seed: int, method: str, rate: float) -> dict[str, Any]:
    """One fit, from the cache or by a process of its own."""
    text = (METHODS / f"{method}.yaml").read_bytes()
    text += (ROOT / "configs" / "suites" / f"{args.suite}.yaml").read_bytes()
    name = f"{args.suite}-{seed}-{method}-{rate:.6g}-{zlib.crc32(text):08x}.json"
    kept = args.cache.parent / "learned" / name
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    command = [sys.executable, __file__, args.suite, "--cache", str(args.cache)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command += ["--json", str(output), "--fit", str(seed), method, str(rate)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{method}, seed {seed}, rate {rate:g} failed:\n{done.stderr[-2000:]}")
        found = json.loads(output.read_text())
    kept.parent.mkdir(parents=True, exist_ok=True)
    work = kept.with_suffix(".partial")
    work.write_text(json.dumps(found))
    work.replace(kept)
    return found


def best_of(suite: str, trials: dict[float, dict[str, Any]]) -> float:
    """The rate that the selection split prefers."""
    higher = METRICS[suite][1]

    def rank(rate: float) -> float:
        found = trials[rate]
        value = found["selection"] if found["labels"] else found["loss"]
        if not math.isfinite(value):
            return math.inf
        return -value if found["labels"] and higher else value

    return min(trials, key=rank)


def render(suite: str, found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A markdown table, the best first."""
    metric, higher, digits = METRICS[suite]
    lines = [
        f"| method (`configs/methods`) | {metric} | rates | coefficients | adaptation | seconds "
        "| memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]

    def mean(name: str) -> float:
        return statistics.mean(result["score"] for result in found[name].values())

    for name in sorted(found, key=mean, reverse=higher):
        results = list(found[name].values())
        scores = [result["score"] for result in results]
        spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
        rates = ", ".join(f"{result['rate']:.2g}" for result in results)
        first = results[0]
        labels = "labels" if first["labels"] else "no labels"
        lines.append(
            f"| `{name}` | {mean(name):.{digits}f}{spread} | {rates} | {first['coefficients']:,} | "
            f"{first['examples']:,}, {labels} | "
            f"{statistics.mean(r['seconds'] for r in results):.0f} | "
            f"{max(r['memory'] for r in results) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", choices=METRICS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="names of files in configs/methods")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "suites")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cache = args.cache.resolve()
    if args.fit:
        seed, method, rate = args.fit
        found_one = fit(args.suite, int(seed), method, float(rate), args.cache)
        args.json.write_text(json.dumps(found_one))
        return
    methods = args.methods or _OWN[args.suite]
    found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in methods}
    for seed in args.seeds:
        build = [sys.executable, str(ROOT / "scripts" / "suites" / f"{args.suite}.py")]
        command = [*build, "--cache", str(args.cache), "--seed", str(seed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for method in methods:
            stated = stated_rate(method)
            trials = {
                stated * factor: cell(args, seed, method, stated * factor) for factor in FACTORS
            }
            rate = best_of(args.suite, trials)
            found[method][seed] = {"rate": rate, **trials[rate]}
            print(f"seed {seed} {method}: {found[method][seed]}", flush=True)
    print(render(args.suite, found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
