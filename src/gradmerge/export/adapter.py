"""Write a merge as a LoRA adapter of its base, in the format of PEFT.

The merged direction of a tensor is `D = sum_k c_k B_k`. If the sources are adapters that are merged
linearly, `B_k = L_k R_k`, it is the product of `[c_1 L_1, ..., c_K L_K]` and `[R_1; ...; R_K]`: an
adapter whose ranks are the sums of the sources' ranks is exact. A smaller rank, or a direction that
is not a product, takes the largest singular values of D; no other matrix of that rank is nearer
(Eckart and Young 1936). Those of large matrices are found by subspace iteration from random vectors
(Halko et al. 2011, arXiv 0909.4061); the error that is stated is that of what is written. Modules
without an adapter of their own kind (norms, layers with a changed bias) are stored whole, as PEFT's
`modules_to_save`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError, require, shorten
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.state import FitState
from gradmerge.export.atomic import inputs_of, new_folder
from gradmerge.export.folder import require_options, write_coefficients, write_records
from gradmerge.export.history import History
from gradmerge.export.provenance import provenance_of, published
from gradmerge.export.writer import Entry, write_safetensors
from gradmerge.preprocess.matrices import decompose
from gradmerge.sources.files import write_json
from gradmerge.sources.lora import LoraCheckpoint

_PREFIX = "base_model.model."
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
# Sides up to which all singular values are computed.
_SMALL = 1024
# Iterations, and ranks beyond those that are wanted, of the subspace iteration.
_ITERATIONS, _MORE = 6, 16
_REMEDY = "Write the whole model instead (outputs: merged)."


@dataclass(frozen=True)
class _Kind:
    """Layout in which PEFT stores the two factors of `D = left @ right`."""

    a: str = "lora_A.weight"
    b: str = "lora_B.weight"
    transposed: bool = False
    """True if the adapter's product is the transpose of D."""


_LINEAR = _Kind()
_CONV1D = _Kind(transposed=True)
_EMBEDDING = _Kind("lora_embedding_A", "lora_embedding_B", transposed=True)


def require_adapter(recipe: Recipe, rank: int | None) -> None:
    """Reject recipes whose merge is no change of a base's own tensors, before any work.

    Raises:
        ConfigError: the recipe has another origin, private tensors, a tokenizer or an alignment.
    """
    if rank is not None:
        require(rank >= 1, "rank", "at least 1", rank)
    aligned = recipe.alignment is not None and not recipe.alignment.is_identity
    origin, private = recipe.resolved_origin, shorten([*recipe.private, *recipe.adapters])
    for is_wrong, problem in (
        (origin != "base", f"expected origin base, which the adapter is added to, got {origin}"),
        (private, f"expected nothing private, got {private}; an adapter is for all tasks"),
        (recipe.tokenizer is not None, "expected no tokenizer, which changes the base's rows"),
        (aligned, "expected no alignment, which changes the order of the base's units"),
    ):
        if is_wrong:
            raise ConfigError(f"outputs adapter: {problem}.\n{_REMEDY}")


def export_adapter(
    state: FitState,
    output: str | Path,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
    tasks: Mapping[str, str] | None = None,
    results: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    inputs: Iterable[Path] = (),
    history: History | None = None,
    provenance_paths: bool = False,
) -> Path:
    """Write a merge as a folder with a LoRA adapter that PEFT loads on the base.

    The scale of all updates is 1 (`lora_alpha` is the rank), and coefficients are multiplied into
    the factors.

    Args:
        state: the opened recipe with its coefficients.
        output: folder to write; it must not exist unless `overwrite`.
        rank: largest rank of a tensor's update; what is beyond it is cut off, and the error is
            stated in card and provenance. Default: the sum of the sources' ranks, which is exact.
        dtype: float32, bfloat16, float16 or float64. Default: float32.
        overwrite: replace an existing folder, once the new one is complete.
        buffers: buffers recomputed on data; an adapter cannot hold others than the base's.
        tasks: task -> source, for the record.
        results: scores for the model card, by stage, task and metric.
        extra: further entries of provenance.json.
        inputs: files and folders besides the sources that the output must be apart from.
        history: what a fit has measured.
        provenance_paths: keep local paths in the records. Default: names and hub ids only.

    Returns:
        The folder.

    Raises:
        ConfigError: the merge is no change of the base's own tensors, a `rank` is needed, or the
            folder exists.
        OutputError: it cannot be written.
    """
    plan, target = state.plan, Path(output).expanduser()
    require_adapter(plan.recipe, rank)
    kind = require_options(dtype, None, ()) or torch.float32
    state.require_finite()
    _require_buffers(plan, buffers or {})
    parts = _Parts.of(state)
    if rank is None:
        parts.require_factors()
    assert plan.base is not None
    with new_folder(target, overwrite, [*inputs, *inputs_of(plan)]) as work:
        plan.require_same_as_before()
        with plan.sound():
            write_coefficients(state, work)
            updates = {name: parts.update(name, rank) for name in parts.low_rank}
        updates = {name: update for name, update in updates.items() if update.rank}
        if not updates:
            raise ConfigError(f"outputs adapter: no matrix differs from the base's.\n{_REMEDY}")
        entries = [entry for name in updates for entry in parts.pair(name, updates[name], kind)]
        entries += parts.whole_entries(kind)
        write_safetensors(work / "adapter_model.safetensors", entries, {"format": "pt"})
        settings = parts.settings({parts.modules[n]: own.rank for n, own in updates.items()})
        base = published(_place_of(plan.base.label), provenance_paths)
        write_json(work / "adapter_config.json", {**settings, **base})
        LoraCheckpoint(work, plan.base)  # read as every other adapter
        facts = {"rank": settings["r"], **_errors(updates)}
        name = type(plan.skeleton).__name__
        facts = {**facts, "summary": _summary(facts), "architecture": name}
        record = partial(provenance_of, state, dtype, tasks or {}, results, paths=provenance_paths)
        more = {**(extra or {}), "adapter": facts}
        write_records(work, state, record, more, "", target.name, history)
    return target


@dataclass(frozen=True)
class _Update:
    """A low-rank update of one tensor."""

    left: Tensor
    """`[rows, rank]`."""
    right: Tensor
    """`[rank, entries per row]`."""
    lost: float = 0.0
    """Squared norm of what was cut off."""
    square: float = 0.0
    """Squared norm of the whole update."""

    @property
    def rank(self) -> int:
        return len(self.right)


@dataclass(frozen=True)
class _Parts:
    """The changed tensors of a merge, by how an adapter stores them."""

    state: FitState
    modules: Mapping[str, str]
    """Name in the files -> name of the module, of all changed tensors."""
    low_rank: Mapping[str, _Kind]
    """Tensors that are stored as factors."""
    whole: Mapping[str, list[tuple[str, str]]]
    """Modules that are stored whole -> names of their tensors, in the module and in the files."""

    @classmethod
    def of(cls, state: FitState) -> _Parts:
        """Sort the tensors that differ from the base's.

        Raises:
            ConfigError: some belong to no single module of the network.
        """
        plan = state.plan
        network, binding = plan.skeleton, plan.binding
        if network is None or binding is None or plan.base is None or plan.base.folder is None:
            raise ConfigError(
                "outputs adapter: expected a base that is a Hugging Face folder, whose network "
                f"transformers builds, got {plan.reference.label}.\n{_REMEDY}"
            )
        changed = [name for name in plan.tensors if state.fixed.get(name) != 0.0]
        changed = [name for name in changed if _differs(plan, name)]
        modules, low_rank, whole, refused = {}, {}, set(), []
        for name in changed:
            places = binding.parameters.get(name, ())
            if len(places) != 1:
                why = "fused or split on loading" if not places else f"tied: {', '.join(places)}"
                refused.append(f"{name} ({why})")
                continue
            modules[name], _, own = places[0].rpartition(".")
            module = network.get_submodule(modules[name])
            kind = _kind_of(module) if own == "weight" else None
            if kind is not None:
                low_rank[name] = kind
            elif next(module.children(), None) is None and modules[name]:
                whole.add(modules[name])
            else:
                refused.append(f"{name} (a parameter of {type(module).__name__})")
        if refused:
            raise ConfigError(
                "outputs adapter: expected tensors that each belong to one linear layer, "
                f"embedding, convolution or norm, got {shorten(refused)}.\n{_REMEDY}"
            )
        files = {aliases[0]: name for name, aliases in binding.parameters.items()}
        inside = {
            module: [
                (place, files[place])
                for own, _ in network.get_submodule(module).named_parameters()
                if (place := f"{module}.{own}") in files
            ]
            for module in sorted(whole)
        }
        low_rank = {name: kind for name, kind in low_rank.items() if modules[name] not in whole}
        return cls(state, modules, low_rank, inside)

    def require_factors(self) -> None:
        """Reject tensors whose rank is not known from the sources.

        Raises:
            ConfigError: some are not merged from factors alone.
        """
        dense = [name for name in self.low_rank if self.state.factors(name) is None]
        if dense:
            raise ConfigError(
                "rank: expected a number, got none, for tensors whose change is not a sum of "
                f"adapters: {shorten(dense)}.\nSources that are whole models, preprocess steps and "
                "operators other than Linear change all ranks. Give --rank 32, for instance; the "
                "error is stated."
            )

    def update(self, name: str, rank: int | None) -> _Update:
        """Return the update of a tensor with at most `rank` ranks."""
        factors = self.state.factors(name)
        if factors is None:
            base = self.state.plan.read("base", name)
            wide = torch.promote_types(base.dtype, torch.float32)
            change = self.state.materialise(name, wide) - base.to(wide)
            return _nearest(change.view(len(change), -1), rank)
        left, right = factors
        if rank is None or len(right) <= rank:
            square = ((left.double().T @ left.double()) * (right.double() @ right.double().T)).sum()
            return _Update(left, right, square=float(square))
        ahead, first = torch.linalg.qr(left.double())
        behind, second = torch.linalg.qr(right.double().T)
        core = _nearest(first @ second.T, rank)
        return replace(core, left=ahead @ core.left, right=core.right @ behind.T)

    def pair(self, name: str, update: _Update, dtype: torch.dtype) -> Iterator[Entry]:
        """Yield the factors A and B of an update as PEFT stores them."""
        kind, module = self.low_rank[name], f"{_PREFIX}{self.modules[name]}"
        left, right = update.left, update.right
        if kind.transposed:
            left, right = right.T, left.T
        else:
            shape = self.state.plan.tensors[name].shape  # of convolutions, with their kernel
            left = left.reshape(*left.shape, *[1] * (len(shape) - 2))
            right = right.reshape(-1, *shape[1:])
        for key, factor in ((kind.a, right), (kind.b, left)):
            yield Entry(f"{module}.{key}", tuple(factor.shape), dtype, factor.to(dtype).contiguous)

    def whole_entries(self, dtype: torch.dtype) -> Iterator[Entry]:
        """Yield the tensors of modules that are stored whole."""
        for tensors in self.whole.values():
            for place, name in tensors:
                make = partial(self.state.materialise, name, dtype)
                shape = self.state.plan.tensors[name].shape
                yield Entry(f"{_PREFIX}{place}", tuple(shape), dtype, make)

    def settings(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Return adapter_config.json for the rank of each module."""
        network: Any = self.state.plan.skeleton
        name = type(network).__name__
        largest = max(ranks.values())
        others = {f"^{re.escape(m)}": rank for m, rank in ranks.items() if rank != largest}
        kinds = {self.low_rank[name] for name in self.low_rank}
        task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
        mapping = {"base_model_class": name, "parent_library": type(network).__module__}
        return {
            "peft_type": "LORA",
            "task_type": task,
            "auto_mapping": None if task else mapping,
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "target_modules": _targets(list(ranks), [m for m, _ in network.named_modules()]),
            "modules_to_save": list(self.whole) or None,
            "fan_in_fan_out": _CONV1D in kinds,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }


def _place_of(label: str) -> dict[str, str | None]:
    """Return what adapter_config.json says of the base: its path, or its id and revision."""
    name, _, revision = label.partition("@")
    if Path(label).expanduser().exists():
        name, revision = label, ""
    return {"base_model_name_or_path": name, "revision": revision or None}


def _summary(facts: Mapping[str, Any]) -> str:
    """Return in a line how near an adapter is to its merge, of its entry in provenance.json."""
    if not facts["relative_error"]:
        return f"largest rank {facts['rank']}, exact up to rounding"
    worst, own = facts["largest_error"]
    return (
        f"largest rank {facts['rank']}, relative error {facts['relative_error']:.2e} of the change "
        f"from the base (largest {own:.2e}, of {worst})"
    )


def _kind_of(module: nn.Module) -> _Kind | None:
    """Return how PEFT adapts the weight of a module; None if it does not."""
    if isinstance(module, nn.Linear):
        return _LINEAR
    if isinstance(module, nn.Embedding):
        return _EMBEDDING
    if type(module).__name__ == "Conv1D":  # of transformers, `[in, out]`
        return _CONV1D
    plain = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
    return _LINEAR if plain else None


def _targets(adapted: list[str], modules: list[str]) -> list[str] | str:
    """Return the modules as PEFT selects them: the last parts of their names if those suffice."""
    last = sorted({name.rpartition(".")[-1] for name in adapted})
    selected = {name for name in modules if name.rpartition(".")[-1] in last}
    if selected == set(adapted):
        return last
    return f"^({'|'.join(map(re.escape, adapted))})$"


def _nearest(matrix: Tensor, rank: int | None) -> _Update:
    """Return the update of the largest singular values, half of each in either factor."""
    if rank is None or min(matrix.shape) <= max(_SMALL, rank + _MORE):
        left, values, right = decompose(matrix)
        square = float(values.square().sum())
    else:
        square = float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file each time
            left, values, other = torch.svd_lowrank(matrix, rank + _MORE, niter=_ITERATIONS)
        right = other.T
    root = values[:rank].sqrt()
    lost = max(0.0, square - float(values[: len(root)].double().square().sum()))
    factors = left[:, : len(root)] * root, root[:, None] * right[: len(root)]
    # what rounding leaves of a direction that has no more ranks than these
    return _Update(*factors, lost=lost if lost > 1e-12 * square else 0.0, square=square)


def _errors(updates: Mapping[str, _Update]) -> dict[str, Any]:
    """Return the relative error over all tensors, and the largest of one tensor."""
    total = sum(update.square for update in updates.values())
    lost = sum(update.lost for update in updates.values())
    own = {n: math.sqrt(u.lost / u.square) for n, u in updates.items() if u.lost > 0}
    found: dict[str, Any] = {"relative_error": math.sqrt(lost / total) if lost else 0.0}
    if own:
        worst = max(own, key=own.__getitem__)
        found["largest_error"] = [worst, own[worst]]
    return found


def _differs(plan: Plan, name: str) -> bool:
    """Return whether a source has another tensor than the base."""
    assert plan.base is not None
    base = None
    for source in plan.sources.values():
        if source.update(name) is not None:
            return True
        if base is None:
            base = plan.base.read(name)
        if not torch.equal(source.read(name).to(base), base):
            return True
    return False


def _require_buffers(plan: Plan, recomputed: Mapping[str, Tensor]) -> None:
    """Reject buffers that are not the base's.

    Raises:
        ConfigError: some are others.
    """
    other = [
        name
        for name in plan.buffers
        if not torch.equal(
            recomputed[name] if name in recomputed else plan.buffer(name),
            plan.reference.read(name),
        )
    ]
    if other:
        raise ConfigError(
            f"outputs adapter: expected the base's buffers, got others for {shorten(other)}, which "
            f"an adapter cannot hold.\n{_REMEDY}"
        )
