"""The sources' statistics on data that a recipe needs, opened and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import to_plain
from gradmerge.engine.recipe import Recipe
from gradmerge.sources.collected import SourceStatistics

Hashes = tuple[Mapping[str, str], Mapping[str, Mapping[str, str]]]


def open_statistics(
    recipe: Recipe, folder: str | None, hashes: Callable[[], Hashes]
) -> SourceStatistics | None:
    """Open the statistics that alignment or preprocess needs and check that they fit.

    Args:
        recipe: the merge.
        folder: where they are.
        hashes: returns fingerprints of the sources, and those of their other files, by source.

    Raises:
        ConfigError: they are needed and there is no folder.
    """
    steps = [step for step in recipe.preprocess if step.needs is not None]
    alignment = recipe.alignment
    if not steps:  # an alignment checked its statistics when it ran
        aligned = alignment is not None and alignment.needs is not None
        return SourceStatistics(folder) if aligned and folder is not None else None
    if folder is None:
        raise ConfigError(
            f"statistics: expected the folder that {type(steps[0]).__name__} needs, with the "
            "sources' statistics on data, got none.\n"
            "Give `gradmerge merge` the tasks' data, or run `gradmerge collect` with the same "
            "files and set recipe.statistics to its output."
        )
    found = SourceStatistics(folder)
    wanted = [(step.needs, to_plain(step)) for step in steps if step.needs is not None]
    order = None if alignment is None or alignment.is_identity else to_plain(alignment)
    fingerprints, files = hashes()
    found.require(wanted, fingerprints, order, {name: files.get(name, {}) for name in fingerprints})
    return found
