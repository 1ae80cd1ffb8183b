"""Other forms of a value that mean the same, in the form that the parser takes."""

from __future__ import annotations

from collections.abc import Mapping
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
    options_within,
)
from gradmerge.cli.check import class_of, fitting, mistakes
from gradmerge.cli.options import fields_of
from gradmerge.common.names import dtype_name, named


def accepted(value: Any, kind: Type) -> Any:
    """Return a value in the form that its type has, where it is meant in another.

    A list of sources becomes a mapping with names from their paths, a loss an objective of it, a
    single component a list of it, and `bf16` `bfloat16`.
    """
    match kind:
        case Choice(values=values) if isinstance(value, str) and value not in values:
            return dtype_name(value) if dtype_name(value) in values else value
        case Either(options=options):
            fits = fitting(value, kind)
            for option in options if fits is None else (fits,):
                new = accepted(value, option)
                if not mistakes(new, option):
                    return new
        case Listing(inner=inner):
            if isinstance(value, list):
                return [accepted(item, inner) for item in value]
            component = isinstance(inner, Instance) and isinstance(value, (str, dict))
            if (component or (inner == Scalar(str) and isinstance(value, str))) and value:
                new = accepted(value, inner)
                return value if mistakes(new, inner) else [new]
        case Table(inner=inner):
            if isinstance(value, list) and _is_source(inner):
                return named(value)
            if isinstance(value, dict):
                return {key: accepted(item, inner) for key, item in value.items()}
        case Instance(of=of):
            return _accepted_component(value, of)
    return value


def _is_source(kind: Type) -> bool:
    options = options_within(kind)
    return any(isinstance(o, Instance) and o.of.name == "AbstractSource" for o in options)


def _accepted_component(value: Any, of: Class | Options) -> Any:
    if isinstance(of, Class) and isinstance(value, dict) and "class_path" in value:
        found = class_of(str(value["class_path"]), of) if of.is_abstract else of
        arguments = value.get("init_args")
        is_own = not of.is_abstract and str(value["class_path"]).rpartition(".")[2] == of.name
        if isinstance(found, Class) and isinstance(arguments, dict) and (of.is_abstract or is_own):
            return {**value, "init_args": _accepted_fields(arguments, found)}
    elif isinstance(value, dict) and not (isinstance(of, Class) and of.is_abstract):
        return _accepted_fields(value, of)
    if isinstance(of, Class) and not of.is_abstract and _is_other(value, of):
        for name, field in fields_of(of).items():
            kind = field.kind
            if isinstance(kind, Listing) and isinstance(kind.inner, Instance):
                new = accepted(value, kind)
                if new and not mistakes(new, kind):
                    return {name: new}
    return value


def _is_other(value: Any, of: Class) -> bool:
    """Return whether a value is not in a form of this class: a list, or of another class."""
    if isinstance(value, str):
        return value.rpartition(".")[2] != of.name
    is_part = isinstance(value, dict) and "class_path" in value
    other = is_part and str(value["class_path"]).rpartition(".")[2] != of.name
    return isinstance(value, list) or other


def _accepted_fields(value: Mapping[str, Any], of: Class | Options) -> dict[str, Any]:
    known = fields_of(of)
    return {
        key: accepted(item, known[key].kind) if key in known else item
        for key, item in value.items()
    }
