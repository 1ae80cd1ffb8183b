"""Loss curves and exported tensors of tiny merges, as they were before the package was reordered.

`GRADMERGE_GOLDEN_EXACT=1` compares every bit, which holds on the machine that wrote the file
(`python tests/compat/test_golden.py --write`); otherwise losses within 1e-5 and sums over each
exported tensor within 1e-4, relatively.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")

import compat_world as world
import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from safetensors.torch import load_file

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData, export_merged
from gradmerge.alignment import WeightMatching
from gradmerge.coefficients import Column, Constant, Sigmoid, Softmax, Tensor, Uniform
from gradmerge.drivers import Continual, Job, LayerWise, Pairwise, Tree
from gradmerge.finalisers import REPAIR
from gradmerge.objectives import L1, CrossEntropy, Entropy, KLToSource, Objective
from gradmerge.preprocess import Trim

GOLDEN = Path(__file__).with_name("golden.json")
NOISE = {r"key\.bias": "mean"}
"""Attention does not depend on it: its gradient is rounding, of which Adam makes whole steps."""


class Record(Logger):
    """Keeps losses and starts as they are logged."""

    def __init__(self, kept: dict[str, list[str]]) -> None:
        super().__init__()
        self.kept = kept

    name = "record"
    version = 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if "loss" in name or name.startswith("init/"):
                self.kept.setdefault(name, []).append(repr(float(value)))


def trainer_of(folder: Path, kept: dict[str, list[str]], **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "logger": Record(kept),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    }
    return lightning.Trainer(**{**settings, **options})


def data_of(kind: str, tasks: str = "ab") -> MergeDataModule:
    if kind == "images":
        described = {t: TaskData(world.images(t), "tensors") for t in tasks}
    else:
        described = {t: TaskData(**world.task(t, kind)) for t in tasks}
    return MergeDataModule(described, batch_size=2, check_disjoint=False)


def sources(make: Any, tasks: str = "ab") -> dict[str, Any]:
    """Folders of each source and the base in the working folder."""
    for i, name in enumerate(["base", *tasks]):
        world.write_model(Path(name), make(i))
    return {"sources": {task: task for task in tasks}, "base": "base"}


def fitted(recipe: Recipe, kind: str, objective: Any = None, **options: Any) -> dict[str, Any]:
    kept: dict[str, list[str]] = {}
    options = {"learning_rate": 0.1, "score_start": False, **options}
    module = MergeModule(recipe, objective, **options)
    trainer_of(Path("run"), kept).fit(module, datamodule=data_of(kind, "".join(recipe.sources)))
    return {"curves": kept, "folders": [export_merged(module.merged, "out")]}


def driven(driver: Any, recipe: Recipe, kind: str = "text_classification") -> dict[str, Any]:
    kept: dict[str, list[str]] = {}

    def make_trainer(folder: Path, callbacks: Any, overrides: Any) -> lightning.Trainer:
        given = {"callbacks": list(callbacks), "enable_checkpointing": True, **overrides}
        return trainer_of(folder, kept, **given)

    data = data_of(kind, "".join(recipe.sources))
    job = Job(recipe, data, Path("run"), make_trainer, {"learning_rate": 0.1, "score_start": False})
    return {"curves": kept, "folders": [driver.run(job)]}


def llama(memory: str) -> dict[str, Any]:
    recipe = Recipe(**sources(world.llama), coefficients=Column(), init=Constant(0.3))
    return fitted(recipe, "causal_lm", memory=memory)


def bert() -> dict[str, Any]:
    recipe = Recipe(
        **sources(world.bert),
        coefficients=Sigmoid(Tensor()),
        init=Constant(0.3),
        preprocess=[Trim(0.6)],
        private=["^classifier"],
        frozen=NOISE,
    )
    objective = Objective([CrossEntropy(), KLToSource(0.5)], [L1(0.01)])
    return fitted(recipe, "text_classification", objective)


def resnet() -> dict[str, Any]:
    recipe = Recipe(**sources(world.resnet), coefficients=Tensor(), init=Uniform())
    return fitted(recipe, "images", Objective([CrossEntropy(), Entropy(0.3)]))


def aligned() -> dict[str, Any]:
    given = sources(partial(world.resnet, near=False))
    recipe = Recipe(
        given["sources"],
        alignment=WeightMatching(),
        coefficients=Softmax(Tensor()),
        init=Uniform(),
        finalisers=[REPAIR(batches=3)],
    )
    return fitted(recipe, "images")


def folded(driver: Any, tasks: str = "abc") -> dict[str, Any]:
    return driven(
        driver, Recipe(**sources(world.bert, tasks), private=["^classifier"], frozen=NOISE)
    )


def continual() -> dict[str, Any]:
    given = sources(world.bert, "abc")
    earlier = given["sources"].pop("a")
    recipe = Recipe(**given, coefficients=Tensor(), frozen=NOISE)
    return driven(Continual(earlier=earlier, earlier_sources=1), recipe)


def layerwise() -> dict[str, Any]:
    recipe = Recipe(**sources(world.llama), coefficients=Column(), init=Constant(0.3))
    return driven(LayerWise(steps=4), recipe, "causal_lm")


CASES = {
    "llama-resident": lambda: llama("resident"),
    "llama-streamed": lambda: llama("streamed"),
    "bert-private-heads": bert,
    "resnet-recomputed": resnet,
    "resnet-aligned": aligned,
    "pairwise": lambda: folded(Pairwise()),
    "tree": lambda: folded(Tree(), "abcd"),
    "continual": continual,
    "layerwise": layerwise,
}


@contextmanager
def quiet_machine(folder: Path) -> Iterator[None]:
    """One thread, one seed, and a folder of its own."""
    threads, here = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    lightning.seed_everything(7, verbose=False)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
        os.environ.pop("PL_GLOBAL_SEED", None)
        os.environ.pop("PL_SEED_WORKERS", None)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder and of its tasks' folders, by file and name.

    Files have the names of the first version, whose folders of tasks had only their heads.
    """
    found = {}
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.st")]):
        place = path.relative_to(folder).with_suffix(".safetensors")
        if path.name.startswith("model-"):
            if place.parent != Path() and path.stat().st_nlink > 1:
                continue  # a file of the whole folder
            place = place.with_name("head" if place.parent != Path() else "model")
            place = place.with_suffix(".safetensors")
        found |= {f"{place}:{name}": tensor for name, tensor in sorted(load_file(path).items())}
    return found


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def run(case: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with quiet_machine(folder):
        if "resnet" not in case:
            world.write_tasks(folder, "abcd")
        found = CASES[case]()
        (exported,) = found.pop("folders")
        tensors = tensors_of(Path(exported))
    return {**found, "sha256": sha256(tensors)}, tensors


@pytest.mark.parametrize("case", CASES)
def test_curves_and_exports_are_the_golden_ones(case, tmp_path):
    golden = json.loads(GOLDEN.read_text())[case]
    found, tensors = run(case, tmp_path)
    assert found["curves"].keys() == golden["curves"].keys()
    if os.environ.get("GRADMERGE_GOLDEN_EXACT") == "1":
        assert found["curves"] == golden["curves"]
        assert found["sha256"] == golden["sha256"]
    for name, curve in found["curves"].items():
        expected = pytest.approx([float(v) for v in golden["curves"][name]], rel=1e-5, abs=1e-7)
        assert [float(v) for v in curve] == expected, name
    assert not list(world.differences(tensors, golden["tensors"]))


def write() -> None:
    """Write the golden values of this machine and version."""
    import tempfile

    golden = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found, tensors = run(case, Path(folder))
        found["tensors"] = {name: world.summary(tensor) for name, tensor in tensors.items()}
        golden[case] = found
        print(case, {name: (c[0], c[-1]) for name, c in found["curves"].items()})
    rows = ",\n".join(f"{json.dumps(case)}: {json.dumps(golden[case])}" for case in golden)
    GOLDEN.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/compat/test_golden.py --write")
    write()
