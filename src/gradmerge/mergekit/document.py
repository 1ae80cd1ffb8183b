"""A mergekit file: its structure, checked as a whole, with every problem reported at once.

mergekit itself ignores keys that it does not know; here they are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gradmerge.errors import ConfigError, nearest
from gradmerge.mergekit.content import (
    OF_A_FILE,
    OF_A_MODEL,
    OF_A_SLICE,
    OF_SOURCES,
    Document,
    Input,
    ModelReference,
    Problems,
    Settings,
    Slice,
)
from gradmerge.mergekit.methods import METHODS, REFUSED, Method, Parameter

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MIXTURE = "this is a file for mergekit-moe; gradmerge makes no mixtures of experts"
# What mergekit knows and gradmerge does not, and why.
_UNSUPPORTED = {
    "residual_weight": "gradmerge has no such option, and mergekit itself does not use it",
    "override_architecture": "gradmerge reads the architecture from config.json",
    "tokens": "gradmerge takes rows of new tokens by its own rule",
    "experts": _MIXTURE,
    "gate_mode": _MIXTURE,
}


def is_mergekit(found: Any) -> bool:
    """Whether a YAML's content is a mergekit file."""
    keys = {"merge_method", "slices", "experts", "gate_mode"}
    return isinstance(found, Mapping) and bool(keys & set(map(str, found)))


def read_document(path: str | Path) -> Document:
    """Read a mergekit file.

    Raises:
        ConfigError: it cannot be read as YAML, or a list of everything in it that is wrong.
    """
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a mergekit YAML, got: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{path}: expected a mergekit YAML with merge_method, got {_kind(found)}."
        )
    reader = _Reader(str(path))
    document = reader.document(found)
    reader.problems.stop(str(path))
    assert document is not None
    return document


class _Reader:
    def __init__(self, path: str) -> None:
        self.path = path
        self.problems = Problems()

    def document(self, found: Mapping[str, Any]) -> Document | None:
        """The file; None, with problems noted, where its method or form is not known."""
        self.keys("", found, OF_A_FILE)
        method = self.method(found.get("merge_method"))
        base = self.optional_model("base_model", found.get("base_model"))
        forms = [form for form in ("models", "slices", "modules") if found.get(form)]
        if len(forms) != 1:
            got = " and ".join(forms) or "none"
            self.problems.add("", f"expected one of models, slices and modules, got {got}")
        if method is None or len(forms) != 1:
            self.outline(found)
            return None
        module = found
        module_parameters: Settings = {}
        if forms == ["modules"]:
            module = self.module(found["modules"])
            module_parameters = self.parameters("modules", module.get("parameters"), method)
        if module.get("models"):
            slices = self.models(module["models"], method, base)
        else:
            slices, base = self.slices(module.get("slices"), method, base)
        self.inputs(slices, method, base)
        tokenizer, multiple = self.tokenizer(found, base)
        return Document(
            self.path,
            method,
            slices,
            base,
            module_parameters,
            self.parameters("parameters", found.get("parameters"), method),
            self.dtype("dtype", found.get("dtype")),
            self.dtype("out_dtype", found.get("out_dtype")),
            tokenizer,
            multiple,
            self.chat_template(found.get("chat_template"), tokenizer is not None),
        )

    def outline(self, found: Mapping[str, Any]) -> None:
        """Note unknown keys of models and slices, where no method tells their parameters."""
        if found.get("models"):
            self.entries("models", found["models"], OF_A_MODEL)
        if found.get("slices"):
            for i, entry in enumerate(self.entries("slices", found["slices"], OF_A_SLICE)):
                if entry.get("sources"):
                    self.entries(f"slices[{i}].sources", entry["sources"], OF_SOURCES)

    def keys(self, where: str, found: Mapping[str, Any], known: Iterable[str]) -> None:
        """Note keys that are unknown, or known and not supported."""
        known = list(known)
        for key in map(str, found):
            place = f"{where}.{key}" if where else key
            if key in _UNSUPPORTED and found[key] is not None:
                self.problems.add(place, f"is not supported: {_UNSUPPORTED[key]}")
            elif key not in known and key not in _UNSUPPORTED:
                self.problems.add(place, f"unknown key.{nearest(key, known)}")

    def method(self, name: Any) -> Method | None:
        """The method of a name."""
        if name in REFUSED:
            self.problems.add("merge_method", f"{name} is not supported: {REFUSED[name]}")
        elif name is None:
            self.problems.add("merge_method", "expected a merge method, got none")
        elif name not in METHODS:
            hint = nearest(str(name), METHODS)
            self.problems.add("merge_method", f"{name!r} is no merge method.{hint}")
        return METHODS.get(str(name))

    def optional_model(self, where: str, found: Any) -> ModelReference | None:
        """A model, where one is given."""
        return None if found is None else self.model(where, found)

    def model(self, where: str, found: Any) -> ModelReference:
        """A model, from a string or a mapping."""
        lora: Any = None
        if isinstance(found, Mapping) and "model" in found:
            self.keys(where, found, ("model", "lora"))
            found, lora = found["model"], found.get("lora")
        elif isinstance(found, str):
            found, *adapters = found.split("+")
            lora = adapters[0] if adapters else None
            if len(adapters) > 1:
                self.problems.add(where, "expected one adapter after '+', got several")
        path, revision = self.path_and_revision(where, found)
        if lora is None:
            return ModelReference(path, revision)
        return ModelReference(path, revision, *self.path_and_revision(where, lora))

    def path_and_revision(self, where: str, found: Any) -> tuple[str, str | None]:
        """`path@revision`, or a mapping of the two."""
        if isinstance(found, Mapping) and isinstance(found.get("path"), str):
            self.keys(where, found, ("path", "revision"))
            return found["path"], found.get("revision")
        if not isinstance(found, str) or not found or found.count("@") > 1:
            self.problems.add(
                where,
                f"expected a path or a hub id, with at most one '@revision', got {found!r}",
            )
            return str(found), None
        path, _, revision = found.partition("@")
        return path, revision or None

    def entries(self, where: str, found: Any, keys: Iterable[str]) -> list[Mapping[str, Any]]:
        """A list of mappings, with no keys but these."""
        if not isinstance(found, list) or not found:
            self.problems.add(where, f"expected a list, got {_kind(found)}")
            return []
        kept = []
        for i, entry in enumerate(found):
            if isinstance(entry, Mapping):
                self.keys(f"{where}[{i}]", entry, keys)
                kept.append(entry)
            else:
                self.problems.add(f"{where}[{i}]", f"expected a mapping, got {_kind(entry)}")
        return kept

    def module(self, found: Any) -> Mapping[str, Any]:
        """The only module."""
        if not isinstance(found, Mapping) or list(found) != ["default"]:
            names = ", ".join(map(str, found)) if isinstance(found, Mapping) else _kind(found)
            self.problems.add(
                "modules",
                f"expected the one module 'default', got {names}. Parts of a network that are "
                "merged apart are not supported; write models, with filters under parameters",
            )
            return {}
        inner = found["default"]
        if not isinstance(inner, Mapping) or bool(inner.get("models")) == bool(inner.get("slices")):
            self.problems.add("modules.default", "expected one of models and slices")
            return {}
        self.keys("modules.default", inner, ("models", "slices", "parameters"))
        return inner

    def models(self, found: Any, method: Method, base: ModelReference | None) -> tuple[Slice, ...]:
        """The form `models`: one slice of all layers. The base joins it if it is not listed."""
        inputs = []
        for i, entry in enumerate(self.entries("models", found, OF_A_MODEL)):
            where = f"models[{i}]"
            model = self.model(f"{where}.model", entry.get("model"))
            own = self.parameters(f"{where}.parameters", entry.get("parameters"), method, True)
            inputs.append(Input(model, own))
        if base is not None and base not in [entry.model for entry in inputs]:
            inputs.append(Input(base))
        return (Slice(tuple(inputs)),)

    def slices(
        self, found: Any, method: Method, base: ModelReference | None
    ) -> tuple[tuple[Slice, ...], ModelReference | None]:
        """The form `slices`, which has to keep every layer where it is; and the base."""
        slices: list[Slice] = []
        bases = set()
        start = 0
        for i, entry in enumerate(self.entries("slices", found, OF_A_SLICE)):
            where = f"slices[{i}]"
            bases.add(self.optional_model(f"{where}.base_model", entry.get("base_model")) or base)
            inputs, ranges = [], set()
            for j, source in enumerate(
                self.entries(f"{where}.sources", entry.get("sources"), OF_SOURCES)
            ):
                place = f"{where}.sources[{j}]"
                model = self.model(f"{place}.model", source.get("model"))
                own = source.get("parameters")
                inputs.append(
                    Input(model, self.parameters(f"{place}.parameters", own, method, True))
                )
                layers = self.layers(f"{place}.layer_range", source.get("layer_range"))
                if layers is not None:
                    ranges.add(layers)
                    if layers[0] != start:
                        self.problems.add(
                            f"{place}.layer_range",
                            f"expected layers from {start} on, got {list(layers)}: layers that "
                            "are left out, repeated or moved change the network, which gradmerge "
                            "does not do",
                        )
            if len(ranges) > 1:
                self.problems.add(where, "expected one range of layers of all its sources")
            own = self.parameters(f"{where}.parameters", entry.get("parameters"), method)
            layers = min(ranges) if ranges else (start, start + 1)
            slices.append(Slice(tuple(inputs), own, layers))
            start = layers[1]
        if len(bases) > 1:
            self.problems.add("slices", "expected one base_model for all slices, got several")
        return tuple(slices), next(iter(bases), base)

    def layers(self, where: str, found: Any) -> tuple[int, int] | None:
        """A range of layers."""
        whole = isinstance(found, list) and all(type(number) is int for number in found)
        if whole and len(found) == 2 and 0 <= found[0] < found[1]:
            return found[0], found[1]
        self.problems.add(where, f"expected [first, last + 1], got {found!r}")
        return None

    def inputs(self, slices: Iterable[Slice], method: Method, base: ModelReference | None) -> None:
        """Note slices whose models are not what the method wants."""
        name = method.name
        if method.base == "required" and base is None:
            self.problems.add("base_model", f"expected a base, which {name} needs, got none")
        for i, part in enumerate(slices):
            where = "models" if part.layers is None else f"slices[{i}].sources"
            models = part.models
            for model in {m for m in models if models.count(m) > 1}:
                self.problems.add(where, f"{model} stands there twice")
            if method.base != "ignored" and base is not None and base not in models:
                self.problems.add(where, f"expected the base {base} among them")
            if len(models) < method.min_inputs:
                least = f"at least {method.min_inputs} models"
                self.problems.add(where, f"expected {least} for {name}, got {len(models)}")
            if method.max_inputs is not None and len(models) > method.max_inputs:
                most = f"at most {method.max_inputs}"
                self.problems.add(where, f"expected {most} for {name}, got {len(models)}")
            others = [m for m in models if method.base == "ignored" or m != base]
            if not others:
                self.problems.add(where, "expected a model other than the base, got none")
            if method.num_non_base not in (None, len(others)):
                wanted = f"{method.num_non_base} models besides the base"
                self.problems.add(where, f"expected {wanted} for {name}, got {len(others)}")

    def parameters(
        self, where: str, found: Any, method: Method, own: bool = False
    ) -> dict[str, Any]:
        """Parameters of one place, each value checked; `own` those of one model."""
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            self.problems.add(where, f"expected a mapping, got {_kind(found)}")
            return {}
        names = [parameter.name for parameter in method.parameters]
        for key, setting in found.items():
            parameter = method.parameter(str(key))
            place = f"{where}.{key}"
            if parameter is None:
                others = [m.name for m in METHODS.values() if m.parameter(str(key))]
                hint = f" It belongs to {', '.join(others[:3])}." if others else ""
                hint = hint or nearest(str(key), names)
                self.problems.add(place, f"{method.name} has no such parameter.{hint}")
            elif own and parameter.scope == "merge":
                self.problems.add(
                    place,
                    "is one for all models, and mergekit ignores it here; write it under the "
                    "parameters of the file or of the slice",
                )
            else:
                self.setting(place, setting, parameter)
        return {str(key): setting for key, setting in found.items()}

    def setting(self, where: str, setting: Any, parameter: Parameter) -> None:
        """Note what cannot stand as a value: scalars, lists of them (gradients), filters."""
        if isinstance(setting, Mapping):
            setting = [setting]
        if isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting):
            for i, item in enumerate(setting):
                place = f"{where}[{i}]"
                if not isinstance(item, Mapping) or "value" not in item:
                    self.problems.add(place, f"expected a filter with its value, got {item!r}")
                    continue
                self.keys(place, item, ("filter", "value"))
                if not isinstance(item.get("filter"), (str, type(None))):
                    self.problems.add(f"{place}.filter", f"expected text, got {item['filter']!r}")
                if isinstance(item["value"], (Mapping, list)) and any(
                    isinstance(inner, (Mapping, list)) for inner in item["value"]
                ):
                    self.problems.add(f"{place}.value", "expected a value or a list of values")
                else:
                    self.setting(f"{place}.value", item["value"], parameter)
            return
        for value in setting if isinstance(setting, list) else [setting]:
            try:
                parameter.convert(value)
            except (TypeError, ValueError):
                self.problems.add(where, f"expected {_EXPECTED[parameter.kind]}, got {value!r}")

    def dtype(self, where: str, found: Any) -> str | None:
        """A dtype by name."""
        name = str(found).removeprefix("torch.")
        if found is not None and name not in _DTYPES:
            self.problems.add(where, f"expected one of {', '.join(_DTYPES)}, got {found!r}")
        return None if found is None else name

    def tokenizer(
        self, found: Mapping[str, Any], base: ModelReference | None
    ) -> tuple[ModelReference | str | None, int | None]:
        """Whose tokenizer is taken, and to what its size is padded."""
        source, multiple = found.get("tokenizer_source"), None
        where = "tokenizer_source"
        if found.get("tokenizer") is not None:
            if source is not None:
                self.problems.add(where, "expected either it or tokenizer, got both")
            options = found["tokenizer"]
            where = "tokenizer.source"
            if not isinstance(options, Mapping):
                self.problems.add("tokenizer", f"expected a mapping, got {_kind(options)}")
                return None, None
            self.keys("tokenizer", options, ("source", "pad_to_multiple_of"))
            source, multiple = options.get("source", "union"), options.get("pad_to_multiple_of")
            if multiple is not None and (type(multiple) is not int or multiple < 1):
                self.problems.add(
                    "tokenizer.pad_to_multiple_of", f"expected a whole number, got {multiple!r}"
                )
        if source is None or source == "union":
            return source, multiple
        if source == "base":
            if base is None:
                self.problems.add(where, "expected a base_model for 'base', got none")
            return source, multiple
        return self.model(where, source), multiple

    def chat_template(self, found: Any, has_tokenizer: bool) -> str | None:
        """The chat template that goes with the tokenizer."""
        if found is not None and not has_tokenizer:
            self.problems.add("chat_template", "expected a tokenizer_source with it, got none")
        elif found is not None and found != "auto" and "{" not in str(found):
            self.problems.add(
                "chat_template",
                f"expected auto or the text of a template, got {found!r}: the templates that come "
                "with mergekit are not here",
            )
        return None if found is None else str(found)


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def _kind(found: Any) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"
