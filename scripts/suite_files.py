"""The shipped configuration of a suite, for another seed or cache."""

from __future__ import annotations

from pathlib import Path

SUITES = Path(__file__).resolve().parent.parent / "configs" / "suites"


def suite_file(suite: str, seed: int, cache: Path, folder: Path) -> Path:
    """Write it to a folder; the shipped one speaks of the default cache and of seed 0."""
    text = (SUITES / f"{suite}.yaml").read_text()
    text = text.replace(".cache/suites", str(cache))
    text = text.replace(f"{suite}-seed0", f"{suite}-seed{seed}")
    text = text.replace("seed_everything: 0", f"seed_everything: {seed}")
    path = folder / f"{suite}-seed{seed}.yaml"
    path.write_text(text)
    return path
