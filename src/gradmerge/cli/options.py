"""The options of each command, as the source text of what they configure describes them."""

from __future__ import annotations

from functools import cache

from gradmerge.cli.catalogue import (
    Choice,
    Class,
    Either,
    Field,
    Instance,
    Listing,
    Options,
    Scalar,
    Table,
    Type,
    described,
    stock_bases,
)

LEARNING = ("fit", "validate", "test")
MERGING = ("merge", "collect")
POSITIONAL = {
    "export": ("checkpoint", "output"),
    "unpack": ("folder", "output"),
    "inspect": ("sources",),
    "evaluate": ("path",),
    "push": ("folder", "repo"),
}
"""Options that are given without their names, in this order."""
ABOUT = {
    "driver": "Run several fits instead of one of all sources (Pairwise, Tree, Continual, "
    "LayerWise). Repeat the command to resume an interrupted job.",
    "search": "Choose the initial coefficients of the fit by scores on the selection split "
    "(GreedySoup, Scales, Draws).",
    "model_folder": "validate and test only: score this Hugging Face folder or hub id instead of a "
    "merge. Shorthand: `--model FOLDER`.",
    "sources": "Places of sources that have moved, as NAME=PLACE (repeat it for several; the name "
    "of the base is `base`). Checkpoints are checked against their contents.",
    "allow_modules": "Modules outside gradmerge whose components configurations and checkpoints "
    "may name; importing a module runs its code. Only on the command line, never in a YAML.",
}
"""Help of the options that the command line adds."""
RECIPE, TASK = "gradmerge.engine.recipe.Recipe", "gradmerge.training.examples.TaskData"
_HARNESS = "gradmerge.training.harness.Harness"
_NULL = Scalar(type(None))
# Arguments that a command sets itself, or that only Python has.
_PYTHON = {
    "merge": ("opened", "configs"),
    "output_options": ("form", "inputs"),
    "MergeModule": ("module",),
}


@cache
def options_of(command: str) -> Options:
    """Return the options of a command by name."""
    function = None if command in LEARNING else described(f"gradmerge.cli.commands.{command}")
    fields = dict(_learning(command) if function is None else _function(function))
    config = Field("config", Scalar(str), "null", "YAML file with any of these options.")
    names = Field(
        "allow_modules", Either((Listing(Scalar(str)), _NULL)), "null", ABOUT["allow_modules"]
    )
    # task files of benchmarks can run code, so that no YAML names them
    own = {**({} if command == "evaluate" else {"config": config}), **fields}
    own["allow_modules"] = names
    return Options(command, own, doc="" if function is None else function.doc)


def _learning(command: str) -> dict[str, Field]:
    optimiser, schedule, *_ = stock_bases()
    drivers = "gradmerge.drivers.base.AbstractDriver"
    searches = "gradmerge.search.AbstractSearch"
    text, switch = Either((Scalar(str), _NULL)), Either((Scalar(bool), _NULL))
    stated: dict[str, tuple[Type, str]] = {
        "seed_everything": (Either((Scalar(int), Scalar(bool), _NULL)), "Seed of the fit."),
        "model": (_part("gradmerge.training.module.MergeModule"), "The merge."),
        "data": (_part("gradmerge.training.data.MergeDataModule"), "The tasks."),
        "optimizer": (_or_null(Instance(optimiser)), "Optimiser. Default: Adam."),
        "lr_scheduler": (_or_null(Instance(schedule)), "Schedule of the optimiser, by steps."),
        "driver": (_or_null(_part(drivers)), ABOUT["driver"]),
        "search": (_or_null(_part(searches)), ABOUT["search"]),
        "trainer": (_part("lightning.pytorch.trainer.trainer.Trainer"), "Lightning's Trainer."),
        "ckpt_path": (text, "Checkpoint to resume from or to score: a path, `last` or `best`."),
        "weights_only": (switch, "Always true: checkpoints are never unpickled."),
        "model_folder": (text, ABOUT["model_folder"]),
        "sources": (_or_null(Table(Scalar(str))), ABOUT["sources"]),
    }
    if command != "fit":
        stated["verbose"] = (Scalar(bool), "Print the scores.")
    needed = ("model", "data")
    return {
        name: Field(name, kind, None if name in needed else "null", doc)
        for name, (kind, doc) in stated.items()
    }


def _part(path: str) -> Instance:
    return Instance(described(path))


def _or_null(kind: Type) -> Either:
    return Either((kind, _NULL))


def _function(function: Class) -> dict[str, Field]:
    shared = _HARNESS if function.name == "evaluate" else "gradmerge.cli.commands.output_options"
    own = fields_of(function)
    if function.is_open:  # `**options`
        own.update(fields_of(described(shared)))
    if "data" in own:
        data = own["data"]
        kind = _part("gradmerge.training.data.MergeDataModule")
        own["data"] = Field("data", Either((kind, _NULL)), data.default, data.doc)
    return own


def fields_of(kind: Class | Options) -> dict[str, Field]:
    """Return the options that a configuration may set."""
    skipped = _PYTHON.get(kind.name, ()) if isinstance(kind, Class) else ()
    return {name: field for name, field in kind.fields.items() if name not in skipped}


def kinds_of_data() -> tuple[str, ...]:
    """Return the kinds of task data that a configuration may name."""
    kind = fields_of(described(TASK))["kind"].kind
    assert isinstance(kind, Choice)
    return tuple(map(str, kind.values))
