"""All mistakes of a command line at once, before what takes seconds to import is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from gradmerge.cli.catalogue import Class, Instance, Listing, Type, options_within
from gradmerge.cli.check import Mistake, misranged, missing, mistakes
from gradmerge.cli.forms import accepted
from gradmerge.cli.given import Part, is_foreign, read_parts, spelled, tree_of, type_at
from gradmerge.cli.imports import allowed_modules
from gradmerge.cli.options import fields_of, options_of
from gradmerge.cli.places import lost
from gradmerge.cli.trial import infinite, trial
from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.secrets import mask_given

_MOST = 12


def prechecked(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command in the form that its parser takes, after a check.

    Args:
        command: name of the command.
        arguments: its arguments, without the command.

    Raises:
        ConfigError: there are mistakes; the message lists all of a kind, each with its full path.
    """
    given = spelled(command, arguments)
    if any(map(_asks, given)):
        return given
    parts = read_parts(command, given)
    tree = tree_of(command, parts)
    lenient = bool(allowed_modules(given))
    found, checked = [], []
    for part in parts:
        new, wrong = _checked(command, part, tree)
        found += [m for m in wrong if not (lenient and m.of_class)]
        checked.append(new)
    if not found and not any(map(is_foreign, parts)):
        tree = tree_of(command, checked)
        whole = Instance(options_of(command))
        found = [*missing(tree, whole), *infinite(tree), *misranged(tree, whole)]
        found = [*found, *lost(command, tree)] or trial(command, tree)
    if found:
        raise ConfigError(_report([mask_given(str(mistake)) for mistake in found]))
    for part in reversed([part for part in checked if part.value != part.original]):
        given[part.at : part.at + part.count] = part.arguments
    return given


def _asks(argument: str) -> bool:
    """Return whether an argument asks for help, which the parser gives."""
    name = argument.partition("=")[0]
    return name in ("-h", "--help", "--print_config") or name.endswith(".help")


def _report(found: Sequence[str]) -> str:
    found = list(dict.fromkeys(found))
    if len(found) == 1:
        return found[0]
    # what several say alike is said once, in the end
    notes = Counter(text.partition("\n")[2] for text in found)
    shared = [note for note, count in notes.items() if note and count > 1]
    lines = []
    for text in found[:_MOST]:
        first, _, note = text.partition("\n")
        lines.append(f"  {first if note in shared else text}")
    if len(found) > _MOST:
        lines.append(f"  ... and {len(found) - _MOST} more")
    return "\n".join([f"{len(found)} mistakes:", *lines, *shared])


def _checked(command: str, part: Part, tree: Any) -> tuple[Part, list[Mistake]]:
    """Return a part in the form that the parser takes, and what is wrong in it."""
    if is_foreign(part):
        return part, []
    kind, at, group = type_at(command, part.path, tree)
    prefix = f"{part.file}: " if part.file else "--" if part.flag else ""
    if kind is None:
        rest = part.path[len(at.split(".")) :]
        wrong = [_unknown(command, Mistake(at, ""), group, "--", rest)]
        return part, [Mistake(f"--{at}", wrong[0].text)]
    inner = kind
    if part.adds:
        inner = next((o.inner for o in options_within(kind) if isinstance(o, Listing)), kind)
    value = accepted(part.value, inner)
    wrong = mistakes(value, inner, at)
    named = [
        _unknown(command, m, Instance(m.of), "" if part.file else "--", ()) if m.of else m
        for m in wrong
    ]
    return replace(part, value=value), [replace(m, at=f"{prefix}{m.at}") for m in named]


def _unknown(
    command: str, mistake: Mistake, group: Type, dashes: str, rest: Sequence[str]
) -> Mistake:
    """Return the mistake of an unknown option, with the option that may be meant."""
    assert isinstance(group, Instance)
    at, _, key = mistake.at.rpartition(".")
    near = nearest_name(key, fields_of(group.of))
    guess = ".".join([*([at] if at else []), near, *rest]) if near else ""
    if not guess and "init_args" not in at:
        elsewhere = [p for p in _paths(command) if p.rpartition(".")[2] == key]
        guess = min(elsewhere, key=len) if elsewhere else ""
    owner = f" of {group.of.name}" if isinstance(group.of, Class) else ""
    hint = f" Did you mean {dashes + guess!r}?"
    if not guess:
        hint = f" Choose from {shorten(list(fields_of(group.of)), 20)}."
    return replace(mistake, text=f"no such option{owner}.{hint}", of=None)


def nearest_name(key: str, known: Iterable[str]) -> str:
    """Return the name that is most like another, or an empty string if none is."""
    found = nearest(key, known)
    return found.split("'")[1] if found else ""


@cache
def _paths(command: str) -> list[str]:
    """Return the full paths of all options that are no components' own."""

    def within(kind: Type, at: str) -> Iterator[str]:
        for option in options_within(kind):
            if isinstance(option, Instance) and not option.of.is_abstract:
                for name, field in fields_of(option.of).items():
                    path = f"{at}.{name}" if at else name
                    yield path
                    yield from within(field.kind, path)

    return list(within(Instance(options_of(command)), ""))
