"""The method of a fit: as configured, or the default where a configuration states none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.given import parts_of, spelled, tree_of
from gradmerge.common.errors import shorten

DEFAULT = Path(__file__).with_name("default.yaml")
"""The same file as `configs/methods/default.yaml`, which links to it."""
_NAME = "configs/methods/default.yaml"
DEFAULTED = f"default ({_NAME})"
_RECIPE = (
    *("origin", "alignment", "preprocess", "statistics", "coefficients", "init", "operator"),
    *("finalisers", "tokenizer"),
)
_MODEL = ("objective", "logit_scale")
_KINDS = (
    *("text_classification", "token_classification", "image_classification"),
    "zero_shot_image_classification",
)


def with_method(command: str, arguments: Sequence[str]) -> tuple[list[str], str]:
    """Return the arguments of a command that learns, with the default method where it applies.

    It applies if nothing states a method (factors of the recipe, objective, driver or search), all
    tasks are classified, and each has the source that it is to imitate. Any other option that is
    given replaces that of the default. A checkpoint is resumed or scored with its own method: with
    the default only if its fit used that.

    Returns:
        The arguments, and the origin of the method in words.
    """
    given = spelled(command, arguments)
    tree = tree_of(command, list(parts_of(command, given)))
    model = _mapping(tree, "model")
    recipe = {**_mapping(tree, "recipe"), **_mapping(model, "recipe")}
    stated = [*(name for name in _RECIPE if name in recipe), *(n for n in _MODEL if n in model)]
    stated += [name for name in ("driver", "search", "model_folder") if tree.get(name) is not None]
    if stated:
        return given, "as configured"
    reason = _obstacle(tree, recipe)
    if reason:
        return given, f"built in ({_NAME} does not apply: {reason})"
    path = tree.get("ckpt_path")
    if path is not None and not _used_by(str(path), _mapping(tree, "trainer")):
        return given, "built in, as in the checkpoint"
    if "learning_rate" not in model:
        return ["--config", str(DEFAULT), *given], DEFAULTED
    default = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    default["optimizer"]["init_args"]["lr"] = model["learning_rate"]
    return ["--config", yaml.safe_dump(default), *given], DEFAULTED


def _obstacle(tree: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return why the default method does not apply, or an empty string."""
    if recipe.get("base") is None:
        return "there is no base"
    data = _mapping(tree, "data")
    if data.get("labels_per_task") is not None:
        return "data.labels_per_task asks for labels"
    known = {*_mapping(recipe, "sources"), *_mapping(recipe, "heads")}
    other, alone = [], []
    for name, task in _mapping(data, "tasks").items():
        task = task if isinstance(task, Mapping) else {}
        if task.get("kind") not in _KINDS:
            other.append(str(name))
        if (task.get("source") or name) not in known:
            alone.append(str(name))
    if other:
        return f"no classification: {shorten(other, 4)}"
    return f"no source of its own: {shorten(alone, 4)}" if alone else ""


def _used_by(path: str, trainer: Mapping[str, Any]) -> bool:
    """Return whether the fit that wrote a checkpoint used the default method."""
    from gradmerge.cli.resume import NAMES, find_checkpoint
    from gradmerge.common.checkpoints import load_checkpoint

    if path in NAMES:
        path = str(find_checkpoint(path, trainer))
    if not Path(path).is_file():
        return False  # reported where the checkpoint is needed
    saved = load_checkpoint(path, mmap=True)
    return _mapping(_mapping(saved, "gradmerge"), "run").get("method") == DEFAULTED


def describe_method(recipe: Any, objective: Any) -> str:
    """Return the terms of an objective and the factors of a recipe, in one line."""
    coefficients, names = recipe.coefficients, []
    while hasattr(coefficients, "inner"):
        names.append(type(coefficients).__name__)
        coefficients = coefficients.inner
    names.append(type(coefficients).__name__)
    terms = ", ".join(type(term).__name__ for term in objective.terms)
    steps = ", ".join(type(step).__name__ for step in recipe.preprocess)
    return f"{terms}; coefficients {' of '.join(names)}" + (f" over {steps}" if steps else "")


def _mapping(holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping of a configuration, empty if there is none."""
    found = holder.get(name)
    return found if isinstance(found, Mapping) else {}
