"""What has no meaning, or another one, in merges of two at a time, and is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradmerge.alignment import AbstractAlignment
from gradmerge.errors import ConfigError, shorten
from gradmerge.objectives import Objective
from gradmerge.recipe import Recipe


def require_foldable(recipe: Recipe) -> None:
    """Refuse factors of a recipe that are of all sources at once.

    Raises:
        ConfigError: what it is, and what to do.
    """
    needy = [type(step).__name__ for step in recipe.preprocess if step.needs is not None]
    if needy:
        raise ConfigError(
            f"{', '.join(needy)}: its statistics are of the sources, and the merge of two sources "
            "has none. Learn without this step, or without a driver (all sources at once)."
        )
    if recipe.tokenizer is not None:
        raise ConfigError(
            "tokenizer: a merge of two at a time takes sources with one tokenizer. Learn without a "
            "driver (all sources at once), which aligns all of them."
        )
    if recipe.alignment is not None and not recipe.alignment.is_identity:
        _require_alignment(recipe, recipe.alignment)


def _require_alignment(recipe: Recipe, alignment: AbstractAlignment) -> None:
    kind = type(alignment).__name__
    if alignment.needs is not None:
        raise ConfigError(
            f"{kind}: its statistics are of the sources, and the merge of two sources has none. "
            "Align by weights (WeightMatching), or learn without a driver (all sources at once)."
        )
    reference = getattr(alignment, "reference", None)
    if reference is not None:
        raise ConfigError(
            f"{kind}: reference: a merge of two at a time aligns the second to the first, which is "
            f"the merge so far; came {reference}. Leave it out, and name that source first in the "
            "driver's order."
        )
    if recipe.private:
        raise ConfigError(
            "private tensors and alignment do not go together in a merge of two at a time: an "
            "aligned source's neurons are in another order in every step, and its head would have "
            f"to follow. Came private: {shorten(recipe.private)}. Merge the heads, too, or learn "
            "without a driver."
        )


def require_objective(driver: str, objective: Objective, joins: int) -> None:
    """Refuse an ensemble of all sources where a step merges the merge so far with one of them.

    Raises:
        ConfigError: a term needs the ensemble, and there are several steps.
    """
    terms = [type(term).__name__ for term in objective.terms if term.needs_ensemble]
    if terms and joins > 1:
        raise ConfigError(
            f"{driver}: {', '.join(terms)} averages what the sources of a step predict; of {joins} "
            "steps all but the first have a merge among them, so that the sources would not count "
            "alike, and the teacher would be another one in each step. Use KLToSource, whose "
            "teachers are the sources themselves, or learn without a driver (all at once)."
        )


def require_start(driver: str, recipe: Recipe, number: int, shares: Sequence[float]) -> None:
    """Refuse a link that a step cannot start with.

    Args:
        driver: its name.
        recipe: of the job.
        number: of the step, from 1.
        shares: the coefficients that it starts at.

    Raises:
        ConfigError: the link cannot be pulled back from them.
    """
    try:
        recipe.coefficients.pull_back(torch.tensor(shares, dtype=torch.float64)[:, None])
    except ConfigError as error:
        raise ConfigError(
            f"{driver}: start: average begins step {number} at {shares[0]:.4g} and "
            f"{shares[1]:.4g}, whatever model.recipe.init says, and "
            f"{type(recipe.coefficients).__name__} cannot begin there ({error}) Take the recipe's "
            "init at each step: --driver.start recipe; or another link."
        ) from error
