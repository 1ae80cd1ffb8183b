"""Mistakes in plain data, found before anything is imported that takes time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from gradmerge.cli.catalogue import (
    Choice,
    Class,
    Either,
    Instance,
    Listing,
    Options,
    Scalar,
    Table,
    Type,
    Unknown,
    components,
    members,
    module,
    named,
)
from gradmerge.cli.options import fields_of
from gradmerge.common.errors import nearest, shorten
from gradmerge.common.ranges import out_of_range

_SHOWN = 12
_SPEC = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True)
class Mistake:
    """A mistake at a place of a configuration."""

    at: str
    text: str
    of: Class | Options | None = None
    """For an option that does not exist: whose options there are."""
    of_class: bool = False
    """True if the name of a class is not known here."""

    def __str__(self) -> str:
        return f"{self.at}: {self.text}" if self.at else self.text


def mistakes(value: Any, kind: Type, at: str = "") -> list[Mistake]:
    """Return what is certainly wrong in a value; what is not certain is left to the parser.

    Args:
        value: plain data.
        kind: the type that is expected.
        at: dotted path of the value.
    """
    return list(_mistakes(value, kind, at))


def _mistakes(value: Any, kind: Type, at: str) -> Iterator[Mistake]:
    match kind:
        case Scalar():
            if not _is_scalar(value, kind.kind):
                yield _wrong(at, kind, value)
        case Choice():
            if not (value in kind.values or str(value) in map(str, kind.values)):
                hint = nearest(str(value), [v for v in kind.values if isinstance(v, str)])
                yield Mistake(at, f"expected one of {kind}, got {_shown(value)}.{hint}")
        case Listing():
            if not isinstance(value, (list, tuple)):
                yield _wrong(at, kind, value)
                return
            for i, item in enumerate(value):
                yield from _mistakes(item, kind.inner, f"{at}[{i}]")
        case Table():
            if not isinstance(value, Mapping):
                yield _wrong(at, kind, value)
                return
            for key, item in value.items():
                yield from _mistakes(item, kind.inner, _joined(at, key))
        case Either():
            yield from _none_fits(value, kind, at)
        case Instance(of=of) if isinstance(of, Class) and of.is_abstract:
            yield from _component(value, of, at)
        case Instance(of=of):
            yield from _fields(value, of, at)


def fitting(value: Any, kind: Either) -> Type | None:
    """Return the first alternative that a value fits, simple ones first, or None."""
    simple = sorted(kind.options, key=lambda option: isinstance(option, (Instance, Listing)))
    return next((o for o in simple if next(_mistakes(value, o, ""), None) is None), None)


def _none_fits(value: Any, kind: Either, at: str) -> Iterator[Mistake]:
    if fitting(value, kind) is not None:
        return
    tried = [list(_mistakes(value, option, at)) for option in kind.options]
    # the type that has the right form says what is wrong within
    inner = [
        found
        for option, found in zip(kind.options, tried, strict=True)
        if _has_form(value, option) and found[0].at != at
    ]
    own = [
        found
        for option, found in zip(kind.options, tried, strict=True)
        if isinstance(option, (Instance, Choice)) and _has_form(value, option)
    ]
    scalars = [o for o in kind.options if isinstance(o, (Scalar, Choice))]
    if inner or (own and len(scalars) <= 1 + (_NULL in scalars)):
        yield from min(inner or own, key=len)
    else:
        yield _wrong(at, kind, value)


_NULL = Scalar(type(None))


def _has_form(value: Any, kind: Type) -> bool:
    if isinstance(value, Mapping):
        return isinstance(kind, (Table, Instance))
    if isinstance(value, (list, tuple)):
        return isinstance(kind, Listing)
    return isinstance(kind, (Scalar, Choice, Instance)) and kind != _NULL


def _is_scalar(value: Any, kind: type) -> bool:
    if kind is type(None):
        return value is None or value == "null"
    if value is None or isinstance(value, (Mapping, list, tuple)):
        return False
    if kind is str:
        return True
    if kind is bool:
        words = ("true", "false", "yes", "no")
        return isinstance(value, bool) or str(value).lower() in words
    if isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _wrong(at: str, kind: Type, value: Any) -> Mistake:
    return Mistake(at, f"expected {in_words(kind)}, got {_shown(value)}.")


def in_words(kind: Type) -> str:
    """Return a type in words, such as `a list of numbers`."""
    match kind:
        case Scalar(kind=scalar) if scalar in (int, float):
            return f"a {kind}"
        case Choice():
            return f"one of {kind}"
        case Listing(inner=inner):
            return f"a list of {_many(inner)}" if _many(inner) else "a list"
        case Table(inner=inner):
            return f"a mapping from names to {_many(inner)}" if _many(inner) else "a mapping"
        case Either(options=options):
            words = [in_words(o) for o in options if o != _NULL and not isinstance(o, Unknown)]
            return " or ".join(dict.fromkeys(words))
        case Instance(of=of):
            if of.is_abstract and isinstance(of, Class):
                return f"one of {shorten(list(members(of)), _SHOWN)}"
            return f"a mapping with {shorten(list(fields_of(of)), _SHOWN)}"
        case Unknown():
            return "any value"
    return str(kind)


def _many(kind: Type) -> str:
    """Return several values of a type in words, or nothing if they are of any type."""
    match kind:
        case Scalar(kind=scalar):
            return {str: "texts", int: "whole numbers", float: "numbers"}.get(scalar, "values")
        case Either(options=options):
            return " or ".join(dict.fromkeys(filter(None, map(_many, options))))
        case Instance(of=of) if of.name == "AbstractSource":
            return "paths, hub ids"
        case Instance(of=of) if of.is_abstract and isinstance(of, Class):
            return f"components ({shorten(list(members(of)), _SHOWN)})"
        case Instance(of=of):
            return f"{of.name} (each a mapping with {shorten(list(fields_of(of)), _SHOWN)})"
    return ""


def _shown(value: Any) -> str:
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _joined(at: str, key: object) -> str:
    return f"{at}.{key}" if at else str(key)


# ---- components ----------------------------------------------------------------------------------


def _component(value: Any, base: Class, at: str) -> Iterator[Mistake]:
    if isinstance(value, str):
        found = class_of(value, base)
        if isinstance(found, str):
            yield Mistake(at, found, of_class=True)
        return
    if not isinstance(value, Mapping):
        yield _wrong(at, Instance(base), value)
        return
    path = value.get("class_path")
    if path is None:  # the options of the default, or of a class that was given before
        if not value:
            yield _wrong(at, Instance(base), value)
        return
    found = class_of(str(path), base)
    if isinstance(found, str):
        yield Mistake(_joined(at, "class_path"), found, of_class=True)
        return
    extra = [str(key) for key in value if key not in _SPEC]
    if extra:
        yield Mistake(
            at,
            f"expected class_path and init_args, got {', '.join(extra)} beside them. Write "
            f"{{class_path: {path}, init_args: {{{extra[0]}: ...}}}}.",
        )
        return
    arguments = value.get("init_args")
    if found is not None and isinstance(arguments, Mapping):
        yield from _fields(arguments, found, _joined(at, "init_args"))


def class_of(name: str, base: Class) -> Class | str | None:
    """Return the class that a name stands for, None if it is not known, or what is wrong."""
    short = name.rpartition(".")[2]
    if short == name:
        known = members(base)
        if name in known:
            return known[name]
        others = named(name)
        hint = _near(name, base)
        if others and all(kind.derives_from(base) is False for kind in others):
            got = f"{name!r}, which is of {others[0].path.rpartition('.')[0]}"
        elif hint or not _is_stock(base):
            got = repr(name)
        else:
            return None  # a part of a trainer that only the parser knows
        return f"expected one of {shorten(list(known), _SHOWN)}, got {got}.{hint}"
    if module(name.partition(".")[0]) is None:
        return None
    found = named(name)
    if found:
        return found[0] if found[0].derives_from(base) is not False else _of_another(name, base)
    hint = _near(short, base)
    return f"no such class: {name!r}.{hint}" if hint else None


def _of_another(name: str, base: Class) -> str:
    return f"expected one of {shorten(list(members(base)), _SHOWN)}, got {name!r}."


def _is_stock(base: Class) -> bool:
    return not base.home.name.startswith("gradmerge.")


def _near(name: str, base: Class) -> str:
    import difflib

    lower = {short.lower(): short for short in members(base)}
    match = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.7)
    if not match:
        return ""
    kind = members(base)[lower[match[0]]]
    own = any(kind in kinds for kinds in components().values())
    return f" Did you mean {kind.name if own and '.optimisers' not in kind.path else kind.path!r}?"


def _fields(value: Any, of: Class | Options, at: str) -> Iterator[Mistake]:
    if isinstance(value, Mapping) and "class_path" in value and isinstance(of, Class):
        if isinstance(value.get("init_args"), Mapping):
            yield from _fields(value["init_args"], of, _joined(at, "init_args"))
        return
    if not isinstance(value, Mapping):
        text = isinstance(value, str) and value.rpartition(".")[2] == of.name
        if value is not None and not text:
            yield _wrong(at, Instance(of), value)
        return
    known = of.fields  # a saved configuration has those of Python alone, too
    for key, item in value.items():
        if str(key) in known:
            yield from _mistakes(item, known[str(key)].kind, _joined(at, key))
        elif not of.is_open:
            yield Mistake(_joined(at, key), "no such option.", of=of)


# ---- the whole ---------------------------------------------------------------------------------


def missing(value: Any, kind: Type) -> Iterator[Mistake]:
    """Yield the required options that plain data lack, wherever a component is given in full."""
    for at, of, given in _groups(value, kind):
        for name, field in fields_of(of).items():
            if name not in given and field.default is None and not _is_group(field.kind):
                about = field.doc.replace("\n", " ").partition(". ")[0].rstrip(".")
                yield Mistake(_joined(at, name), f"required, but not given ({about}).")


def misranged(value: Any, kind: Type) -> Iterator[Mistake]:
    """Yield the numbers in plain data that are out of the range of their options."""
    for at, of, given in _groups(value, kind):
        names = [base.name for base in of.lineage[0]] if isinstance(of, Class) else [of.name]
        for name, expected, got in out_of_range(names, given):
            if isfinite(got):  # else it is named with all others that are not
                yield Mistake(_joined(at, name), f"expected {expected}, got {got}.")


Group = tuple[str, Class | Options, Mapping[str, Any]]


def _groups(value: Any, kind: Type, at: str = "") -> Iterator[Group]:
    """Yield path, class and options of each component and group of options in plain data."""
    match kind:
        case Either():
            fits = fitting(value, kind)
            if fits is not None:
                yield from _groups(value, fits, at)
        case Listing(inner=inner) if isinstance(value, Sequence) and not isinstance(value, str):
            for i, item in enumerate(value):
                yield from _groups(item, inner, f"{at}[{i}]")
        case Table(inner=inner) if isinstance(value, Mapping):
            for key, item in value.items():
                yield from _groups(item, inner, _joined(at, key))
        case Instance(of=of):
            group = _group(value, of, at)
            if group is None:
                return
            yield group
            at, of, given = group
            for name, field in fields_of(of).items():
                required = field.default is None and _is_group(field.kind)
                inner = given.get(name, {} if required else None)
                yield from _groups(inner, field.kind, _joined(at, name))


def _is_group(kind: Type) -> bool:
    return isinstance(kind, Instance) and not kind.of.is_abstract


def _group(value: Any, of: Class | Options, at: str) -> Group | None:
    """Return a component as it is given in full, or None."""
    if isinstance(value, str) and isinstance(of, Class) and of.is_abstract:
        value = {"class_path": value}
    if not isinstance(value, Mapping):
        return None
    if isinstance(of, Class) and "class_path" in value:
        found = class_of(str(value["class_path"]), of) if of.is_abstract else of
        if not isinstance(found, Class):
            return None
        given = value.get("init_args") or {}
        return (_joined(at, "init_args"), found, given) if isinstance(given, Mapping) else None
    return None if isinstance(of, Class) and of.is_abstract else (at, of, value)
