"""All static methods on a quickstart suite, tuned alike by `gradmerge compare`.

    python benchmarks/methods.py lm --seeds 0 1 2
    python benchmarks/methods.py vision --seeds 3 4 5 --methods ties mats

Every file in configs/static that merges the suite's sources is compared: twelve scales each on the
selection split, and the best once on the test split. Experts and data are built by
benchmarks/suites, or found in the cache. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

import harness

STATIC = harness.CONFIGS / "static"


def merges_the_suite(method: Path) -> bool:
    """Check that a file is a merge of the suite's sources: it names none of its own, aligns none
    (they share an initialisation), and is not a part that follows another file.
    """
    recipe = (yaml.safe_load(method.read_text()).get("model") or {}).get("recipe")
    return recipe is not None and not {"sources", "alignment"} & recipe.keys()


def main() -> int:
    from gradmerge.cli import main as gradmerge

    files = {path.stem: path for path in sorted(STATIC.glob("*.yaml")) if merges_the_suite(path)}
    del files["task_arithmetic_tuned"]  # what every method is here
    parser = harness.make_parser(__doc__, "suites")
    parser.add_argument("suite", choices=harness.SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=files, default=list(files))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--output", type=Path, help="default: outputs/static-SUITE")
    args = parser.parse_args()
    output = args.output or harness.ROOT / "outputs" / f"static-{args.suite}"
    suite = harness.seeded_suite(args.suite, args.seeds, args.cache.resolve(), output.parent)
    given = [str(suite), *(str(files[name]) for name in args.methods), "--output", str(output)]
    given += ["--trials", str(args.trials), "--seeds", *map(str, args.seeds)]
    return gradmerge(["compare", *given, "--metric", harness.SUITES[args.suite].metric])


if __name__ == "__main__":
    sys.exit(main())
