"""The blocks of a network: which modules they are, and which of a merge's tensors they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gradmerge.alignment import AbstractAlignment
from gradmerge.alignment.views import original_of
from gradmerge.coefficients.base import Slot
from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError, nearest, shorten


@dataclass(frozen=True)
class Block:
    """A module whose input is the output of the block before."""

    name: str
    """Name of the module."""
    tensors: tuple[str, ...]
    """Merged tensors that it holds, in the order of the plan."""


def find_blocks(plan: Plan, wanted: Sequence[str] | None = None) -> list[Block]:
    """The blocks of a plan's network, in the order of its modules.

    Args:
        plan: an opened recipe with a network.
        wanted: regular expressions that match whole names of modules; default: the members of the
            network's one `nn.ModuleList` that is in no other list, or of the network itself where
            it is an `nn.Sequential`.

    Raises:
        ConfigError: the network has no such blocks, blocks lie within each other, a tensor is used
            in a block and elsewhere, or a coefficient is shared between blocks.
    """
    skeleton = plan.skeleton
    if skeleton is None or plan.binding is None:
        raise ConfigError(
            "the sources carry no config to build the network from, so it has no blocks to learn "
            "one by one; pass it as `module`."
        )
    if getattr(getattr(skeleton, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            f"LayerWise: {type(skeleton).__name__} is an encoder with a decoder, whose blocks take "
            "the encoder's output besides that of the block before. Expected a network whose "
            "blocks are one chain; learn this one end to end (driver EndToEnd)."
        )
    names = _default(skeleton) if wanted is None else _matching(skeleton, wanted)
    blocks = [Block(name, _held(plan, name)) for name in names]
    if not any(name not in plan.fixed for block in blocks for name in block.tensors):
        raise ConfigError(
            f"LayerWise: the blocks {shorten(names)} hold no tensor whose coefficients are "
            "learned; name others in `blocks`."
        )
    _require_own_coefficients(plan, blocks)
    return blocks


def _default(skeleton: nn.Module) -> list[str]:
    if isinstance(skeleton, nn.Sequential):
        return [name for name, _ in skeleton.named_children()]
    lists: list[str] = []
    for name, module in skeleton.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        full = isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
        if full and not inside:
            lists.append(name)
    if len(lists) != 1:
        found = f"several ({shorten(lists)})" if lists else "none"
        raise ConfigError(
            f"LayerWise: expected {type(skeleton).__name__} to stack its blocks in one "
            f"nn.ModuleList, got {found}. Say which modules are its blocks: `blocks`, regular "
            "expressions that match whole module names, e.g. ['layer[1-4]']."
        )
    members = skeleton.get_submodule(lists[0]).named_children()
    return [f"{lists[0]}.{name}" for name, _ in members]


def _matching(skeleton: nn.Module, wanted: Sequence[str]) -> list[str]:
    every = [name for name, _ in skeleton.named_modules() if name]
    found = set()
    for pattern in wanted:
        matches = [name for name in every if re.fullmatch(pattern, name)]
        if not matches:
            raise ConfigError(
                f"LayerWise: blocks: {pattern!r} matches the whole name of no module of "
                f"{type(skeleton).__name__}.{nearest(pattern, every)}"
            )
        found.update(matches)
    for name in sorted(found):
        outer = next((other for other in found if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ConfigError(
                f"LayerWise: the block {name} lies within the block {outer}; name one of them."
            )
    return [name for name in every if name in found]


def _held(plan: Plan, block: str) -> tuple[str, ...]:
    """Merged tensors of a block.

    Raises:
        ConfigError: one is used outside of it, too.
    """
    assert plan.binding is not None
    held = []
    for name in plan.tensors:
        places = plan.binding.parameters.get(name, ())
        within = [place for place in places if place.startswith(f"{block}.")]
        if not within:
            continue
        others = [place for place in places if place not in within]
        if others and name not in plan.fixed:
            raise ConfigError(
                f"LayerWise: {name} is tied: it is {within[0]} of the block {block} and "
                f"{others[0]} outside of it, so it cannot be learned with that block alone. Learn "
                "end to end, or freeze it (recipe.frozen)."
            )
        held.append(name)
    return tuple(held)


def slot_id(slot: Slot) -> str:
    """A name for the raw coefficients `[rows, *slot]` of one slot, as a parameter may have."""
    return slot.key if slot.index is None else f"{slot.key}/{slot.index}"


def _require_own_coefficients(plan: Plan, blocks: Sequence[Block]) -> None:
    """Refuse coefficients that tensors of two blocks, or of a block and the rest, share."""
    of = {name: block.name for block in blocks for name in block.tensors}
    first: dict[str, str] = {}
    for name in plan.learned:
        other = first.setdefault(slot_id(plan.layout.slots[name]), name)
        here, there = of.get(name, "no block"), of.get(other, "no block")
        if here != there:
            raise ConfigError(
                f"LayerWise: {other} (of {there}) and {name} (of {here}) share a coefficient, "
                "which one block's loss alone would decide for all. Take a granularity within a "
                "block (Tensor, Column, Row, Partition, Element, or Group with patterns that end "
                "at a block), or learn end to end."
            )


def require_permuted(alignment: AbstractAlignment | None, plan: Plan | None = None) -> None:
    """Refuse an alignment that mixes units.

    What a block is matched to are hidden features of an expert. A permuted expert computes them, in
    the merge's order; a mixed one computes something else, and the expert's own are in another
    basis than the merge's.

    Args:
        alignment: the recipe's.
        plan: the opened recipe, whose maps are looked at; default: what the alignment says.

    Raises:
        ConfigError: it mixes.
    """
    if alignment is None:
        return
    if plan is None:
        found = "may mix units" if alignment.mixes_units else ""
    else:
        mixed = [name for name, view in plan.serving.items() if original_of(view) is not view]
        found = f"mixes units of {shorten(mixed)}" if mixed else ""
    if found:
        raise ConfigError(
            f"LayerWise: alignment {type(alignment).__name__} {found}, expected one that permutes "
            "them. Each block is matched to an expert's hidden features; those of a mixed source "
            "are not the expert's, and the expert's own lie in another basis than the merge's. "
            "Take WeightMatching or ActivationMatching, or learn end to end, where the teacher is "
            "the source itself."
        )
