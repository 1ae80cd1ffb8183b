"""All static or all learned methods on a quickstart suite, tuned alike by `gradmerge compare`.

    python benchmarks/methods.py static lm --seeds 0 1 2
    python benchmarks/methods.py learned vision --seeds 3 4 5 --methods tensor samerging

Static are the files in configs/static that merge the suite's sources, with twelve scales each;
learned are those in configs/methods and variants of them, with the suite's number of steps, one
schedule and the same three learning rates. Experts and data are built by benchmarks/suites, or
found in the cache. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

import harness

STATIC, LEARNED = harness.CONFIGS / "static", harness.CONFIGS / "methods"
VARIANTS = Path(__file__).parent / "variants"
SCALES, RATES = 12, "[0.01, 0.03, 0.1]"
CLASSES = ("adamerg", "adarank", "entropy")  # first letters; entropy is for classification
_DRAWS, _MARGINAL = STATIC / "m3_draws.yaml", VARIANTS / "adarank_marginal.yaml"
COMBINED = {
    "adarank_marginal": (LEARNED / "adarank.yaml", _MARGINAL),
    "adarank_cart": (LEARNED / "adarank.yaml", _MARGINAL, VARIANTS / "adarank_cart.yaml"),
    "adarank_masks": (LEARNED / "adarank.yaml", VARIANTS / "adarank_masks.yaml"),
    "atlas_x_10": (LEARNED / "atlas.yaml", VARIANTS / "atlas_x_10.yaml"),
    "m3": (STATIC / "m3.yaml", _DRAWS),
    "m3_dare": (STATIC / "dare_linear.yaml", _DRAWS),
    "m3_ties": (STATIC / "ties.yaml", _DRAWS),
    "tensor_from_m3": (LEARNED / "tensor.yaml", _DRAWS),
}
"""Methods of several files, which learn or belong beside those that do."""


def merges_the_suite(method: Path) -> bool:
    """Check that a file is a merge of the suite's sources: it names none of its own, aligns none
    (they share an initialisation), and is not a part that follows another file.
    """
    recipe = (yaml.safe_load(method.read_text()).get("model") or {}).get("recipe")
    return recipe is not None and not {"sources", "alignment"} & recipe.keys()


def methods_of(kind: str, suite: str) -> dict[str, tuple[Path, ...]]:
    """Return the files of methods by name."""
    folder = {"static": STATIC, "learned": LEARNED}[kind]
    paths = [path for path in sorted(folder.glob("*.yaml")) if merges_the_suite(path)]
    found = {path.stem: (path,) for path in paths} | (COMBINED if kind == "learned" else {})
    found.pop("task_arithmetic_tuned", None)  # what every method is here
    classifies = harness.SUITES[suite].metric == "accuracy"
    return {n: files for n, files in found.items() if classifies or n[:7] not in CLASSES}


def learns(files: Sequence[Path]) -> bool:
    """Check for an optimiser."""
    return any("optimizer" in yaml.safe_load(file.read_text()) for file in files)


def budget(suite: str, folder: Path) -> tuple[Path, Path]:
    """Write what every learned method gets, and what one that learns block by block does."""
    steps = harness.SUITES[suite].steps
    decay = "gradmerge.optimisers.CosineDecay"
    shared = {"lr_scheduler": {"class_path": decay}, "trainer": {"max_steps": steps}}
    blocks = {"driver": {"class_path": "LayerWise", "init_args": {"steps": steps}}}
    contents = {"budget": shared, "budget-blocks": {**shared, **blocks}}
    for name, content in contents.items():
        (folder / f"{suite}-{name}.yaml").write_text(yaml.safe_dump(content))
    first, second = (folder / f"{suite}-{name}.yaml" for name in contents)
    return first, second


def main() -> int:
    from gradmerge.cli import main as gradmerge

    parser = harness.make_parser(__doc__, "suites")
    parser.add_argument("kind", choices=("static", "learned"))
    parser.add_argument("suite", choices=harness.SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--output", type=Path, help="default: outputs/KIND-SUITE")
    args = parser.parse_args()
    known = methods_of(args.kind, args.suite)
    if unknown := set(args.methods or ()) - known.keys():
        parser.error(f"unknown methods {', '.join(unknown)} (choose from {', '.join(known)})")
    output = args.output or harness.ROOT / "outputs" / f"{args.kind}-{args.suite}"
    suite = harness.seeded_suite(args.suite, args.seeds, args.cache.resolve(), output.parent)
    names, given, tuned = args.methods or list(known), [str(suite)], []
    alike, in_blocks = budget(args.suite, output.parent)
    for name in names:
        files = known[name]
        if learns(files):
            files = (*files, in_blocks if name == "prodistill" else alike)
            tuned.append(f"{name}:optimizer.init_args.lr={RATES}")
        given.append(f"{name}={'+'.join(map(str, files))}")
    given += ["--output", str(output), "--seeds", *map(str, args.seeds), "--trials", str(SCALES)]
    given += ["--metric", harness.SUITES[args.suite].metric, *(["--tune", *tuned] if tuned else [])]
    return gradmerge(["compare", *given])


if __name__ == "__main__":
    sys.exit(main())
