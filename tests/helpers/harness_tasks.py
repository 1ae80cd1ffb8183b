"""A folder of tasks for lm-evaluation-harness, with local data, and a tiny Llama family."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from architectures import ARCHITECTURES
from tiny import relatives, save_family, sentences

TASKS = "tiny_choice,tiny_words,tiny_text"


def save_llamas(root: Path, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Folders `base`, `a`, `b` of a Llama with a tokenizer."""
    torch.manual_seed(0)
    return save_family(root, relatives(ARCHITECTURES["llama"][0]().to(dtype), 3, scale=0.05))


def write_tasks(folder: Path, count: int = 12) -> Path:
    """A task of choices, one of generated words and one of whole texts, on one local file."""
    folder.mkdir()
    texts = sentences(5, count, length=9)
    rows = [
        {"question": " ".join(w[:5]), "choices": w[5:], "answer": i % 4, "text": " ".join(w)}
        for i, w in enumerate(text.split() for text in texts)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    head = f"""\
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
metadata: {{version: 2.0}}
"""
    (folder / "choice.yaml").write_text(
        f"""\
task: tiny_choice
{head}output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
"""
    )
    (folder / "words.yaml").write_text(
        f"""\
task: tiny_words
{head}output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["w3"], max_gen_toks: 4}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
  - metric: chrf
    aggregation: chrf
    higher_is_better: true
"""
    )
    (folder / "text.yaml").write_text(
        f"""\
task: tiny_text
{head}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
    )
    return folder
