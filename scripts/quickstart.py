"""The main job on real data: build experts, learn merges, compare, export.

    python scripts/quickstart.py               four text tasks, a sentence encoder of 22.7 million
                                               parameters, learned without labels
    python scripts/quickstart.py text8         eight of them
    python scripts/quickstart.py lm            four text domains, a byte-level Llama
    python scripts/quickstart.py vision        four image tasks, labelled and unlabelled
    python scripts/quickstart.py vision4       four image tasks, a vision transformer of 315,000
                                               parameters, learned without labels
    python scripts/quickstart.py vision8       eight of them
    python scripts/quickstart.py chat          three tasks in chat, SmolLM2-135M-Instruct with LoRA
    python scripts/quickstart.py lm-chat       chat, code, headlines and reviews: LoRA and full
                                               fine-tunes of SmolLM2-135M-Instruct

For each seed the suite is built (or found in the cache). `gradmerge compare` scores baselines and
learned merges on the test split and writes table, figures and a page to outputs/quickstart-SUITE,
where the best learned merge is exported, too. Every choice (task arithmetic's scale, a learned
merge's step) is made on the selection split. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import harness

SCALES = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0]
# The learned merges of each suite: files of configs/methods, each with its own learning rate.
METHODS = {
    "text4": ("default",),
    "text8": ("default",),
    "lm": ("tensor", "column"),
    "vision": ("tensor", "column", "entropy"),
    "vision4": ("default",),
    "vision8": ("default",),
    "chat": ("tensor", "column"),
    "lm-chat": ("tensor", "column", "kl_column"),
}


def compare(name: str, seeds: list[int], cache: Path, output: Path) -> int:
    """Build the suite, and compare the baselines and the learned merges on it."""
    from gradmerge.cli import main as gradmerge

    suite = harness.seeded_suite(name, seeds, cache, output.parent)
    methods = [str(harness.CONFIGS / "methods" / f"{method}.yaml") for method in METHODS[name]]
    factors = [round(scale / 0.3, 4) for scale in SCALES]  # of the scale that the method states
    return gradmerge(
        [
            *("compare", str(suite), *methods, "--output", str(output)),
            *("--seeds", *map(str, seeds), "--metric", harness.SUITES[name].metric),
            *("--trials", "1", "--tune", f"task_arithmetic:scale={factors}"),
            *("--workers", str(min(2, os.cpu_count() or 1))),
        ]
    )


def export_best(output: Path, seed: int) -> Path:
    """Export the best learned merge of a seed, and return its folder."""
    from gradmerge.cli import main as gradmerge

    found = json.loads((output / "results.json").read_text())
    learned = [row for row in found["rows"] if row["seeds"].get(str(seed), {}).get("checkpoint")]
    best = learned[-1]  # rows are sorted
    checkpoint = best["seeds"][str(seed)]["checkpoint"]
    folder = output / f"merged-seed{seed}"
    place = output / "jobs" / f"seed{seed}" / best["name"] / checkpoint
    if gradmerge(["export", str(place), str(folder), "--overwrite", "true"]):
        raise SystemExit(f"{place}: the best learned merge cannot be exported.")
    return folder


def classify(folder: Path, suite: Path) -> None:
    """Classify a text of each task with the exported folders, by plain transformers."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("\na test text of each task, by transformers alone:")
    for path in sorted((folder / "tasks").iterdir()):
        data = suite / "data" / path.name
        with (data / "test.jsonl").open(encoding="utf-8") as file:
            row = json.loads(next(file))
        wanted = json.loads((data / "classes.json").read_text())[row["label"]]
        (found,) = pipeline("text-classification", str(path))(row["text"], truncation=True)
        print(f"{path.name}: {found['label']} (expected {wanted}): {row['text'][:60]}")


def answer(folder: Path, suite: Path) -> None:
    """Answer a question of each task with the exported folder, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(f"\nanswers of {folder.name}, by transformers alone:")
    for path in sorted(suite.glob("data/*/test.jsonl")):
        asked, wanted = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["messages"]
        inputs = tokenizer.apply_chat_template(
            [asked], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{asked['content']}\n-> {new} (expected {wanted['content']})\n")


def sample(folder: Path) -> None:
    """Continue a text with the exported folder, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("The film is", return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.6, top_k=20)
    print(f"\nsample of {folder.name}, by transformers alone:\n{tokenizer.decode(out[0])}\n")


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", nargs="?", default="text4", choices=harness.SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cache", type=Path, default=harness.ROOT / ".cache" / "suites")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    name, cache = options.suite, options.cache.resolve()
    output = (options.output or harness.ROOT / "outputs" / f"quickstart-{name}").resolve()
    harness.quieten()
    start = time.perf_counter()
    status = compare(name, options.seeds, cache, output)
    if status:
        return status
    for seed in options.seeds:
        folder = export_best(output, seed)
    suite = cache / f"{name}-seed{options.seeds[-1]}"
    if name in ("text4", "text8"):
        classify(folder, suite)
    elif name == "lm":
        sample(folder)
    elif name in ("chat", "lm-chat"):
        answer(folder, suite)
    print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
