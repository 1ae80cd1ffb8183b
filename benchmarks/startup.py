"""Time of the command line until it works: `--help`, a fit to its first step, and a static merge.

    python benchmarks/startup.py [--against SRC] [--repeats 3] [--merge 1b]

Runs each command in processes of its own, alternating between this source tree and another one
(`--against`, a path to an earlier `src`), and prints seconds of CPU (user and system, children
included) and of the clock, with their ratios. The fit is one step of two tiny text classifiers. The
merge (`--merge`) is that of two Llamas of a size with their base; the first of its architecture
imports transformers to open what it has written, later ones do not.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import harness

RUN = "import sys; from gradmerge.cli import main; sys.exit(main(sys.argv[1:]))"


def seconds(source: Path, arguments: list[str], folder: Path) -> tuple[float, float]:
    """Return the seconds of CPU and of the clock that a command takes."""
    environment = {**os.environ, "PYTHONPATH": str(source), "WANDB_MODE": "disabled"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, took


def merge_of(size: str, cache: Path) -> list[str]:
    """Return the arguments of a merge of two Llamas and their base, which are made once."""
    folder = cache.resolve() / f"llama-{size}"
    harness.make_models(folder, harness.llama(size, "bfloat16"), ("a", "b"), 0.002)
    places = ", ".join(f"{name}: {folder / name}" for name in "ab")
    recipe = ["--recipe.base", str(folder / "base"), "--recipe.sources", f"{{{places}}}"]
    init = ["--recipe.init", "Constant", "--recipe.init.init_args.value", "0.4"]
    return ["merge", *recipe, *init, "--output", "merged"]


def main() -> None:
    sys.path.insert(0, str(harness.ROOT / "tests" / "helpers"))
    from tiny import text_world, write_yaml

    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, help="an earlier source tree, for ratios")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--merge", choices=harness.LLAMAS, help="size of the models of a merge")
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench"))
    options = parser.parse_args()
    trees = {"this": harness.ROOT / "src"}
    if options.against is not None:
        trees["other"] = options.against.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        once = {"trainer": {"max_steps": 1, "logger": False}}
        fit = ["fit", "--config", write_yaml(folder / "fit.yaml", text_world(folder), once)]
        commands = {"--help": ["--help"], "fit --help": ["fit", "--help"], "fit, one step": fit}
        if options.merge:
            merge = merge_of(options.merge, options.cache)
            commands |= {f"merge, {options.merge}": merge, "the first of its kind": merge}
        for name, arguments in commands.items():
            times: dict[str, list[tuple[float, float]]] = {tree: [] for tree in trees}
            for turn in range(-1, options.repeats):  # the first warms the caches
                for tree in list(trees)[:: 1 if turn % 2 else -1]:
                    shutil.rmtree(folder / "merged", ignore_errors=True)
                    if name == "the first of its kind":
                        shutil.rmtree(folder / "cache" / "gradmerge" / "opened", ignore_errors=True)
                    times[tree].append(seconds(trees[tree], arguments, folder))
            columns = []
            for part in (0, 1):
                found = [statistics.median(t[part] for t in ts[1:]) for ts in times.values()]
                columns += [f"{value:.2f}" for value in found]
                columns += [f"{found[0] / other:.2f}" for other in found[1:]]
            rows.append([name, *columns])
    ratio = ["ratio"] if options.against is not None else []
    heads = [c for unit in ("CPU", "clock") for c in [*(f"{t}, s {unit}" for t in trees), *ratio]]
    print(harness.table(["command", *heads], rows, pad=True))


if __name__ == "__main__":
    main()
