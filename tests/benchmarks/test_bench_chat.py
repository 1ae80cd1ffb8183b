"""The data of the chat suite: balanced answers, and splits that share neither texts nor groups."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import pytest

PROGRAM = "suites.chat"


def test_splits_are_balanced_and_disjoint(bench: ModuleType) -> None:
    sizes = {"adaptation": 6, "selection": 3, "test": 6, "train": 9}
    rows = [
        (f"group {i // 3}", f"{i} words", answer)
        for i, answer in enumerate(["good", "bad", "neither"] * 40)
    ]
    found = bench.split(iter([*rows, *rows]), 0, "films", sizes)  # every text twice
    assert {name: len(pairs) for name, pairs in found.items()} == sizes
    for pairs in found.values():
        assert len(set(Counter(answer for _, answer in pairs).values())) == 1
    groups = [{int(t.split()[0]) // 3 for t, _ in pairs} for pairs in found.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_too_little_text_is_an_error_that_says_what_lacks(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="the split 'adaptation' of 'films' needs 160 texts"):
        bench.split(iter([("a", "a text", "good")]), 0, "films", bench.SPLITS)
