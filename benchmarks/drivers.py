"""Merges of two sources at a time, and of a source onto an earlier merge, on a quickstart suite.

    python benchmarks/drivers.py vision --seeds 3 4 5 --json drivers-vision.json

All merges of a driver together get the suite's number of steps, the same learning rates to choose
from and the same schedule. Rate and step are chosen on the selection split by the score; the test
split decides nothing. docs/benchmarks/learned.md says what the columns are.

Every fit is a process of its own; finished ones are kept in the cache, so that a stopped run
resumes where it stopped.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import harness
from harness import CONFIGS, SUITES

os.environ["WANDB_MODE"] = "disabled"  # a run for each fit would be measured, too

FORMAT = 2  # raise when the code changes what a fit gives
RATES = (0.01, 0.03, 0.1)
_QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@dataclass(frozen=True)
class Method:
    """Files of configs, with options."""

    files: tuple[str, ...]
    options: tuple[str, ...] = ()
    sources: str = "all"
    """`first`: all but the last; `last`: that one alone, onto a merge of the others."""
    data: str = "all"
    """`new`: of the sources' own tasks alone."""
    learns: bool = True
    """False to stay at the start."""

    def uses(self, kind: str) -> bool:
        """Check for a file of a folder of configs: `methods` learn, `drivers` do so in parts."""
        return any(file.startswith(kind) for file in self.files)


_CONTINUAL = Method(("methods/tensor", "drivers/continual"), sources="last")
_PLAIN = ("--driver.projection", "false")
DRIVERS = {
    "tensor": Method(("methods/tensor",)),
    "pairwise": Method(("methods/tensor", "drivers/pairwise")),
    "tree": Method(("methods/tensor", "drivers/tree")),
}
for _name, _options in (("continual", _PLAIN), ("continual, projected", ())):
    DRIVERS[_name] = replace(_CONTINUAL, options=_options)
    DRIVERS[f"{_name}, new data"] = replace(DRIVERS[_name], data="new")
    DRIVERS[f"{_name}, not learned"] = replace(DRIVERS[f"{_name}, new data"], learns=False)
# The merge that `continual` goes on with.
_EARLIER = "earlier"
ALL = DRIVERS | {_EARLIER: replace(DRIVERS["tensor"], sources="first", data="new")}


@dataclass(frozen=True)
class Job:
    """One fit of a method."""

    suite: str
    seed: int
    name: str
    rate: float
    cache: Path
    earlier: str = ""
    """Name of the merge that it goes on with."""

    @property
    def method(self) -> Method:
        return ALL[self.name]

    @property
    def steps(self) -> int:
        driven = 1 / 3 if self.method.uses("drivers") else 1.0
        share = 2 / 3 if self.method.sources == "first" else driven
        return round(SUITES[self.suite].steps * share)

    @property
    def key(self) -> str:
        """Name of all that the result depends on."""
        files = (f"suites/{self.suite}", *self.method.files)
        read = [(CONFIGS / f"{file}.yaml").read_text() for file in files]
        mark = harness.fingerprint([FORMAT, self.method, self.steps, read, self.earlier])
        return f"{self.suite}-{self.seed}-{self.name.replace(' ', '-')}-{self.rate:g}-{mark[:8]}"

    def path(self, key: str) -> Path:
        """Return a place in the cache of finished fits."""
        return self.cache.parent / "drivers" / key

    def result(self) -> dict[str, Any]:
        """Read the result from the cache, or compute it in a process of its own."""
        return harness.cached(self.path(f"{self.key}.json"), lambda: harness.ask(fit, self))


# ---- one fit, in a process of its own -----------------------------------------------------------


def options_of(job: Job, suite: Path) -> list[str]:
    method, steps = job.method, job.steps
    config = yaml.safe_load(suite.read_text())
    sources = config["model"]["recipe"]["sources"]
    *first, last = sources
    for gone in {"all": [], "first": [last], "last": first}[method.sources]:
        del sources[gone]
        if method.data == "new":
            del config["data"]["tasks"][gone]
    if method.sources == "first":
        arguments = {"output": str(job.path(job.key)), "overwrite": True}
        export = {"class_path": "ExportAtEnd", "init_args": arguments}
        config["trainer"]["callbacks"].append(export)
    part = suite.with_name("part.yaml")
    part.write_text(yaml.safe_dump(config, sort_keys=False))
    files = [part, *(CONFIGS / f"{file}.yaml" for file in method.files)]
    options = [word for file in files for word in ("--config", str(file))]
    options += ["--trainer.default_root_dir", str(suite.parent), *method.options]
    if method.sources == "last":
        options += ["--driver.earlier", str(job.path(job.earlier))]
    options += [
        *("--trainer.max_steps", str(steps), f"--optimizer.init_args.lr={job.rate}"),
        *("--lr_scheduler", "gradmerge.optimisers.CosineDecay"),
        *_QUIET,
    ]
    if method.uses("drivers"):
        options += ["--trainer.val_check_interval", str(max(1, steps // 3))]
    return options


def fit(job: Job) -> dict[str, Any]:
    """Fit once and score; runs in a process of its own."""
    from gradmerge.cli.main import learn
    from gradmerge.training.search import Scorer

    metric = SUITES[job.suite].metric
    cost: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        suite = harness.suite_file(job.suite, job.seed, job.cache, Path(folder))
        options = options_of(job, suite)
        with harness.measured(cost):
            cli = learn(["fit", *options])
        module, data, tasks = cli.model, cli.datamodule, list(cli.datamodule.tasks)
        if module is None:  # a driver's merge is a folder, whose tasks each have their own head
            written = str(cli.job.target.folder)
            count = coefficients_of(Path(written))
            quiet = (*_QUIET, "--verbose=false", f"--trainer.default_root_dir={folder}")
            cli = learn(["test", "--config", str(suite), "--model", written, *quiet])
            module, data = cli.model, cli.datamodule
        else:
            count = sum(p.numel() for p in module.merged.parameters())
            cli.trainer.test(module, data, ckpt_path="best", verbose=False)
        test, chosen = module.results["test"], Scorer(module, data).score()
    drawn = data.batch_size * SUITES[job.suite].steps
    sizes = {task: len(found) for task, found in data.examples("adaptation").items()}
    return {
        "selection": statistics.mean(chosen[task][metric] for task in tasks),
        "loss": statistics.mean(chosen[task]["loss"] for task in tasks),
        "score": test["average"][metric],
        "test": {task: scores[metric] for task, scores in test.items()},
        "coefficients": count,
        "examples": sum(min(drawn, sizes[task]) for task in tasks),
        "seconds": cost["wall"],
        "memory": cost["memory"],
    }


def coefficients_of(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "coefficients.st", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


# ---- all fits -----------------------------------------------------------------------------------


def tuned(job: Job, rates: Sequence[float]) -> tuple[Job, dict[str, Any]]:
    """Return the job with the rate that the selection split prefers, and its result."""
    method = job.method
    if method.sources == "last":
        job = replace(job, earlier=tuned(replace(job, name=_EARLIER), rates)[0].key)
    rates = rates if method.learns else (0.0,)
    trials = {rate: replace(job, rate=rate).result() for rate in rates}
    rate = best_of(job.suite, trials)
    return replace(job, rate=rate), {"rate": rate, **trials[rate]}


def best_of(suite: str, trials: dict[float, dict[str, Any]]) -> float:
    own = SUITES[suite]

    def rank(rate: float) -> float:
        value = trials[rate]["selection"]
        return -math.inf if math.isnan(value) else value if own.higher_is_better else -value

    return max(trials, key=rank)


def render(suite: str, found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return a markdown table, the best first, with the last task apart."""

    def tasks(part: slice) -> Callable[[list[dict[str, Any]]], str]:
        def cell(results: list[dict[str, Any]]) -> str:
            every = [[s for task, s in r["test"].items() if task != "average"] for r in results]
            return f"{statistics.mean(s for one in every for s in one[part]):.3f}"

        return cell

    columns = {
        "first three tasks": tasks(slice(-1)),
        "the fourth": tasks(slice(-1, None)),
        "rates": lambda rs: ", ".join(f"{r['rate']:g}" for r in rs),
        "coefficients": lambda rs: f"{rs[0]['coefficients']:,}",
        "adaptation": lambda rs: f"{rs[0]['examples']:,}",
        "seconds": lambda rs: f"{min(r['seconds'] for r in rs):.0f}",
        "memory, MB": lambda rs: f"{max(r['memory'] for r in rs) / 1e6:.0f}",
    }
    return harness.ranking(suite, found, columns)


def main() -> None:
    parser = harness.suite_parser(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="to choose from")
    args = parser.parse_args()

    def score(name: str, seed: int) -> dict[str, Any]:
        job = Job(args.suite, seed, name, RATES[0], args.cache.resolve())
        return tuned(job, args.rates)[1]

    found = harness.compare(args.suite, list(DRIVERS), args, score)
    print(render(args.suite, found))


if __name__ == "__main__":
    main()
