"""JSON and YAML of strangers: what is ambiguous, too deep, too large or of another kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from gradmerge.common import files
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.common.files import parse_json, read_json, read_yaml, require_bounded

DEEP = 200_000
JSON = {
    "empty": (b"", "expected JSON"),
    "cut off": (b'{"a": [1, 2', "expected JSON"),
    "other text": (b"tensors", "expected JSON"),
    "another encoding": ('{"a": 1}'.encode("utf-16"), "expected JSON"),
    "no encoding": (b'{"a": "\xff"}', "expected JSON"),
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "lists without end": (b"[" * DEEP, "more than 64 levels"),
    "nested lists": (b"[" * 100 + b"]" * 100, "more than 64 levels"),
    "nested objects": (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 64 levels"),
    "deep beside wide": (b"[1, 2, {}," + b"[[0]," * 70 + b"0" + b"]" * 71, "more than 64 levels"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "a number of 200 digits": (b'{"a": -' + b"9" * 200 + b"}", "a number of 201 digits"),
    "one key, two values": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
    "one key deep inside": (b'{"a": [{"b": {"c": 1, "c": "1"}}]}', "the key 'c' twice"),
    "half a pair": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
    "a list": (b"[1]", "expected a JSON object, got list"),
    "a number": (b"1", "expected a JSON object, got int"),
    "null": (b"null", "expected a JSON object, got NoneType"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_refused(name, tmp_path):
    content, message = JSON[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=rf"config\.json: .*{message}"):
        read_json(path)
    with pytest.raises(ConfigError, match=message):
        read_json(path, ConfigError)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"a": [1, 2.5, None, True, "x"], "é": {"b": {}}},
        {"a": float("inf")},  # time_step_limit of Mamba2's configs
        {"a": 10**99, "b": -(10**98)},
        {"smile": "\U0001f600", "half": "\\ud800"},
        {str(i): i for i in range(10_000)},
    ],
)
def test_json_that_is_read(found, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found))
    assert read_json(path) == found


def test_a_key_that_says_the_same_twice_is_no_harm():
    assert parse_json('{"a": [1], "a": [1]}', "x") == {"a": [1]}
    assert parse_json('{"a": 1, "a": 2}', "x", plain=True) == {"a": 2}
    for text in ("[" * 200_000, "9" * 5000, '"\\ud800"'):
        with pytest.raises(SourceError, match="x: expected JSON, got"):
            parse_json(text, "x", plain=True)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"folder\.json: cannot be read: Is a directory"):
        read_yaml(tmp_path / "folder.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(5 << 30)  # of holes alone
    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    with pytest.raises(SourceError, match=r"huge\.json: expected at most 1 MiB"):
        read_json(tmp_path / "huge.json")


def bomb(levels, width=10):
    lines = ["a0: &a0 [x, x, x]"]
    for i in range(levels):
        lines.append(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * width)}]")
    return "\n".join(lines)


YAML = {
    "laughs": (bomb(9), "more than 1000000 values"),
    "deep flow": ("[" * DEEP, "more than 64 levels"),
    "deep mappings": ("{a: " * 100 + "1" + "}" * 100, "more than 64 levels"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(100)), "more than 64 levels"),
    "itself": ("a: &x [1, *x]", r"the alias \*x within what it stands for"),
    "itself as a mapping": ("a: &x {b: {c: *x}}", r"the alias \*x within"),
    "an unknown alias": ("a: *x", "undefined alias"),
    "twice": ("a: 1\nb: 2\na: 3\n", "the key 'a' twice"),
    "twice inside": ("a: [{b: {c: 1, c: 1}}]", "the key 'c' twice"),
    "twice, once quoted": ("a: 1\n'a': 1\n", "the key 'a' twice"),
    "twice after nested": ("a: {b: 1}\nc: [a, a]\na: 2\n", "the key 'a' twice"),
    "a date": ("a: 2020-13-45", "month must be in"),
    "digits": ("a: " + "9" * 5000, "digits"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a control character": ("a: \x00", "expected YAML"),
    "half": ("a: [1", "expected YAML"),
    "two documents": ("a: 1\n---\nb: 1\n", "expected a single document"),
    "a list as a key": ("? [1]\n: 2\n", "unhashable key"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_refused(name, tmp_path):
    content, message = YAML[name]
    path = tmp_path / "merge.yaml"
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=rf"(?s)merge\.yaml: expected YAML, got: .*{message}|{message}"
    ):
        read_yaml(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "a: &x {b: 1, c: [2, 3]}\nd: *x\ne: {<<: *x, b: 2}\nf: {<<: *x, g: *x}",
        "[{a: 1}, {a: 2}]",
        "a: {b: {a: {b: 1}}}",
        "? a\n: 1\n? b\n: [a, b, a]\n",
        "1: a\n2: b\n",
        bomb(3),
    ],
)
def test_yaml_that_is_read(text, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    require_bounded(text)
    assert read_yaml(path) == yaml.safe_load(text)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_not_taken_for_a_missing_one(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(SourceError, match=r"config\.json: expected a file, got a folder, a pipe"):
        read_json(tmp_path / "config.json")
