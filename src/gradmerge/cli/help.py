"""`--help` as one screen of gradmerge's own options, and `gradmerge help COMPONENT`."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from gradmerge.cli.catalogue import (
    Choice,
    Class,
    Field,
    Instance,
    Listing,
    Options,
    Table,
    components,
    described,
    members,
    module,
    named,
    options_within,
    stock_bases,
)
from gradmerge.cli.check import in_words
from gradmerge.cli.options import LEARNING, RECIPE, TASK, fields_of, options_of
from gradmerge.common.errors import nearest
from gradmerge.common.spec import CONCEPTS

_WIDEST = 120
_NAMES = 32
_OUTPUT = "gradmerge.training.callbacks.ExportAtEnd"
_OBJECTIVE = "gradmerge.objectives.objective.Objective"
_KINDS = "gradmerge.training.kinds"
# Options of the trainer that most fits set.
_TRAINER = {
    "max_steps": "Length of the fit in steps. Default: 200.",
    "val_check_interval": "Steps between scores of the selection split.",
    "accelerator": "Device: cpu, gpu or auto.",
    "devices": "Number of processes, or auto.",
    "default_root_dir": "Folder of logs and checkpoints. Default: outputs.",
}
_SYNOPSIS = {
    "fit": ("--config merge.yaml [options]", "Learn the coefficients of a merge."),
    "validate": ("--config merge.yaml --ckpt_path X.ckpt", "Score a fit on the selection split."),
    "test": ("--config merge.yaml --ckpt_path X.ckpt", "Score a fit on the test split."),
    "merge": ("--config static.yaml --output FOLDER [options]", ""),
    "collect": ("--config merge.yaml --output FOLDER [options]", ""),
    "export": ("CHECKPOINT OUTPUT [options]", ""),
    "unpack": ("FOLDER OUTPUT [options]", ""),
    "evaluate": ("FOLDER_OR_CHECKPOINT --tasks NAMES [options]", ""),
    "push": ("FOLDER OWNER/NAME [options]", ""),
    "inspect": ("SOURCE SOURCE... [options]", ""),
}


# ---- one screen ----------------------------------------------------------------------------------


def screen(command: str) -> str:
    """Return the options of a command that are gradmerge's own, one per line."""
    usage, about = _SYNOPSIS[command]
    options = options_of(command)
    about = about or options.doc.partition("\n")[0]
    dotted = "recipe" in options.fields or command in LEARNING
    parts = [f"usage: gradmerge {command} {usage}\n\n{about}"]
    if dotted:
        parts[0] += (
            "\nOptions are keys of a YAML, or flags with dots: --recipe.init Uniform"
            f"{' --data.batch_size 8' if command in LEARNING else ''}.\n"
            "`gradmerge help NAME` explains a component and its options, e.g. `gradmerge help "
            "Column`;\n`--help-all` lists everything, with the options of Lightning's trainer."
        )
    parts += [_section(title, fields) for title, fields in _sections(command, options) if fields]
    return "\n\n".join(parts) + "\n"


def _sections(command: str, options: Options) -> Iterator[tuple[str, Iterable[Field]]]:
    own = fields_of(options)
    groups = ("recipe", "data", "model", "trainer", "search", "driver", "optimizer", "lr_scheduler")
    rest = [field for name, field in own.items() if name not in groups]
    learns = command in LEARNING
    if learns or "recipe" in own:
        place = " (below `model:` in a YAML, or at its top)" if learns else ""
        yield f"recipe{place}", fields_of(described(RECIPE)).values()
    if learns:
        yield "model.objective", fields_of(described(_OBJECTIVE)).values()
        inner = ("recipe", "objective", "allow_modules")
        yield "model", _without(own["model"], inner)
    if "data" in own:
        yield "data", _without(own["data"], ("tasks",))
        yield "data.tasks.NAME", fields_of(described(TASK)).values()
    if command == "fit":
        yield "driver, search and optimiser", [own[name] for name in groups[4:]]
        yield "output (trainer.callbacks: ExportAtEnd)", fields_of(described(_OUTPUT)).values()
        trainer = _group(own["trainer"])
        yield (
            "trainer",
            [Field(name, trainer[name].stated, "null", text) for name, text in _TRAINER.items()],
        )
    elif "search" in own and not learns:
        yield "search", [own["search"]]
    skipped = ("weights_only", "verbose", *(["model_folder"] if command == "fit" else []))
    yield (
        "command" if learns or "recipe" in own else "options",
        [field for field in rest if field.name not in skipped],
    )


def _group(field: Field) -> Mapping[str, Field]:
    found = next(o for o in options_within(field.kind) if isinstance(o, Instance))
    return fields_of(found.of)


def _without(field: Field, names: Iterable[str]) -> list[Field]:
    return [inner for name, inner in _group(field).items() if name not in names]


def _section(title: str, fields: Iterable[Field]) -> str:
    return "\n".join([title, *(line for field in fields for line in _line(field))])


def _line(field: Field) -> Iterator[str]:
    """Yield an option with its default and the first sentence about it."""
    default = "" if field.default is None or field.shown in ("null", "[]", "{}") else field.shown
    left = f"  {field.name}{f' = {default}' if default else ''}"
    words = _first_sentence(field.doc)
    choices = next((o for o in options_within(field.kind) if isinstance(o, Choice)), None)
    room = _width() - _NAMES - 1
    if choices is not None and not all(str(value) in words for value in choices.values):
        words = f"{choices}: {words}"
    if field.default is None:
        words = f"(required) {words}"
    if len(left) >= _NAMES:
        yield left
        left = ""
    if choices is None or len(str(choices)) < room:
        yield f"{left:{_NAMES}} {textwrap.shorten(words, room, placeholder=' ...')}".rstrip()
        return
    for line in textwrap.wrap(f"{choices}", room):
        yield f"{left:{_NAMES}} {line}"
        left = ""


def _first_sentence(doc: str) -> str:
    text = " ".join(doc.split())
    found = re.match(r"(.*?[.;])(?= [A-Z]|$| Default)", text)
    first = (found[1] if found else text).rstrip(";")
    return first[:1].upper() + first[1:]


def _width() -> int:
    return max(72, min(shutil.get_terminal_size().columns, _WIDEST)) - 1


# ---- one component -------------------------------------------------------------------------------


def explain_component(name: str) -> str:
    """Return what a component does, its options and how to write it.

    Args:
        name: name or path of a class, of a group of them (`operators`), or of a kind of data.

    Raises:
        KeyError: there is no such name; the argument is a suggestion.
    """
    if name in CONCEPTS and components()[name]:
        return _overview(name)
    found = named(name) or [kind for kind in _groups() if kind.name == name]
    kinds = [described_kind(name)] if name in _data_kinds() else []
    if not found and not kinds:
        raise KeyError(_suggested(name))
    return "\n\n\n".join([*map(_component, found), *kinds]) + "\n"


def _groups() -> list[Class]:
    return [described(path) for path in (RECIPE, TASK, _OBJECTIVE)]


def _suggested(name: str) -> str:
    every = [kind.name for kinds in components().values() for kind in kinds]
    every += [name for base in stock_bases() for name in members(base)]
    every += [*CONCEPTS, *_data_kinds(), "Recipe"]
    lower = {known.lower(): known for known in every}
    close = nearest(name.lower(), lower)
    return f" Did you mean {lower[close.split(chr(39))[1]]!r}?" if close else ""


def _overview(concept: str) -> str:
    home = module(f"gradmerge.{concept}")
    about = (ast.get_docstring(home.tree) or "") if home is not None else ""
    kinds = [kind for kind in components()[concept] if places_of(kind)]
    lines = [
        f"  {kind.name:{_NAMES - 3}} {_shortened(kind.doc)}"
        for kind in sorted(kinds, key=lambda kind: kind.name)
    ]
    head = about.partition("\n\n")[0]
    return "\n".join([head, "", *lines, "", "`gradmerge help NAME` explains one of them.", ""])


def _shortened(doc: str) -> str:
    return textwrap.shorten(_first_sentence(doc), _width() - _NAMES, placeholder=" ...")


def _component(kind: Class) -> str:
    body = re.split(r"\n(?:Args|Raises|Examples?|Returns|Attributes):\n", kind.doc)[0].rstrip()
    if not kind.home.name.startswith("gradmerge."):
        body = body.partition("\n\n")[0]  # formulas for a browser follow
    fields = list(fields_of(kind).values())
    places = places_of(kind)
    used = f"Used in {', '.join(places)}." if places else ""
    parts = ["\n".join(filter(None, [kind.path, used])), body]
    if fields:
        parts.append("options\n" + "\n".join(line for f in fields for line in _full(f)))
    if places:
        parts.append(f"YAML\n{textwrap.indent(_yaml(kind, places[0]), '  ')}")
    return "\n\n".join(parts)


def _full(field: Field) -> Iterator[str]:
    """Yield an option with its type, its default and all of its description."""
    default = "required" if field.default is None else f"default {field.shown}"
    yield f"  {field.name}: {in_words(field.kind)} ({default})"
    words = textwrap.wrap(" ".join(field.doc.split()), _width() - 6)
    yield from (f"      {line}" for line in words)


def places_of(kind: Class) -> list[str]:
    """Return the options that take a class, as a YAML names them."""
    found = [
        re.sub(r"^model\.(?=recipe\b)", "", path)
        for path, base in _slots()
        if base == kind or (base.is_abstract and kind.derives_from(base))
    ]
    return list(dict.fromkeys(found))


@cache
def _slots() -> list[tuple[str, Class]]:
    """Return the options of `fit` that take components, each with the class of those."""

    def look(at: str, fields: Mapping[str, Field]) -> Iterator[tuple[str, Class]]:
        for name, field in fields.items():
            path = f"{at}.{name}" if at else name
            for option in options_within(field.kind):
                inner = option.inner if isinstance(option, (Listing, Table)) else option
                for part in options_within(inner):
                    if isinstance(part, Instance) and isinstance(part.of, Class):
                        yield path, part.of
                        if not part.of.is_abstract:
                            deeper = f"{path}.NAME" if isinstance(option, Table) else path
                            yield from look(deeper, fields_of(part.of))

    return list(look("", fields_of(options_of("fit"))))


def _yaml(kind: Class, place: str) -> str:
    """Return the lines that put a component at a place, with its options as an example."""
    keys = place.split(".")
    lines = [f"{'  ' * i}{key}:" for i, key in enumerate(keys)]
    given = {f.name: f.shown for f in fields_of(kind).values() if f.default is not None}
    needed = {f.name: "..." for f in fields_of(kind).values() if f.default is None}
    shown = {**needed, **{k: v for k, v in given.items() if not needed and v != "null"}}
    inside = ", ".join(f"{key}: {value}" for key, value in list(shown.items())[:3])
    plain = kind in _groups()
    if plain:
        return "\n".join([*lines, f"{'  ' * len(keys)}{{{inside}}}"])
    spec = f"{{class_path: {_spelled(kind)}{f', init_args: {{{inside}}}' if inside else ''}}}"
    if place.endswith(("preprocess", "finalisers", "terms", "regularisers", "callbacks")):
        return "\n".join([*lines, f"{'  ' * len(keys)}- {spec}"])
    if place.endswith(("sources", "heads")):
        return "\n".join([*lines, f"{'  ' * len(keys)}NAME: {spec}"])
    return "\n".join([*lines[:-1], f"{lines[-1]} {spec}"])


def _spelled(kind: Class) -> str:
    own = any(kind in kinds for name, kinds in components().items() if name != "optimisers")
    return kind.name if own else kind.path


# ---- kinds of data -------------------------------------------------------------------------------


def _data_kinds() -> list[str]:
    kind = described(TASK).fields["kind"].kind
    found = next((o for o in options_within(kind) if isinstance(o, Choice)), Choice(()))
    return [str(value) for value in found.values]


def described_kind(name: str) -> str:
    """Return what the examples of a kind of data are."""
    home = module(_KINDS)
    plain = name.replace("_", "").lower()
    match = next((n for n in home.public if n.lower() == plain), None) if home is not None else None
    place = home.find(match) if home is not None and match is not None else None
    about = Class(*place).doc if place is not None else described(TASK).fields["kind"].doc
    example = f"data:\n  tasks:\n    NAME: {{path: json, data_files: NAME.jsonl, kind: {name}}}"
    fields = "\n".join(line for f in fields_of(described(TASK)).values() for line in _line(f))
    return (
        f"{name}: a kind of task data (data.tasks.NAME.kind)\n\n{about}\n\n"
        f"YAML\n{textwrap.indent(example, '  ')}\n\noptions of a task\n{fields}"
    )
