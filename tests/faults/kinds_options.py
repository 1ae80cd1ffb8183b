"""Faults of what users write: options, YAML files, names, patterns and output folders."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from typing import Any

from damage import BOMB, DEEP, HANG, both, fields, folder, link, options, remove, write
from fault_runner import Kind
from kinds_sources import FIT, MERGE, loads

NAN, INF = float("nan"), float("inf")
LINE = "{base: base, sources: {a: a, b: b}, init: Uniform}"
NINES = "9" * 5000

# ---- numbers ------------------------------------------------------------------------------------


def _component(place: str, name: str, key: str, /, *values: Any, **more: Any) -> list[Kind]:
    """Return a kind for each bad value of an option of a component."""
    found = []
    for value in values:
        given: Any = {"class_path": name, "init_args": {key: value, **more}}
        about = rf"{key}|{name}"
        label = f"option/{name}.{key}-{json.dumps(value)}"
        if place.startswith("recipe__"):
            if place.endswith(("preprocess", "finalisers")):
                given = [given]
            found.append(Kind(label, MERGE, options("merge.yaml", **{place: given}), about))
        else:
            if place.endswith("terms"):
                given = [given]
            found.append(Kind(label, FIT, options("fit.yaml", **{place: given}), about))
    return found


_PLACES = {
    "preprocess": "recipe__preprocess",
    "operators": "recipe__operator",
    "finalisers": "recipe__finalisers",
    "search": "search",
    "drivers": "driver",
}


def _place(concept: str, kind: type) -> str | None:
    """Return where a configuration has components of this kind."""
    if concept == "coefficients":
        init = any(base.__name__ == "AbstractInit" for base in kind.__mro__)
        return "recipe__init" if init else "recipe__coefficients"
    if concept == "objectives":
        abstract = [b.__name__ for b in kind.__mro__ if b.__name__.startswith("Abstract")]
        if "AbstractTerm" in abstract:
            return "model__objective__terms"
        return None
    return _PLACES[concept]


def _every_number() -> list[Kind]:
    """Return kinds for every option of every component that is a number."""
    kinds = []
    for concept in (*_PLACES, "coefficients", "objectives"):
        namespace = importlib.import_module(f"gradmerge.{concept}")
        for name in namespace.__all__:
            kind = getattr(namespace, name)
            if not dataclasses.is_dataclass(kind) or inspect.isabstract(kind):
                continue
            place = _place(concept, kind)
            required = {
                f.name: _example(str(f.type))
                for f in dataclasses.fields(kind)
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            }
            for option in dataclasses.fields(kind):
                if place is None or not re.search("float|Setting", str(option.type)):
                    continue
                listed = re.match("list|tuple", str(option.type))
                values = ([NAN], ["x"]) if listed else (NAN, INF, "x")
                others = {key: value for key, value in required.items() if key != option.name}
                kinds += _component(place, name, option.name, *values, **others)
    return kinds


def _example(kind: str) -> Any:
    """Return a value for a required option."""
    return "Tensor" if "Coefficients" in kind else 1.0 if "float" in kind else "x"


def _components() -> list[Kind]:
    init, steps, granularity = "recipe__init", "recipe__preprocess", "recipe__coefficients"
    return [
        *_component(init, "Constant", "value", None, [0.1], [0.1, NAN], {"(": 1.0}, {HANG: 1.0}),
        *_component(init, "Mixup", "seed", "x", NAN, 1.5, None),
        *_component(init, "FromFile", "path", "nothing", "a/model.safetensors", "base", 5),
        *_component(steps, "Trim", "density", None, -0.1, 1.5, {"nothing": 0.5}),
        *_component(steps, "RandomDrop", "density", None, -1, 2),
        *_component(steps, "RandomDrop", "seed", "x", NAN),
        *_component(steps, "TSVM", "rank", 5, "x", None),
        *_component(steps, "NoSuchStep", "x", 1),
        *_component("recipe__operator", "NoSuchOperator", "x", 1),
        *_component("recipe__operator", "ModelStock", "x", 1),
        *_component(granularity, "NoSuchGranularity", "x", 1),
        *_component(granularity, "Group", "patterns", ["("], 5, ["nothing_at_all"], [HANG]),
        *_component("recipe__finalisers", "NoSuchFinaliser", "x", 1),
        *_every_number(),
    ]


def _numbers_of_fits() -> list[Kind]:
    wrong: dict[str, tuple[Any, ...]] = {
        "optimizer__init_args__lr": (NAN, INF, -1, "x", None),
        "optimizer__init_args__betas": ([NAN, 0.9], "x", [0.9]),
        "optimizer__class_path": ("torch.optim.Adamm", "os.system", "nope", 5),
        "seed_everything": (-5, 2**70, "x"),
        "trainer__max_steps": (-5, "x", 1.5, NAN),
        "trainer__max_epochs": (-5, "x"),
        "trainer__devices": (0, -2, "x", 99),
        "trainer__accelerator": ("gpu", "nope", 5),
        "trainer__strategy": ("nope",),
        "trainer__precision": ("17", 5),
        "trainer__gradient_clip_val": (NAN, -1, "x"),
        "trainer__gradient_clip_algorithm": ("nope",),
        "trainer__accumulate_grad_batches": (0, -1, "x"),
        "trainer__val_check_interval": (10_000, -1, "x"),
        "trainer__limit_train_batches": (-1, 0, "x"),
        "trainer__log_every_n_steps": (-1, "x"),
        "trainer__callbacks": (["nope"], 5, ["os.system"], [{"class_path": "ExportAtEnd"}]),
        "trainer__logger": ("nope", 5),
        "trainer__nope": (1,),
        "trainer__max_time": ("x", -1),
        "data__batch_size": (0, -1, "x", 1.5, None),
        "data__eval_batch_size": (0, -1, "x"),
        "data__num_workers": (-1, "x"),
        "data__nope": (1,),
        "model__nope": (1,),
        "model__objective__terms": ([], ["Nope"], 5),
        "model__activation_checkpointing": ("x",),
        "driver": ("Nope", "os.system"),
        "search": ("Nope", {"class_path": "Scales", "init_args": {"values": []}}),
    }
    kinds = []
    for key, values in wrong.items():
        for value in values:
            field = key.split("__")[-1]
            about = rf"{field}|{key.split('__')[0]}|component|Scales|ExportAtEnd"
            # no terms: the default one
            right = (lambda w: True) if value == [] else None
            name = f"fit-option/{key.replace('__', '.')}-{json.dumps(value)[:40]}"
            kinds.append(Kind(name, FIT, options("fit.yaml", **{key: value}), about, right))
    monitor = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    kinds += [
        Kind(
            f"fit-option/monitor-{callback['class_path'].split('.')[-1]}",
            FIT,
            options(
                "fit.yaml",
                trainer__callbacks=[{**callback, "init_args": {"monitor": "nope"}}],
                trainer__max_steps=20,
            ),
            "monitor|nope",
        )
        for callback in (monitor, keeper)
    ]
    return kinds


# ---- the recipe ---------------------------------------------------------------------------------


def _recipes() -> list[Kind]:
    wrong: dict[str, tuple[Any, ...]] = {
        "base": ("nothing", "./nothing", "x/y/z", 5, "", "base/", "~nobody/x", "C:\\models\\a"),
        "sources": ({}, [], 5, {"a": "nothing"}, {"a": None}, {"a": 5}, {"a": ["a"]}, "a"),
        "origin": ("nope", 5),
        "private": (["^lm_haed"], ["("], 5, [5], [HANG], ["."]),
        "frozen": (
            {"embed_tokns": "origin"},
            {"(": 0},
            {"norm": "nope"},
            {"norm": NAN},
            {"norm": INF},
            {".": 0.5},
            {HANG: 0.5},
            5,
        ),
        "allow": (["nope"], ["missing"], 5),
        "unused": ("nope",),
        "buffers": ("nope",),
        "tokenizer": ({"source": "nope"}, {"nope": 1}, 5),
        "trust_remote_code": ("x",),
        "nope": (1,),
        "statistics": ("nothing",),
        "heads": ({"a": "a"}, {"c": "nothing"}, 5),
        "alignment": ("Nope", "WeightMatching"),
    }
    kinds = []
    for key, values in wrong.items():
        for value in values:
            change = options("merge.yaml", **{f"recipe__{key}": value})
            name = f"recipe/{key}-{json.dumps(value)[:40]}"
            right = (
                loads if (key, value) in (("base", "base/"), ("statistics", "nothing")) else None
            )
            part = re.escape(str(value)[-12:-2]) or "x"
            about = rf"{key}|{part}|nothing|nobody|Vocabulary: Option 'nope'"
            kinds.append(Kind(name, MERGE, change, about, right))
    for name in ("..", ".", "", "a/b", "../x", "/abs", "a\\b", "x" * 300, "a\0b", "a\nb", "base"):
        change = options("merge.yaml", recipe__sources={name: "a", "b": "b"})
        kinds.append(Kind(f"name/source-{name[:10]!r}", MERGE, change, "source|name"))
    for name in ("..", "", "a/b", "../../x", "/abs", "a\\b", "x" * 300, "a\0b"):
        one = {**_task(), "source": "a"}
        change = options("heads.yaml", data__tasks={name: one, "b": _task("b")})
        command = "fit --config heads.yaml --trainer.max_steps 1"
        kinds.append(Kind(f"name/task-{name[:10]!r}", command, change, "task|name"))
    for source in (
        "nope/nope",
        "nope",
        "http://127.0.0.1:9/x",
        "s3://bucket/x",
        "file:///nowhere/x",
        "nope/nope@main",
        "a@main",
        "a.safetensors",
        "a.gguf",
        "base/config.json",
    ):
        change = options("merge.yaml", recipe__sources={"a": source, "b": "b"})
        about = source.split("@")[0].split("/")[-1].replace(".", r"\.")
        kinds.append(Kind(f"name/path-{source[:20]}", MERGE, change, about))
    return kinds


def _task(task: str = "a") -> dict[str, Any]:
    files = {s: f"{task}-{s}.jsonl" for s in ("adaptation", "selection", "test")}
    return {"path": "json", "max_length": 8, "data_files": files}


# ---- YAML files ---------------------------------------------------------------------------------


def _yamls() -> list[Kind]:
    file = "merge.yaml"
    touch = "touch ../PWNED"
    content = {
        "empty": "",
        "a-list": "[1, 2]",
        "a-word": "merge",
        "a-number": "7",
        "binary": bytes(range(256)) * 4,
        "deep": DEEP,
        "anchors": BOMB,
        "tabs": "recipe:\n\tbase: base\n",
        "open-quote": 'recipe: {base: "base}\n',
        "key-twice": f"recipe: {LINE}\nrecipe: {{base: a}}\n",
        "inner-key-twice": "recipe: {base: base, base: a, sources: {a: a, b: b}, init: Uniform}\n",
        "source-twice": "recipe: {base: base, sources: {a: a, a: b}, init: Uniform}\n",
        "python-object": f"recipe: !!python/object/apply:os.system ['{touch}']\n",
        "python-name": "recipe: !!python/name:os.system\n",
        "unknown-tag": "recipe: !nope {base: base}\n",
        "two-documents": "recipe: {base: base}\n---\nrecipe: {base: a}\n",
        "number-keys": "5: {base: base}\n",
        "unknown-section": "recipes: {base: base}\n",
        "recursive": "recipe: &r {base: base, sources: *r}\n",
        "long-number": f"recipe: {{base: base, sources: {{a: a}}, frozen: {{n: {NINES}}}}}\n",
    }
    kinds = [
        Kind(f"yaml/{name}", MERGE, write(file, text), r"yaml|recipe|config|key|sources|expected")
        for name, text in content.items()
    ]
    kinds += [
        Kind(
            f"yaml/{name}-fit", FIT, write("fit.yaml", text), r"yaml|recipe|config|key|sources|data"
        )
        for name, text in content.items()
    ]
    kinds += [
        Kind("yaml/missing", MERGE, remove(file), r"merge\.yaml"),
        Kind("yaml/a-folder", MERGE, folder(file), r"merge\.yaml"),
        Kind(
            "yaml/utf-16",
            MERGE,
            lambda w: (w / file).write_bytes((w / file).read_text().encode("utf-16-be")),
            r"yaml|utf",
        ),
        Kind("yaml/link-to-itself", MERGE, link(file, file), r"merge\.yaml"),
        Kind("yaml/url", "merge --config http://127.0.0.1:9/x.yaml --output out", None, "http"),
    ]
    return kinds


def _callables() -> list[Kind]:
    """Return classes and functions that a YAML names where it must not."""
    call = {"class_path": "os.system", "init_args": {"command": "touch ../PWNED"}}
    started = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "../PWNED"]}}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    kinds = []
    for name, value in (("os.system", call), ("Popen", started)):
        places: dict[str, Any] = {
            "data__tasks__a__path": value,
            "data__tasks__a__data_files": value,
            "data__tasks": value,
            "data__processor": value,
            "model__recipe__base": value,
            "model__recipe__sources": {"a": value, "b": "b"},
            "model__recipe__init": value,
            "model__recipe__coefficients": value,
            "model__objective": value,
            "optimizer": value,
            "lr_scheduler": value,
            "trainer__callbacks": [value],
            "trainer__logger": value,
            "trainer__strategy": value,
            "trainer__profiler": value,
            "trainer__plugins": [value],
            "driver": value,
            "search": value,
        }
        for place, given in places.items():
            change = options("fit.yaml", **{place: given})
            about = place.split("__")[-1] + "|sources|class|task|config|component"
            kinds.append(Kind(f"code/{name}-in-{place.replace('__', '.')}", FIT, change, about))
        lambdas = {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": value},
        }
        change = options("fit.yaml", lr_scheduler=lambdas, optimizer=adam)
        kinds.append(Kind(f"code/{name}-in-LambdaLR", FIT, change, "lr_|component"))
        callback = {
            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
            "init_args": {"on_fit_start": value},
        }
        change = options("fit.yaml", trainer__callbacks=[callback])
        kinds.append(
            Kind(f"code/{name}-in-LambdaCallback", FIT, change, "callbacks|on_fit_start|component")
        )
    script = "import os\nos.system('touch ../PWNED')\nclass Foreign: pass\n"
    for place in ("optimizer", "trainer__logger", "model__recipe__init", "driver"):
        change = both(
            write("foreign.py", script), options("fit.yaml", **{place: "foreign.Foreign"})
        )
        about = place.split("__")[-1] + "|foreign"
        kinds.append(Kind(f"code/module-in-{place.split('__')[-1]}", FIT, change, about))
    remote = both(
        write("code.py", script),
        write("base/code.py", script),
        fields(
            [f"{n}/config.json" for n in ("base", "a", "b")],
            model_type="foreign",
            auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        ),
    )
    kinds.append(Kind("code/remote-code-fit", FIT, remote, "config|code|model_type"))
    kinds.append(Kind("code/remote-code-merge", MERGE, remote, "config|code", right=lambda w: True))
    return kinds


# ---- outputs ------------------------------------------------------------------------------------


def _outputs() -> list[Kind]:
    merge = "merge --config merge.yaml --output"
    export = "export fit.ckpt"
    force = "--overwrite true"

    def end(output: str, force: bool = False) -> Any:
        given = {"output": output, "overwrite": force}
        callbacks = [{"class_path": "ExportAtEnd", "init_args": given}]
        return options("fit.yaml", trainer__callbacks=callbacks)

    kinds = []
    foreign = both(lambda w: (w / "mine").mkdir(), write("mine/thesis.tex", "years of work"))
    places = {
        "source": "a",
        "base": "base",
        "inside-a-source": "a/out",
        "parent": ".",
        "above": "..",
        "root": "/",
        "home": "~",
        "foreign": "mine",
        "a-file": "merge.yaml",
        "below-a-file": "merge.yaml/out",
        "proc": "/proc/out",
        "dev-null": "/dev/null",
        "long": "x" * 300,
        "nearly-long": "x" * 245,
        "link-to-a-source": "linked",
        "other-spelling": "base/../a",
        "deep": "/".join(["x" * 100] * 60),
    }
    for name, place in places.items():
        damage = both(foreign, link("linked", "a"))
        about = r"output|exists|folder|name|file|writ|source|base|place apart"
        for command, words in (("merge", merge), ("export", export)):
            right = (lambda w: True) if name == "nearly-long" else None
            where = {"changes": ("x" * 245,)} if name == "nearly-long" else {}
            kinds.append(
                Kind(
                    f"output/{name}-{command}",
                    f"{words} '{place}' {force}",
                    damage,
                    about,
                    right,
                    **where,
                )
            )
        kinds.append(
            Kind(
                f"output/{name}-fit",
                FIT,
                both(damage, end(place, True)),
                about,
                (lambda w: True) if name == "nearly-long" else None,
                changes=("x" * 245,) if name == "nearly-long" else (),
            )
        )
    for name, command in {
        "collect": "collect --config fisher.yaml --output",
        "unpack": "unpack compact",
    }.items():
        for place in ("a", "base", ".", "mine", "compact", "merge.yaml/out"):
            if (name, place) != ("collect", "compact"):
                kinds.append(
                    Kind(
                        f"output/{name}-{place}",
                        f"{command} {place} {force}",
                        foreign,
                        "output|exists|folder|file|writ|source|base|place apart",
                    )
                )
    kinds += [
        Kind("output/exists", f"{merge} compact", None, "exists"),
        Kind("output/empty-name", f"{merge} ''", None, "output"),
        Kind(
            "output/nul",
            MERGE,
            options("merge.yaml", output="a\0b"),
            "output|nul|null",
            right=loads,
        ),
        Kind(
            "output/fit-into-a-source",
            FIT,
            options("fit.yaml", trainer__default_root_dir="a/runs"),
            "a/runs: expected a place apart",
        ),
        Kind(
            "output/mergekit-over-config",
            f"merge --config merge.yaml --mergekit true --output merge.yaml {force}",
            None,
            "merge.yaml|output|config",
        ),
        Kind(
            "output/mergekit-over-foreign",
            f"merge --config merge.yaml --mergekit true --output fit.yaml {force}",
            None,
            "fit.yaml|output",
        ),
        Kind("output/dtype", f"{MERGE} --dtype int8", None, "dtype"),
        Kind("output/dtype-unknown", f"{MERGE} --dtype float3", None, "dtype"),
        Kind("output/head-unknown", f"{MERGE} --head nope", None, "head"),
        Kind("output/form-unknown", f"{MERGE} --outputs nope", None, "outputs"),
        Kind("output/not-unified", f"{MERGE} --outputs compact", None, "outputs|Unify"),
    ]
    return kinds


def _commands() -> list[Kind]:
    commands = {
        "unknown": "nope",
        "unknown-option": f"{MERGE} --nope 5",
        "no-config": "merge --output out",
        "no-output": "merge --config merge.yaml",
        "no-sources": "inspect",
        "abbreviated": "merge --conf merge.yaml --output out",
        "extra": "export fit.ckpt out more",
        "no-checkpoint": "export",
        "fit-without-data": "fit --config merge.yaml",
        "merge-of-a-fit-yaml": "merge --config fit.yaml --output out",
        "test-without-data": "test --model a",
        "inspect-one": "inspect nothing",
        "inspect-file": "inspect merge.yaml a",
        "unpack-of-a-model": "unpack a out",
        "unpack-task": "unpack compact out --tasks '[nope]'",
        "collect-without-data": "collect --config merge.yaml --output out",
        "collect-not-needed": "collect --config fit.yaml --output out",
        "test-of-nothing": "test --config fit.yaml --model nothing",
        "test-of-a-file": "test --config fit.yaml --model merge.yaml",
        "validate-with-driver": "validate --config fit.yaml --driver Pairwise",
    }
    right = ("merge-of-a-fit-yaml", "test-of-a-file")
    return [
        Kind(f"command/{name}", words, None, ".", (lambda w: True) if name in right else None)
        for name, words in commands.items()
    ]


KINDS = [
    *_components(),
    *_numbers_of_fits(),
    *_recipes(),
    *_yamls(),
    *_callables(),
    *_outputs(),
    *_commands(),
]
