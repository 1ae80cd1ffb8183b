"""Classes and functions as their source text describes them, with nothing imported.

Importing a component imports torch, and a part of a trainer Lightning. Help texts and the check of
a configuration need only names, fields, types and docstrings, which the text of a module holds.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import ClassVar

from gradmerge.common.spec import CONCEPTS, current_path

_PACKAGES = ("gradmerge", "torch", "lightning")
_SCALARS = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None)}
_LISTS = ("list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple")
_STOCK = {
    "Optimizer": ("torch.optim", "gradmerge.optimisers"),
    "LRScheduler": ("torch.optim.lr_scheduler", "lightning.pytorch.cli", "gradmerge.optimisers"),
    "Callback": ("lightning.pytorch.callbacks", "gradmerge.training"),
    "Logger": ("lightning.pytorch.loggers",),
}
"""Where the parts of a trainer are, by base class."""
# Arguments that a class of the trainer gets from elsewhere.
_GIVEN = ("self", "params", "optimizer")


# ---- types ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """A text, a number, true or false, or null."""

    kind: type

    def __str__(self) -> str:
        return {type(None): "null", str: "text", bool: "true or false"}.get(
            self.kind, "whole number" if self.kind is int else "number"
        )


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[object, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Listing:
    """A list."""

    inner: Type


@dataclass(frozen=True)
class Table:
    """A mapping from texts."""

    inner: Type


@dataclass(frozen=True)
class Either:
    """One of several types."""

    options: tuple[Type, ...]


@dataclass(frozen=True)
class Instance:
    """A component, by its class or its fields."""

    of: Class | Options


@dataclass(frozen=True)
class Unknown:
    """Anything: a type that the parser knows and this module does not."""


Type = Scalar | Choice | Listing | Table | Either | Instance | Unknown
ANY, _NULL = Unknown(), Scalar(type(None))


# ---- modules -------------------------------------------------------------------------------------


class Module:
    """The top-level names of a source file.

    Args:
        name: dotted name.
        path: the file.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.tree = ast.parse(path.read_bytes())
        self.names: dict[str, ast.AST] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        self.docs: dict[str, ast.expr] = {}
        self._take(self.tree.body)

    def _take(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                self.names[node.name] = node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.names[target.id] = node.value
                    elif isinstance(target, ast.Attribute) and target.attr == "__doc__":
                        self.docs[ast.unparse(target.value)] = node.value
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(node)
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (source, alias.name)
            elif isinstance(node, ast.If):
                self._take([*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                self._take(node.body)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        up = node.level - (self.path.name == "__init__.py")
        return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])

    @property
    def public(self) -> list[str]:
        """Names of `__all__`, or all."""
        listed = self.names.get("__all__")
        if isinstance(listed, ast.List):
            return [e.value for e in listed.elts if isinstance(e, ast.Constant)]  # type: ignore[misc]
        return [*self.names, *self.imported]

    def find(self, name: str, steps: int = 8) -> tuple[Module, ast.AST] | None:
        """Return the definition of a name and the module that has it; imports are followed."""
        if name in self.names:
            return self, self.names[name]
        if name not in self.imported or not steps:
            return None
        source, original = self.imported[name]
        other = module(source)
        return None if other is None else other.find(original, steps - 1)

    def type_of(self, node: ast.AST | None) -> Type:
        """Return the type that an annotation in this module states."""
        match node:
            case ast.Constant(value=None):
                return _NULL
            case ast.Constant(value=str(text)):
                return self.type_of(ast.parse(text, mode="eval").body)
            case ast.Name(id=name) if name in _SCALARS:
                return Scalar(_SCALARS[name])
            case ast.Name(id=name) if name in (*_LISTS, "dict", "Mapping"):
                return Listing(ANY) if name in _LISTS else Table(ANY)
            case ast.Name(id=name):
                found = self.find(name)
                if found is None:
                    return ANY
                if isinstance(found[1], ast.ClassDef):
                    own = found[0].name.startswith("gradmerge.") or name in _STOCK
                    return Instance(Class(*found)) if own else ANY
                return found[0].type_of(found[1])
            case ast.BinOp(op=ast.BitOr()):
                return _either(self.type_of(node.left), self.type_of(node.right))
            case ast.Subscript(value=ast.Name(id=name)):
                inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                return self._generic(name, inner)
        return ANY

    def _generic(self, name: str, inner: list[ast.expr]) -> Type:
        if name == "Literal":
            return Choice(tuple(ast.literal_eval(value) for value in inner))
        kinds = [self.type_of(part) for part in inner]
        if name == "Optional":
            return _either(*kinds, _NULL)
        if name == "Union":
            return _either(*kinds)
        if name in ("dict", "Mapping", "Dict"):
            return Table(kinds[-1])
        return Listing(kinds[0]) if name in _LISTS else ANY


def options_within(kind: Type) -> tuple[Type, ...]:
    """Return the alternatives of a type, or the type itself."""
    return kind.options if isinstance(kind, Either) else (kind,)


def _either(*kinds: Type) -> Type:
    return Either(tuple(option for kind in kinds for option in options_within(kind)))


@cache
def module(name: str) -> Module | None:
    """Return a module of gradmerge, torch or Lightning, or None if it is not found."""
    package, *rest = name.split(".")
    if package not in _PACKAGES:
        return None
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place, *rest)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file() and (rest or file.name == "__init__.py"):
                return Module(name, file)
    return None


# ---- classes and functions -----------------------------------------------------------------------


@dataclass
class Field:
    """An option: a field of a dataclass, or an argument."""

    name: str
    stated: Type | Callable[[], Type]
    """The type, or a function that reads it when it is needed."""
    default: str | None
    """The default as text, or None if a value is required."""
    doc: str

    @cached_property
    def kind(self) -> Type:
        """The type."""
        return self.stated() if callable(self.stated) else self.stated

    @property
    def shown(self) -> str:
        """The default as YAML."""
        text = self.default or ""
        text = {"None": "null", "True": "true", "False": "false", "()": "[]"}.get(text, text)
        text = re.sub(r"^\((.*?),?\)$", r"[\1]", text)
        return re.sub(r"^['\"](.*)['\"]$", r"\1", re.sub(r"^(\w+)\(\)$", r"\1", text))


class Class:
    """A class or function.

    Args:
        home: the module that defines it.
        node: its definition.
    """

    _known: ClassVar[dict[int, Class]] = {}

    def __new__(cls, home: Module, node: ast.AST) -> Class:
        """Return the same object for the same definition, which keeps what it has found."""
        return cls._known.setdefault(id(node), super().__new__(cls))

    def __init__(self, home: Module, node: ast.AST) -> None:
        assert isinstance(node, (ast.ClassDef, ast.FunctionDef))
        self.home, self.node, self.name = home, node, node.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Class) and self.node is other.node

    def __hash__(self) -> int:
        return hash(id(self.node))

    @property
    def doc(self) -> str:
        """The docstring."""
        found = ast.get_docstring(self.node)
        if found is None and self.name in self.home.docs:  # torch assigns some of them
            texts = (n for n in ast.walk(self.home.docs[self.name]) if isinstance(n, ast.Constant))
            found = inspect.cleandoc(next((str(n.value) for n in texts), ""))
        return found or ""

    @property
    def path(self) -> str:
        """The path by which a configuration names it."""
        stock = [name for places in _STOCK.values() for name in places]
        for home in filter(None, map(module, ("gradmerge", *stock))):
            place = home.find(self.name) if self.name in home.public else None
            if place is not None and place[1] is self.node:
                return current_path(f"{home.name}.{self.name}")
        return current_path(f"{self.home.name}.{self.name}")

    @property
    def is_abstract(self) -> bool:
        """True for the classes of a concept, which only their subclasses are instances of."""
        bases = [ast.unparse(base) for base in getattr(self.node, "bases", ())]
        own = self.name.startswith(("Abstract", "_")) or "ABC" in bases
        return own or self.name in _STOCK

    @cached_property
    def lineage(self) -> tuple[list[Class], bool]:
        """The class and its bases, and whether all of them are known."""
        found, known = [self], True
        for base in getattr(self.node, "bases", ()):
            text = ast.unparse(base)
            if text in ("ABC", "object", "Generic", "Protocol"):
                continue
            place = self._locate(base)
            if place is None or not isinstance(place[1], ast.ClassDef):
                known = False
                continue
            inner, whole = Class(*place).lineage
            found += [one for one in inner if one not in found]
            known = known and whole
        return found, known

    def _locate(self, base: ast.expr) -> tuple[Module, ast.AST] | None:
        if isinstance(base, ast.Name):
            return self.home.find(base.id)
        if isinstance(base, ast.Attribute):
            other = module(ast.unparse(base.value))
            return None if other is None else other.find(base.attr)
        return None

    def derives_from(self, base: Class) -> bool | None:
        """Return whether it is a subclass, or None if some of its bases are not known."""
        found, known = self.lineage
        # torch and Lightning define their base classes in several modules
        names = {kind.name for kind in found} & set(_STOCK)
        if base in found or base.name in names:
            return True
        return False if known else None

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Its options by name, in order."""
        if isinstance(self.node, ast.FunctionDef):
            return _arguments(self.home, self.node, self.doc)
        if _is_dataclass(self.node):
            fields: dict[str, Field] = {}
            for kind in reversed(self.lineage[0]):
                if isinstance(kind.node, ast.ClassDef) and _is_dataclass(kind.node):
                    fields.update(_own_fields(kind.home, kind.node))
            return fields
        found = self._constructor
        return {} if found is None else _arguments(found[0].home, found[1], self.doc)

    @property
    def is_open(self) -> bool:
        """True if it takes options that are not listed."""
        if isinstance(self.node, ast.ClassDef) and _is_dataclass(self.node):
            return not self.lineage[1]
        found = (self, self.node) if isinstance(self.node, ast.FunctionDef) else self._constructor
        return found is None or found[1].args.kwarg is not None

    @cached_property
    def _constructor(self) -> tuple[Class, ast.FunctionDef] | None:
        for kind in self.lineage[0]:
            for node in getattr(kind.node, "body", ()):
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    return kind, node
        return None


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(mark).startswith("dataclass") for mark in node.decorator_list)


def _own_fields(home: Module, node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    for at, line in enumerate(node.body):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        default = None if line.value is None else ast.unparse(line.value)
        if isinstance(line.value, ast.Call) and ast.unparse(line.value.func) == "field":
            given = {k.arg: k.value for k in line.value.keywords}
            if "init" in given:
                continue
            default = ast.unparse(given["default"]) if "default" in given else None
            if "default_factory" in given:
                default = _made_by(given["default_factory"], home)
        following = node.body[at + 1] if at + 1 < len(node.body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = inspect.cleandoc(str(following.value.value))
        if not line.target.id.startswith("_") and "ClassVar" not in ast.unparse(line.annotation):
            kind = partial(home.type_of, line.annotation)
            yield line.target.id, Field(line.target.id, kind, default, text)


def _made_by(factory: ast.expr, home: Module) -> str:
    """Return the text of the default that a function makes."""
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    made = ast.unparse(factory)
    made = home.imported.get(made, ("", made))[1]
    return {"list": "[]", "dict": "{}"}.get(made, f"{made}()")


def _arguments(home: Module, node: ast.FunctionDef, doc: str) -> dict[str, Field]:
    about = arguments_of(doc) or arguments_of(ast.get_docstring(node) or "")
    spec, found = node.args, {}
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    named = zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    for given, default in [*zip(plain, defaults, strict=True), *named]:
        if given.arg not in _GIVEN:
            text = None if default is None else ast.unparse(default)
            kind = partial(home.type_of, given.annotation)
            found[given.arg] = Field(given.arg, kind, text, about.get(given.arg, ""))
    return found


def arguments_of(doc: str) -> dict[str, str]:
    """Return the texts of a docstring's `Args:` section by name."""
    _, _, rest = doc.partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in rest.split("\n"):
        if line and not line.startswith(" "):
            break
        start = re.match(r"    (\*{0,2}\w+)(?: \(.*?\))?: (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
        elif not line.strip():
            name = ""
    return found


@dataclass(frozen=True)
class Options:
    """The options of a command; as a `Class` to whom checks them."""

    name: str
    fields: Mapping[str, Field]
    is_open: bool = False
    is_abstract: bool = False
    doc: str = ""


# ---- look-up -------------------------------------------------------------------------------------


def described(path: str) -> Class:
    """Return a class or function of the packages by its path."""
    where, _, name = path.rpartition(".")
    home = module(where)
    found = None if home is None else home.find(name)
    assert found is not None, path
    return Class(*found)


@cache
def components() -> Mapping[str, list[Class]]:
    """Return the classes of gradmerge that a configuration may name, by namespace."""
    found = {}
    for concept in CONCEPTS:
        home = module(f"gradmerge.{concept}")
        places = [] if home is None else [home.find(name) for name in home.public]
        kinds = [Class(*p) for p in places if p is not None and isinstance(p[1], ast.ClassDef)]
        found[concept] = [kind for kind in kinds if not kind.is_abstract]
    return found


@cache
def members(base: Class) -> Mapping[str, Class]:
    """Return the classes that may stand where a base class is expected, by short name."""
    if base.name in _STOCK:
        homes = filter(None, map(module, _STOCK[base.name]))
        places = [(name, home.find(name)) for home in homes for name in home.public]
        kinds = [Class(*p) for _, p in places if p is not None and isinstance(p[1], ast.ClassDef)]
        return {k.name: k for k in kinds if k.derives_from(base) and not _is_base(k)}
    whole = [kind for kinds in components().values() for kind in kinds]
    return {kind.name: kind for kind in whole if kind.derives_from(base)}


def _is_base(kind: Class) -> bool:
    return kind.name.startswith(("_", "Base")) or kind.name in _STOCK or kind.name == "ProgressBar"


def named(name: str) -> list[Class]:
    """Return the classes with a short name or path: components, then parts of a trainer."""
    if "." in name:
        where, _, short = current_path(name).rpartition(".")
        home = module(where)
        place = None if home is None else home.find(short)
        return [] if place is None or not isinstance(place[1], ast.ClassDef) else [Class(*place)]
    own = [kind for kinds in components().values() for kind in kinds if kind.name == name]
    if own:
        return own
    return [kinds[name] for kinds in map(members, stock_bases()) if name in kinds]


@cache
def stock_bases() -> tuple[Class, ...]:
    """Return the base classes of optimisers, schedules, callbacks and loggers."""
    return tuple(
        described(path)
        for path in (
            "torch.optim.optimizer.Optimizer",
            "torch.optim.lr_scheduler.LRScheduler",
            "lightning.pytorch.callbacks.callback.Callback",
            "lightning.pytorch.loggers.logger.Logger",
        )
    )
