"""Nothing large is kept in the repository: no weights, data or packages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_no_file_is_above_250_kilobytes():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 100
    large = {str(file.relative_to(ROOT)): file.stat().st_size for file in files if file.is_file()}
    assert not {name: size for name, size in large.items() if size > 250_000}
