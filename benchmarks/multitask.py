"""Fine-tune the base of a suite on all tasks at once, with labels, under the experts' heads.

    python benchmarks/multitask.py vision8 --seeds 0 1 2
    gradmerge compare SUITE.yaml METHOD... outputs/multitask-vision8/seed0/multitask

The labelled adaptation split is what a merge may learn from, and as many steps on the same batches
are made: AdamW, a cosine to zero, the mean of the tasks' cross-entropies. What no expert has
changed stays fixed. The rate is chosen by the loss on the selection split. The result is a row for
`gradmerge compare`: what the same data give without merging anything.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import harness
from suites.common import replacing

RATES = (3e-4, 1e-3, 3e-3)


def networks(base: str, experts: Mapping[str, str]) -> dict[str, Any]:
    """Return a classifier per task: one network of the base, and each task's head, fixed."""
    models = {task: harness.classifier(place, base) for task, place in experts.items()}
    first = next(iter(models.values()))
    start = {name: value.clone() for name, value in first.base_model.state_dict().items()}
    changed = set()
    for place in experts.values():
        other = harness.classifier(place).base_model.state_dict()
        changed |= {name for name, value in other.items() if not value.equal(start[name])}
    for model in models.values():
        model.requires_grad_(False)
        setattr(model, model.base_model_prefix, first.base_model)
    for name, parameter in first.base_model.named_parameters():
        parameter.requires_grad_(name in changed)
    return models


def loss_of(models: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    """Return the mean over tasks of the cross-entropy of a batch."""
    import torch

    total: Any = 0.0
    for task, inputs in batch.items():
        given = {name: value for name, value in inputs.items() if name != "labels"}
        logits = models[task](**given).logits.float()
        total = total + torch.nn.functional.cross_entropy(logits, inputs["labels"])
    return total / len(batch)


def steps_of(loader: Any, count: int) -> Iterator[Any]:
    """Yield batches, over as many epochs as it takes."""
    while count > 0:
        for batch in loader:
            yield batch
            count -= 1
            if not count:
                return


def train(models: Mapping[str, Any], batches: Iterator[Any], steps: int, rate: float) -> None:
    """Train what is not fixed."""
    import torch

    network = next(iter(models.values())).base_model
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for model in models.values():
        model.train()
    for batch in batches:
        optimiser.zero_grad()
        loss_of(models, batch).backward()
        optimiser.step()
        schedule.step()


def selection_loss(models: Mapping[str, Any], data: Any) -> float:
    """Return the mean over tasks of the loss on the selection split."""
    import torch

    for model in models.values():
        model.eval()
    means = []
    with torch.inference_mode():
        for task, loader in zip(data.tasks, data.val_dataloader(), strict=True):
            sizes, sums = 0, 0.0
            for inputs in loader:
                size = len(inputs["labels"])
                sums += size * float(loss_of(models, {task: inputs}))
                sizes += size
            means.append(sums / sizes)
    return sum(means) / len(means)


def fine_tune(suite: str, seed: int, args: argparse.Namespace, target: Path) -> None:
    """Train with each rate, and write the best."""
    from gradmerge.cli.main import learn

    file = harness.suite_file(suite, seed, args.cache, target.parent)
    method = harness.CONFIGS / "methods" / "tensor.yaml"
    cli = learn(["--config", str(file), "--config", str(method)], run=False)
    data, recipe = cli.datamodule, cli.model.recipe
    data.attach(cli.model.merged)
    data.setup("fit")
    steps = args.steps or harness.SUITES[suite].steps
    best: tuple[float, float, Any] = (math.inf, 0.0, None)
    for rate in args.rates:
        began = time.perf_counter()
        models = networks(str(recipe.base), recipe.sources)
        train(models, steps_of(data.train_dataloader(), steps), steps, rate)
        loss = selection_loss(models, data)
        took = time.perf_counter() - began
        print(f"seed {seed}, rate {rate:g}: selection loss {loss:.4f} ({took:.0f} s)", flush=True)
        network = next(iter(models.values())).base_model
        best = min(best, (loss, rate, copy.deepcopy(network.state_dict())), key=lambda b: b[0])
    if best[2] is None:
        raise SystemExit(f"no rate of {args.rates} has a finite selection loss; give lower --rates")
    with replacing(target) as folder:
        harness.write_classifiers(folder, best[2], recipe.sources)
    print(f"{target}: rate {best[1]:g}")


def main() -> int:
    parser = harness.suite_parser(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, help="default: those of the suite's merges")
    parser.add_argument("--output", type=Path, help="default: outputs/multitask-SUITE")
    args = parser.parse_args()
    args.cache = args.cache.resolve()
    harness.quieten()
    output = args.output or harness.ROOT / "outputs" / f"multitask-{args.suite}"
    for seed in args.seeds:
        harness.build_suite(args.suite, seed, args.cache)
        target = output / f"seed{seed}" / "multitask"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            fine_tune(args.suite, seed, args, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
