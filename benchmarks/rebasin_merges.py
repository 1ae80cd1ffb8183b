"""Merging by gradmerge, and what stands beside it, in the benchmark ``scripts/bench_rebasin.py``.

A `Case` is some trained networks and the images to merge them with. Merges go through gradmerge's
public interface, as a user would write them; the ensemble and fine-tuning are plain torch.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning
import rebasin
import torch
from rebasin import CLASSES, Architecture, Images, Parts, Sizes
from rebasin_tables import Result
from torch import Tensor, nn
from torch.nn import functional

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.alignment import (
    CCA,
    AbstractAlignment,
    ActivationMatching,
    OptimalTransport,
    WeightMatching,
)
from gradmerge.coefficients import Complement, Constant, Element, Sigmoid, Softmax, Uniform
from gradmerge.collection import collect
from gradmerge.evaluation import set_coefficients
from gradmerge.finalisers import REPAIR
from gradmerge.objectives import KLToEnsemble, Objective

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


@dataclass(frozen=True)
class Budget:
    """What NP Merge and fine-tuning are each given."""

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
    """How the rows learn that see no label: `KLToEnsemble`, and the same for fine-tuning."""

    images: int = 20_000
    """At most; they are of no other part."""
    temperature: float = 2.0
    longer: int = 4
    """Times the steps of the budget."""


DISTILLATION = Distillation()
# For as long as the endpoints were trained; with the one rate that the shorter distillation chose.
LONGER = Distillation(images=40_000, longer=16)

# For coefficients without bounds, which are not raw numbers behind a sigmoid or softmax.
UNBOUNDED_RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Condition:
    """What is special about the adaptation and selection data."""

    adaptation: int | None = None
    """That many adaptation images, and two fifths as many for selection; None: all."""
    noise: float = 0.0
    """Share of labels, in both splits, that are replaced by another class."""
    missing: tuple[int, ...] = ()
    """Classes that neither split has."""

    @property
    def name(self) -> str:
        """A short one, for files and tables."""
        parts = [] if self.adaptation is None else [f"n{self.adaptation}"]
        parts += [f"noise{self.noise:g}"] if self.noise else []
        parts += ["without" + "".join(map(str, self.missing))] if self.missing else []
        return "-".join(parts) or "plain"

    def apply(self, parts: Parts, repeat: int) -> Parts:
        """The parts of a repeat under this condition."""
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


@dataclass
class Pool:
    """The images of one data set, read once, and their parts by repeat."""

    data: str
    cache: Path
    sizes: Sizes
    _parts: tuple[int, Parts] | None = None

    @cached_property
    def everything(self) -> rebasin.Raw:
        """Training and test images."""
        return rebasin.read_images(self.data, self.cache)

    def parts(self, repeat: int) -> Parts:
        """The disjoint parts of a repeat; one repeat's are kept."""
        if self._parts is None or self._parts[0] != repeat:
            self._parts = repeat, rebasin.cut(self.everything, self.sizes, repeat)
        return self._parts[1]


def falling(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate goes linearly to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)


class Learner(MergeModule):
    """Adam with a falling learning rate (on the command line: `lr_scheduler`)."""

    def configure_optimizers(self) -> Any:
        """See `MergeModule.configure_optimizers`."""
        optimiser = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        scheduler = falling(optimiser, self.trainer.max_steps)
        return [optimiser], [{"scheduler": scheduler, "interval": "step"}]


class KeepBest(lightning.Callback):
    """The raw coefficients with the best accuracy on selection so far, or with the least loss."""

    def __init__(self, start: float, distil: Distillation | None) -> None:
        self.best, self.step, self.distil = start, 0, distil
        self.raws: State | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Compare."""
        found = pl_module.results["selection"]["average"]
        score = -found["loss"] if self.distil else found["accuracy"]
        if score > self.best:
            self.best, self.step = score, trainer.global_step
            self.raws = {k: raw.detach().clone() for k, raw in pl_module.merged.raw.items()}


@dataclass
class Case:
    """Some networks that are to be merged, and the data to do it with."""

    cache: Path
    pool: Pool
    architecture: Architecture
    setting: str
    members: int
    repeat: int
    budget: Budget
    condition: Condition = Condition()

    @property
    def name(self) -> str:
        """Names the case in messages."""
        parts = [self.pool.data, self.architecture.name, f"{self.setting}{self.members}"]
        return "-".join([*parts, f"r{self.repeat}", self.condition.name])

    @cached_property
    def files(self) -> list[Path]:
        """One file an endpoint."""
        found = []
        train = self.pool.parts(self.repeat).train
        seen: dict[tuple[int, ...], int] = {}
        for classes in SETTINGS[self.setting][self.members]:
            member = seen[classes] = seen.get(classes, -1) + 1
            options = (classes, self.repeat, member, train, self.pool.sizes)
            found.append(rebasin.endpoint(self.cache, self.pool.data, self.architecture, *options))
        return found

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
        return self._data_of(self.parts.adaptation)

    def unlabelled(self, distil: Distillation) -> MergeDataModule:
        """The same, with other images to learn from."""
        rest = self.parts.rest
        return self._data_of(rest.at(torch.arange(min(distil.images, len(rest)))))

    def _data_of(self, adaptation: Images) -> MergeDataModule:
        splits = {"adaptation": adaptation}
        splits |= {k: getattr(self.parts, k) for k in ("selection", "test")}
        size = min(self.budget.batch_size, len(adaptation))
        module = MergeDataModule(
            {"images": TaskData(splits, "tensors")},
            batch_size=size,
            eval_batch_size=128,
            seed=self.repeat,
            # Compared once a repeat; conditions take parts of the same splits.
            check_disjoint=self.condition == Condition(),
        )
        module.setup()
        return module

    def network(self, state: State | None = None) -> nn.Module:
        """The architecture, with weights."""
        return rebasin.build_network(self.architecture, state)

    @cached_property
    def has_norms(self) -> bool:
        """Whether it has BatchNorm."""
        return any(isinstance(m, nn.BatchNorm2d) for m in self.network().modules())

    def sources(self) -> dict[str, str]:
        """Sources by name, as a recipe takes them."""
        return {f"m{k}": str(path) for k, path in enumerate(self.files)}

    def score(self, state: State) -> Result:
        """Test and selection accuracy of one network."""
        return self.score_logits(partial(rebasin.logits_of, self.network(state)))

    def score_last(self, state: Callable[[], State]) -> Result | None:
        """The score at the end of a training, without early stopping; only the study asks."""
        return None if self.condition == Condition() else self.score(state())

    def score_logits(self, logits: Callable[[Images], Tensor]) -> Result:
        """Test and selection accuracy of whatever gives a score a class."""
        found = logits(self.parts.test)
        selection = logits(self.parts.selection)
        return {
            "test": rebasin.accuracy(found, self.parts.test.labels),
            "classes": rebasin.by_class(found, self.parts.test.labels),
            "selection": rebasin.accuracy(selection, self.parts.selection.labels),
        }


# ----------------------------------------------------------------------------------------------
# Merging, by gradmerge
# ----------------------------------------------------------------------------------------------


def with_alignment(case: Case, recipe: Recipe, name: str) -> Recipe:
    """The recipe under an alignment, with what that reads of the sources on data."""
    recipe = replace(recipe, alignment=ALIGNMENTS[name])
    if ALIGNMENTS[name].needs is None:
        return recipe
    # The same for all alignments on data; a merge on the way to another has its own.
    own = recipe.sources == case.sources()
    folder = Path(case.scratch.name) / ("own" if own else "other")
    if not own or not folder.is_dir():
        collect(recipe, case.data, folder, overwrite=True, module=case.network())
    return replace(recipe, statistics=str(folder))


def open_merge(
    case: Case, recipe: Recipe, alignment: str | None, objective: Objective | None = None
) -> MergeModule:
    """A merge that is ready to be scored or learned."""
    if alignment is not None:
        recipe = with_alignment(case, recipe, alignment)
    module = Learner(recipe, objective, module=case.network(), score_experts=False)
    module.take_tasks(case.data.tasks)
    return module


def state_of(module: MergeModule, data: MergeDataModule) -> State:
    """The merged network's weights and buffers, as an export would have them."""
    module.refresh_buffers(data)
    merged = module.merged
    state = {name: merged.plan.materialise(name, merged.raw) for name in merged.plan.tensors}
    return state | {name: value.clone() for name, value in merged.statistics.values().items()}


def averaged(
    case: Case,
    alignment: str | None,
    buffers: Literal["recompute", "mean"] = "recompute",
    repair: bool = False,
) -> State:
    """The average of the sources, under an alignment."""
    final = [REPAIR()] if repair else []
    recipe = Recipe(dict(case.sources()), init=Uniform(), buffers=buffers, finalisers=final)
    return state_of(open_merge(case, recipe, alignment), case.data)


def quiet_trainer(steps: int, checks: int, callback: lightning.Callback) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=max(1, steps // checks),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def learned(
    case: Case,
    recipe: Recipe,
    alignment: str | None,
    steps: int | None = None,
    distil: Distillation | None = None,
    rates: Sequence[float] | None = None,
) -> tuple[Result, State]:
    """Learn the coefficients with each learning rate; the best on selection stays."""
    budget, data, objective = case.budget, case.data, None
    steps = steps or budget.steps
    if distil:
        steps, data = steps * distil.longer, case.unlabelled(distil)
        objective = Objective([KLToEnsemble(temperature=distil.temperature)])
    module = open_merge(case, recipe, alignment, objective)
    begin = state_of(module, case.data)
    rank = chooser(case, distil)
    start = case.score(begin)
    start["rank"] = rank(begin, start)
    best, best_state = {**start, "rate": None, "step": 0}, begin
    tried = {}
    for rate in rates or budget.np_rates:
        set_coefficients(module.merged, recipe.init)
        module.learning_rate = rate
        keep = KeepBest(start["rank"], distil)
        quiet_trainer(steps, budget.checks, keep).fit(module, datamodule=data)
        last = case.score_last(lambda: state_of(module, case.data))
        set_coefficients(module.merged, recipe.init)
        with torch.no_grad():
            for key, value in (keep.raws or {}).items():
                module.merged.raw[key].copy_(value)
        state = state_of(module, case.data)
        score = case.score(state)
        tried[rate] = {**score, "rank": rank(state, score), "step": keep.step, "last": last}
        if tried[rate]["rank"] > best["rank"]:
            best, best_state = {**tried[rate], "rate": rate}, state
    return {**best, "start": start, "tried": tried}, best_state


def pairwise_recipe(sources: Mapping[str, Any], shares: Sequence[float]) -> Recipe:
    """NP Merge of two, which starts at stated shares."""
    coefficients = Complement(Sigmoid(Element()))
    return Recipe(dict(sources), coefficients=coefficients, init=Constant(list(shares)))


def np_pair(case: Case, alignment: str | None, distil: Distillation | None = None) -> Result:
    """One coefficient a weight, `sigmoid(a)` and `1 - sigmoid(a)`."""
    recipe = pairwise_recipe(case.sources(), [0.5, 0.5])
    return learned(case, recipe, alignment, distil=distil)[0]


def np_joint(case: Case, alignment: str | None, distil: Distillation | None = None) -> Result:
    """All at once, a softmax over sources for each weight."""
    coefficients = Softmax(Element())
    recipe = Recipe(dict(case.sources()), coefficients=coefficients, init=Uniform())
    return learned(case, recipe, alignment, distil=distil)[0]


def np_unbounded(
    case: Case,
    alignment: str | None,
    distil: Distillation | None = None,
    rates: Sequence[float] = UNBOUNDED_RATES,
) -> Result:
    """A coefficient for each weight of each source, which may be any number."""
    recipe = Recipe(dict(case.sources()), coefficients=Element(), init=Uniform(), origin="zero")
    return learned(case, recipe, alignment, distil=distil, rates=rates)[0]


def np_fold(case: Case, alignment: str | None) -> Result:
    """One source after another into the merge so far; the steps are shared by the merges."""
    (_, merged), *others = case.sources().items()
    result: Result = {}
    for number, (name, path) in enumerate(others, start=1):
        shares = [number / (number + 1), 1 / (number + 1)]
        recipe = pairwise_recipe({"merged": merged, name: path}, shares)
        result, merged = learned(case, recipe, alignment, case.budget.steps // len(others))
    return result


def np_tree(case: Case, alignment: str | None) -> Result:
    """Pairs, then pairs of those; the steps are shared by the merges."""
    level: list[Any] = list(case.sources().values())
    steps = case.budget.steps // (len(level) - 1)
    result: Result = {}
    while len(level) > 1:
        merged = []
        for first, second in zip(level[::2], level[1::2], strict=True):
            recipe = pairwise_recipe({"first": first, "second": second}, [0.5, 0.5])
            result, state = learned(case, recipe, alignment, steps)
            merged.append(state)
        level = merged
    return result


# ----------------------------------------------------------------------------------------------
# Beside it: the ensemble, and plain fine-tuning
# ----------------------------------------------------------------------------------------------


def endpoints(case: Case) -> Result:
    """Each network alone, and their means."""
    each = [case.score(rebasin.load_state(path)) for path in case.files]
    result: Result = {key: statistics.mean(e[key] for e in each) for key in ("test", "selection")}
    result["classes"] = [
        statistics.mean(column) for column in zip(*(e["classes"] for e in each), strict=True)
    ]
    return {**result, "each": [e["test"] for e in each]}


def ensemble(case: Case) -> Result:
    """The mean of the networks' probabilities."""
    networks = endpoint_networks(case)

    def probabilities(images: Images) -> Tensor:
        logits = [rebasin.logits_of(network, images) for network in networks]
        return torch.stack(logits).softmax(dim=-1).mean(dim=0)

    return case.score_logits(probabilities)


def endpoint_networks(case: Case) -> list[nn.Module]:
    """The networks, in evaluation mode."""
    return [case.network(rebasin.load_state(path)).eval() for path in case.files]


def distillation_loss(networks: Sequence[nn.Module]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What fine-tuning learns without labels: the ensemble's probabilities, softened."""
    t = DISTILLATION.temperature

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            each = torch.stack([network(images) for network in networks])
        target = (each / t).softmax(dim=-1).mean(dim=0)
        return (
            t
            * t
            * functional.kl_div((logits / t).log_softmax(dim=-1), target, reduction="batchmean")
        )

    return loss


def chooser(case: Case, distil: Distillation | None) -> Callable[[State, Result], float]:
    """What of several states is chosen by, on selection: more is better.

    With labels the accuracy. Without, minus the divergence from the ensemble: no label is read
    then, and it is less noisy.
    """
    if not distil:
        return lambda state, score: float(score["selection"])
    images = case.parts.selection
    loss_of = distillation_loss(endpoint_networks(case))

    def rank(state: State, score: Result) -> float:
        logits = rebasin.logits_of(case.network(state), images)
        return -float(loss_of(logits, images.images, images.labels))

    return rank


def label_loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """What fine-tuning learns with them."""
    return functional.cross_entropy(logits, labels)


def training_batches(data: MergeDataModule, steps: int) -> Iterator[dict[str, Tensor]]:
    """The batches that gradmerge learns on, in the same order."""
    loader = data.train_dataloader()
    while loader.step < steps:
        for batch in loader:
            yield batch["images"]
            if loader.step >= steps:
                return


def fine_tuned(
    case: Case,
    begin: State,
    distil: Distillation | None = None,
    rates: Sequence[float] | None = None,
) -> Result:
    """All weights trained from a start, with the budget of NP Merge."""
    budget, data, loss_of = case.budget, case.data, label_loss
    if distil:
        budget = replace(budget, steps=budget.steps * distil.longer)
        data = case.unlabelled(distil)
        loss_of = distillation_loss(endpoint_networks(case))
    sample = case.parts.adaptation.at(torch.arange(min(2_048, len(case.parts.adaptation))))
    rank = chooser(case, distil)
    start = case.score(begin)
    start["rank"] = rank(begin, start)
    best: Result = {**start, "rate": None, "step": 0}
    tried = {}
    for rate in rates or budget.tuning_rates:
        network = case.network(begin).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=rate)
        schedule = falling(optimiser, budget.steps)
        chosen: Result = {**start, "step": 0}
        for step, batch in enumerate(training_batches(data, budget.steps), start=1):
            loss = loss_of(network(batch["images"]), batch["images"], batch["labels"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % max(1, budget.steps // budget.checks) == 0:
                rebasin.recompute_batch_norm(network, sample)
                score = case.score(network.state_dict())
                score["rank"] = rank(network.state_dict(), score)
                if score["rank"] > chosen["rank"]:
                    chosen = {**score, "step": step}
                network.train()
        rebasin.recompute_batch_norm(network, sample)
        tried[rate] = {**chosen, "last": case.score_last(network.state_dict)}
        if chosen["rank"] > best["rank"]:
            best = {**chosen, "rate": rate}
    return {**best, "start": start, "tried": tried}
