"""A mergekit file as data, read as a whole so that all of its problems are reported at once.

mergekit itself ignores keys that it does not know; here they are errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gradmerge.common.errors import ConfigError, nearest
from gradmerge.common.files import read_yaml
from gradmerge.common.typing import Origin
from gradmerge.mergekit.methods import METHODS, REFUSED, Method, Parameter, Value
from gradmerge.sources import Vocabulary

Case = tuple[str, tuple[Value, ...]]
"""A filter, empty for every tensor, with one value or a gradient over the layers."""
Settings = Mapping[str, Sequence[Case]]
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
_SAME_LAYERS = (
    "omitted, repeated or moved layers change the network, which gradmerge does not support"
)
# Read even where they are absent, as their readers then report it.
_REQUIRED = ("merge_method", "sources", "model", "layer_range", "path", "value")


@dataclass(frozen=True)
class ModelReference:
    """A model as mergekit names one: `path`, `owner/name@revision`, each with `+adapter`."""

    path: str
    revision: str | None = None
    adapter: ModelReference | None = None

    def __str__(self) -> str:
        text = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return text if self.adapter is None else f"{text}+{self.adapter}"


@dataclass(frozen=True)
class Slice:
    """A range of layers and the models that go into it."""

    inputs: Mapping[ModelReference, Settings]
    """Models in order, each with its own parameters."""
    shared: tuple[Settings, ...]
    """Parameters of the slice, the module and the file, nearest first."""
    layers: tuple[int, int] | None
    """First layer and one past the last; None for all."""


@dataclass(frozen=True)
class Document:
    """A whole file."""

    method: Method
    slices: tuple[Slice, ...]
    base: ModelReference | None
    dtype: str | None
    """dtype of the result, if stated."""
    vocabulary: Vocabulary | None
    """Tokens of the merge, if stated; a source by the name that the file has for the model."""

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """All inputs, each once, in order of appearance."""
        return tuple(dict.fromkeys(model for part in self.slices for model in part.inputs))

    @property
    def origin(self) -> Origin:
        """The recipe's origin."""
        among = self.method.base == "input" or self.method.base_takes_rest
        return "zero" if among or self.base is None else "base"

    @property
    def sources(self) -> tuple[ModelReference, ...]:
        """The models with a coefficient: all, or all but the base that directions start from."""
        left_out = self.base if self.origin == "base" else None
        return tuple(model for model in self.models if model != left_out)


class Problems(list[str]):
    """The problems of a file, each once."""

    def add(self, where: str, what: str) -> None:
        """Note a problem."""
        text = f"{where}: {what}" if where else what
        if text not in self:
            self.append(text)

    def expect(self, holds: object, where: str, expected: str, got: object) -> bool:
        """Note a problem unless it holds."""
        if not holds:
            self.add(where, f"expected {expected}, got {got}")
        return bool(holds)

    def stop(self, path: str) -> None:
        """Raise one error that lists all problems, if there are any."""
        if self:
            count = "one problem" if len(self) == 1 else f"{len(self)} problems"
            raise ConfigError("\n  ".join([f"{path}: this mergekit file has {count}:", *self]))


def is_mergekit(found: Any) -> bool:
    """Check whether the content of a YAML is a mergekit file."""
    keys = {"merge_method", "slices", "experts", "gate_mode"}
    return isinstance(found, Mapping) and bool(keys & set(map(str, found)))


def read_document(path: str | Path) -> Document:
    """Read a mergekit file.

    Raises:
        ConfigError: the file is not YAML, or has problems (all are listed).
    """
    found = read_yaml(Path(path).expanduser())
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{path}: expected a mergekit YAML with merge_method, got {_kind(found)}."
        )
    reader = _Reader()
    document = reader.document(found)
    reader.problems.stop(str(path))
    return document


class _Reader:
    """Reads a file by the keys that each place may have; what does not fit becomes a problem."""

    def __init__(self) -> None:
        self.problems = Problems()
        self.expect = self.problems.expect
        self.method: Method | None = None

    def document(self, found: Mapping[str, Any]) -> Document:
        file = self.read("", found, _FILE)
        self.one_of("", found, "models, slices and modules")
        base, slices = self.slices(file)
        where, multiple = "tokenizer_source", None
        tokenizer, template = file.get(where), file.get("chat_template")
        if "tokenizer" in file:
            self.expect(tokenizer is None, where, f"either {where} or tokenizer", "both")
            where, multiple = "tokenizer.source", file["tokenizer"].get("pad_to_multiple_of")
            tokenizer = file["tokenizer"].get("source", "union")
        self.expect(base or tokenizer != "base", where, "a base_model for 'base'", "none")
        alone = template and not tokenizer
        self.expect(not alone, "chat_template", "a tokenizer_source with it", "none")
        return Document(
            self.method or METHODS["linear"],  # an unknown method is a problem already
            slices,
            base,
            file.get("out_dtype") or file.get("dtype"),
            Vocabulary(tokenizer, multiple, template or "auto") if tokenizer else None,
        )

    # ---- structure ------------------------------------------------------------------------------

    def read(self, where: str, found: Any, shape: Any) -> Any:
        """Read what has a shape: of a mapping the known keys, of a list the mappings."""
        if callable(shape):
            return shape(self, where, found)
        if isinstance(shape, list):
            holds = isinstance(found, list) and found
            self.expect(holds, where, "a list", _kind(found or None))
            entries = enumerate(found if holds else [])
            read = [self.read(f"{where}[{i}]", entry, shape[0]) for i, entry in entries]
            return [entry for entry in read if entry]
        if not self.expect(isinstance(found, Mapping), where, "a mapping", _kind(found)):
            return {}
        at = f"{where}." if where else ""
        for key in found:
            if key in _UNSUPPORTED and found[key] is not None:
                self.problems.add(f"{at}{key}", f"is not supported: {_UNSUPPORTED[key]}")
            elif key not in shape and key not in _UNSUPPORTED:
                self.problems.add(f"{at}{key}", f"unknown key.{nearest(str(key), shape)}")
        return {
            key: self.read(f"{at}{key}", found.get(key), inner)
            for key, inner in shape.items()
            if key in _REQUIRED or found.get(key) is not None  # null counts as absent
        }

    def one_of(self, where: str, found: Mapping[str, Any], forms: str) -> None:
        got = [form for form in ("models", "slices", "modules") if found.get(form)]
        self.expect(len(got) == 1, where, f"one of {forms}", " and ".join(got) or "none")

    def only_module(self, where: str, found: Any) -> Any:
        names = ", ".join(map(str, found)) if isinstance(found, Mapping) else _kind(found)
        if names != "default":
            self.problems.add(
                where,
                f"expected the single module 'default', got {names}. Merging parts of a network "
                "separately is not supported; write models, with filters under parameters",
            )
            return {}
        module = self.read(f"{where}.default", found["default"], _MODULE)
        self.one_of(f"{where}.default", module, "models and slices")
        return module

    # ---- models ---------------------------------------------------------------------------------

    def merge_method(self, where: str, name: Any) -> None:
        if self.expect(name is not None, where, "a merge method", "none"):
            self.method = METHODS.get(str(name))
            if name in REFUSED:
                self.problems.add(where, f"{name} is not supported: gradmerge does not have it")
            elif self.method is None:
                hint = nearest(str(name), METHODS)
                self.problems.add(where, f"unknown merge method {name!r}.{hint}")

    def model(self, where: str, found: Any) -> ModelReference:
        """Read `path@revision+adapter`, or mappings of these parts."""
        if isinstance(found, Mapping) and "model" in found:
            shape = {"model": _Reader.path, "lora": _Reader.path}
            own, *adapters = self.read(where, found, shape).values()
        else:
            paths = found.split("+") if isinstance(found, str) else [found]
            own, *adapters = (self.path(where, path) for path in paths)
        self.expect(len(adapters) < 2, where, "one adapter after '+'", len(adapters))
        return replace(own, adapter=adapters[0]) if adapters else own

    def path(self, where: str, found: Any) -> ModelReference:
        """Read `path@revision`, or a mapping of the two."""
        if isinstance(found, Mapping):
            shape = {"path": _Reader.text, "revision": _Reader.text}
            return ModelReference(**self.read(where, found, shape))
        holds = isinstance(found, str) and found and found.count("@") < 2
        expected = "a path or a hub id, with at most one '@revision'"
        self.expect(holds, where, expected, repr(found))
        path, _, revision = str(found).partition("@")
        return ModelReference(path, revision or None)

    def layers(self, where: str, found: Any) -> tuple[int, int] | None:
        whole = isinstance(found, list) and all(type(number) is int for number in found)
        holds = whole and len(found) == 2 and 0 <= found[0] < found[1]
        self.expect(holds, where, "[first, last + 1]", repr(found))
        return (found[0], found[1]) if holds else None

    def slices(self, file: Mapping[str, Any]) -> tuple[ModelReference | None, tuple[Slice, ...]]:
        """Return the base and the slices; `models` are one slice of all layers."""
        module = file.get("modules") or file  # the file itself is most often the only module
        by_layers, models = "slices" in module, module.get("models")
        parts = module.get("slices") or ([{"sources": models}] if models else [])
        bases = {part.get("base_model", file.get("base_model")) for part in parts}
        self.expect(len(bases) < 2, "slices", "one base_model for all slices", len(bases))
        base = next(iter(bases), None)
        slices: list[Slice] = []
        start = 0
        for i, part in enumerate(parts):
            where = f"slices[{i}].sources" if by_layers else "models"
            inputs: dict[ModelReference, Settings] = {}
            for source in part["sources"]:
                model = source["model"]
                if model in inputs:
                    self.problems.add(where, f"{model} is listed twice")
                inputs[model] = source.get("parameters", {})
            if base is not None and not by_layers:
                inputs.setdefault(base, {})
            ranges = {source.get("layer_range") for source in part["sources"]} - {None}
            self.expect(len(ranges) < 2, where, "one layer_range for all sources", len(ranges))
            layers = min(ranges, default=None)
            if layers is not None:
                got = f"{list(layers)}: {_SAME_LAYERS}"
                self.expect(layers[0] == start, where, f"layers from {start} on", got)
                start = layers[1]
            shared = tuple(scope.get("parameters", {}) for scope in (part, module, file))
            slices.append(Slice(inputs, shared, layers))
            self.require_models(where, slices, base)
        return base, tuple(slices)

    def require_models(self, where: str, slices: list[Slice], base: ModelReference | None) -> None:
        """Note a last slice with other models than the method takes."""
        if self.method is None:
            return
        name, (fewest, most), inputs = self.method.name, self.method.num_models, slices[-1].inputs
        if self.method.base == "required":
            self.expect(base, "base_model", f"the base that {name} needs", "none")
        if self.method.base == "input":
            base = None
        if base is not None and base not in inputs:
            self.problems.add(where, f"expected the base {base} among them")
        number = f"{fewest} model{'s' if fewest > 1 else ''}{' besides the base' if base else ''}"
        number = number if most == fewest else f"at least {number}"
        got = len(inputs.keys() - {base})
        self.expect(fewest <= got <= (most or got), where, f"{number} for {name}", got)
        if inputs.keys() != slices[0].inputs.keys() and not self.method.slices_may_differ:
            self.problems.add(
                where, f"expected the same models in every slice for {name}, which counts them"
            )

    # ---- parameters and options -----------------------------------------------------------------

    def parameters(self, where: str, found: Any, of_model: bool = False) -> Settings:
        settings: dict[str, Sequence[Case]] = {}
        if self.method is None or not self.expect(
            isinstance(found, Mapping), where, "a mapping", _kind(found)
        ):
            return settings
        for key, setting in found.items():
            place, parameter = f"{where}.{key}", self.method.parameter(key)
            if parameter is None:
                others = [m.name for m in METHODS.values() if m.parameter(key)]
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
                settings[key] = tuple(self.cases(place, setting, parameter))
        return settings

    def parameters_of_model(self, where: str, found: Any) -> Settings:
        return self.parameters(where, found, of_model=True)

    def cases(self, where: str, found: Any, parameter: Parameter) -> Iterator[Case]:
        """Read a value, a list of values, or filters with either."""
        items = found if isinstance(found, list) else [found]
        if not any(isinstance(item, Mapping) for item in items):
            yield "", self.values(where, items, parameter)
            return
        shape = {"filter": _Reader.text, "value": partial(_Reader.values, parameter=parameter)}
        for i, item in enumerate(items):
            place = f"{where}[{i}]"
            holds = isinstance(item, Mapping) and "value" in item
            if self.expect(holds, place, "a filter with its value", repr(item)):
                case = self.read(place, item, shape)
                pattern = case.get("filter", "*")
                yield "" if pattern == "*" else pattern, case["value"]

    def values(self, where: str, found: Any, parameter: Parameter) -> tuple[Value, ...]:
        values = []
        for value in found if isinstance(found, list) else [found]:
            try:
                values.append(parameter.convert(value))
            except ValueError as error:
                self.problems.add(where, str(error))
        return tuple(values)

    def text(self, where: str, found: Any) -> str:
        self.expect(isinstance(found, str), where, "text", repr(found))
        return str(found)

    def dtype(self, where: str, found: Any) -> str:
        name = str(found).removeprefix("torch.")
        self.expect(name in _DTYPES, where, f"one of {', '.join(_DTYPES)}", repr(found))
        return name

    def tokenizer(self, where: str, found: Any) -> str:
        return str(found if found in ("union", "base") else self.model(where, found))

    def multiple(self, where: str, found: Any) -> int:
        holds = type(found) is int and found > 0
        self.expect(holds, where, "a positive whole number", repr(found))
        return found if holds else 1

    def chat_template(self, where: str, found: Any) -> str:
        holds = found == "auto" or "{" in str(found)
        why = "gradmerge does not have the templates that come with mergekit"
        self.expect(holds, where, "auto or the text of a template", f"{found!r}: {why}")
        return str(found)


def _kind(found: Any) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"


# What each place may hold: a reader, the keys of a mapping, or a list of such mappings.
_INPUT = {"model": _Reader.model, "parameters": _Reader.parameters_of_model}
_SLICE = {
    "sources": [{**_INPUT, "layer_range": _Reader.layers}],
    "base_model": _Reader.model,
    "parameters": _Reader.parameters,
}
_MODULE = {"models": [_INPUT], "slices": [_SLICE], "parameters": _Reader.parameters}
_FILE = {
    "merge_method": _Reader.merge_method,  # first: it names the parameters
    "base_model": _Reader.model,
    **_MODULE,
    "modules": _Reader.only_module,
    "dtype": _Reader.dtype,
    "out_dtype": _Reader.dtype,
    "tokenizer_source": _Reader.tokenizer,
    "tokenizer": {"source": _Reader.tokenizer, "pad_to_multiple_of": _Reader.multiple},
    "chat_template": _Reader.chat_template,
}
