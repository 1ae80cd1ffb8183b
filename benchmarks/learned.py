"""Learned merges on a quickstart suite, tuned alike on the selection split.

    python benchmarks/learned.py vision --seeds 3 4 5 --json learned-vision.json

Each method is a file of configs/methods with the length of the suite's own file (of LayerWise: as
many steps per block). All get the same learning rates to choose from, for a rate is a fraction of a
task vector whatever the method, and the same schedule, a cosine to 0.06 of the rate; rate and step
are chosen on the selection split, by the score, or by the loss where the method sees no labels.
The best is scored on the test split, which nothing else reads. `m3` alone draws sixteen mixing
ratios (over task arithmetic, of which linear is the same for ratios that sum to one, over DARE and
TIES), `tensor from m3` starts at the best of them.

`--drivers` prints a table of its own: `tensor` two at a time, all merges together as many steps as
one fit of all four, and the fourth source onto an earlier merge of the first three, which was
learned with two thirds of the steps and the best of the rates. *New data*: of the fourth task
alone, to learn and to choose by, as if the others' were gone; *not learned*: where that starts. All
are scored on all four tasks.

Every fit is a process of its own: `seconds` is the wall time of the chosen fit with its validations
(the least of the seeds, for other work on the machine only adds), `memory` how far its anonymous
memory rose (the most; mapped files do not count). `adaptation` is how many examples were learned
from, and whether their labels were read. Finished fits are kept in the cache, so that a stopped run
resumes where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import harness

os.environ["WANDB_MODE"] = "disabled"  # a run for each fit would be measured, too

FORMAT = 1  # raise when the code changes what a fit gives
RATES = (0.01, 0.03, 0.1)
_DRAWS = ("--search", "Draws", "--search.num_draws", "16", "--search.alpha", "0.5")


@dataclass(frozen=True)
class Method:
    """A file of configs/methods, with options."""

    file: str
    options: tuple[str, ...] = ()
    suites: tuple[str, ...] = ("lm", "vision")
    learns: bool = True
    driver: str = ""
    """A file of configs/drivers."""
    sources: str = "all"
    """`first`: all but the last; `last`: that one alone, onto a merge of the others."""
    data: str = "all"
    """`new`: of the sources' own tasks alone."""
    rates: tuple[float, ...] = ()
    """Instead of those to choose from."""

    @property
    def share(self) -> float:
        """Share of the suite's steps that each of its fits takes."""
        if self.sources == "first":
            return 2 / 3
        return 1 / 3 if self.driver else 1.0


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
# The paper's method over each of its merges (configs/static).
_M3 = ("--model.recipe.coefficients", "Model", *_DRAWS)
_DROPPED = (
    "--model.recipe.preprocess",
    '[{"class_path": "RandomDrop", "init_args": {"density": 0.5, "seed": 0}}]',
)
_TRIMMED = (
    "--model.recipe.preprocess",
    '[{"class_path": "Trim", "init_args": {"density": 0.2}}]',
    *("--model.recipe.operator", "DisjointMean"),
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
    "m3": Method("tensor", _M3, learns=False),
    "m3, dare": Method("tensor", (*_M3, *_DROPPED), learns=False),
    "m3, ties": Method("tensor", (*_M3, *_TRIMMED), learns=False),
    "tensor from m3": Method("tensor", _DRAWS),
}
# The merge that `continual` goes on with.
_EARLIER = "earlier"
_PLAIN = ("--driver.projection", "false")
DRIVERS = {
    "tensor": METHODS["tensor"],
    "pairwise": Method("tensor", driver="pairwise"),
    "tree": Method("tensor", driver="tree"),
    _EARLIER: Method("tensor", sources="first", data="new"),
    "continual": Method("tensor", _PLAIN, driver="continual", sources="last"),
    "continual, projected": Method("tensor", driver="continual", sources="last"),
    "continual, new data": Method("tensor", _PLAIN, driver="continual", sources="last", data="new"),
    "continual, projected, new data": Method(
        "tensor", driver="continual", sources="last", data="new"
    ),
}
for _name in ("continual", "continual, projected"):
    DRIVERS[f"{_name}, not learned"] = replace(DRIVERS[f"{_name}, new data"], rates=(0.0,))
ALL = METHODS | DRIVERS


@dataclass(frozen=True)
class Job:
    """One fit of a method."""

    suite: str
    seed: int
    name: str
    rate: float
    cache: Path
    earlier: Path | None = None
    """The merge that it goes on with, or, of that merge itself, where it goes."""

    @property
    def method(self) -> Method:
        """The method that is learned."""
        return ALL[self.name]

    @property
    def key(self) -> str:
        """Name of all that the result depends on."""
        method = self.method
        files = [f"suites/{self.suite}", f"methods/{method.file}"]
        files += [f"drivers/{method.driver}"] if method.driver else []
        read = [yaml.safe_load((harness.CONFIGS / f"{file}.yaml").read_text()) for file in files]
        own = (method.options, method.learns, method.driver, method.sources, method.data)
        earlier = self.earlier.name if self.earlier and method.sources == "last" else ""
        text = repr((FORMAT, own, harness.SUITES[self.suite].steps, self.rate, read, earlier))
        slug = self.name.replace(" ", "-")
        number = zlib.crc32(text.encode())
        return f"{self.suite}-{self.seed}-{slug}-{self.rate:g}-{number:08x}"

    def result(self) -> dict[str, Any]:
        """Read the result from the cache, or compute it in a process of its own."""
        kept = self.cache.parent / "learned" / f"{self.key}.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        given = (self.suite, self.seed, self.name, self.rate, self.cache, self.earlier)
        found = harness.ask(__file__, *given)
        kept.parent.mkdir(parents=True, exist_ok=True)
        work = kept.with_suffix(".partial")
        work.write_text(json.dumps(found))
        work.replace(kept)
        return found


# ---- one fit, in a process of its own -----------------------------------------------------------


def options_of(job: Job, folder: Path, whole: bool = False) -> list[str]:
    """Return the arguments of `gradmerge fit`.

    Args:
        job: what is to be learned.
        folder: for files of its own.
        whole: with all sources and tasks, and without a driver.
    """
    method = job.method
    steps = round(harness.SUITES[job.suite].steps * method.share)
    folder.mkdir(exist_ok=True)
    path = harness.suite_file(job.suite, job.seed, job.cache, folder)
    options = ["--config", str(path)]
    options += ["--config", str(harness.CONFIGS / "methods" / f"{method.file}.yaml")]
    if whole:
        options += ["--driver", "null"]  # some methods' files have one
    else:
        _leave_part(path, method, job.earlier if method.sources == "first" else None)
        if method.driver:
            options += ["--config", str(harness.CONFIGS / "drivers" / f"{method.driver}.yaml")]
        if method.sources == "last":
            options += ["--driver.earlier", str(job.earlier)]
        options += method.options
    cosine = "torch.optim.lr_scheduler.CosineAnnealingLR"
    options += [
        *("--trainer.max_steps", str(steps), f"--optimizer.init_args.lr={job.rate}"),
        *("--lr_scheduler", cosine, f"--lr_scheduler.T_max={steps}"),
        f"--lr_scheduler.eta_min={0.06 * job.rate}",
        *("--trainer.default_root_dir", str(folder)),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    if method.driver:
        options += ["--trainer.val_check_interval", str(max(1, steps // 3))]
    if method.file == "prodistill" and not whole:
        options += ["--driver.steps", str(steps)]
    return options


def _leave_part(path: Path, method: Method, output: Path | None) -> None:
    """Leave a suite's file with a method's own sources and tasks alone."""
    config = yaml.safe_load(path.read_text())
    sources = config["model"]["recipe"]["sources"]
    *first, last = sources
    for gone in {"all": [], "first": [last], "last": first}[method.sources]:
        del sources[gone]
        if method.data == "new":
            del config["data"]["tasks"][gone]
    if output is not None:
        arguments = {"output": str(output), "overwrite": True}
        export = {"class_path": "ExportAtEnd", "init_args": arguments}
        config["trainer"]["callbacks"].append(export)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def fit(job: Job) -> dict[str, Any]:
    """Fit once and score; runs in a process of its own."""
    from gradmerge.cli.main import learn

    harness.quieten()
    method, suite = job.method, harness.SUITES[job.suite]
    cost: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(job, Path(folder))
        if method.learns:
            with harness.measured(cost):
                cli = learn(["fit", *options])
        else:
            cli = learn(options, run=False)
        module, data = cli.model, cli.datamodule
        if not method.learns:
            chosen, test, count = searched(cli, cost)
        elif module is None:
            whole = options_of(job, Path(folder) / "whole", whole=True)
            module, data, chosen, test, count = driven(cli, learn(whole, run=False))
        else:
            chosen, test = harness.best_step(cli), module.results["test"]
            count = sum(p.numel() for p in module.merged.parameters())
    drawn = data.batch_size * suite.steps
    examples = data.examples("adaptation")
    sizes = [len(examples[task]) for task in cli.datamodule.tasks]
    labels = method.learns and module.objective.needs_labels and method.file != "prodistill"
    return {
        "selection": chosen["average"][suite.metric],
        "loss": chosen["average"]["loss"],
        "score": test["average"][suite.metric],
        "test": {task: scores[suite.metric] for task, scores in test.items()},
        "coefficients": count,
        "labels": labels,
        "examples": sum(min(drawn, size) for size in sizes) if method.learns else 0,
        "seconds": cost["wall"],
        "memory": cost["memory"],
    }


def searched(cli: Any, cost: dict[str, float]) -> tuple[Any, Any, int]:
    """Return scores on selection and test of a search alone, and how many numbers it chose."""
    from gradmerge.training.search import Selection

    with harness.measured(cost):
        selection = Selection(cli.model, cli.datamodule)
        selection.search(cli.config_init["search"])
    return selection.score(), harness.tested(cli.model, cli.datamodule), 1


def driven(cli: Any, whole: Any) -> tuple[Any, Any, Any, Any, int]:
    """Score the folder that a driver wrote; each task has its own head."""
    from safetensors import safe_open

    from gradmerge import MergeModule, Recipe
    from gradmerge.coefficients import Constant, Model
    from gradmerge.training.search import Selection

    recipe, folder = whole.model.merged.plan.recipe, cli.job.target.folder
    merged = Recipe(
        sources={"merged": str(folder)},
        coefficients=Model(),
        init=Constant(1.0),
        private=recipe.private,
        heads=dict(recipe.sources) if recipe.private else {},
    )
    module = MergeModule(merged, score_experts=False)
    scores = Selection(module, whole.datamodule).score()
    mine = list(cli.datamodule.tasks)
    metrics = {name for task in mine for name in scores[task]}
    average = {m: statistics.mean(scores[task][m] for task in mine) for m in metrics}
    with safe_open(folder / "coefficients.safetensors", framework="pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    test = harness.tested(module, whole.datamodule)
    return module, whole.datamodule, {"average": average}, test, sum(sizes)


# ---- all fits -----------------------------------------------------------------------------------


def tuned(
    suite: str, seed: int, name: str, cache: Path, rates: Sequence[float]
) -> tuple[Job, dict[str, Any]]:
    """Return the job whose rate the selection split prefers, and its result."""
    method = ALL[name]
    jobs = []
    for rate in method.rates or (rates if method.learns else RATES[:1]):
        job = Job(suite, seed, name, rate, cache)
        if method.sources == "first":
            job = replace(job, earlier=cache.parent / "learned" / job.key)
        elif method.sources == "last":
            job = replace(job, earlier=tuned(suite, seed, _EARLIER, cache, rates)[0].earlier)
        jobs.append(job)
    trials = {job.rate: job.result() for job in jobs}
    rate = best_of(suite, trials)
    return next(job for job in jobs if job.rate == rate), {"rate": rate, **trials[rate]}


def best_of(suite: str, trials: dict[float, dict[str, Any]]) -> float:
    """Return the rate that the selection split prefers."""
    own = harness.SUITES[suite]

    def rank(rate: float) -> float:
        found = trials[rate]
        scores = {own.metric: found["selection"], "loss": found["loss"]}
        return own.rank(scores, found["labels"])

    return max(trials, key=rank)


def render(suite: str, found: dict[str, dict[int, dict[str, Any]]], apart: bool = False) -> str:
    """Return a markdown table, the best first; with the last task apart, if asked."""
    own = harness.SUITES[suite]
    parts = ["first three tasks", "the fourth"] if apart else []
    columns = ["rates", "coefficients", "adaptation", "seconds", "memory, MB"]

    def mean(name: str) -> float:
        return statistics.mean(result["score"] for result in found[name].values())

    def cells(name: str) -> list[str]:
        results = list(found[name].values())
        scores = [harness.spread([result["score"] for result in results], own.digits)]
        if apart:
            every = [[s for task, s in r["test"].items() if task != "average"] for r in results]
            earlier = [score for one in every for score in one[:-1]]
            for values in (earlier, [one[-1] for one in every]):
                scores.append(f"{statistics.mean(values):.{own.digits}f}")
        first = results[0]
        labels = "labels" if first["labels"] else "no labels"
        return [
            f"`{name}`",
            *scores,
            ", ".join(f"{result['rate']:g}" for result in results) if ALL[name].learns else "-",
            f"{first['coefficients']:,}",
            f"{first['examples']:,}, {labels}" if first["examples"] else "none; selection labels",
            f"{min(r['seconds'] for r in results):.0f}",
            f"{max(r['memory'] for r in results) / 1e6:.0f}",
        ]

    order = sorted((n for n in found if found[n]), key=mean, reverse=own.higher_is_better)
    return harness.table(["method", own.metric, *parts, *columns], [cells(name) for name in order])


def main() -> None:
    harness.answer(lambda *job: fit(Job(*job[:4], *(path and Path(path) for path in job[4:]))))
    parser = harness.make_parser(__doc__, "suites")
    parser.add_argument("suite", choices=harness.SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all of the suite")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="to choose from")
    parser.add_argument("--drivers", action="store_true", help="two at a time, and one after")
    args = parser.parse_args()
    cache = args.cache.resolve()
    methods = args.methods or [n for n, m in METHODS.items() if args.suite in m.suites]
    if args.drivers:
        methods = [name for name in DRIVERS if name != _EARLIER]
    found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in methods}
    for seed in args.seeds:
        harness.build_suite(args.suite, seed, cache)
        for method in methods:
            found[method][seed] = tuned(args.suite, seed, method, cache, args.rates)[1]
            print(f"seed {seed} {method}: {found[method][seed]}", flush=True)
            harness.write_json(args.json, found)
    print(render(args.suite, found, apart=args.drivers))


if __name__ == "__main__":
    main()
