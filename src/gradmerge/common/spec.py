"""Specifications (frozen dataclasses) as plain data, and settings per source and tensor.

A checkpoint stores its recipe as plain data and therefore loads with `weights_only=True`, without
unpickling anything. Classes are named by public path (`gradmerge.coefficients.Column`), and only
components are ever instantiated: those of this package, and a user's own from allowed modules.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gradmerge.common.errors import ConfigError, require, shorten
from gradmerge.common.patterns import matches, require_pattern
from gradmerge.common.secrets import hidden, is_secret, mask

CONCEPTS = (
    "sources",
    "alignment",
    "preprocess",
    "coefficients",
    "operators",
    "finalisers",
    "objectives",
    "drivers",
    "optimisers",
    "search",
    "mergekit",
    "training",
)
"""Public namespaces of the package; the `__all__` of each lists its components."""

# Class paths of version 0.1 whose namespace has changed. For all others only the private module was
# dropped: gradmerge.coefficients.granularity.Column is now gradmerge.coefficients.Column.
_OLD_PATHS = {
    "gradmerge.recipe.Recipe": "gradmerge.Recipe",
    "gradmerge.data.TaskData": "gradmerge.TaskData",
    "gradmerge.data.MergeDataModule": "gradmerge.MergeDataModule",
    "gradmerge.module.MergeModule": "gradmerge.MergeModule",
    "gradmerge.callbacks.CoefficientLogger": "gradmerge.training.CoefficientLogger",
    "gradmerge.callbacks.ExportAtEnd": "gradmerge.training.ExportAtEnd",
    "gradmerge.coefficients.FromMergekit": "gradmerge.mergekit.FromMergekit",
    "gradmerge.coefficients.from_mergekit.FromMergekit": "gradmerge.mergekit.FromMergekit",
}
_IN_MEMORY = "in memory"
# Fields that only a user sets: plain data come from checkpoints, which may be a stranger's.
_WITHHELD = ("trust_remote_code", "token")


def public_path(kind: type) -> str:
    """Return the path by which users and files name a class, e.g. `gradmerge.operators.Linear`."""
    package, _, rest = kind.__module__.partition(".")
    if package == "gradmerge":
        concept = rest.partition(".")[0]
        for namespace in ["gradmerge", *([f"gradmerge.{concept}"] if concept in CONCEPTS else [])]:
            public = importlib.import_module(namespace)
            if kind.__name__ in public.__all__ and getattr(public, kind.__name__) is kind:
                return f"{namespace}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def current_path(path: str) -> str:
    """Return the current public path of a class path written by an earlier version.

    Examples:
        >>> current_path("gradmerge.coefficients.granularity.Column")
        'gradmerge.coefficients.Column'
    """
    if path in _OLD_PATHS:
        return _OLD_PATHS[path]
    parts = path.split(".")
    if len(parts) > 3 and parts[0] == "gradmerge" and parts[1] in CONCEPTS:
        return f"gradmerge.{parts[1]}.{parts[-1]}"
    return path


def modernise(value: Any) -> Any:
    """Replace the class paths of an earlier version in plain data by current ones."""
    if isinstance(value, Mapping):
        found = {key: modernise(item) for key, item in value.items()}
        if isinstance(found.get("class_path"), str):
            found["class_path"] = current_path(found["class_path"])
        return found
    if isinstance(value, list):
        return [modernise(item) for item in value]
    return value


def completed(value: Any) -> Any:
    """Give components of gradmerge in plain data the defaults of options that they do not state.

    Records of earlier versions lack the options that were added since.
    """
    if isinstance(value, Mapping):
        found = {key: completed(item) for key, item in value.items()}
        path, given = found.get("class_path"), found.get("init_args")
        if isinstance(path, str) and path.startswith("gradmerge.") and isinstance(given, dict):
            module, _, name = path.rpartition(".")
            kind = getattr(importlib.import_module(module), name, None)
            for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
                if field.name not in given and field.default is not dataclasses.MISSING:
                    given[field.name] = to_plain(field.default)
                elif field.name not in given and callable(field.default_factory):
                    given[field.name] = to_plain(field.default_factory())
        return found
    return [completed(item) for item in value] if isinstance(value, list) else value


def to_plain(value: Any) -> Any:
    """Return a specification as nested dicts, lists and scalars, without secrets.

    In-memory weights and components that cannot be imported by name are replaced by a marker;
    loading such data asks for the recipe again.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if kind.__name__ == "InMemory":
            return {_IN_MEMORY: getattr(value, "label", "")}
        if not _is_importable(kind):
            return {_IN_MEMORY: kind.__qualname__}
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        fields = {name: hidden(v, name) if is_secret(name) else v for name, v in fields.items()}
        return {"class_path": public_path(kind), "init_args": fields}
    if isinstance(value, Mapping):
        if all(hasattr(item, "untyped_storage") for item in value.values()) and value:
            return {_IN_MEMORY: "state dict"}
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (str, Path)):
        return mask(str(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return {_IN_MEMORY: type(value).__qualname__}


def from_plain(value: Any, allow_modules: Collection[str] = ()) -> Any:
    """Build the specification that `to_plain` returned, without the permissions in it.

    Whether code of a model may run is not for the data to say: `trust_remote_code` is false in the
    result, whatever they state.

    Args:
        value: plain data.
        allow_modules: modules outside gradmerge whose components may be imported; naming a
            package allows all of its modules.

    Raises:
        ConfigError: the data names a module that is not allowed, an object that is not a component,
            or in-memory weights.
    """
    if isinstance(value, Mapping):
        if _IN_MEMORY in value:
            raise ConfigError(
                "the checkpoint was trained on in-memory sources, which it does not contain; pass "
                "the recipe again: MergeModule.load_from_checkpoint(path, recipe=...)."
            )
        if "class_path" not in value:
            return {key: from_plain(item, allow_modules) for key, item in value.items()}
        kind = _component(current_path(str(value["class_path"])), allow_modules)
        given = value.get("init_args", {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"{public_path(kind)}: expected init_args, got {given!r:.60}.")
        arguments = {
            str(key): from_plain(item, allow_modules)
            for key, item in given.items()
            if key not in _WITHHELD
        }
        return _built(kind, arguments)
    if isinstance(value, list):
        return [from_plain(item, allow_modules) for item in value]
    return value


def _built(kind: Any, arguments: dict[str, Any]) -> Any:
    """Return a component with arguments that are all of the right types."""
    wrong = []
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    hints = _hints(kind)
    for name, value in arguments.items():
        if name not in fields:
            wrong.append(f"{name}: no such field")
        elif not _has_type(value, hints.get(name, Any)):
            wrong.append(f"{name}: expected {fields[name].type}, got {value!r:.60}")
        elif isinstance(value, list) and str(fields[name].type).startswith("tuple"):
            arguments[name] = tuple(value)
    missing = dataclasses.MISSING
    wrong += [
        f"{name}: missing"
        for name, field in fields.items()
        if field.default is missing and field.default_factory is missing and name not in arguments
    ]
    if wrong:
        raise ConfigError(f"{public_path(kind)} as stored does not fit: {shorten(wrong, 3)}.")
    return kind(**arguments)


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except Exception:  # a user's own class may name types that exist for type checkers alone
        return {}


def _has_type(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_has_type(v, parts[1]) for v in value.values())
    if origin is not None and issubclass(origin, Collection):
        inner = parts[0] if parts else Any
        return isinstance(value, (list, tuple)) and all(_has_type(v, inner) for v in value)
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _component(path: str, allow_modules: Collection[str]) -> Any:
    """Return the class with a public path; only allowed modules are imported."""
    module, _, name = path.rpartition(".")
    if module.split(".")[0] == "gradmerge":
        public = ("gradmerge", *(f"gradmerge.{concept}" for concept in CONCEPTS))
        space = importlib.import_module(module) if module in public else None
        kind = getattr(space, name) if name in getattr(space, "__all__", ()) else None
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ConfigError(f"unknown component {path!r}: no public class of gradmerge.")
        return kind
    if not any(module == known or module.startswith(f"{known}.") for known in allow_modules):
        raise ConfigError(
            f"the checkpoint uses {path}, a class outside gradmerge; importing it executes the "
            f"code of its module.\nIf you trust it, pass --allow-modules {module.split('.')[0]} "
            "(in Python: allow_modules=[...])."
        )
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be imported ({error}). Install the package that defines it."
        ) from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and is_component(kind)):
        raise ConfigError(
            f"{path}: expected a dataclass derived from an abstract class of gradmerge such as "
            f"AbstractInit, got {kind!r}."
        )
    return kind


def is_component(kind: type) -> bool:
    """Return whether a class derives from an abstract class of a public namespace."""
    return issubclass(kind, abstract_classes())


def abstract_classes() -> tuple[type, ...]:
    """Return the abstract classes of the public namespaces."""
    concepts = [importlib.import_module(f"gradmerge.{concept}") for concept in CONCEPTS[:7]]
    found = {getattr(c, n) for c in concepts for n in c.__all__ if n.startswith("Abstract")}
    return tuple(filter(inspect.isabstract, found))


def _is_importable(kind: type) -> bool:
    """Return whether a class can be imported by its path."""
    if kind.__module__.split(".")[0] == "gradmerge":
        return True
    named = kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__
    return named and is_component(kind)


Setting = float | list[float] | dict[str, float | list[float]]
"""A number, a list with one number per source (in order), or a dict from regular expressions of
tensor names to either; an exact tensor name takes precedence, then the first match counts."""


def settle(who: str, setting: Setting, tensor: str, sources: Sequence[str]) -> list[float]:
    """Return the value of a setting for each source at one tensor.

    Args:
        who: name of the option, for error messages.
        setting: value or values (see `Setting`).
        tensor: name of the tensor.
        sources: names of the sources, in order.

    Raises:
        ConfigError: no expression matches the tensor, or a list does not have one value per source.
    """
    if isinstance(setting, dict):
        if tensor in setting:
            setting = setting[tensor]
        else:
            found = next((key for key in setting if matches([key], tensor)), None)
            if found is None:
                raise ConfigError(
                    f"{who}: no expression matches the tensor {tensor}, got {list(setting)[:5]}. "
                    "Add '.*' as the last one to cover all other tensors."
                )
            setting = setting[found]
    if not isinstance(setting, list):
        return [float(setting)] * len(sources)
    if len(setting) != len(sources):
        raise ConfigError(
            f"{who}: expected one value or {len(sources)} (for {', '.join(sources)}), got "
            f"{len(setting)} values."
        )
    return [float(value) for value in setting]


def require_setting(
    who: str, setting: Setting, expected: str, holds: Callable[[float], bool]
) -> None:
    """Reject a setting with an invalid number or regular expression.

    Args:
        who: name of the option, for error messages.
        setting: value or values (see `Setting`).
        expected: condition in words.
        holds: condition that every number must meet.

    Raises:
        ConfigError: a number does not meet the condition, or an expression is invalid.
    """
    if isinstance(setting, dict):
        require(bool(setting), who, "at least one expression", "none")
        for pattern, value in setting.items():
            require_pattern(who, pattern)
            require_setting(f"{who}[{pattern!r}]", value, expected, holds)
        return
    for value in setting if isinstance(setting, list) else [setting]:
        require(holds(float(value)), who, expected, value)


PATTERNS = {"patterns": True}
"""Metadata of a field that holds regular expressions of tensors' names."""


def patterns_of(component: Any, prefix: str = "") -> dict[str, list[str]]:
    """Return the expressions that a specification and its parts hold, by option.

    Expressions are in fields of type `Setting` and in those with the metadata `PATTERNS`. Defaults,
    which suit many networks, are left out.
    """
    found: dict[str, list[str]] = {}
    if isinstance(component, (list, tuple)):
        for part in component:
            found.update(patterns_of(part, f"{type(part).__name__}."))
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return found
    for field in dataclasses.fields(component):
        value = getattr(component, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.metadata.get("patterns"):
            if value != default:
                listed = [value] if isinstance(value, str) else list(value or ())
                found[prefix + field.name] = listed
        elif "Setting" in str(field.type) and isinstance(value, dict):
            found[prefix + field.name] = list(value)
        else:
            found.update(patterns_of(value, f"{type(value).__name__}."))
    return found
