"""Regular expressions: one engine, with a time limit, and expressions that match nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gradmerge
from gradmerge.coefficients import Component, Constant, Group
from gradmerge.common import patterns
from gradmerge.common.errors import ConfigError
from gradmerge.common.patterns import matches, require_matches, require_pattern, search
from gradmerge.common.spec import patterns_of
from gradmerge.finalisers import REPAIR
from gradmerge.operators import Components
from gradmerge.preprocess import Trim
from tiny import Perceptron, build, recipe_of, relatives

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn.q_proj", "mlp.up")),
    "model.norm.weight",
    "lm_head.weight",
]
PACKAGE = Path(gradmerge.__file__).parent


@pytest.mark.parametrize(
    "pattern",
    [
        r"^lm_head\.",
        r"layers\.\d+\.",
        r"layers\.[02]\.(attn|mlp)",
        r"(?i)LM_HEAD",
        r"(?P<layer>layers\.1)",
        r"^model\.(?!layers)",
        r"(?<=layers\.)1",
        r"norm\.weight$|embed",
        r"(\w+\.)+weight\Z",
        r"nothing",
        r"",
        r"w{1,2}eight",
        r"a.*?w",
        r"[^.]+\.[^.]+$",
        r"(.*\.)?(q_proj)",
    ],
)
def test_expressions_mean_what_they_mean_in_re(pattern):
    for name in NAMES:
        for whole, method in ((False, re.search), (True, re.fullmatch)):
            expected = method(pattern, name)
            assert search(pattern, name, whole) == (expected and expected.span())
        assert matches(["zzz", pattern], name) == bool(re.search(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "ends"),
    [
        (r"(a+)+$", True),  # the engine sees that it cannot match
        (r"([a-z_.0-9]+)+X", True),
        (r"(a|a)*$", False),
        (r"(a|aa)+$", False),
    ],
)
def test_expressions_that_never_end_are_stopped(pattern, ends, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    patterns._compiled.cache_clear()
    name = "a" * 60 + "!"
    if ends:
        assert search(pattern, name) is None
        return
    with pytest.raises(ConfigError, match=r"takes more than 0\.05 s to match 'aaa"):
        search(pattern, name)


def test_the_time_of_an_expression_is_limited_over_all_names(monkeypatch):
    """One that takes long for each of many names, but never very long for one."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    patterns._compiled.cache_clear()
    names = (f"{'abcd' * 12}{i}" for i in range(100_000))
    with pytest.raises(ConfigError, match="takes more than"):
        all(search(r"(.*a)(.*b)(.*c)(.*d)[^a-d\d]", name) is None for name in names)
    assert next(names, None)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", r"private: invalid regular expression '\(a': missing \)"),
        ("a**", "private: invalid regular expression"),
        (r"\p{L}", "private: invalid regular expression"),  # not in `re`
        ("(" * 5000 + ")" * 5000, "private: invalid regular expression.*(deeply|nested)"),
        ("a{99999999999999999999}", "private: invalid regular expression.*repetition"),
        ("a" * 20_000, "private: a regular expression of 20000 characters: expected at most 10000"),
        (3, "private: expected a regular expression, got 3"),
        (None, "private: expected a regular expression, got None"),
    ],
)
def test_invalid_expressions_are_refused(pattern, message):
    with pytest.raises(ConfigError, match=message):
        require_pattern("private", pattern)


def calls_of_re(path):
    """Calls of functions of `re` in a file whose expression is not written in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if (
            isinstance(owner, ast.Name)
            and owner.id in ("re", "regex")
            and node.func.attr != "escape"
        ):
            parts = ast.walk(node.args[0])
            if any(isinstance(part, (ast.Call, ast.Attribute)) for part in parts) or not any(
                isinstance(part, ast.Constant) for part in ast.walk(node.args[0])
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}"


def test_the_engine_is_the_only_one():
    """Elsewhere the functions of `re` are called with expressions of the package itself."""
    found = [call for path in sorted(PACKAGE.rglob("*.py")) for call in calls_of_re(path)]
    assert {call.partition(":")[0] for call in found} <= {
        "common/patterns.py",  # the engine
        "cli/given.py",  # an escaped option
        "cli/explain.py",  # a constant of its own
        "cli/compare/methods.py",  # a number within a constant
        "common/atomic.py",  # an escaped name
        "engine/precision.py",  # names that classes of transformers state
        "common/hub.py",  # a constant within a constant
        "sources/loader.py",  # names that classes of transformers ignore
        "sources/quantised.py",  # constants of its own
    }
    assert any(call.startswith("common/patterns.py") for call in found)


# ---- expressions that match nothing --------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("^lm_haed", "Did you mean 'lm_head', as in lm_head.weight?"),
        (r"embed_tokns\.weight", "Did you mean 'embed_tokens', as in model.embed_tokens.weight?"),
        (r"layers\.\d+\.atn", "Did you mean 'attn', as in model.layers.0.attn.q_proj.weight?"),
        (r"layer\.\d+\.", "Did you mean 'layers', as in model.layers.0.attn.q_proj.weight?"),
        (r"^norm", ""),
        (r"zzz", ""),
    ],
)
def test_what_matches_nothing_is_named_with_the_nearest(pattern, hint):
    with pytest.raises(ConfigError) as caught:
        require_matches({"private": [pattern]}, NAMES, "tensor")
    assert str(caught.value).startswith(f"private: {pattern!r} matches no tensor. {hint}".rstrip())


def test_all_that_matches_nothing_is_listed(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    given = {"private": ["^lm_head", "hed"], "frozen": ["norm", "nrm", "(a|aa)+$"]}
    with pytest.raises(ConfigError, match="3 patterns have no effect") as caught:
        require_matches(given, [*NAMES, "a" * 60 + "!"], "tensor")
    lines = str(caught.value).splitlines()[1:]
    assert lines[0].startswith("  private: 'hed' matches no tensor")
    assert lines[1].startswith("  frozen: 'nrm' matches no tensor")
    assert lines[2].startswith("  frozen: the regular expression")
    require_matches({"private": ["^lm_head"], "frozen": NAMES, "none": []}, NAMES, "tensor")


def test_expressions_of_all_parts_of_a_recipe_are_found():
    recipe = recipe_of(
        relatives(build(Perceptron)),
        private=["head"],
        frozen={"body": "origin"},
        coefficients=Component(whole="bias"),
        operator=Components(),
        init=Constant({"fc": 0.1, ".*": 0.2}),
        preprocess=[Trim({"body": 0.1, ".*": 0.2}), Trim(0.5)],
        finalisers=[REPAIR(skip=["norm"])],
    )
    assert patterns_of(recipe) == {
        "frozen": ["body"],
        "private": ["head"],
        "Constant.value": ["fc", ".*"],
        "Trim.density": ["body", ".*"],
        "REPAIR.skip": ["norm"],
    }
    # tensors to leave out, and defaults, suit many networks and need not match in this one
    assert patterns_of(Group()) == {}
    assert patterns_of(Group(("fc",))) == {"patterns": ["fc"]}
