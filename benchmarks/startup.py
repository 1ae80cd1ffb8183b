"""CPU time of the command line until it works: `--help`, and a fit from import to its first step.

    python benchmarks/startup.py [--against SRC] [--repeats 3]

Runs each command in processes of its own, alternating between this source tree and another one
(`--against`, a path to an earlier `src`), and prints seconds of CPU (user and system, children
included) with their ratio. The fit is one step of two tiny text classifiers.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import text_world, write_yaml
root = Path(sys.argv[2])
write_yaml(root / "fit.yaml", text_world(root), {"trainer": {"max_steps": 1, "logger": False}})
"""
RUN = "import sys; from gradmerge.cli import main; sys.exit(main(sys.argv[1:]))"


def cpu_seconds(source: Path, arguments: list[str], folder: Path) -> float:
    """Return the CPU time of one command."""
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
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="an earlier source tree, for ratios")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    trees = {"this": ROOT / "src"}
    if options.against is not None:
        trees["other"] = options.against.resolve()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        helpers = str(ROOT / "tests" / "helpers")
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-c", WORLD, helpers, place]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        commands = {
            "--help": ["--help"],
            "fit --help": ["fit", "--help"],
            "fit, one step": ["fit", "--config", str(folder / "fit.yaml")],
        }
        for name, arguments in commands.items():
            times: dict[str, list[float]] = {tree: [] for tree in trees}
            for _ in range(options.repeats):
                for tree, source in trees.items():
                    times[tree].append(cpu_seconds(source, arguments, folder))
            medians = {tree: statistics.median(values) for tree, values in times.items()}
            line = f"{name:14}" + "".join(f"  {t} {m:6.2f} s" for t, m in medians.items())
            if "other" in medians:
                line += f"  ratio {medians['this'] / medians['other']:.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
