"""CPU time of the command line until it works: `--help`, and a fit from import to its first step.

    python benchmarks/startup.py [--against SRC] [--repeats 3]

Runs each command in processes of its own, alternating between this source tree and another one
(`--against`, a path to an earlier `src`), and prints seconds of CPU (user and system, children
included) with their ratio. The fit is one step of two tiny text classifiers.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from harness import ROOT, table

RUN = "import sys; from gradmerge.cli import main; sys.exit(main(sys.argv[1:]))"


def cpu_seconds(source: Path, arguments: list[str], folder: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(source), "WANDB_MODE": "disabled"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tiny import text_world, write_yaml

    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, help="an earlier source tree, for ratios")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    trees = {"this": ROOT / "src"}
    if options.against is not None:
        trees["other"] = options.against.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        once = {"trainer": {"max_steps": 1, "logger": False}}
        fit = ["fit", "--config", write_yaml(folder / "fit.yaml", text_world(folder), once)]
        for name, arguments in (
            ("--help", ["--help"]),
            ("fit --help", ["fit", "--help"]),
            ("fit, one step", fit),
        ):
            times: dict[str, list[float]] = {tree: [] for tree in trees}
            for _ in range(options.repeats):
                for tree, source in trees.items():
                    times[tree].append(cpu_seconds(source, arguments, folder))
            this, *other = map(statistics.median, times.values())
            ratio = [f"{this / seconds:.2f}" for seconds in other]
            rows.append([name, *(f"{seconds:.2f}" for seconds in (this, *other)), *ratio])
    heads = ["command", *(f"{tree}, s" for tree in trees), "ratio"]
    print(table(heads[: len(rows[0])], rows, pad=True))


if __name__ == "__main__":
    main()
