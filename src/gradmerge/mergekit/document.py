"""The structure of a mergekit file, checked as a whole so that all problems are reported at once.

mergekit itself ignores keys that it does not know; here they are errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gradmerge.errors import ConfigError, nearest
from gradmerge.mergekit.content import Document, ModelReference, Problems, Settings, Slice
from gradmerge.mergekit.methods import METHODS, REFUSED, Method, Parameter

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MIXTURE = "this is a file for mergekit-moe; gradmerge makes no mixtures of experts"
# Keys of mergekit without a counterpart in gradmerge, and why.
_UNSUPPORTED = {
    "residual_weight": "gradmerge has no such option, and mergekit itself does not use it",
    "override_architecture": "gradmerge reads the architecture from config.json",
    "tokens": "gradmerge initialises the rows of new tokens by its own rule",
    "experts": _MIXTURE,
    "gate_mode": _MIXTURE,
}


def is_mergekit(found: Any) -> bool:
    """Check whether the content of a YAML is a mergekit file."""
    keys = {"merge_method", "slices", "experts", "gate_mode"}
    return isinstance(found, Mapping) and bool(keys & set(map(str, found)))


def read_document(path: str | Path) -> Document:
    """Read a mergekit file.

    Raises:
        ConfigError: the file is not YAML, or has problems (all are listed).
    """
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a mergekit YAML, got: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{path}: expected a mergekit YAML with merge_method, got {_kind(found)}."
        )
    reader = _Reader(found)
    document = reader.document(found)
    reader.problems.stop(str(path))
    return document


class _Reader:
    def __init__(self, found: Mapping[str, Any]) -> None:
        self.problems = Problems()
        self.method = self.find_method(found.get("merge_method"))
        base = found.get("base_model")
        self.base = None if base is None else self.model("base_model", base)

    def document(self, found: Mapping[str, Any]) -> Document:
        """Read the whole file and note its problems."""
        self.keys("", found, _KEYS)
        forms = [form for form in ("models", "slices", "modules") if found.get(form)]
        got = " and ".join(forms) or "none"
        self.expect(len(forms) == 1, "", "one of models, slices and modules", got)
        module = self.module(found["modules"]) if forms == ["modules"] else found
        own = module.get("parameters") if forms == ["modules"] else None
        slices: tuple[Slice, ...] = ()
        if module.get("models"):
            inputs, _ = self.inputs("models", module["models"])
            if self.base is not None:
                inputs.setdefault(self.base, {})
            slices = (Slice(inputs),)
        elif module.get("slices"):
            slices = self.slices(module["slices"])
        if self.method is not None:
            self.require_models(slices, self.method)
        tokenizer, multiple = self.tokenizer(found)
        return Document(
            self.method or METHODS["linear"],  # an unknown method is a problem already
            slices,
            self.base,
            self.parameters("modules.default.parameters", own),
            self.parameters("parameters", found.get("parameters")),
            self.dtype("dtype", found.get("dtype")),
            self.dtype("out_dtype", found.get("out_dtype")),
            tokenizer,
            multiple,
            self.chat_template(found.get("chat_template"), tokenizer is not None),
        )

    # ---- checks ---------------------------------------------------------------------------------

    def expect(self, holds: object, where: str, expected: str, got: object) -> bool:
        """Note a problem unless it holds."""
        if not holds:
            self.problems.add(where, f"expected {expected}, got {got}")
        return bool(holds)

    def keys(self, where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
        """Note keys that are unknown or not supported."""
        for key in map(str, found):
            place = f"{where}.{key}" if where else key
            if key in _UNSUPPORTED and found[key] is not None:
                self.problems.add(place, f"is not supported: {_UNSUPPORTED[key]}")
            elif key not in known and key not in _UNSUPPORTED:
                self.problems.add(place, f"unknown key.{nearest(key, known)}")

    def entries(
        self, where: str, found: Any, keys: Sequence[str]
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the mappings of a list with their places, after a check of their keys."""
        if self.expect(isinstance(found, list) and found, where, "a list", _kind(found)):
            for i, entry in enumerate(found):
                place = f"{where}[{i}]"
                if self.expect(isinstance(entry, Mapping), place, "a mapping", _kind(entry)):
                    self.keys(place, entry, keys)
                    yield place, entry

    # ---- models ---------------------------------------------------------------------------------

    def find_method(self, name: Any) -> Method | None:
        """Return the method of a name."""
        where = "merge_method"
        if name in REFUSED:
            self.problems.add(where, f"{name} is not supported: gradmerge does not have it")
        elif name is not None and name not in METHODS:
            hint = nearest(str(name), METHODS)
            self.problems.add(where, f"unknown merge method {name!r}.{hint}")
        self.expect(name is not None, where, "a merge method", "none")
        return METHODS.get(str(name))

    def model(self, where: str, found: Any) -> ModelReference:
        """Return a model reference from text or a mapping."""
        lora: Any = None
        if isinstance(found, Mapping) and "model" in found:
            self.keys(where, found, ("model", "lora"))
            found, lora = found["model"], found.get("lora")
        elif isinstance(found, str):
            found, *adapters = found.split("+")
            lora = adapters[0] if adapters else None
            self.expect(len(adapters) < 2, where, "one adapter after '+'", len(adapters))
        path, revision = self.path_and_revision(where, found)
        if lora is None:
            return ModelReference(path, revision)
        return ModelReference(path, revision, *self.path_and_revision(where, lora))

    def path_and_revision(self, where: str, found: Any) -> tuple[str, str | None]:
        """Split `path@revision`, or a mapping of the two."""
        if isinstance(found, Mapping) and isinstance(found.get("path"), str):
            self.keys(where, found, ("path", "revision"))
            return found["path"], found.get("revision")
        expected = "a path or a hub id, with at most one '@revision'"
        holds = isinstance(found, str) and found and found.count("@") < 2
        self.expect(holds, where, expected, repr(found))
        path, _, revision = str(found).partition("@")
        return path, revision or None

    def module(self, found: Any) -> Mapping[str, Any]:
        """Return the only module."""
        names = ", ".join(map(str, found)) if isinstance(found, Mapping) else _kind(found)
        if names != "default":
            self.problems.add(
                "modules",
                f"expected the single module 'default', got {names}. Merging parts of a network "
                "separately is not supported; write models, with filters under parameters",
            )
            return {}
        where, inner = "modules.default", found["default"]
        if not self.expect(isinstance(inner, Mapping), where, "a mapping", _kind(inner)):
            return {}
        self.keys(where, inner, ("models", "slices", "parameters"))
        got = [form for form in ("models", "slices") if inner.get(form)]
        self.expect(len(got) == 1, where, "one of models and slices", " and ".join(got) or "none")
        return inner

    def inputs(
        self, where: str, found: Any, start: int | None = None
    ) -> tuple[dict[ModelReference, Settings], set[tuple[int, int]]]:
        """Return a list's models with their own parameters, and their ranges of layers.

        Args:
            where: the place of the list.
            found: the list.
            start: the first layer of a slice; None for models of all layers.
        """
        inputs: dict[ModelReference, Settings] = {}
        ranges = set()
        keys = ("model", "parameters", *(() if start is None else ("layer_range",)))
        for place, entry in self.entries(where, found, keys):
            model = self.model(f"{place}.model", entry.get("model"))
            if model in inputs:
                self.problems.add(where, f"{model} is listed twice")
            own = self.parameters(f"{place}.parameters", entry.get("parameters"), of_model=True)
            inputs[model] = own
            if start is not None:
                at = f"{place}.layer_range"
                ranges.add(self.layers(at, entry.get("layer_range"), start))
        return inputs, ranges

    def slices(self, found: Any) -> tuple[Slice, ...]:
        """Read the form `slices`, which has to keep every layer where it is."""
        slices: list[Slice] = []
        bases = set()
        start = 0
        keys = ("sources", "base_model", "residual_weight", "parameters")
        for place, entry in self.entries("slices", found, keys):
            own_base = entry.get("base_model")
            bases.add(self.model(f"{place}.base_model", own_base) if own_base else self.base)
            inputs, ranges = self.inputs(f"{place}.sources", entry.get("sources"), start)
            self.expect(len(ranges) < 2, place, "one layer_range for all sources", len(ranges))
            own = self.parameters(f"{place}.parameters", entry.get("parameters"))
            layers = min(ranges, default=(start, start + 1))
            slices.append(Slice(inputs, own, layers))
            start = layers[1]
        self.expect(len(bases) < 2, "slices", "one base_model for all slices", len(bases))
        self.base = next(iter(bases), self.base)
        return tuple(slices)

    def layers(self, where: str, found: Any, start: int) -> tuple[int, int]:
        """Return a range of layers that begins where the slice before it ends."""
        whole = isinstance(found, list) and all(type(number) is int for number in found)
        holds = whole and len(found) == 2 and 0 <= found[0] < found[1]
        if not self.expect(holds, where, "[first, last + 1]", repr(found)):
            return start, start + 1
        why = (
            "omitted, repeated or moved layers change the network, which gradmerge does not support"
        )
        self.expect(found[0] == start, where, f"layers from {start} on", f"{found}: {why}")
        return found[0], found[1]

    def require_models(self, slices: tuple[Slice, ...], method: Method) -> None:
        """Note slices with other models than the method takes."""
        name, (fewest, most) = method.name, method.num_models
        base = None if method.base == "input" else self.base
        needs_base = method.base == "required" and self.base is None
        self.expect(not needs_base, "base_model", f"the base that {name} needs", "none")
        number = f"{fewest} model{'s' if fewest > 1 else ''}{' besides the base' if base else ''}"
        number = number if most == fewest else f"at least {number}"
        for i, part in enumerate(slices):
            where = "models" if part.layers is None else f"slices[{i}].sources"
            if base is not None and base not in part.inputs:
                self.problems.add(where, f"expected the base {base} among them")
            got = len(part.inputs.keys() - {base})
            self.expect(fewest <= got <= (most or got), where, f"{number} for {name}", got)
            if part.inputs.keys() != slices[0].inputs.keys() and not method.slices_may_differ:
                self.problems.add(
                    where, f"expected the same models in every slice for {name}, which counts them"
                )

    # ---- parameters and options -----------------------------------------------------------------

    def parameters(self, where: str, found: Any, of_model: bool = False) -> Settings:
        """Return the parameters of one place, after a check of every value."""
        if found is None or self.method is None:
            return {}
        if not self.expect(isinstance(found, Mapping), where, "a mapping", _kind(found)):
            return {}
        for key, setting in found.items():
            parameter = self.method.parameter(str(key))
            place = f"{where}.{key}"
            if parameter is None:
                others = [m.name for m in METHODS.values() if m.parameter(str(key))]
                hint = f" It belongs to {', '.join(others[:3])}." if others else ""
                hint = hint or nearest(str(key), [p.name for p in self.method.parameters])
                self.problems.add(place, f"{self.method.name} has no such parameter.{hint}")
            elif of_model and parameter.scope != "model":
                self.problems.add(
                    place,
                    "applies to all models, and mergekit ignores it here; write it under the "
                    "parameters of the file or of the slice",
                )
            else:
                self.setting(place, setting, parameter)
        return {str(key): setting for key, setting in found.items()}

    def setting(self, where: str, setting: Any, parameter: Parameter, nested: bool = False) -> None:
        """Note what is not a value, a list of values (a gradient), or filters with either."""
        if isinstance(setting, Mapping):
            setting = [setting]
        if not isinstance(setting, list) or not any(isinstance(item, Mapping) for item in setting):
            for value in setting if isinstance(setting, list) else [setting]:
                try:
                    parameter.convert(value)
                except ValueError as error:
                    self.problems.add(where, str(error))
            return
        expected = "a value or a list of values" if nested else "a filter with its value"
        for i, item in enumerate(setting):
            place = f"{where}[{i}]"
            holds = not nested and isinstance(item, Mapping) and "value" in item
            if self.expect(holds, place, expected, repr(item)):
                self.keys(place, item, ("filter", "value"))
                pattern = item.get("filter")
                is_text = pattern is None or isinstance(pattern, str)
                self.expect(is_text, f"{place}.filter", "text", repr(pattern))
                self.setting(f"{place}.value", item["value"], parameter, nested=True)

    def dtype(self, where: str, found: Any) -> str | None:
        """Return a dtype by name."""
        name = None if found is None else str(found).removeprefix("torch.")
        known = ", ".join(_DTYPES)
        self.expect(name in (None, *_DTYPES), where, f"one of {known}", repr(found))
        return name

    def tokenizer(self, found: Mapping[str, Any]) -> tuple[ModelReference | str | None, int | None]:
        """Return whose tokenizer the merge has, and the multiple that its size is padded to."""
        where, source, multiple = "tokenizer_source", found.get("tokenizer_source"), None
        options = found.get("tokenizer")
        if options is not None and self.expect(
            isinstance(options, Mapping), "tokenizer", "a mapping", _kind(options)
        ):
            self.expect(source is None, where, "either tokenizer_source or tokenizer", "both")
            self.keys("tokenizer", options, ("source", "pad_to_multiple_of"))
            where, source = "tokenizer.source", options.get("source", "union")
            multiple = options.get("pad_to_multiple_of")
            holds = multiple is None or (type(multiple) is int and multiple > 0)
            at = "tokenizer.pad_to_multiple_of"
            self.expect(holds, at, "a positive whole number", repr(multiple))
        if source == "base":
            self.expect(self.base, where, "a base_model for 'base'", "none")
        named = source in (None, "union", "base")
        return source if named else self.model(where, source), multiple

    def chat_template(self, found: Any, has_tokenizer: bool) -> str | None:
        """Return the chat template that goes with the tokenizer."""
        if found is None:
            return None
        where = "chat_template"
        self.expect(has_tokenizer, where, "a tokenizer_source with it", "none")
        why = "gradmerge does not have the templates that come with mergekit"
        holds = found == "auto" or "{" in str(found)
        self.expect(holds, where, "auto or the text of a template", f"{found!r}: {why}")
        return str(found)


def _kind(found: Any) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"
