"""Predicted and measured memory of fits: `gradmerge plan` against the peaks of real ones.

    python benchmarks/plan.py --json plan.json

Each fit takes two steps and an evaluation in a fresh process, whose highest anonymous resident
memory (RssAnon) is measured; it is predicted in another one, before any weight is read. Both
include the interpreter and its libraries. BERT has 25M parameters, the Llama 34M, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness

ROWS, TOKENS, VOCABULARY, CLASSES = 8, 128, 8192, 8
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}


@dataclass(frozen=True)
class Case:
    """A fit whose memory is predicted and measured."""

    model: str = "llama"
    memory: str = "resident"
    checkpointing: bool = False
    tasks: int = 1
    elements: bool = False
    """One coefficient per weight."""

    @property
    def name(self) -> str:
        parts = [self.model, self.memory]
        parts += ["activation checkpointing"] if self.checkpointing else []
        parts += [f"{self.tasks} tasks"] if self.tasks > 1 else []
        return ", ".join([*parts, "one coefficient per weight"] if self.elements else parts)


CASES = (
    Case("bert"),
    Case(),
    Case(memory="streamed"),
    Case(checkpointing=True),
    Case(memory="streamed", checkpointing=True),
    Case(tasks=3),
    Case(elements=True),
)


def configuration(model: str) -> Any:
    """Return the configuration of a network."""
    import transformers

    if model == "bert":
        return transformers.BertConfig(
            **_SIZES,
            num_labels=CLASSES,
            dtype="float32",
            architectures=["BertForSequenceClassification"],
        )
    return transformers.LlamaConfig(
        **_SIZES,
        tie_word_embeddings=False,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def recipe_of(case: Case, folder: Path) -> Any:
    """Return the merge of a case."""
    from gradmerge import Recipe
    from gradmerge.coefficients import Complement, Element, Sigmoid, Uniform

    root = folder / case.model
    sources = {name: str(root / name) for name in ("a", "b")}
    if case.elements:
        return Recipe(sources, coefficients=Complement(Sigmoid(Element())), init=Uniform())
    return Recipe(sources, base=str(root / "base"))


def data_of(case: Case) -> Any:
    """Return tasks whose texts have the same number of tokens."""
    import torch

    from gradmerge import MergeDataModule, TaskData

    generator = torch.Generator().manual_seed(0)

    def row() -> dict[str, Any]:
        ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        mask = torch.ones_like(ids)
        if case.model == "bert":
            label = torch.randint(0, CLASSES, (), generator=generator)
            return {"input_ids": ids, "attention_mask": mask, "labels": label}
        return {"input_ids": ids, "labels": ids}

    splits = ("adaptation", "selection", "test")
    tasks = {}
    for i in range(case.tasks):
        rows = {split: [row() for _ in range(2 * ROWS)] for split in splits}
        tasks[f"task{i}"] = TaskData(rows, "tensors", source="a")
    return MergeDataModule(tasks, batch_size=ROWS)


def predict(case: Case, folder: Path) -> float:
    """Return the bytes that a fit is predicted to take in this process."""
    import lightning  # noqa: F401  (part of what a fit takes)
    import torch

    from gradmerge.common.memory import anonymous_memory
    from gradmerge.engine.opening import Opening
    from gradmerge.objectives import Objective
    from gradmerge.training.planned import Fit, Setting, estimate

    torch.set_num_threads(1)
    adam = partial(torch.optim.Adam, lr=0.01)
    fit = Fit(data_of(case), Objective(), torch.float32, adam, torch.device("cpu"))
    opening = Opening(recipe_of(case, folder))
    process = anonymous_memory()
    setting = Setting(case.memory, case.checkpointing)  # type: ignore[arg-type]
    return float(process + estimate(opening, fit, setting).host)


def measure(case: Case, folder: Path) -> float:
    """Return the bytes that a fit takes at most in this process."""
    import torch

    from gradmerge import MergeModule

    torch.set_num_threads(1)
    module = MergeModule(
        recipe_of(case, folder),
        memory=case.memory,  # type: ignore[arg-type]
        activation_checkpointing=case.checkpointing,
    )
    trainer = harness.quiet_trainer(max_steps=2, limit_val_batches=1)
    found: dict[str, float] = {}
    with harness.measured(found):
        trainer.fit(module, data_of(case))
    return found["peak"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict and measure each case, and print a table."""
    parser = harness.make_parser(__doc__, "plan")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))))
    options = parser.parse_args(arguments)
    found, rows = [], []
    for case in (CASES[number] for number in options.cases):
        folder = options.cache / case.model
        harness.make_models(folder, configuration(case.model), ("a", "b"), 0.01)
        expected, got = (harness.ask(work, case, options.cache) for work in (predict, measure))
        found.append({"case": case, "predicted": expected, "measured": got})
        sizes = [f"{size / 2**20:,.0f}" for size in (expected, got)]
        rows.append([case.name, *sizes, f"{expected / got:.2f}"])
        print(*rows[-1], sep=" | ", flush=True)
        harness.write_json(options.json, found)
    print(harness.table(["fit", "predicted, MB", "measured, MB", "ratio"], rows))


if __name__ == "__main__":
    main()
