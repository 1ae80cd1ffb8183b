"""Count what becomes of every kind of fault: `python tests/faults/count_faults.py [--only REGEX]`.

`--details FILE` writes the output of every kind that is neither clear nor right. With PYTHONPATH
set to the `src` of another version, that version is counted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from fault_kinds import KINDS  # noqa: E402
from fault_runner import ACCEPTED, Kind, Outcome, run_kind, start_server  # noqa: E402
from fault_world import build_world  # noqa: E402

CLASSES = ("clear", "right", "late", "vague", "raw", "silent", "hang", "elsewhere")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--details", type=Path, default=Path(os.devnull), help="file for outputs")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    chosen = [kind for kind in KINDS if re.search(given.only, kind.name)]
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder, "world"))
        start_server()

        def run(numbered: tuple[int, Kind]) -> tuple[Kind, Outcome]:
            number, kind = numbered
            with tempfile.TemporaryDirectory(dir=folder, prefix=f"{number}-") as own:
                return kind, run_kind(kind, world, Path(own))

        counts: dict[str, Counter[str]] = defaultdict(Counter)
        with ThreadPoolExecutor(given.processes) as pool, given.details.open("w") as details:
            for kind, outcome in pool.map(run, enumerate(chosen)):
                area = kind.name.partition("/")[0]
                counts[area][outcome.kind] += 1
                counts["all"][outcome.kind] += 1
                if outcome.kind not in ACCEPTED:
                    end = "\n    ".join(outcome.printed.strip().splitlines()[-6:])
                    print(
                        f"{outcome.kind}: {kind.name} ({outcome.status})\n    {end}", file=details
                    )
                    details.flush()
    print(f"| {'area':<12} | {'kinds':>6} | " + " | ".join(f"{c:>9}" for c in CLASSES) + " |")
    print(f"|{'-' * 14}|{'-' * 7}:|" + f"{'-' * 10}:|" * len(CLASSES))
    for area in [*(a for a in counts if a != "all"), "all"]:
        row = " | ".join(f"{counts[area][c]:>9}" for c in CLASSES)
        print(f"| {area:<12} | {counts[area].total():>6} | {row} |")


if __name__ == "__main__":
    main()
