"""Merges by gradmerge, the ensemble and fine-tuning, for the benchmark ``benchmarks/rebasin.py``.

A `Case` is some trained networks and the images to merge them with. Merges go through gradmerge's
public interface, as a user would write them; the ensemble and fine-tuning are plain torch.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.alignment import (
    CCA,
    AbstractAlignment,
    ActivationMatching,
    OptimalTransport,
    WeightMatching,
)
from gradmerge.coefficients import Complement, Constant, Element, Sigmoid, Softmax, Uniform
from gradmerge.objectives import KLToEnsemble, Objective
from gradmerge.training.collect import collect
from gradmerge.training.search import set_coefficients
from harness import quiet_trainer
from suites import rebasin
from suites.rebasin import CLASSES, Architecture, Images, Parts, Pool

# Of each setting and number of models, the classes that each model sees.
ALL = tuple(range(CLASSES))
SETTINGS: dict[str, dict[int, list[tuple[int, ...]]]] = {
    "same": {2: [ALL] * 2, 4: [ALL] * 4},
    "split": {
        2: [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)],
        4: [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)],
    },
}
ALIGNMENTS: dict[str, AbstractAlignment] = {
    "weights": WeightMatching(),
    "activations": ActivationMatching(),
    "CCA": CCA(),
    "transport": OptimalTransport(),
}
# What NP Merge and fine-tuning start from: chosen by the selection split of repeat 0 of the pairs.
LEARNED_ON = {"mlp": "weights", "vgg11": "transport", "resnet20": "transport"}

State = dict[str, Tensor]
Result = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """Steps, batches and rates of NP Merge and of fine-tuning, each."""

    steps: int = 120
    checks: int = 3
    """Scores on selection on the way; the best state is kept (the start is one of them)."""
    batch_size: int = 64
    np_rates: tuple[float, ...] = (0.01, 0.05, 0.25)
    """Of Adam on the raw coefficients; they fall linearly to zero."""
    tuning_rates: tuple[float, ...] = (1e-4, 5e-4, 2.5e-3)
    """Of Adam on the weights; likewise."""


@dataclass(frozen=True)
class Distillation:
    """Learning without labels: `KLToEnsemble`, and the same for fine-tuning."""

    images: int = 20_000
    """At most; they are of no other part."""
    temperature: float = 2.0
    longer: int = 4
    """Multiple of the budget's steps."""


DISTILLATION = Distillation()
# For as long as the endpoints were trained; with the one rate that the shorter distillation chose.
LONGER = Distillation(images=40_000, longer=16)

# For coefficients without bounds, which are not raw numbers behind a sigmoid or softmax.
UNBOUNDED_RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Condition:
    """A peculiarity of the adaptation and selection data."""

    adaptation: int | None = None
    """That many adaptation images, and two fifths as many for selection; None: all."""
    noise: float = 0.0
    """Share of labels, in both splits, that are replaced by another class."""
    missing: tuple[int, ...] = ()
    """Classes that neither split has."""

    @property
    def name(self) -> str:
        """A short name, for files and tables."""
        parts = [] if self.adaptation is None else [f"n{self.adaptation}"]
        parts += [f"noise{self.noise:g}"] if self.noise else []
        parts += ["without" + "".join(map(str, self.missing))] if self.missing else []
        return "-".join(parts) or "plain"

    def apply(self, parts: Parts, repeat: int) -> Parts:
        """Return the parts of a repeat under this condition."""
        generator = torch.Generator().manual_seed(77 + repeat)
        kept = [k for k in ALL if k not in self.missing]
        changed = {}
        for name, share in (("adaptation", 1.0), ("selection", 0.4)):
            images: Images = getattr(parts, name)
            images = images.of_classes(kept) if self.missing else images
            if self.adaptation is not None:
                images = images.at(torch.arange(round(self.adaptation * share)))
            if self.noise:
                wrong = torch.rand(len(images), generator=generator) < self.noise
                shift = torch.randint(1, CLASSES, (len(images),), generator=generator)
                labels = torch.where(wrong, (images.labels + shift) % CLASSES, images.labels)
                images = Images(images.images, labels)
            changed[name] = images
        return replace(parts, **changed)


def falling(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Let the learning rate fall linearly to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)


class Learner(MergeModule):
    """Adam with a falling learning rate (on the command line: `lr_scheduler`)."""

    def configure_optimizers(self) -> Any:
        """Return both."""
        optimiser = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        scheduler = falling(optimiser, self.trainer.max_steps)
        return [optimiser], [{"scheduler": scheduler, "interval": "step"}]


class KeepBest(lightning.Callback):
    """The raw coefficients with the best accuracy on selection so far, or with the least loss."""

    def __init__(self, start: float, distil: Distillation | None) -> None:
        self.best, self.step, self.distil = start, 0, distil
        self.raws: State = {}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Keep the coefficients, if they are better."""
        found = pl_module.results["selection"]["average"]
        score = -found["loss"] if self.distil else found["accuracy"]
        if score > self.best:
            self.best, self.step = score, trainer.global_step
            self.raws = {k: raw.detach().clone() for k, raw in pl_module.merged.raw.items()}


@dataclass
class Case:
    """Some networks that are to be merged, and the data to do it with."""

    pool: Pool
    architecture: Architecture
    setting: str
    members: int
    repeat: int
    budget: Budget
    condition: Condition = Condition()

    @property
    def name(self) -> str:
        """Name of the case in messages."""
        parts = [self.pool.data, self.architecture.name, f"{self.setting}{self.members}"]
        return "-".join([*parts, f"r{self.repeat}", self.condition.name])

    @cached_property
    def files(self) -> list[Path]:
        """One file per endpoint."""
        every = SETTINGS[self.setting][self.members]
        return [
            rebasin.endpoint(
                self.pool, self.architecture, classes, self.repeat, every[:at].count(classes)
            )
            for at, classes in enumerate(every)
        ]

    @cached_property
    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder that lives as long as the case."""
        return tempfile.TemporaryDirectory()

    @cached_property
    def parts(self) -> Parts:
        """The images, as the condition leaves them."""
        return self.condition.apply(self.pool.parts(self.repeat), self.repeat)

    @cached_property
    def data(self) -> MergeDataModule:
        """The same images as gradmerge takes them: one task."""
        return self.data_of(self.parts.adaptation)

    def data_of(self, adaptation: Images) -> MergeDataModule:
        """Return the same, with other images to learn from."""
        splits = {"adaptation": adaptation}
        splits |= {k: getattr(self.parts, k) for k in ("selection", "test")}
        module = MergeDataModule(
            {"images": TaskData(splits, "tensors")},
            batch_size=min(self.budget.batch_size, len(adaptation)),
            eval_batch_size=128,
            seed=self.repeat,
        )
        module.setup()
        return module

    def network(self, state: State | None = None) -> nn.Module:
        """Return the architecture, with weights."""
        return rebasin.build_network(self.architecture, state)

    def endpoints(self) -> list[nn.Module]:
        """Return the networks that are to be merged."""
        return [self.network(load_file(path)) for path in self.files]

    def sources(self) -> dict[str, Any]:
        """Return the sources by name, as a recipe takes them."""
        return {f"m{k}": str(path) for k, path in enumerate(self.files)}

    def score(self, network: Callable[[Images], Tensor] | State) -> Result:
        """Return test and selection accuracy of weights, or of anything that scores classes."""
        if isinstance(network, dict):
            network = partial(rebasin.logits_of, self.network(network))
        hits = {
            name: network(images).argmax(dim=1) == images.labels
            for name, images in (("test", self.parts.test), ("selection", self.parts.selection))
        }
        labels = self.parts.test.labels
        classes = [float(hits["test"].double()[labels == k].mean()) for k in range(CLASSES)]
        means = {name: float(found.float().mean()) for name, found in hits.items()}
        return {**means, "classes": classes}


# ---- merging, by gradmerge -----------------------------------------------------------------------


def open_merge(
    case: Case, recipe: Recipe, alignment: str | None, objective: Objective | None = None
) -> MergeModule:
    """Open a merge under an alignment, ready to be scored or learned."""
    if alignment is not None:
        recipe = replace(recipe, alignment=ALIGNMENTS[alignment])
        if ALIGNMENTS[alignment].needs is not None:
            # The same for all alignments on data; a merge on the way to another has its own.
            own = recipe.sources == case.sources()
            folder = Path(case.scratch.name) / ("own" if own else "other")
            if not own or not folder.is_dir():
                collect(recipe, case.data, folder, overwrite=True, module=case.network())
            recipe = replace(recipe, statistics=str(folder))
    module = Learner(recipe, objective, module=case.network(), score_experts=False)
    module.take_tasks(case.data.tasks)
    return module


def state_of(module: MergeModule, data: MergeDataModule) -> State:
    """Return the merged network's weights and buffers, as an export would have them."""
    module.refresh_buffers(data)
    merged = module.merged
    state = {name: merged.plan.materialise(name, merged.raw) for name in merged.plan.tensors}
    return state | {name: value.clone() for name, value in merged.statistics.values().items()}


def averaged(case: Case, alignment: str | None, **factors: Any) -> State:
    """Average the sources, under an alignment."""
    factors = {"buffers": "recompute", **factors}
    recipe = Recipe(case.sources(), init=Uniform(), **factors)
    return state_of(open_merge(case, recipe, alignment), case.data)


def average(case: Case, alignment: str | None, **factors: Any) -> Result:
    """Score the average of the sources."""
    return case.score(averaged(case, alignment, **factors))


def pairwise_recipe(sources: dict[str, Any], shares: Sequence[float] = (0.5, 0.5)) -> Recipe:
    """Return NP Merge of two: `sigmoid(a)` and `1 - sigmoid(a)`, which start at stated shares."""
    coefficients = Complement(Sigmoid(Element()))
    return Recipe(sources, coefficients=coefficients, init=Constant(list(shares)))


# One coefficient per weight: of two, of all at once by a softmax, or any number.
RECIPES: dict[str, Callable[[dict[str, Any]], Recipe]] = {
    "pair": pairwise_recipe,
    "joint": partial(Recipe, coefficients=Softmax(Element()), init=Uniform()),
    "unbounded": partial(Recipe, coefficients=Element(), init=Uniform(), origin="zero"),
}


def np_merge(
    case: Case,
    alignment: str | None,
    kind: str,
    distil: Distillation | None = None,
    rates: Sequence[float] | None = None,
) -> Result:
    """Learn all sources at once."""
    rates = rates or (UNBOUNDED_RATES if kind == "unbounded" else None)
    return learned(case, RECIPES[kind](case.sources()), alignment, distil=distil, rates=rates)[0]


def np_fold(case: Case, alignment: str | None) -> Result:
    """Merge one source after another into the merge so far; the merges share the steps."""
    (_, merged), *others = case.sources().items()
    result: Result = {}
    for number, (name, path) in enumerate(others, start=1):
        shares = [number / (number + 1), 1 / (number + 1)]
        recipe = pairwise_recipe({"merged": merged, name: path}, shares)
        result, merged = learned(case, recipe, alignment, case.budget.steps // len(others))
    return result


def np_tree(case: Case, alignment: str | None) -> Result:
    """Merge pairs, then pairs of those; the merges share the steps."""
    level: list[Any] = list(case.sources().values())
    steps = case.budget.steps // (len(level) - 1)
    result: Result = {}
    while len(level) > 1:
        pairs, level = zip(level[::2], level[1::2], strict=True), []
        for first, second in pairs:
            recipe = pairwise_recipe({"first": first, "second": second})
            result, state = learned(case, recipe, alignment, steps)
            level.append(state)
    return result


# ---- beside it: endpoints and their ensemble -----------------------------------------------------


def endpoints(case: Case) -> Result:
    """Score each network alone, and their means."""
    each = [case.score(load_file(path)) for path in case.files]
    result: Result = {key: statistics.mean(e[key] for e in each) for key in ("test", "selection")}
    columns = zip(*(e["classes"] for e in each), strict=True)
    return {
        **result,
        "classes": [*map(statistics.mean, columns)],
        "each": [e["test"] for e in each],
    }


def ensemble(case: Case) -> Result:
    """Score the mean of the networks' probabilities."""
    networks = case.endpoints()

    def probabilities(images: Images) -> Tensor:
        logits = [rebasin.logits_of(network, images) for network in networks]
        return torch.stack(logits).softmax(dim=-1).mean(dim=0)

    return case.score(probabilities)


def distillation_loss(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the loss without labels: divergence from the ensemble's softened probabilities."""
    networks, t = case.endpoints(), DISTILLATION.temperature

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            each = torch.stack([network(images) for network in networks])
        target = (each / t).softmax(dim=-1).mean(dim=0)
        own = (logits / t).log_softmax(dim=-1)
        return t * t * functional.kl_div(own, target, reduction="batchmean")

    return loss


# ---- learning: each rate in turn, the best on selection stays ------------------------------------

Attempt = Callable[[float, Result], tuple[Result, State]]


@dataclass
class Learning:
    """What NP Merge and fine-tuning share: steps, images to learn from, the choice of a state."""

    case: Case
    steps: int
    distil: Distillation | None

    def __post_init__(self) -> None:
        self.data, self.loss = self.case.data, None
        if self.distil:
            self.steps *= self.distil.longer
            rest = self.case.parts.rest
            self.data = self.case.data_of(rest.at(torch.arange(min(self.distil.images, len(rest)))))
            self.loss = distillation_loss(self.case)

    def score(self, state: State) -> Result:
        """Return scores, and the `rank` that states are chosen by: more is better.

        With labels the accuracy on selection. Without, minus the divergence from the ensemble: it
        reads no label, and is less noisy.
        """
        found = self.case.score(state)
        if self.loss is None:
            return {**found, "rank": found["selection"]}
        images = self.case.parts.selection
        logits = rebasin.logits_of(self.case.network(state), images)
        return {**found, "rank": -float(self.loss(logits, images.images, images.labels))}

    def best(self, begin: State, rates: Sequence[float], attempt: Attempt) -> tuple[Result, State]:
        """Return the best of the start and of an attempt with each learning rate."""
        start = self.score(begin)
        best, best_state = {**start, "rate": None, "step": 0}, begin
        tried = {}
        for rate in rates:
            tried[rate], state = attempt(rate, start)
            if tried[rate]["rank"] > best["rank"]:
                best, best_state = {**tried[rate], "rate": rate}, state
        return {**best, "start": start, "tried": tried}, best_state


def learned(
    case: Case,
    recipe: Recipe,
    alignment: str | None,
    steps: int | None = None,
    distil: Distillation | None = None,
    rates: Sequence[float] | None = None,
) -> tuple[Result, State]:
    """Learn the coefficients with each learning rate; the best on selection stays."""
    learning = Learning(case, steps or case.budget.steps, distil)
    objective = Objective([KLToEnsemble(temperature=distil.temperature)]) if distil else None
    module = open_merge(case, recipe, alignment, objective)
    merged = module.merged

    def attempt(rate: float, start: Result) -> tuple[Result, State]:
        set_coefficients(merged, recipe.init)
        module.learning_rate = rate
        keep = KeepBest(start["rank"], distil)
        trainer = quiet_trainer(
            max_steps=learning.steps,
            check_val_every_n_epoch=None,
            callbacks=[keep],
            val_check_interval=max(1, learning.steps // case.budget.checks),
        )
        trainer.fit(module, datamodule=learning.data)
        last = case.score(state_of(module, case.data))
        set_coefficients(merged, recipe.init)
        with torch.no_grad():
            for key, value in keep.raws.items():
                merged.raw[key].copy_(value)
        state = state_of(module, case.data)
        return {**learning.score(state), "step": keep.step, "last": last}, state

    begin = state_of(module, case.data)
    result, state = learning.best(begin, rates or case.budget.np_rates, attempt)
    return {**result, "alignment": alignment}, state


def training_batches(data: MergeDataModule, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield the batches that gradmerge learns on, in the same order."""
    loader = data.train_dataloader()
    while loader.step < steps:
        for batch in loader:
            yield batch["images"]
            if loader.step >= steps:
                return


def fine_tuned(
    case: Case,
    alignment: str | None,
    distil: Distillation | None = None,
    rates: Sequence[float] | None = None,
) -> Result:
    """Train all weights of the average that NP Merge starts from, with the same budget."""
    learning = Learning(case, case.budget.steps, distil)
    steps, begin = learning.steps, averaged(case, alignment)
    sample = case.parts.adaptation.images[:2_048].split(500)
    loss_of = learning.loss or (lambda logits, images, labels: cross_entropy(logits, labels))

    def attempt(rate: float, start: Result) -> tuple[Result, State]:
        network = case.network(begin).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=rate)
        schedule = falling(optimiser, steps)
        chosen: Result = {**start, "step": 0}
        for step, batch in enumerate(training_batches(learning.data, steps), start=1):
            loss = loss_of(network(batch["images"]), batch["images"], batch["labels"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % max(1, steps // case.budget.checks) == 0:
                update_bn(sample, network)
                score = learning.score(network.state_dict())
                if score["rank"] > chosen["rank"]:
                    chosen = {**score, "step": step}
        update_bn(sample, network)
        return {**chosen, "last": case.score(network.state_dict())}, network.state_dict()

    result, _ = learning.best(begin, rates or case.budget.tuning_rates, attempt)
    return {**result, "alignment": alignment}
