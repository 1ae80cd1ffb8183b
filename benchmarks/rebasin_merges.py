"""Merges by gradmerge, the ensemble and fine-tuning, for the benchmark ``benchmarks/rebasin.py``.

A `Case` is some trained networks and the images to merge them with. NP Merge and fine-tuning learn
in one loop: the same batches, steps, checks and choice of a state.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
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
from gradmerge.engine.predict import predict
from gradmerge.objectives import CrossEntropy, KLToEnsemble, Objective
from gradmerge.training.collect import collect
from gradmerge.training.search import set_coefficients
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
    """Steps and batches of NP Merge and of fine-tuning, each."""

    steps: int
    checks: int
    """Scores on selection on the way; the best state is kept (the start is one of them)."""
    batch_size: int


# Of Adam: on raw coefficients behind a sigmoid or softmax, on coefficients without bounds, and on
# weights. They fall linearly to zero.
RATES = {
    "bounded": (0.01, 0.05, 0.25),
    "unbounded": (0.01, 0.03, 0.1),
    "fine-tuning": (1e-4, 5e-4, 2.5e-3),
}


@dataclass(frozen=True)
class Distillation:
    """Learning without labels: `KLToEnsemble`, and the same for fine-tuning."""

    images: int = 20_000
    """At most; they are of no other part."""
    longer: int = 4
    """Multiple of the budget's steps."""


TEMPERATURE = 2.0
DISTILLATION = Distillation()
# For as long as the endpoints were trained; with the one rate that the shorter distillation chose.
LONGER = Distillation(images=40_000, longer=16)


@dataclass(frozen=True)
class Condition:
    """A peculiarity of the adaptation and selection data."""

    adaptation: int | None = None
    """That many adaptation images, and two fifths as many for selection; None: all."""
    noise: float = 0.0
    """Share of labels, in both splits, that are replaced by another class."""
    missing: tuple[int, ...] = ()
    """Classes that neither split has."""

    def apply(self, parts: Parts, repeat: int) -> Parts:
        generator = torch.Generator().manual_seed(77 + repeat)
        kept = [k for k in ALL if k not in self.missing]
        changed = {}
        for name, share in (("adaptation", 1.0), ("selection", 0.4)):
            images: Images = getattr(parts, name)
            images = images.of_classes(kept) if self.missing else images
            if self.adaptation is not None:
                images = images.first(round(self.adaptation * share))
            if self.noise:
                wrong = torch.rand(len(images), generator=generator) < self.noise
                shift = torch.randint(1, CLASSES, (len(images),), generator=generator)
                labels = torch.where(wrong, (images.labels + shift) % CLASSES, images.labels)
                images = Images(images.images, labels)
            changed[name] = images
        return replace(parts, **changed)


CONDITIONS = {
    "plain": Condition(),
    "n50": Condition(50),
    "n200": Condition(200),
    "n1000": Condition(1_000),
    "n5000": Condition(5_000),
    "n1000-noise0.2": Condition(1_000, noise=0.2),
    "n1000-noise0.4": Condition(1_000, noise=0.4),
    "n1000-without3489": Condition(1_000, missing=(3, 4, 8, 9)),
}


@dataclass
class Case:
    """Some networks that are to be merged, and the data to do it with."""

    pool: Pool
    architecture: Architecture
    setting: str
    members: int
    repeat: int
    budget: Budget
    condition: str

    @property
    def name(self) -> str:
        parts = [self.pool.data, self.architecture.name, f"{self.setting}{self.members}"]
        return "-".join([*parts, f"r{self.repeat}", self.condition])

    @cached_property
    def sources(self) -> dict[str, Any]:
        """The networks' files by name, as a recipe takes them."""
        every = SETTINGS[self.setting][self.members]
        return {
            f"m{k}": str(
                rebasin.endpoint(
                    self.pool, self.architecture, classes, self.repeat, every[:k].count(classes)
                )
            )
            for k, classes in enumerate(every)
        }

    @cached_property
    def parts(self) -> Parts:
        return CONDITIONS[self.condition].apply(self.pool.parts(self.repeat), self.repeat)

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
        return rebasin.build_network(self.architecture, state)

    def endpoints(self) -> list[nn.Module]:
        """Return the networks that are to be merged."""
        return [self.network(load_file(path)) for path in self.sources.values()]

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


def open_merge(case: Case, recipe: Recipe, alignment: str | None) -> MergeModule:
    with tempfile.TemporaryDirectory() as folder:
        if alignment is not None:
            recipe = replace(recipe, alignment=ALIGNMENTS[alignment])
            if ALIGNMENTS[alignment].needs is not None:
                collect(recipe, case.data, folder, overwrite=True, module=case.network())
                recipe = replace(recipe, statistics=folder)
        module = MergeModule(recipe, module=case.network(), score_experts=False)
    module.take_tasks(case.data.tasks)
    return module


def state_of(module: MergeModule, data: MergeDataModule) -> State:
    """Return the merged network's weights and buffers, as an export would have them."""
    merged = module.merged
    merged.eval()
    module.refresh_buffers(data)
    state = {name: merged.state.materialise(name) for name in merged.plan.tensors}
    return state | {name: value.clone() for name, value in merged.network_buffers.values().items()}


def averaged(case: Case, alignment: str | None, **factors: Any) -> State:
    factors = {"buffers": "recompute", **factors}
    recipe = Recipe(case.sources, init=Uniform(), **factors)
    return state_of(open_merge(case, recipe, alignment), case.data)


def average(case: Case, alignment: str | None, **factors: Any) -> Result:
    return case.score(averaged(case, alignment, **factors))


# ---- beside it: endpoints and their ensemble -----------------------------------------------------


def endpoints(case: Case) -> Result:
    """Score each network alone; return means."""
    each = [case.score(load_file(path)) for path in case.sources.values()]
    means = {key: statistics.mean(e[key] for e in each) for key in ("test", "selection")}
    columns = zip(*(e["classes"] for e in each), strict=True)
    return {**means, "classes": [*map(statistics.mean, columns)]}


def ensemble(case: Case) -> Result:
    """Score the mean of the networks' probabilities."""
    networks = case.endpoints()

    def probabilities(images: Images) -> Tensor:
        logits = [rebasin.logits_of(network, images) for network in networks]
        return torch.stack(logits).softmax(dim=-1).mean(dim=0)

    return case.score(probabilities)


def distillation_loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss without labels: divergence from the ensemble's softened probabilities."""
    networks, t = case.endpoints(), TEMPERATURE

    def loss(logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            each = torch.stack([network(images) for network in networks])
        target = (each / t).softmax(dim=-1).mean(dim=0)
        own = (logits / t).log_softmax(dim=-1)
        return t * t * functional.kl_div(own, target, reduction="batchmean")

    return loss


# ---- learning: each rate in turn, the best on selection stays ------------------------------------

Loss = Callable[[dict[str, Tensor]], Tensor]
Start = Callable[[MergeDataModule], tuple[nn.Module, Loss, Callable[[], State]]]
"""Goes back to the start; returns parameters, loss of a batch, and the weights that they give."""


def merge_of(
    case: Case, recipe: Recipe, alignment: str | None, distil: Distillation | None
) -> tuple[State, Start]:
    """Return the start of NP Merge, whose parameters are raw coefficients."""
    module = open_merge(case, recipe, alignment)
    merged = module.merged
    term = KLToEnsemble(temperature=TEMPERATURE) if distil else CrossEntropy()
    objective = Objective([term])

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        def loss() -> Tensor:
            return objective.loss(predict(merged, objective, "images", batch, False))

        return merged.accumulate([loss])[0]

    def start(data: MergeDataModule) -> Any:
        set_coefficients(merged, recipe.init)
        return merged, loss_of, partial(state_of, module, data)

    return state_of(module, case.data), start


def network_of(
    case: Case, alignment: str | None, distil: Distillation | None
) -> tuple[State, Start]:
    """Return the start of fine-tuning: the average that NP Merge starts from."""
    first = averaged(case, alignment)
    sample = case.parts.adaptation.images[:2_048].split(500)
    divergence = distillation_loss(case) if distil else None

    def start(data: MergeDataModule) -> Any:
        network = case.network(first)

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            logits = network(batch["images"])
            if divergence:
                return divergence(logits, batch["images"])
            return functional.cross_entropy(logits, batch["labels"])

        def state() -> State:
            update_bn(sample, network)
            return {name: value.clone() for name, value in network.state_dict().items()}

        return network, loss_of, state

    return first, start


def learned(
    case: Case,
    begin: tuple[State, Start],
    rates: Sequence[float],
    distil: Distillation | None = None,
    steps: int | None = None,
) -> tuple[Result, State]:
    """Learn with each rate in turn; the best on selection stays, be it the start.

    States are compared by their `rank`: with labels the accuracy on selection; without, minus the
    divergence from the ensemble, which reads no label and is less noisy.
    """
    steps, data = steps or case.budget.steps, case.data
    divergence = None
    if distil:
        data = case.data_of(case.parts.rest.first(distil.images))
        steps *= distil.longer
        divergence = distillation_loss(case)

    def score(state: State) -> Result:
        found = case.score(state)
        if divergence is None:
            return {**found, "rank": found["selection"]}
        images = case.parts.selection
        logits = rebasin.logits_of(case.network(state), images)
        return {**found, "rank": -float(divergence(logits, images.images))}

    def attempt(rate: float) -> tuple[Result, State]:
        parameters, loss_of, state_now = begin[1](data)
        optimiser = torch.optim.Adam(parameters.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        chosen: tuple[Result, State] = {**start, "step": 0}, begin[0]
        for step, batch in enumerate(training_batches(data, steps), start=1):
            parameters.train()
            optimiser.zero_grad()
            loss_of(batch).backward()
            optimiser.step()
            schedule.step()
            if step % max(1, steps // case.budget.checks) == 0:
                state = state_now()
                found = score(state)
                if found["rank"] > chosen[0]["rank"]:
                    chosen = {**found, "step": step}, state
        return {**chosen[0], "last": case.score(state_now())}, chosen[1]

    start = score(begin[0])
    best: tuple[Result, State] = {**start, "rate": None, "step": 0}, begin[0]
    tried = {}
    for rate in rates:
        tried[rate], state = attempt(rate)
        if tried[rate]["rank"] > best[0]["rank"]:
            best = {**tried[rate], "rate": rate}, state
    return {**best[0], "start": start, "tried": tried}, best[1]


def training_batches(data: MergeDataModule, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of a fit, in the same order."""
    loader = data.train_dataloader()
    while loader.step < steps:
        for batch in loader:
            yield batch["images"]
            if loader.step >= steps:
                return


# ---- NP Merge and fine-tuning --------------------------------------------------------------------


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
    rates = rates or RATES["unbounded" if kind == "unbounded" else "bounded"]
    begin = merge_of(case, RECIPES[kind](case.sources), alignment, distil)
    return {**learned(case, begin, rates, distil)[0], "alignment": alignment}


def two(
    case: Case, alignment: str | None, sources: dict[str, Any], shares: list[float], merges: int
) -> tuple[Result, State]:
    """Learn one of several merges of two, which share the steps."""
    begin = merge_of(case, pairwise_recipe(sources, shares), alignment, None)
    steps = case.budget.steps // merges
    result, state = learned(case, begin, RATES["bounded"], steps=steps)
    return {**result, "alignment": alignment}, state


def np_fold(case: Case, alignment: str | None) -> Result:
    """Merge one source after another into the merge so far."""
    (_, merged), *others = case.sources.items()
    result: Result = {}
    for number, (name, path) in enumerate(others, start=1):
        shares = [number / (number + 1), 1 / (number + 1)]
        result, merged = two(case, alignment, {"merged": merged, name: path}, shares, len(others))
    return result


def np_tree(case: Case, alignment: str | None) -> Result:
    """Merge pairs, then pairs of those."""
    level: list[Any] = list(case.sources.values())
    merges, result = len(level) - 1, {}
    while len(level) > 1:
        pairs, level = zip(level[::2], level[1::2], strict=True), []
        for first, second in pairs:
            sources = {"first": first, "second": second}
            result, state = two(case, alignment, sources, [0.5, 0.5], merges)
            level.append(state)
    return result


def fine_tuned(
    case: Case,
    alignment: str | None,
    distil: Distillation | None = None,
    rates: Sequence[float] | None = None,
) -> Result:
    """Train all weights of the average that NP Merge starts from, with the same budget."""
    begin = network_of(case, alignment, distil)
    result, _ = learned(case, begin, rates or RATES["fine-tuning"], distil)
    return {**result, "alignment": alignment}
