"""Later scores in the records of an exported folder: provenance and model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from gradmerge.common.atomic import whole_file
from gradmerge.common.errors import ConfigError
from gradmerge.common.files import read_json
from gradmerge.common.schema import a_number, require_shape
from gradmerge.export.card import eval_results, score_sections
from gradmerge.export.provenance import stamp
from gradmerge.sources.files import write_json

STAGE = "lm-eval"
"""Start of the names under which scores of lm-evaluation-harness are kept, beside the splits."""
_CARD, _PROVENANCE = "README.md", "provenance.json"
_SHAPE = {
    "results?": {str: {str: {str: (a_number, None)}}},
    "evaluation?": {str: dict},
}


def is_recorded(folder: Path) -> bool:
    """Return whether a folder has the records of an export by gradmerge."""
    return all((folder / name).is_file() for name in (_CARD, _PROVENANCE))


def record(
    folder: Path, stage: str, scores: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Add scores to provenance and model card of a folder; those of the same tasks are replaced.

    Scores of a split replace all of that split, because their average is of all its tasks.

    Args:
        folder: the exported folder.
        stage: how they were measured: a split, or a benchmark (see `STAGE`).
        scores: by task and metric.
        settings: versions and settings, for the provenance.

    Raises:
        ConfigError: provenance or card is damaged.
        OutputError: they cannot be written.
    """
    path = folder / _PROVENANCE
    found: dict[str, Any] = read_json(path, ConfigError) or {}
    require_shape(path, found, _SHAPE, "Export the merge again.", ConfigError)
    results = found.setdefault("results", {})
    before = results.get(stage, {}) if stage.startswith(STAGE) else {}
    results[stage] = {**before, **scores}
    known = found.setdefault("evaluation", {}).get(stage, {}).get("tasks", {})
    tasks = {**known, **settings.get("tasks", {})}
    found["evaluation"][stage] = {**stamp(), **settings, **({"tasks": tasks} if tasks else {})}
    card = _with_scores(folder, results)
    with whole_file(path) as work:
        write_json(work, found)
    with whole_file(folder / _CARD) as work:
        work.write_text(card, encoding="utf-8")


def _with_scores(folder: Path, results: Mapping[str, Any]) -> str:
    """Return the model card with these scores in its metadata and in its section on scores."""
    path = folder / _CARD
    try:
        card = ModelCard.load(path)
    except Exception as error:  # of the YAML parser, and of the library's checks
        raise ConfigError(
            f"{path}: expected a model card, got {type(error).__name__}: {error}\n"
            "Export the merge again, or correct the lines between `---`."
        ) from error
    pipeline = card.data.pipeline_tag
    card.data.eval_results = list(eval_results(pipeline, results)) if pipeline else None
    if card.data.eval_results:
        card.data.model_name = card.data.model_name or folder.resolve().name
    shown = "\n\n".join(["## Scores", *score_sections(results)]) + "\n\n"
    text, section = card.text, re.compile(r"^## Scores\n.*?(?=^## |\Z)", re.M | re.S)
    if section.search(text):
        text = section.sub(lambda _: shown, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{shown.rstrip()}\n"
    # the library's own property would not keep the text
    return f"---\n{card.data.to_yaml()}\n---\n{text}"
