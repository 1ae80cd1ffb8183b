"""Writes the files of `fixtures/` with the version that it runs in.

They are kept as the version before the package was reordered wrote them, with the module paths of
its classes: `test_old_files.py` reads them with the present one. To run this program again replaces
them by files of the present version, which proves nothing about old ones.

    PYTHONPATH=src:tests/helpers python tests/compat/write_fixtures.py [FIXTURE...]
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from inspect import isabstract
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled")
    sys.path.insert(0, str(Path(__file__).parents[1]))

import compat_world as world
import lightning
import torch

import gradmerge
from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData, optimisers
from gradmerge import alignment as al
from gradmerge import coefficients as co
from gradmerge import finalisers as fi
from gradmerge import objectives as ob
from gradmerge import operators as op
from gradmerge import preprocess as pre
from gradmerge import sources as so
from gradmerge.cli import main
from gradmerge.mergekit import FromMergekit

HERE = Path(__file__).parent
EXPECTED = world.EXPECTED
TERMS = [ob.CrossEntropy()]


def fit(
    path: Path,
    recipe: Recipe,
    objective: Any = None,
    kind: str = "text_classification",
    optimiser: Callable[[Any], torch.optim.Optimizer] | None = None,
    tasks: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """A checkpoint after two steps."""
    module = MergeModule(recipe, objective, **options)
    make = optimiser or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    module.configure_optimizers = lambda: make(module.parameters())  # type: ignore
    described = {name: TaskData(**given) for name, given in (tasks or _tasks(kind)).items()}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=MergeDataModule(described, batch_size=2, check_disjoint=False))
    trainer.save_checkpoint(path)


def _tasks(kind: str) -> dict[str, Any]:
    return {name: world.task(name, kind) for name in "ab"}


FAR = {"a": "far/a", "b": "far/b"}
"""Sources that share no initialisation."""


def recipe(**options: Any) -> Recipe:
    given = {"sources": {"a": "a", "b": "b"}, "base": "base", "init": co.Constant(0.3)}
    return Recipe(**{**given, **options})


def plain(**options: Any) -> Callable[[Path], None]:
    """A case that differs in fields of the recipe."""
    return lambda path: fit(path, recipe(**options))


def one(**options: Any) -> Callable[[Path], None]:
    """The same with a single source, for operators that take no more."""
    return lambda path: fit(path, recipe(sources={"a": "a"}, **options))


def aligned(alignment: Any) -> Callable[[Path], None]:
    statistics = None if alignment.needs is None else "statistics/units"
    options = {"statistics": statistics, "init": co.Uniform()}
    return plain(sources=FAR, base=None, alignment=alignment, **options)


def learned(*terms: Any, **options: Any) -> Callable[[Path], None]:
    """A case that differs in the objective or in options of the module."""
    regularisers = [t for t in terms if isinstance(t, ob.AbstractRegulariser)]
    own = [t for t in terms if not isinstance(t, ob.AbstractRegulariser)]
    objective = ob.Objective(own or TERMS, regularisers, {"b": 2.0})
    return lambda path: fit(path, recipe(), objective, **options)


def step(*steps: Any, **options: Any) -> Callable[[Path], None]:
    return plain(preprocess=list(steps), **options)


def folder(name: str) -> dict[str, Any]:
    return {"statistics": f"statistics/{name}"}


def vocabulary(path: Path) -> None:
    family = {name: f"words/{name}" for name in "ab"}
    given = recipe(sources=family, base="words/base", tokenizer=so.Vocabulary())
    tasks = {}
    for name in "ab":
        task = world.task(name, "causal_lm")
        files = {split: f"words/{file}" for split, file in task["data_files"].items()}
        tasks[name] = {**task, "data_files": files, "max_length": 4}
    fit(path, given, tasks=tasks)


def fields_of_the_recipe(path: Path) -> None:
    """Everything in a recipe that is no component."""
    given = recipe(
        frozen={"embeddings": "mean", "LayerNorm": 0.25},
        private=["^classifier"],
        heads={"c": "c"},
        unused="mean",
        buffers="mean",
        allow=["tokenizer"],
        origin="base",
    )
    tasks = {**_tasks("text_classification"), "c": world.task("c")}
    options = {"dtype": "bfloat16", "memory": "streamed", "logit_scale": 1.5}
    fit(path, given, tasks=tasks, activation_checkpointing=True, **options)


def searched(name: str, *options: str) -> Callable[[Path], None]:
    """A checkpoint of the command line, after a search."""

    def write(path: Path) -> None:
        arguments = ["fit", "--config", "fit.yaml", "--search", name, "--search.metric", "loss"]
        assert main([*arguments, *options, "--trainer.default_root_dir", "searched"]) == 0
        (found,) = Path("searched").rglob("*.ckpt")
        shutil.copy(found, path)
        shutil.rmtree("searched")

    return write


COMPONENTS = {"operator": op.Components(0.3)}

CASES: dict[str, Callable[[Path], None]] = {
    # coefficients
    "model": plain(coefficients=co.Model()),
    "group": plain(coefficients=co.Group((r"layer\.\d+\.", "embeddings"))),
    "tensor": plain(),
    "column": plain(coefficients=co.Column()),
    "row": plain(coefficients=co.Row()),
    "partition": plain(coefficients=co.Partition(3, seed=5)),
    "component": plain(coefficients=co.Component("embeddings"), **COMPONENTS),
    "element": plain(coefficients=co.Element()),
    "clamp": plain(coefficients=co.Clamp(co.Tensor(), high=2.0)),
    "sigmoid": plain(coefficients=co.Sigmoid(co.Column())),
    "tanh": plain(coefficients=co.Tanh()),
    "softmax": plain(coefficients=co.Softmax(co.Row()), init=co.Uniform()),
    "complement": plain(coefficients=co.Complement(co.Sigmoid()), init=co.Uniform()),
    "hard-mask": plain(
        coefficients=co.HardMask(co.Component(), 5.0), init=co.Constant(1.0), **COMPONENTS
    ),
    "with-scale": plain(coefficients=co.WithScale(co.Column())),
    # starts
    "constant": plain(init=co.Constant([0.2, 0.6])),
    "depth-ramp": plain(init=co.DepthRamp(0.1, 0.7)),
    "from-file": plain(
        init=co.FromFile("coefficients.safetensors"),
        coefficients=co.Column(),
        private=["^classifier"],
    ),
    "from-mergekit": plain(init=FromMergekit("merge.yaml")),
    "leading-components": plain(
        coefficients=co.HardMask(co.Component()), init=co.LeadingComponents(0.5), **COMPONENTS
    ),
    "meta-gpt": plain(init=co.MetaGPT()),
    "mixup": plain(init=co.Mixup(0.7, "tensor", 0.9, 3)),
    "scaled": plain(init=co.Scaled(co.Uniform(), 0.8)),
    "uniform": plain(init=co.Uniform(), origin="mean"),
    # operators
    "linear": plain(operator=op.Linear("directions")),
    "components": plain(**COMPONENTS),
    "disjoint-mean": plain(operator=op.DisjointMean(scale=0.7), preprocess=[pre.Trim(0.5)]),
    "slerp": plain(operator=op.Slerp("row"), base=None),
    "multi-slerp": plain(operator=op.MultiSlerp(), base=None),
    "karcher": plain(operator=op.Karcher(8), base=None),
    "model-stock": plain(operator=op.ModelStock()),
    "near-swap": one(operator=op.NearSwap(), init=co.Constant(0.02)),
    "arcee-fusion": one(operator=op.ArceeFusion(), init=co.Constant(0.9)),
    # steps
    "trim": step(pre.Trim(0.4, "model", "l1")),
    "breadcrumbs": step(pre.Breadcrumbs(0.6, 0.1)),
    "random-drop": step(pre.RandomDrop(0.5, seed=2)),
    "magnitude-drop": step(pre.MagnitudeDrop(0.5, 0.2, seed=2)),
    "elect-sign": step(pre.ElectSign("count")),
    "select-top": step(pre.SelectTop(0.5)),
    "consensus": step(pre.Consensus(0.6, 1)),
    "share-of-squares": step(pre.ShareOfSquares()),
    "tsvm": step(pre.TSVM()),
    "iso-c": step(pre.IsoC()),
    "iso-cts": step(pre.IsoCTS(0.5)),
    "wudi": step(pre.WUDI(20)),
    "orthogonalise": step(pre.Orthogonalise(0.8)),
    "parameter-competition": step(pre.ParameterCompetition(0.5)),
    "unify": step(pre.Unify("means")),
    "fisher-scale": step(pre.FisherScale(), **folder("fisher")),
    "regmean": step(pre.RegMean(0.8), **folder("gram")),
    "mats": step(pre.MaTS(5, statistic="kfac"), **folder("kfac")),
    # finalisers
    "repair": plain(finalisers=[fi.REPAIR("coefficients", 2, ["pooler"])]),
    "spectral-rescale": plain(finalisers=[fi.SpectralRescale("frobenius")]),
    "depth-rescale": plain(finalisers=[fi.DepthRescale(0.5, 1.0)]),
    # alignments
    "identity": plain(alignment=al.Identity()),
    "weight-matching": aligned(al.WeightMatching(seed=4)),
    "activation-matching": aligned(al.ActivationMatching(metric="covariance")),
    "cca": aligned(al.CCA(gamma=0.2)),
    "optimal-transport": aligned(al.OptimalTransport(regularisation=0.1)),
    # objectives, options and optimisers
    "cross-entropy": learned(ob.CrossEntropy(0.5, 0.1)),
    "entropy": learned(ob.Entropy(1.0, 0.5)),
    "kl-to-source": learned(ob.KLToSource(1.0, 2.0)),
    "kl-to-ensemble": learned(ob.KLToEnsemble()),
    "l1": learned(ob.L1(weight=0.1)),
    "l2-to-init": learned(ob.L2ToInit(weight=0.1)),
    "fisher-to-init": learned(ob.FisherToInit(weight=0.1, batches=1)),
    "lp": learned(ob.Lp(p=1.5, weight=0.1)),
    "overlap": learned(ob.Overlap(weight=0.1)),
    "similarity": learned(ob.Similarity(weight=0.1)),
    "sam": learned(optimiser=lambda p: optimisers.SAM(p, lr=0.1)),
    "mofo": learned(optimiser=lambda p: optimisers.MoFO(p, lr=0.1)),
    "recipe": fields_of_the_recipe,
    # sources
    "hugging-face": plain(sources={"a": so.HuggingFace("a"), "b": so.HuggingFace("b")}),
    "safetensors-file": plain(sources={n: so.SafetensorsFile(f"{n}.safetensors") for n in "ab"}),
    "torch-file": plain(sources={name: so.TorchFile(f"{name}.pt") for name in "ab"}),
    "lora": plain(sources={"a": so.Lora("adapter", so.HuggingFace("base")), "b": "b"}),
    "emr": plain(sources={n: so.EMR("compact", n, so.HuggingFace("base")) for n in "ab"}),
    "vocabulary": vocabulary,
    # searches as the start
    "scales": searched("Scales", "--search.values", "[0.2, 0.5]"),
    "draws": searched("Draws", "--search.num_draws", "2"),
    "greedy-soup": searched("GreedySoup"),
}


# ---- what is no checkpoint ----------------------------------------------------------------------

FULL = {
    "origin": "base",
    "preprocess": [
        {"class_path": "Trim", "init_args": {"density": 0.6}},
        {"class_path": "ElectSign"},
    ],
    "coefficients": {"class_path": "Sigmoid", "init_args": {"inner": "Tensor"}},
    "init": {"class_path": "Constant", "init_args": {"value": 0.4}},
    "operator": {"class_path": "DisjointMean", "init_args": {"scale": 0.9}},
    "finalisers": [{"class_path": "SpectralRescale"}],
    "private": ["^classifier"],
}
STATISTICS = {
    "fisher": {"preprocess": [{"class_path": "FisherScale"}]},
    "gram": {"preprocess": [{"class_path": "RegMean"}]},
    "kfac": {"preprocess": [{"class_path": "MaTS", "init_args": {"statistic": "kfac"}}]},
    "units": {"alignment": "ActivationMatching", "sources": FAR, "base": None},
}


def write_statistics(target: Path) -> None:
    for name, part in STATISTICS.items():
        config = world.configured("collect.yaml", part)
        assert main(["collect", "--config", config, "--output", str(target / name)]) == 0


def write_compact(target: Path) -> None:
    config = world.configured("emr.yaml", {"preprocess": [{"class_path": "Unify"}]})
    arguments = ["--outputs", "compact", "--output", str(target)]
    assert main(["merge", "--config", config, *arguments]) == 0


def write_export(target: Path) -> None:
    """A fit with everything, its logged configuration, and its export."""
    export = {"class_path": "ExportAtEnd", "init_args": {"output": "exported"}}
    trainer = {**world.CONFIG["trainer"], "callbacks": [export]}
    arguments = ["--config", world.configured("full.yaml", FULL, trainer=trainer)]
    assert main(["fit", *arguments]) == 0
    target.mkdir(parents=True)
    for path in sorted(Path("exported").iterdir()):
        if path.suffix in (".yaml", ".md", ".safetensors", ".st", ".json"):
            shutil.copy(path, target)
    (config,) = Path("run").rglob("config.yaml")
    shutil.copy(config, target / "logged-config.yaml")
    (checkpoint,) = Path("run").rglob("*.ckpt")
    shutil.copy(checkpoint, target / "fit.ckpt")
    shutil.rmtree("run")


class KilledError(Exception):
    """The job was stopped on purpose."""


@contextlib.contextmanager
def killed(limit: int) -> Iterator[None]:
    """Stop after so many optimiser steps."""
    count = []
    original = torch.optim.SGD.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.append(0)
        if len(count) > limit:
            raise KilledError
        return original(self, *args, **kwargs)

    torch.optim.SGD.step = counted  # type: ignore
    try:
        with contextlib.suppress(KilledError):
            yield
    finally:
        torch.optim.SGD.step = original  # type: ignore
    assert len(count) > limit, count


def write_job(name: str, target: Path) -> dict[str, Any]:
    """A job that was killed in its second half; returns what the whole one ends in."""
    with killed(world.JOBS[name][1]):
        world.job(name)
    for picture in Path("run").rglob("*.png"):
        picture.unlink()
    shutil.copytree("run", target)
    shutil.rmtree("run")
    assert world.job(name) == 0
    found = world.exported(Path("run/merged"))
    shutil.rmtree("run")
    return found


NAMED = ("Recipe", "FoldedRecipe", "Objective", "Vocabulary", "TaskData")
UNNAMED = ("InMemory",)  # becomes a note that asks for it
OTHERS = (MergeDataModule, optimisers.MoFO, optimisers.SAM)


def old_paths() -> dict[str, list[str]]:
    """Every class that files name by its module.

    `specifications` are those that `to_plain` writes and `from_plain` builds; `others` are written
    into what is known of a run, and compared when a job resumes, but never built.
    """
    found = set()
    for module in pkgutil.walk_packages(gradmerge.__path__, "gradmerge."):
        for kind in vars(importlib.import_module(module.name)).values():
            known = isinstance(kind, type) and is_dataclass(kind) and not isabstract(kind)
            if not known or not kind.__module__.startswith("gradmerge."):
                continue
            concept = any(base.__name__.startswith("Abstract") for base in kind.__mro__)
            named = kind.__name__ in NAMED
            hidden = kind.__name__.startswith("_") or kind.__name__ in UNNAMED
            if (concept or named) and not hidden:
                found.add(f"{kind.__module__}.{kind.__qualname__}")
    others = [f"{kind.__module__}.{kind.__qualname__}" for kind in OTHERS]
    return {"specifications": sorted(found), "others": others}


def save(name: str, found: dict[str, Any]) -> None:
    """Add what a fixture gives to the file of all, where lists of names stand once."""
    known = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {"names": []}
    names = list(found["model"])
    if names not in known["names"]:
        known["names"].append(names)
    own = {"names": known["names"].index(names), "model": list(found["model"].values())}
    known[name] = {**own, "coefficients": found["coefficients"]}
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items())
    EXPECTED.write_text(f"{{\n{rows}\n}}\n")


def write_folders(only: list[str]) -> None:
    """Folders that other fixtures read come first."""
    writers = {"statistics": write_statistics, "compact": write_compact, "export": write_export}
    for name, write in writers.items():
        if name in only or not (world.FIXTURES / name).is_dir():
            shutil.rmtree(world.FIXTURES / name, ignore_errors=True)
            write(world.FIXTURES / name)
    world.copy_fixtures(Path())


def write_jobs(only: list[str]) -> None:
    for name in world.JOBS:
        target = world.FIXTURES / "jobs" / name
        if name in only or not target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            save(f"job-{name}", write_job(name, target))


def write_checkpoints(only: list[str]) -> None:
    (world.FIXTURES / "checkpoints").mkdir(exist_ok=True)
    for name, case in CASES.items():
        path = world.FIXTURES / "checkpoints" / f"{name}.ckpt"
        if name in only or not path.is_file():
            lightning.seed_everything(3, verbose=False)
            case(path)
            assert main(["export", str(path), f"out/{name}"]) == 0
            save(name, world.exported(Path("out") / name))


def make_relative(work: str) -> None:
    """Leave no path of this machine in text files."""
    for path in world.FIXTURES.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md"):
            text = path.read_text()
            if work in text:
                path.write_text(text.replace(f"{work}/", "").replace(work, "."))


def write_all(only: list[str]) -> None:
    """Write the fixtures that are named, and those that do not exist."""
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        torch.set_num_threads(1)
        world.write_world(Path())
        world.configured("fit.yaml")
        write_folders(only)
        write_jobs(only)
        write_checkpoints(only)
        make_relative(work)
    (HERE / "old_paths.json").write_text(json.dumps(old_paths(), indent=1) + "\n")


if __name__ == "__main__":
    write_all(sys.argv[1:])
