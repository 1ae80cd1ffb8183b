"""Faults of data."""

from __future__ import annotations

import json
from typing import Any

from damage import Damage, both, cut, damaged_json, fields, folder, options, pipe, remove, write
from fault_runner import Kind
from kinds_sources import FIT

NAN = float("nan")
LABELS = "fit --config classes_fit.yaml"
IMAGES = "fit --config images_fit.yaml"


def _labels(split: str, labels: list[Any]) -> Damage:
    rows = [{"text": f"w{i} w{i + 1}", "label": label} for i, label in enumerate(labels)]
    return write(f"labels-{split}.jsonl", "\n".join(map(json.dumps, rows)))


def _of_labels() -> list[Kind]:
    values: dict[str, list[Any]] = {
        "null": [0, None, 1],
        "nulls": [None, None, None],
        "floats": [0.9, 1.9, 0.5],
        "text": ["no", "yes", "no"],
        "lists": [[0], [1], [2]],
        "huge": [0, 10**12, 1],
        "too-high": [0, 3, 1],
        "negative": [0, -1, 1],
        "nan": [0.0, NAN, 1.0],
        "objects": [{"x": 1}, {"x": 2}, {"x": 0}],
    }
    return [
        Kind(f"data/labels-{name}-{split}", LABELS, _labels(split, labels), "label")
        for name, labels in values.items()
        for split in ("adaptation", "selection", "test")
    ]


def _of_texts() -> list[Kind]:
    file = "a-adaptation.jsonl"
    texts: dict[str, Any] = {
        "empty": "",
        "blank": "\n\n\n",
        "not-json": "w1 w2 w3\nw4",
        "cut-off": '{"text": "w1',
        "a-list": "[1, 2]",
        "html": "<html></html>",
        "other-column": '{"body": "w1 w2"}',
        "null-text": '{"text": null}\n{"text": "w1"}',
        "number-text": '{"text": 5}',
        "empty-texts": '{"text": ""}\n{"text": ""}',
        "list-text": '{"text": ["w1", "w2"]}',
        "mixed-types": '{"text": "w1"}\n{"text": 5}\n{"text": ["x"]}',
        "binary": bytes(range(256)) * 40,
        "deep": "[" * 100_000,
        "utf-16": "text".encode("utf-16"),
        "one-short-text": '{"text": "w1"}',
    }
    kinds = [
        Kind(f"data/text-{n}", FIT, write(file, t), r"task a|a-adapt|data")
        for n, t in texts.items()
    ]
    kinds += [
        Kind("data/file-missing", FIT, remove(file), r"a-adaptation"),
        Kind("data/file-a-folder", FIT, folder(file), r"a-adaptation|task a"),
        Kind("data/file-a-pipe", FIT, pipe(file), r"a-adaptation|task a"),
    ]
    settings: dict[str, tuple[Any, ...]] = {
        "path": (
            "nothing",
            5,
            None,
            "nope/nope",
            "a",
            ["json"],
            "os.system",
            "http://127.0.0.1:9/x",
        ),
        "kind": ("nope", "text_classification", "image_classification", "tensors"),
        "max_length": (0, -1, "x", 10**6, 1.5),
        "limit": ({"adaptation": 0}, {"adaptation": -1}, {"nope": 5}, 5),
        "text": ("body", 5),
        "splits": ({"nope": "train"}, {"adaptation": "nope"}, 5),
        "fractions": ([0.5, 0.5], [2, -1, 0], [NAN, 0.5, 0.5], "x"),
        "data_files": ({}, {"adaptation": "nothing.jsonl"}, 5, {"nope": "a-test.jsonl"}),
        "source": ("nope", 5),
        "nope": (1,),
        "name": ("nope",),
    }
    for key, values in settings.items():
        for value in values:
            change = options("fit.yaml", **{f"data__tasks__a__{key}": value})
            about = rf"{key}|task a|data"
            harmless = (("name", "nope"), ("data_files", {"nope": "a-test.jsonl"}))
            right = (lambda w: True) if (key, value) in harmless else None
            kinds.append(Kind(f"data/{key}-{json.dumps(value)[:30]}", FIT, change, about, right))
    lost = options("fit.yaml", data__tasks__c=_task("a"))
    kinds.append(Kind("data/task-without-source", FIT, lost, right=lambda w: True))
    same = options(
        "fit.yaml",
        data__tasks__a__data_files=dict.fromkeys(
            ("adaptation", "selection", "test"), "a-test.jsonl"
        ),
    )
    kinds.append(Kind("data/splits-overlap", FIT, same, "split|same|overlap|share"))
    long = write(file, json.dumps({"text": "w1 " * 20_000}))
    kinds.append(Kind("data/one-long-text", FIT, long, right=lambda w: True))
    return kinds


def _task(task: str) -> dict[str, Any]:
    files = {s: f"{task}-{s}.jsonl" for s in ("adaptation", "selection", "test")}
    return {"path": "json", "max_length": 8, "data_files": files}


def _of_images() -> list[Kind]:
    kinds = []
    for split in ("adaptation", "test"):
        image = f"images/{split}/1.png"
        damages: dict[str, Damage] = {
            "text": write(image, "not an image"),
            "empty": write(image, b""),
            "cut-off": cut(image, 60),
            "missing": remove(image),
            "a-folder": folder(image),
            "five-classes": write(
                f"images/{split}/metadata.jsonl",
                "\n".join(json.dumps({"file_name": f"{i}.png", "label": i + 2}) for i in range(4)),
            ),
        }
        kinds += [
            Kind(f"data/image-{name}-{split}", IMAGES, damage, r"image|label|1\.png|task")
            for name, damage in damages.items()
        ]
    file = [f"v_{n}/preprocessor_config.json" for n in ("base", "a", "b")]
    for name, change in {
        "mean": {"image_mean": [0.5]},
        "size": {"size": {"height": 16, "width": 16}},
        "type": {"image_processor_type": "Nope"},
        "std-zero": {"image_std": [0, 0, 0]},
    }.items():
        kinds.append(
            Kind(
                f"data/processor-{name}",
                IMAGES,
                fields(file, **change),
                "image|process|size|finite",
            )
        )
    for name, damage in damaged_json("v_base/preprocessor_config.json").items():
        every = both(damage, *(damaged_json(f)[name] for f in file[1:]))
        kinds.append(Kind(f"data/processor-file-{name}", IMAGES, every, "process"))
    return kinds


KINDS = [*_of_labels(), *_of_texts(), *_of_images()]
