"""A lint against wording that reads badly, in the package, the documentation and the README."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOUNS = (
    "batch|block|byte|class|coefficient|column|command|component|direction|driver|entry|file|folder|"
    "group|input|layer|line|merge|model|network|operator|optimiser|option|parameter|recipe|"
    "regular expression|row|source|split|step|task|tensor|thread|token|unit|value|weight"
)
LINKS = "and|as|at|by|for|from|in|into|is|like|of|on|or|over|per|than|to|with"
PHRASES = {
    "'came': write 'got'": r"\bcame\b",
    "'one a ...': write 'per'": (
        rf"\b(?:one|bits|bytes|steps|(?:a|one) (?!(?:{LINKS}) )\w+) an? (?:{NOUNS})\b"
    ),
    "'is no ...': write 'unknown', 'not a'": rf"(?<!there )\bis no (?:{NOUNS})\b",
}


def offences(text: str, python: bool = True) -> list[str]:
    """Return what is wrong with the wording of a file."""
    flat = re.sub(r"\s+(?:# )?", " ", text)
    found = [
        f"{rule}: {match.group()}"
        for rule, pattern in PHRASES.items()
        for match in re.finditer(pattern, flat, re.IGNORECASE)
    ]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)) if python else ():
        docstring = (ast.get_docstring(node) or "") if isinstance(node, kinds) else ""
        if re.match(r"(?:What|Which|Where|Whether|How)\b", docstring):
            found.append(f"start with a verb or a noun: {docstring.splitlines()[0]}")
        if re.fullmatch(r"See `[^`]*`\.?", docstring):
            found.append(f"a docstring that is only a reference: {docstring}")
    return found


def files() -> list[Path]:
    package = [path for end in ("py", "c", "h") for path in (ROOT / "src").rglob(f"*.{end}")]
    return sorted([*package, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])


def test_the_package_and_its_documentation_read_well():
    found = {path: offences(path.read_text(), path.suffix == ".py") for path in files()}
    assert len(found) > 150
    assert not [f"{path.relative_to(ROOT)}: {text}" for path in found for text in found[path]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 'expected 3, came 2'", "came"),
        ("# one coefficient a\n# tensor", "one coefficient a tensor"),
        ("# one a source", "one a source"),
        ("# bits a byte", "bits a byte"),
        ("# a byte an entry", "a byte an entry"),
        ("x = f'{name} is no source'", "is no source"),
        ('def f():\n    """What it gives."""', "What it gives."),
        ('class A:\n    """Where it stands."""', "Where it stands."),
        ('"""Whether it is so."""', "Whether it is so."),
        ('def f():\n    """See `A.f`."""', "See `A.f`."),
    ],
)
def test_bad_wording_is_found(text, expected):
    (offence,) = offences(text)
    assert offence.endswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        '"""Return one coefficient per tensor; see `Spread`."""',
        "# there is no source, as a task becomes a layer; A from a base",
        "x = 'unknown source; got a tensor and a weight'",
    ],
)
def test_good_wording_passes(text):
    assert offences(text) == []
