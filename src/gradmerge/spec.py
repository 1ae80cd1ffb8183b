"""Specifications (frozen dataclasses) as plain data, and back.

A checkpoint holds its recipe as plain data, so that it loads with `weights_only=True`: nothing is
unpickled, and only classes of this package are ever built from it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmerge.errors import ConfigError

_IN_MEMORY = "in memory"


def to_plain(value: Any) -> Any:
    """Nested dicts, lists and scalars that say everything a specification says.

    Weights that live in memory cannot be said; they become a note that asks for them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if not kind.__module__.startswith("gradmerge."):
            return {_IN_MEMORY: kind.__qualname__}
        if kind.__name__ == "InMemory":
            return {_IN_MEMORY: getattr(value, "label", "")}
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": fields}
    if isinstance(value, Mapping):
        if all(hasattr(item, "untyped_storage") for item in value.values()) and value:
            return {_IN_MEMORY: "state dict"}
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {_IN_MEMORY: type(value).__qualname__}


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`.

    Raises:
        ConfigError: the data names a class outside this package, or weights that lived in memory.
    """
    if isinstance(value, Mapping):
        if _IN_MEMORY in value:
            raise ConfigError(
                "the checkpoint was trained on sources in memory, which it does not hold; pass the "
                "recipe again: MergeModule.load_from_checkpoint(path, recipe=...)."
            )
        if "class_path" not in value:
            return {key: from_plain(item) for key, item in value.items()}
        module, _, name = str(value["class_path"]).rpartition(".")
        kind = _class(module, name)
        if kind is None:
            raise ConfigError(f"{value['class_path']} is no class of gradmerge; it was not loaded.")
        arguments = {key: from_plain(item) for key, item in value.get("init_args", {}).items()}
        for field in dataclasses.fields(kind):
            if str(field.type).startswith("tuple") and field.name in arguments:
                arguments[field.name] = tuple(arguments[field.name])
        return kind(**arguments)
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value


def _class(module: str, name: str) -> Any:
    if not module.startswith("gradmerge.") or importlib.util.find_spec(module) is None:
        return None
    kind = getattr(importlib.import_module(module), name, None)
    own = isinstance(kind, type) and kind.__module__ == module
    return kind if own and dataclasses.is_dataclass(kind) else None
