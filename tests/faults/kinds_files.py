"""Faults of the files that gradmerge writes and reads again, and of mergekit files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import (
    DROP,
    HANG,
    Damage,
    Hostile,
    both,
    checkpoint,
    cut,
    damaged_json,
    entry,
    fields,
    folder,
    options,
    pipe,
    remove,
    tensors,
    write,
)
from fault_runner import Kind
from kinds_sources import FIT

NAN = float("nan")

# ---- checkpoints --------------------------------------------------------------------------------

EXPORT = "export fit.ckpt out"
RESUME = "fit --config fit.yaml --ckpt_path fit.ckpt --trainer.max_steps 3"


def _section(key: str, value: Any) -> Damage:
    def change(content: dict[str, Any], work: Path) -> None:
        if value is DROP:
            del content["gradmerge"][key]
        else:
            content["gradmerge"][key] = value

    return checkpoint("fit.ckpt", change)


def _recipe(**changes: Any) -> Damage:
    def change(content: dict[str, Any], work: Path) -> None:
        content["hyper_parameters"]["recipe"]["init_args"].update(changes)

    return checkpoint("fit.ckpt", change)


def _checkpoints() -> list[Kind]:
    called = {"class_path": "os.system", "init_args": {"command": "touch ../PWNED"}}
    damages: dict[str, Damage] = {
        "missing": remove("fit.ckpt"),
        "empty": write("fit.ckpt", b""),
        "a-folder": folder("fit.ckpt"),
        "garbage": write("fit.ckpt", b"\x80\x02garbage" * 99),
        "cut-off": cut("fit.ckpt", -300),
        "cut-off-early": cut("fit.ckpt", 500),
        "a-pipe": pipe("fit.ckpt"),
        "hostile": checkpoint("fit.ckpt", lambda c, w: {**c, "x": Hostile(w)}),
        "plain-weights": checkpoint("fit.ckpt", lambda c, w: c["state_dict"]),
        "a-list": checkpoint("fit.ckpt", lambda c, w: [1, 2]),
        "other-model": checkpoint(
            "fit.ckpt", lambda c, w: {k: v for k, v in c.items() if k != "gradmerge"}
        ),
        "no-hyper-parameters": checkpoint("fit.ckpt", lambda c, w: c.update(hyper_parameters={})),
        "no-state": checkpoint("fit.ckpt", lambda c, w: c.pop("state_dict") is None or None),
        "empty-state": checkpoint("fit.ckpt", lambda c, w: c.update(state_dict={})),
        "shapes": checkpoint(
            "fit.ckpt",
            lambda c, w: c.update(
                state_dict={
                    k: v[..., :1].repeat(*[1] * (v.dim() - 1), 7)
                    for k, v in c["state_dict"].items()
                }
            ),
        ),
        "nan": checkpoint(
            "fit.ckpt",
            lambda c, w: c.update(state_dict={k: v * NAN for k, v in c["state_dict"].items()}),
        ),
        "more-state": checkpoint(
            "fit.ckpt",
            lambda c, w: c["state_dict"].update(more=c["state_dict"][next(iter(c["state_dict"]))]),
        ),
        "recipe-text": checkpoint(
            "fit.ckpt", lambda c, w: c["hyper_parameters"].update(recipe="x")
        ),
        "recipe-called": checkpoint(
            "fit.ckpt", lambda c, w: c["hyper_parameters"].update(recipe=called)
        ),
        "objective-called": checkpoint(
            "fit.ckpt", lambda c, w: c["hyper_parameters"].update(objective=called)
        ),
        "init-called": _recipe(init=called),
        "source-called": _recipe(sources={"a": called, "b": "b"}),
        "private-hangs": _recipe(private=[HANG]),
        "private-broken": _recipe(private=["("]),
        "source-moved": _recipe(sources={"a": "moved", "b": "b"}),
        "source-text": _recipe(sources="x"),
        "field-unknown": _recipe(nope=1),
        "base-other": _recipe(base="a"),
        "task-elsewhere": _section("tasks", {"../../PWNED": "a", "b": "b"}),
        "task-unknown-source": _section("tasks", {"a": "nope"}),
        "nested": _recipe(frozen={"x": [[[[]]]]}),
        "fixed-unknown": _section("fixed", {"nope": 0.5}),
        "fixed-nan": _section("fixed", {"model.norm.weight": NAN}),
        "results-text": _section("results", "x"),
        "buffers-unknown": _section("buffers", {"nope": 5}),
    }
    for key in (
        "tasks",
        "fingerprints",
        "fixed",
        "buffers",
        "sources",
        "results",
        "checked_unused",
    ):
        for label, value in (("gone", DROP), ("null", None), ("number", 5), ("list", [1])):
            damages[f"{key}-{label}"] = _section(key, value)
    about = r"ckpt|checkpoint|recipe|sources|moved|trained on"
    kinds = []
    accepted = ("results-text", "sources-gone", "results-gone", "checked_unused-gone")
    for name, damage in damages.items():
        right = (
            (lambda w: True)
            if name in accepted or name.startswith(("sources-", "checked_unused-"))
            else None
        )
        kinds.append(
            Kind(
                f"checkpoint/{name}-export", EXPORT, damage, about + "|" + name.split("-")[0], right
            )
        )
        if name not in ("source-moved", "field-unknown", "base-other") and not name.startswith(
            ("init-", "source-", "recipe-", "private-", "objective-", "nested", "no-hyper")
        ):  # a resumed fit takes these from the user's own configuration
            kinds.append(
                Kind(
                    f"checkpoint/{name}-resume",
                    RESUME,
                    damage,
                    about + "|" + name.split("-")[0],
                    right,
                )
            )
    trusting = both(
        _recipe(trust_remote_code=True),
        *(
            both(
                write(f"{n}/code.py", "import os\nos.system('touch ../PWNED')\n"),
                fields(
                    f"{n}/config.json",
                    model_type="foreign",
                    auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
                ),
            )
            for n in ("base", "a", "b")
        ),
    )
    kinds.append(Kind("checkpoint/trusts-itself", EXPORT, trusting, "trust|code|config|trained on"))
    for address in (
        "http://127.0.0.1:9/x.ckpt",
        "https://127.0.0.1:9/x.ckpt",
        "s3://b/x.ckpt",
        "file://fit.ckpt",
        "ftp://127.0.0.1/x",
        "nothing.ckpt",
        "last",
        "hpc",
        "best",
        "",
        "a",
        "fit.yaml",
        "x" * 300,
    ):
        command = f"fit --config fit.yaml --ckpt_path '{address}'"
        about = r"ckpt_path|checkpoint|x\.ckpt|no such|expected"
        right = (lambda w: True) if address == "file://fit.ckpt" else None
        kinds.append(Kind(f"checkpoint/address-{address[:20]}", command, None, about, right))
    hostile = checkpoint("fit.ckpt", lambda c, w: {**c, "x": Hostile(w)})
    for word in ("validate", "test"):
        command = f"{word} --config fit.yaml --ckpt_path fit.ckpt"
        kinds.append(Kind(f"checkpoint/hostile-{word}", command, hostile, "checkpoint|fit.ckpt"))
    url = both(hostile, lambda w: options("fit.yaml", ckpt_path=f"file://{w}/fit.ckpt")(w))
    kinds.append(Kind("checkpoint/hostile-url", FIT, url, "ckpt"))
    private = checkpoint(
        "heads.ckpt", lambda c, w: c["gradmerge"].update(tasks={"../../../PWNED": "a", "b": "b"})
    )
    kinds.append(Kind("checkpoint/head-elsewhere", "export heads.ckpt out", private, "task|name"))
    return kinds


# ---- side files ---------------------------------------------------------------------------------

STATISTICS = "merge --config fisher_merge.yaml --output out"
UNPACK = "unpack compact out"


def _json_fields(file: str, area: str, command: str, keys: list[str], about: str) -> list[Kind]:
    kinds = []
    for key in keys:
        for label, value in (
            ("gone", DROP),
            ("null", None),
            ("number", 5),
            ("text", "x"),
            ("list", [1]),
        ):
            damage = fields(file, **{key: value})
            kinds.append(Kind(f"{area}/{key}-{label}", command, damage, about))
    return kinds


def _of_stem(stem: str, make: Callable[[str], Damage]) -> Damage:
    """Damage the file with this stem, whose suffix has changed between versions."""

    def damage(work: Path) -> None:
        (found,) = (path for path in (work / stem).parent.glob(f"{Path(stem).name}.*"))
        make(str(found.relative_to(work)))(work)

    return damage


def _side_files() -> list[Kind]:
    about = "statistics"
    kinds = [
        Kind(f"statistics/file-{n}", STATISTICS, d, about)
        for n, d in damaged_json("statistics/statistics.json").items()
    ]
    kinds += _json_fields(
        "statistics/statistics.json", "statistics", STATISTICS, ["version", "collected"], about
    )
    kinds += [
        Kind("statistics/folder-missing", STATISTICS, remove("statistics"), about),
        Kind(
            "statistics/other-weights",
            STATISTICS,
            entry("a/model.safetensors", "model.norm.weight", 0.25),
            "statistics|weights",
        ),
    ]

    def every(change: Any) -> Damage:
        return lambda work: [
            change(str(f.relative_to(work)))(work)
            for f in sorted((work / "statistics").rglob("*.safetensors"))
        ]

    for name, change in {
        "cut-off": lambda f: cut(f, -16),
        "missing": remove,
        "empty": lambda f: write(f, b""),
        "nan": lambda f: tensors(
            f, lambda s: {k: v * NAN if v.is_floating_point() else v for k, v in s.items()}
        ),
        "flat": lambda f: tensors(f, lambda s: {k: v.reshape(-1)[:1] for k, v in s.items()}),
        "no-tensors": lambda f: tensors(f, lambda s: {"x": next(iter(s.values()))}),
    }.items():
        kinds.append(Kind(f"statistics/tensors-{name}", STATISTICS, every(change), about))
    about = "emr|compact"
    kinds += [
        Kind(f"compact/file-{n}", UNPACK, d, about)
        for n, d in damaged_json("compact/emr.json").items()
    ]
    kinds += _json_fields(
        "compact/emr.json", "compact", UNPACK, ["format", "base", "scales"], about
    )
    for label, value in {
        "elsewhere": {"../../PWNED": 0.5},
        "words": {"a": "x"},
        "nan": {"a": NAN},
        "unknown": {"nope": 1.0},
        "empty": {},
    }.items():
        kinds.append(
            Kind(
                f"compact/scales-{label}",
                UNPACK,
                fields("compact/emr.json", scales=value),
                about + "|nope",
            )
        )
    kinds.append(
        Kind(
            "compact/base-moved",
            UNPACK,
            fields("compact/emr.json", base={"from": "moved"}),
            "moved|emr",
        )
    )
    kinds.append(
        Kind(
            "compact/base-url",
            UNPACK,
            fields("compact/emr.json", base={"from": "http://127.0.0.1:9/x"}),
            "127|emr",
        )
    )
    for stem in ("compact/unified", "compact/tasks/a/masks"):
        name = Path(stem).name
        for label, make in {
            "cut-off": lambda f: cut(f, -8),
            "missing": remove,
            "empty": lambda f: write(f, b""),
            "shape": lambda f: tensors(f, lambda s: {k: v.reshape(-1)[:1] for k, v in s.items()}),
            "no-tensors": lambda f: tensors(f, lambda s: {"x": next(iter(s.values()))}),
        }.items():
            damage = _of_stem(stem, make)
            kinds.append(Kind(f"compact/{name}-{label}", UNPACK, damage, rf"{name}|compact"))
    kinds.append(
        Kind(
            "compact/unified-nan",
            UNPACK,
            _of_stem("compact/unified", lambda f: entry(f, "model.norm.weight", NAN)),
            "unified|finite",
        )
    )
    return kinds


# ---- mergekit files -----------------------------------------------------------------------------


def _mergekit() -> list[Kind]:
    whole = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.5}},
            {"model": "b", "parameters": {"weight": 0.5}},
        ],
        "dtype": "float32",
    }
    changes: dict[str, Any] = {
        "method": {"merge_method": "nope"},
        "method-number": {"merge_method": 5},
        "no-models": {"models": []},
        "models-text": {"models": "a"},
        "model-missing": {"models": [{"model": "nothing"}, {"model": "b"}]},
        "model-number": {"models": [5]},
        "weight-nan": {"models": [{"model": "a", "parameters": {"weight": NAN}}, {"model": "b"}]},
        "weight-text": {"models": [{"model": "a", "parameters": {"weight": "x"}}, {"model": "b"}]},
        "no-weights": {"models": [{"model": "a"}, {"model": "b"}]},
        "dtype": {"dtype": "float3"},
        "unknown-key": {"nope": 5},
        "parameters": {"parameters": 5},
        "tokenizer": {"tokenizer_source": "nope"},
        "base": {"merge_method": "ties", "base_model": "nothing"},
        "no-base": {"merge_method": "ties"},
        "slices": {"slices": 5},
        "both": {"slices": [], "models": [{"model": "a"}]},
        "filter-hangs": {
            "models": [
                {"model": "a", "parameters": {"weight": [{"filter": HANG, "value": 1}, 0.5]}},
                {"model": "b"},
            ]
        },
    }
    kinds = []
    for name, change in changes.items():
        text = json.dumps({**whole, **change}).replace("NaN", ".nan")
        about = (
            "merge_method|model|weight|dtype|key|parameters|tokenizer|base|slices|nope|mk|filter"
            "|nothing"
        )
        kinds.append(
            Kind(
                f"mergekit/{name}",
                "merge --config mk.yaml --output out",
                write("mk.yaml", text),
                about,
            )
        )
    from damage import BOMB, DEEP

    for name, content in {
        "deep": DEEP,
        "anchors": BOMB,
        "empty": "",
        "cut-off": "merge_method: linear\nmodels: [",
        "key-twice": "merge_method: linear\nmerge_method: ties\nmodels: [{model: a}]\n",
        "python": "merge_method: !!python/object/apply:os.system ['touch ../PWNED']\n",
    }.items():
        kinds.append(
            Kind(
                f"mergekit/file-{name}",
                "merge --config mk.yaml --output out",
                write("mk.yaml", content),
                "mk|yaml|merge_method|key|option|recipe",
            )
        )
    fine = write("mk.yaml", json.dumps(whole))
    kinds.append(
        Kind("mergekit/fine", "merge --config mk.yaml --output out", fine, right=lambda w: True)
    )
    return kinds


KINDS = [
    *_checkpoints(),
    *_side_files(),
    *_mergekit(),
]
