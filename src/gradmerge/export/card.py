"""Model cards of exported folders."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.export.license import License, Terms
from gradmerge.sources.modules import modules_of
from gradmerge.sources.tokenizers.report import summarise, token_report

# Tasks on the Hugging Face Hub, by the last part of a model class's name.
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "WhisperForConditionalGeneration": "automatic-speech-recognition",
    "CLIPModel": "zero-shot-image-classification",
    "SiglipModel": "zero-shot-image-classification",
    "ForMultipleChoice": "multiple-choice",
}


def model_card(
    state: FitState, provenance: Mapping[str, Any], head: str, name: str, terms: Terms
) -> str:
    """Return the card of a merge: what was merged, how, its scores, and how to load it."""
    plan, driver, results = state.plan, provenance.get("driver", {}), provenance["results"]
    adapter = provenance.get("adapter")
    architecture = ((plan.reference.config or {}).get("architectures") or [None])[0]
    # the last step of a merge in steps has only some of the sources
    sources = driver.get("sources") or provenance["sources"]
    sections = [
        f"A merge of {len(sources.keys() - {'base'})} checkpoints of one architecture, made by "
        f"gradmerge {provenance['versions']['gradmerge']}.",
        _loading(plan, architecture, head) if adapter is None else _attaching(plan, adapter),
        "## Sources",
        _table(
            ["name", "from", "sha256 of the weights"],
            [[n, Path(s["from"]).name, f"`{s['sha256'][:16]}`"] for n, s in sources.items()],
        ),
        *_steps([step for step in driver.get("steps", ()) if "merged" in step]),
        "## Scores",
        *score_sections(results),
        "## Coefficients",
        *_coefficients(state),
        *_tokens(plan),
        *_parts(provenance.get("trained")),
        "## License",
        _license_text(terms),
        "## Recipe",
        f"```json\n{json.dumps(provenance['recipe'], indent=2)}\n```",
        "`coefficients.st` (a safetensors file) has all coefficients; `provenance.json` has "
        "fingerprints, versions, seeds and settings.",
    ]
    labels = [source["from"] for source in sources.values()]
    modules = modules_of(plan.folder) is not None
    title, library = "Merged model", "sentence-transformers" if modules else None
    if adapter is not None:
        title, library, labels = "Merged adapter", "peft", labels[:1]
    return render(title, sections, name, architecture, labels, results, terms.license, library)


def render(
    title: str,
    sections: Iterable[str],
    name: str,
    architecture: str | None = None,
    sources: Iterable[str] = (),
    results: Mapping[str, Any] | None = None,
    license: License | None = None,
    library: str | None = None,
) -> str:
    """Return a Markdown page with the metadata of the Hugging Face Hub.

    `architecture` is the model class if transformers loads the folder, alone or through another
    `library` (sentence-transformers, peft). Of the `sources`, paths and hub ids, the metadata names
    only hub ids; `results` are scores by stage, task and metric.
    """
    places = [place.partition("@")[0] for label in sources for place in label.split(" on ")]
    models = list(dict.fromkeys(filter(_is_hub_id, places)))
    names = (end for end in _PIPELINES if (architecture or "").endswith(end))
    task = _PIPELINES.get(next(names, ""))
    if library == "sentence-transformers":
        task = "sentence-similarity"
    found = list(eval_results(task, results or {})) if task else []
    relation = "adapter" if library == "peft" else "merge"
    data = ModelCardData(
        base_model=models or None,
        base_model_relation=relation if models else None,
        library_name=(library or "transformers") if architecture else None,
        license=license and license.id,
        license_name=license and license.name,
        license_link=license and license.link,
        pipeline_tag=task,
        tags=["merge", "gradmerge"],
        model_name=name if found else None,
        eval_results=found or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([f"# {title}", *sections]) + "\n"
    return str(ModelCard(text))


def _license_text(terms: Terms) -> str:
    rows = [[name, str(own or "not stated")] for name, own in terms.found.items()]
    if terms.license is not None:
        text = f"`{terms.license}`, the strictest of the sources' licenses."
    else:
        text = (
            f"**Not settled**: {terms.warning}. A merge is a derivative of every source: choose a "
            "license that all of them allow before you publish it."
        )
    return f"{text}\n\n{_table(['source', 'license'], rows)}"


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def eval_results(pipeline: str, results: Mapping[str, Any]) -> Iterable[EvalResult]:
    """Yield the scores of single tasks as the metadata of the hub has them."""
    for stage, tasks in results.items():
        for task, values in tasks.items():
            for metric, value in values.items():
                if task != "average" and value is not None and math.isfinite(value):
                    yield EvalResult(pipeline, task, task, metric, value, dataset_split=stage)


def _loading(plan: Plan, architecture: str | None, head: str) -> str:
    if architecture is None:
        return "The `.safetensors` files have the weights, by the architecture's parameter names."
    text = (
        "It is an ordinary checkpoint that `transformers` loads:\n\n"
        f"```python\nfrom transformers import {architecture}\n\n"
        f'model = {architecture}.from_pretrained("this-folder")\n```'
    )
    if plan.has_own:
        own = "head" if plan.private else "adapter"
        text += (
            f"\n\nThis folder has the {own} of the task `{head}`. The folder of each task "
            f'(`from_pretrained("this-folder/tasks/<task>")`) is complete: it has its own {own} on '
            "the same weights."
        )
    return text


def _parts(trained: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the section on what was trained per task."""
    if trained is None:
        return
    yield "## Private parts"
    listed = [f"`{name}`" for name in trained["tensors"]]
    listed += [f"LoRA of rank {rank} on `{name}`" for name, rank in trained["adapters"].items()]
    yield (
        "Trained for each task alone, beside the merged weights; the LoRA is added to the weights "
        f"in `tasks/<task>`: {', '.join(listed)}."
    )
    rows = [[task, f"{count:,}"] for task, count in trained["parameters"].items()]
    yield _table(["task", "private parameters"], rows)


def _attaching(plan: Plan, adapter: Mapping[str, Any]) -> str:
    """Return how an adapter is loaded, and how near it is to the merge."""
    architecture = adapter["architecture"]
    return (
        "It is a LoRA adapter that PEFT loads on the base:\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {architecture}\n\n"
        f'base = {architecture}.from_pretrained("the-base")\n'
        'model = PeftModel.from_pretrained(base, "this-folder")\n```\n\n'
        f"The adapter and the merge: {adapter['summary']}."
    )


def _steps(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section on a merge in steps."""
    rows = []
    for number, step in enumerate(steps, 1):
        names = " with ".join(" + ".join(members) for members in step["merged"])
        shares = ", ".join(f"{value:.3f}" for value in step["coefficients"].values())
        rows.append(f"{number}. {names} (mean coefficients {shares})")
    note = "Coefficients and recipe below are those of the last step."
    return ["## Steps", note, "\n".join(rows)] if rows else []


def score_sections(results: Mapping[str, Any]) -> list[str]:
    """Return a table per split or other measurement, of scores by task and metric."""
    return [_scores(*each) for each in results.items()] or ["None measured."]


def _scores(stage: str, tasks: Mapping[str, Mapping[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for values in tasks.values() for metric in values))
    rows = [
        [task, *(_number(values[m]) if m in values else "" for m in metrics)]
        for task, values in tasks.items()
    ]
    return _table([stage, *metrics], rows)


def _number(value: float | None) -> str:
    """Return a score as text; those of a record may be null, which stands for NaN."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "n/a"


def _coefficients(state: FitState) -> Iterable[str]:
    plan, found = state.plan, []
    for name in (name for name in plan.tensors if name not in plan.unchanged):
        values = state.coefficient(name).detach().float().reshape(len(plan.sources), -1)
        found.append(torch.stack([values.mean(dim=1), *values.aminmax(dim=1)]))
    mean, low, high = torch.stack(found, dim=2)  # each `[sources, tensors]`
    summary = torch.stack([mean.mean(dim=1), low.amin(dim=1), high.amax(dim=1)], dim=1)
    rows = [
        [source, *(f"{value:.4f}" for value in values)]
        for source, values in zip(plan.sources, summary.tolist(), strict=True)
    ]
    yield _table(["source", "mean", "smallest", "largest"], rows)
    if plan.unchanged_note:
        yield f"{plan.unchanged_note}."
    if others := state.fixed.keys() - plan.unchanged:
        yield f"{len(others)} tensors are fixed."
    if plan.finalisation.active:
        names = ", ".join(type(finaliser).__name__ for finaliser in plan.recipe.finalisers)
        yield f"The weights are those of the merge after {names} (`finalisers`)."


def _tokens(plan: Plan) -> list[str]:
    if plan.tokens is None:
        return []
    summary = summarise(token_report(plan.tokens))
    return ["## Tokenizer", f"```\n{summary}\n```", "`tokens.json` lists each token that differs."]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
