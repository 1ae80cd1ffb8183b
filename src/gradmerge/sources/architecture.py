"""The config and the model class of a folder, as transformers reads them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from gradmerge.common.errors import SourceError, nearest, shorten
from gradmerge.common.files import read_json

_DEPTH = re.compile(r"(^|_)(n_?)?(layers?|experts)$|_depth$")
_DEEPEST = 10_000


class UnknownArchitectureError(SourceError):
    """The installed transformers does not have the model class, or may not run its code."""


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return `config.json` as an object of its class.

    Raises:
        UnknownArchitectureError: transformers has no class for it.
        SourceError: transformers refuses the file, or it asks for a network without end.
    """
    import transformers

    _require_bounded(folder / "config.json")
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # classes check their fields in many ways
        known = (read_json(folder / "config.json") or {}).get("model_type", "")
        if not isinstance(known, str):
            raise SourceError(
                f"{folder}/config.json: expected `model_type` to be a text, got {known!r}; correct "
                "that field, or download the file again."
            ) from error
        if known in transformers.CONFIG_MAPPING:
            raise refusal(folder, "cannot read it", error, _from_dict) from error
        raise UnknownArchitectureError(
            f"{folder}: transformers cannot read its config: {error}. If the model ships its own "
            "code and you trust it, set trust_remote_code: true (gradmerge export: "
            "--trust_remote_code true)."
        ) from error


def _require_bounded(path: Path) -> None:
    """Reject numbers of layers that would take days to build, and more memory than there is."""
    fields = read_json(path) or {}
    for keys in _leaves(fields):
        value: Any = fields
        for key in keys:
            value = value[key]
        if _DEPTH.search(keys[-1]) and isinstance(value, int) and value > _DEEPEST:
            raise SourceError(
                f"{path}: expected at most {_DEEPEST} layers or experts, got "
                f"{'.'.join(keys)}: {value}. Correct the file, or download it again."
            )


def _from_dict(fields: dict[str, Any]) -> Any:
    import transformers

    return transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def model_class_of(config: Any, folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the class that `architectures` names.

    Raises:
        UnknownArchitectureError: there is no such class, or `architectures` is missing.
        SourceError: `architectures` names something else.
    """
    import transformers

    names = getattr(config, "architectures", None)
    if names is None or names == []:
        raise UnknownArchitectureError(
            f"{folder}/config.json: expected `architectures` to name the model class."
        )
    if not isinstance(names, (list, tuple)) or not isinstance(next(iter(names)), str):
        raise SourceError(
            f"{folder}/config.json: expected `architectures` to be a list with the name of the "
            f"model class, got {names!r}; correct that field, or download the file again."
        )
    found = getattr(transformers, names[0], None)
    if isinstance(found, type) and (issubclass(found, nn.Module) or hasattr(found, "from_config")):
        wanted: Any = getattr(found, "config_class", None)
        if isinstance(wanted, type) and not isinstance(config, wanted):
            expected = getattr(wanted, "model_type", "another")
            raise SourceError(
                f"{folder}/config.json: expected the model_type of {names[0]}, which is "
                f"{expected}, got {config.model_type}; correct `architectures` or `model_type`."
            )
        return found
    if found is not None:
        raise SourceError(
            f"{folder}/config.json: expected `architectures` to name a model class of "
            f"transformers, got {names[0]!r}, which is none; correct that field."
        )
    auto_map = getattr(config, "auto_map", None) or {}
    for auto_name, place in auto_map.items() if trust_remote_code else ():
        if auto_name.startswith("AutoModel") and place.endswith(names[0]):
            return getattr(transformers, auto_name)
    known = [name for name in dir(transformers) if "For" in name or "Model" in name]
    raise UnknownArchitectureError(
        f"{folder}/config.json: architecture {names[0]} is not in transformers "
        f"{transformers.__version__}.{nearest(names[0], known)} Update transformers, or set "
        "trust_remote_code: true for a model with its own code."
    )


def refusal(
    folder: Path, what: str, error: Exception, attempt: Callable[[dict[str, Any]], Any]
) -> SourceError:
    """Return the error for a config that transformers refuses; it names the field to blame.

    Args:
        folder: the folder of the config.
        what: what transformers cannot do.
        error: its own error.
        attempt: does the same for other fields. Fields without which it works are to blame.
    """
    path = folder / "config.json"
    told = " ".join(f"{type(error).__name__}: {error}".split())
    fields = read_json(path) or {}
    blamed = [f"{key} (got {value!r})" for key, value in _blamed(fields, attempt)]
    todo = "Correct the file, or download it again."
    if blamed:
        todo = (
            f"It can with another value of {shorten(blamed, 3)}: correct that field, or download "
            "the file again."
        )
    return SourceError(f"{path}: transformers {what}: {told[:300]}\n{todo}")


def _blamed(
    fields: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any]
) -> list[tuple[str, Any]]:
    """Return the fields without which the attempt succeeds, or else with 1 as their value."""
    for other in ((), (1,)):
        found = []
        for keys in _leaves(fields):
            changed = copy.deepcopy(dict(fields))
            inner = changed
            for key in keys[:-1]:
                inner = inner[key]
            value = inner.pop(keys[-1])
            if other:
                inner[keys[-1]] = other[0]
            with suppress(Exception):  # of any kind: this field is not to blame, or not alone
                attempt(changed)
                found.append((".".join(keys), value))
        if found:
            return found
    return []


def _leaves(fields: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in fields.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        elif key not in ("model_type", "architectures", "auto_map"):
            yield (*above, key)
