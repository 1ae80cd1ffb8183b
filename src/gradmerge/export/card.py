"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmerge._typing import Raw
from gradmerge.engine.plan import Plan
from gradmerge.sources.tokenizers.report import summarise, token_report


def model_card(plan: Plan, raw: Raw, provenance: Mapping[str, Any], head: str) -> str:
    """What was merged, how, how well it scored, and how to load it."""
    count = len([name for name in _entries(provenance) if name != "base"])
    sections = [
        _front_matter(provenance),
        "# Merged model",
        f"A merge of {count} checkpoints of one architecture, written by gradmerge "
        f"{provenance['versions']['gradmerge']}. It is an ordinary checkpoint: "
        "`transformers` loads it alone.",
        _loading(plan, head),
        "## Sources\n\n" + _sources(provenance),
        *_steps(provenance),
        "## Scores\n\n" + _scores(provenance.get("results") or {}),
        "## Coefficients\n\n" + _coefficients(plan, raw),
        *_tokens(plan),
        "## Recipe\n\n```json\n" + json.dumps(provenance["recipe"], indent=2) + "\n```",
        "`coefficients.safetensors` holds every coefficient, `provenance.json` the fingerprints, "
        "versions, seeds and settings.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(provenance: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- gradmerge"]
    labels = [entry["from"] for entry in _entries(provenance).values()]
    hub = [x for x in labels if x.count("/") == 1 and not Path(x).exists() and x[0].isalnum()]
    if hub:
        lines += ["base_model:", *(f"- {label.partition('@')[0]}" for label in hub)]
    return "\n".join([*lines, "---"])


def _loading(plan: Plan, head: str) -> str:
    names = (plan.reference.config or {}).get("architectures") or []
    if not names:
        return (
            "The weights are in `model.safetensors`, by the names of the architecture's parameters."
        )
    text = (
        "```python\n"
        f"from transformers import {names[0]}\n\n"
        f'model = {names[0]}.from_pretrained("this-folder")\n```'
    )
    if plan.private:
        text += (
            f"\n\nThe folder itself carries the head of `{head}`. Each task's folder "
            '(`from_pretrained("this-folder/tasks/<task>")`) has its own head on the same weights.'
        )
    return text


def _entries(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """Everything that is in the merge; of one made in steps, more than the last step merged."""
    entries: Mapping[str, Any] = provenance.get("driver", {}).get("sources")
    return entries or provenance["sources"]


def _steps(provenance: Mapping[str, Any]) -> list[str]:
    """A section, where the merge was made in steps; coefficients and recipe are of the last one."""
    steps = [step for step in provenance.get("driver", {}).get("steps", []) if "merged" in step]
    if not steps:
        return []
    rows = ["## Steps\n\nCoefficients and recipe below are those of the last step.\n"]
    for number, step in enumerate(steps, 1):
        names = " with ".join(" + ".join(members) for members in step["merged"])
        shares = ", ".join(f"{value:.3f}" for value in step["coefficients"].values())
        rows.append(f"{number}. {names} (mean coefficients {shares})")
    return ["\n".join(rows)]


def _sources(provenance: Mapping[str, Any]) -> str:
    rows = ["| name | from | sha256 of the weights |", "|---|---|---|"]
    for name, entry in _entries(provenance).items():
        rows.append(f"| {name} | {Path(entry['from']).name} | `{entry['sha256'][:16]}` |")
    return "\n".join(rows)


def _tokens(plan: Plan) -> list[str]:
    """A section, where the merge chose whose tokens it has."""
    if plan.alignment is None:
        return []
    summary = summarise(token_report(plan.alignment))
    note = "`tokens.json` says what happened to each token that differs."
    return [f"## Tokenizer\n\n```\n{summary}\n```\n\n{note}"]


def _scores(results: Mapping[str, Any]) -> str:
    if not results:
        return "None measured."
    blocks = []
    for stage, tasks in results.items():
        names = list(dict.fromkeys(name for values in tasks.values() for name in values))
        rows = [f"| {stage} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for task, values in tasks.items():
            cells = [f"{values[name]:.4f}" if name in values else "" for name in names]
            rows.append(f"| {task} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def _coefficients(plan: Plan, raw: Raw) -> str:
    rows = ["| source | mean | smallest | largest |", "|---|---|---|---|"]
    sums = dict.fromkeys(plan.sources, 0.0)
    low = dict.fromkeys(plan.sources, float("inf"))
    high = dict.fromkeys(plan.sources, -float("inf"))
    count = 0
    for name in plan.tensors:
        coefficient = plan.coefficient(name, raw).detach().float().reshape(len(plan.sources), -1)
        count += 1
        for source, values in zip(plan.sources, coefficient, strict=True):
            sums[source] += float(values.mean())
            low[source] = min(low[source], float(values.min()))
            high[source] = max(high[source], float(values.max()))
    for source in plan.sources:
        rows.append(
            f"| {source} | {sums[source] / count:.4f} | {low[source]:.4f} | {high[source]:.4f} |"
        )
    fixed = f"\n\n{len(plan.fixed)} tensors are fixed." if plan.fixed else ""
    return "\n".join(rows) + fixed + _finished(plan)


def _finished(plan: Plan) -> str:
    """What was done to the weights that these coefficients give."""
    if not plan.finalisation.active:
        return ""
    names = ", ".join(type(finaliser).__name__ for finaliser in plan.recipe.finalisers)
    return f"\n\nThe weights are those of these coefficients after {names} (`finalisers`)."
