"""The import graph of the package: no cycle, late and type-checking imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradmerge

PACKAGE = Path(gradmerge.__file__).parent


def modules() -> dict[str, Path]:
    """Modules of the package by dotted name; a package goes by the name of its folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Modules that each module names in an import statement, wherever it stands."""
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (inner & set(known)) or {node.module}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return one cycle of a graph, or an empty list."""
    done: set[str] = set()

    def search(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            found = search(other, [*trail, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of top-level folders and modules."""
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        room = name.split(".")[1] if "." in name else "gradmerge"
        used = {other.split(".")[1] for other in others if "." in other}
        found.setdefault(room, set()).update(used - {room})
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = imports(modules())
    # The package's own file names public classes for type checkers; nothing imports them from it.
    assert all("gradmerge" not in others for name, others in found.items() if name != "gradmerge")
    del found["gradmerge"]
    return found


def test_a_cycle_is_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_modules_import_without_a_cycle(graph):
    assert cycle(graph) == []


def test_folders_import_without_a_cycle(graph):
    assert cycle(rooms(graph)) == []


def test_every_import_of_the_package_is_seen(graph):
    assert "gradmerge.engine.plan" in graph["gradmerge.engine.opening"]
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 400
