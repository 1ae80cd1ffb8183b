"""Learned merges on a quickstart suite, tuned alike on the selection split.

    python scripts/bench_learned.py vision --seeds 3 4 5 --json learned-vision.json

Each method is a file of configs/methods with the length of the suite's own file (of LayerWise: as
many steps a block). All get the same learning rates to choose from, for a rate is a fraction of a
task vector whatever the method, and the same schedule, a cosine to 0.06 of the rate; rate and step
are chosen on the selection split, by the score, or by the loss where the method sees no labels.
The best is scored on the test split, which nothing else reads. `m3` alone draws sixteen mixing
ratios, `tensor from m3` starts at the best of them.

Every fit is a process of its own: `seconds` is the wall time of the chosen fit with its validations
(the least of the seeds, for other work on the machine only adds), `memory` how far its anonymous
memory rose (the most; mapped files do not count). `adaptation` is how many examples were learned
from, and whether their labels were read. Finished fits are kept in the cache, so that a stopped run
continues.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"  # a run for each fit would be measured, too

from measuring import measured
from suite_files import suite_file

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
FORMAT = 1  # raise when the code changes what a fit gives
METRICS = {"lm": ("bits_per_byte", False, 3), "vision": ("accuracy", True, 3)}
RATES = (0.01, 0.03, 0.1)
STEPS = {"lm": 60, "vision": 100}
_DRAWS = ("--search", "Draws", "--search.num_draws", "16", "--search.alpha", "0.5")


@dataclass(frozen=True)
class Method:
    """A file of configs/methods, with options."""

    file: str
    options: tuple[str, ...] = ()
    suites: tuple[str, ...] = ("lm", "vision")
    learns: bool = True


# With free scales entropy alone collapses (docs/benchmarks.md): entropy.yaml's term against it.
_MARGINAL = ("--model.objective.terms", '[{"class_path": "Entropy", "init_args": {"marginal": 1}}]')
# CART's start: the first components of what each source has beside the mean, scaled.
_CART = (
    *_MARGINAL,
    *("--model.recipe.origin", "mean"),
    "--model.recipe.coefficients.init_args.start=2.3",
    "--model.recipe.init.init_args.factor=2.3",
    "--model.recipe.init.init_args.inner.init_args.share=0.16",
)
# Nothing learned but the masks, and of components alone.
_MASKS = (
    *("--model.recipe.coefficients", "HardMask"),
    "--model.recipe.coefficients.start=0.1",
    *("--model.recipe.coefficients.inner", "Component"),
    *("--model.recipe.init", "LeadingComponents"),
    "--model.recipe.operator.init_args.scale=0.3",
    *("--model.recipe.frozen", '{"(?i)bias$|norm|embed|ln_|cls_token": 1.0}'),
)
_CLASSES = ("vision",)  # entropy is for classification
METHODS = {
    "tensor": Method("tensor"),
    "column": Method("column"),
    "entropy": Method("entropy", suites=_CLASSES),
    "adamerging": Method("adamerging", suites=_CLASSES),
    "adamerging_pp": Method("adamerging_pp", suites=_CLASSES),
    "adarank": Method("adarank", suites=_CLASSES),
    "adarank, marginal": Method("adarank", _MARGINAL, suites=_CLASSES),
    "adarank, marginal, from the mean": Method("adarank", _CART, suites=_CLASSES),
    "adarank, masks alone": Method("adarank", _MASKS, suites=_CLASSES),
    "dam": Method("dam"),
    "learned_soup": Method("learned_soup"),
    "atlas": Method("atlas"),
    "atlas_x_10": Method("atlas", ("--model.recipe.coefficients", "Partition")),
    "supermerge": Method("supermerge"),
    "samerging": Method("samerging"),
    "prodistill": Method("prodistill"),
    "m3": Method("tensor", ("--model.recipe.coefficients", "Model", *_DRAWS), learns=False),
    "tensor from m3": Method("tensor", _DRAWS),
}


def options_of(
    suite: str, seed: int, method: Method, rate: float, cache: Path, folder: Path
) -> Any:
    """Arguments of `gradmerge fit`."""
    steps = STEPS[suite]
    options = ["--config", str(suite_file(suite, seed, cache, folder))]
    options += ["--config", str(CONFIGS / "methods" / f"{method.file}.yaml"), *method.options]
    options += ["--trainer.max_steps", str(steps), f"--optimizer.init_args.lr={rate}"]
    cosine = "torch.optim.lr_scheduler.CosineAnnealingLR"
    options += ["--lr_scheduler", cosine, f"--lr_scheduler.T_max={steps}"]
    options += [f"--lr_scheduler.eta_min={0.06 * rate}"]
    options += ["--trainer.default_root_dir", str(folder)]
    options += ["--trainer.enable_progress_bar", "false"]
    options += ["--trainer.enable_model_summary", "false"]
    if method.file == "prodistill":
        options += ["--driver.steps", str(steps)]
    return options


def fit(suite: str, seed: int, name: str, rate: float, cache: Path) -> dict[str, Any]:
    """One fit and its scores; runs in a process of its own."""
    from gradmerge.cli import learn

    quieten()
    method, metric = METHODS[name], METRICS[suite][0]
    cost: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(suite, seed, method, rate, cache, Path(folder))
        if not method.learns:
            cli = learn(options, run=False)
            module, data, chosen, count = searched(cli, cost)
        else:
            with measured(cost):
                cli = learn(["fit", *options])
            if cli.model is None:
                module, data, chosen, count = driven(cli)
            else:
                module, data, chosen, count = fitted(cli)
        found = {
            "selection": chosen["average"][metric],
            "loss": chosen["average"]["loss"],
            "score": module.results["test"]["average"][metric],
        }
    drawn = data.batch_size * STEPS[suite]
    sizes = [len(split) for split in data.examples("adaptation").values()]
    labels = method.learns and module.objective.needs_labels and method.file != "prodistill"
    return {
        **found,
        "coefficients": count,
        "labels": labels,
        "examples": sum(min(drawn, size) for size in sizes) if method.learns else 0,
        "seconds": cost["wall"],
        "memory": cost["memory"],
    }


def quieten() -> None:
    """No warnings and no advice."""
    import logging
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fitted(cli: Any) -> tuple[Any, Any, Any, int]:
    """Scores of a fit's best step."""
    import torch

    path = cli.trainer.checkpoint_callback.best_model_path
    chosen = torch.load(path, weights_only=True)["gradmerge"]["results"]["selection"]
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=path, verbose=False)
    count = sum(p.numel() for p in cli.model.merged.parameters())
    return cli.model, cli.datamodule, chosen, count


def searched(cli: Any, cost: dict[str, float]) -> tuple[Any, Any, Any, int]:
    """Scores of a search alone."""
    from gradmerge.evaluation import Selection

    with measured(cost):
        selection = Selection(cli.model, cli.datamodule)
        selection.search(cli.config_init["search"])
    chosen = selection.score()
    selection._trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return cli.model, cli.datamodule, chosen, 1


def driven(cli: Any) -> tuple[Any, Any, Any, int]:
    """Scores of the folder that a driver wrote; each task has its own head."""
    from safetensors import safe_open

    from gradmerge import MergeModule, Recipe
    from gradmerge.coefficients import Constant, Model
    from gradmerge.evaluation import Selection

    recipe, folder = cli.job.recipe, Path(cli.job.target.path)
    whole = Recipe(
        sources={"merged": str(folder)},
        coefficients=Model(),
        init=Constant(1.0),
        private=recipe.private,
        heads=dict(recipe.sources) if recipe.private else {},
    )
    module = MergeModule(whole, score_experts=False)
    selection = Selection(module, cli.datamodule)
    chosen = selection.score()
    selection._trainer.test(module, datamodule=cli.datamodule, verbose=False)
    with safe_open(folder / "coefficients.safetensors", framework="pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return module, cli.datamodule, chosen, sum(sizes)


def cell(args: argparse.Namespace, seed: int, name: str, rate: float) -> dict[str, Any]:
    """One fit, from the cache or by a process of its own."""
    text = repr((FORMAT, METHODS[name], STEPS[args.suite], rate)).encode()
    text += (CONFIGS / "methods" / f"{METHODS[name].file}.yaml").read_bytes()
    text += (CONFIGS / "suites" / f"{args.suite}.yaml").read_bytes()
    slug = name.replace(" ", "-")
    kept = args.cache.parent / "learned"
    kept /= f"{args.suite}-{seed}-{slug}-{rate:g}-{zlib.crc32(text):08x}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    command = [sys.executable, __file__, args.suite, "--cache", str(args.cache)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command += ["--json", str(output), "--fit", str(seed), name, str(rate)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}, rate {rate:g} failed:\n{done.stderr[-3000:]}")
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
        value = float(found["selection"] if found["labels"] else found["loss"])
        if not math.isfinite(value):
            return math.inf
        return -value if found["labels"] and higher else value

    return min(trials, key=rank)


def render(suite: str, found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A markdown table, the best first."""
    metric, higher, digits = METRICS[suite]
    lines = [
        f"| method | {metric} | rates | coefficients | adaptation | seconds | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]

    def mean(name: str) -> float:
        return statistics.mean(result["score"] for result in found[name].values())

    for name in sorted((n for n in found if found[n]), key=mean, reverse=higher):
        results = list(found[name].values())
        scores = [result["score"] for result in results]
        spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
        rates = ", ".join(f"{result['rate']:g}" for result in results)
        first = results[0]
        labels = "labels" if first["labels"] else "no labels"
        data = f"{first['examples']:,}, {labels}" if first["examples"] else "none; selection labels"
        lines.append(
            f"| `{name}` | {mean(name):.{digits}f}{spread} | "
            f"{rates if METHODS[name].learns else '-'} | {first['coefficients']:,} | {data} | "
            f"{min(r['seconds'] for r in results):.0f} | "
            f"{max(r['memory'] for r in results) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", choices=METRICS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all of the suite")
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
    methods = args.methods or [n for n, m in METHODS.items() if args.suite in m.suites]
    found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in methods}
    for seed in args.seeds:
        build = [sys.executable, str(ROOT / "scripts" / "suites" / f"{args.suite}.py")]
        command = [*build, "--cache", str(args.cache), "--seed", str(seed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for method in methods:
            rates = RATES if METHODS[method].learns else RATES[:1]
            trials = {rate: cell(args, seed, method, rate) for rate in rates}
            rate = best_of(args.suite, trials)
            found[method][seed] = {"rate": rate, **trials[rate]}
            print(f"seed {seed} {method}: {found[method][seed]}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(render(args.suite, found))


if __name__ == "__main__":
    main()
