"""Merges of a text suite on mistyped texts, and on tasks whose experts were left out.

    python benchmarks/robustness.py text8 --unseen r8 spam --seeds 0 --methods default kl_column

The experts of the unseen tasks are not merged, and their texts are in no split that anything is
learned or chosen on; their heads alone are used. Every choice is then scored three times by
`gradmerge compare --also`: on the test split, on the same texts with typing errors, and on the
unseen tasks. One letter or digit in ten is mistyped: left out, doubled, swapped with the next, or
replaced by a random letter.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

import yaml

import harness

SHARE = 0.1
STATIC = ("tsv_m", "iso_c", "regmean")
SCALES = [0.33, 0.5, 0.67, 0.83, 1.0, 1.2, 1.5, 2.0]
"""Factors of the scales that the files of static methods state; learned ones keep their rate."""


def mistyped(text: str, share: float = SHARE) -> str:
    """Return a text with typing errors, which depend on the text alone."""
    rng = random.Random(hashlib.sha256(text.encode()).digest())
    found = list(text)
    for at in range(len(found)):
        if rng.random() >= share or not found[at].isalnum():
            continue
        kind = rng.randrange(4)
        if kind == 0:
            found[at] = ""
        elif kind == 1:
            found[at] *= 2
        elif kind == 2 and at + 1 < len(found):
            found[at], found[at + 1] = found[at + 1], found[at]
        else:
            found[at] = rng.choice(string.ascii_lowercase)
    return "".join(found)


def write_mistyped(path: Path) -> Path:
    """Write the mistyped texts of a JSON-lines file beside it."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "text": mistyped(row["text"])}) for row in rows]
    target = path.with_name("mistyped.jsonl")
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def write_suite(
    suite: Path, unseen: list[str], seeds: list[int], folder: Path
) -> tuple[Path, dict[str, Path]]:
    """Write the suite without some tasks, and the two other test data."""
    tree: dict[str, Any] = yaml.safe_load(suite.read_text())
    recipe, tasks = tree["model"]["recipe"], tree["data"]["tasks"]
    recipe["heads"] = {name: recipe["sources"].pop(name) for name in unseen}
    others: dict[str, Any] = {"unseen": {name: tasks.pop(name) for name in unseen}}
    own = f"seed{seeds[0]}"
    for task in tasks.values():
        for seed in seeds:
            found = write_mistyped(Path(task["data_files"]["test"].replace(own, f"seed{seed}")))
        name = str(found).replace(f"seed{seeds[-1]}", own)
        others.setdefault("mistyped", {})[Path(name).parent.name] = {"data_files": {"test": name}}
    contents = {name: {"data": {"tasks": own}} for name, own in others.items() if own}
    written = {}
    for name, content in {"suite": tree, **contents}.items():
        written[name] = folder / f"{suite.stem}-{name}.yaml"
        written[name].write_text(yaml.safe_dump(content, sort_keys=False))
    return written.pop("suite"), written


def main() -> int:
    from gradmerge.cli import main as gradmerge

    parser = harness.make_parser(__doc__, "suites")
    parser.add_argument("suite", choices=[name for name in harness.SUITES if name[:4] == "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--unseen", nargs="*", default=[], help="tasks whose experts are left out")
    parser.add_argument("--methods", nargs="+", default=["default"], help="of configs/methods")
    parser.add_argument("--output", type=Path, help="default: outputs/robustness-SUITE")
    args = parser.parse_args()
    output = args.output or harness.ROOT / "outputs" / f"robustness-{args.suite}"
    suite = harness.seeded_suite(args.suite, args.seeds, args.cache.resolve(), output.parent)
    known = list(yaml.safe_load(suite.read_text())["data"]["tasks"])
    if unknown := set(args.unseen) - set(known):
        parser.error(f"--unseen: unknown {', '.join(unknown)} (choose from {', '.join(known)})")
    file, others = write_suite(suite, args.unseen, args.seeds, output.parent)
    scaled = ("task_arithmetic", *STATIC)
    static = [str(harness.CONFIGS / "static" / f"{name}.yaml") for name in STATIC]
    learned = [str(harness.CONFIGS / "methods" / f"{name}.yaml") for name in args.methods]
    return gradmerge(
        [
            *("compare", str(file), *static, *learned, "--output", str(output)),
            *("--seeds", *map(str, args.seeds), "--metric", harness.SUITES[args.suite].metric),
            *("--also", *(f"{name}={path}" for name, path in others.items())),
            *("--trials", "1", "--tune", *(f"{n}:scale={SCALES}" for n in scaled)),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
