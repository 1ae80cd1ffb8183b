"""Names that become parts of paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmerge import MergeDataModule, MergedModel, Recipe, TaskData
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.common.names import LONGEST, is_name, named, require_file, require_names
from gradmerge.export.emr import export_tasks
from gradmerge.export.folder import export_merged

GOOD = ["a", "A-b_c", "cola", "llama-3.2-1b", "my model (v2)", "x..y", "日本", "a" * LONGEST]
BAD = [
    "",
    ".",
    "..",
    "...",
    ".a",
    " a",
    "a ",
    "a.",
    "a/b",
    "/a",
    "../a",
    "a/../b",
    "..\\a",
    "a\\b",
    "C:",
    "C:\\a",
    "a:b",
    "a*",
    "a?",
    'a"',
    "a<b",
    "a|b",
    "a\0",
    "a\nb",
    "a\tb",
    "\x1b[31m",
    "a\u202eb",
    "\ud800",
    "NUL",
    "con.txt",
    "com1",
    "a" * (LONGEST + 1),
    "é" * LONGEST,
    "a/" * 500,
    None,
    1,
    ("a",),
    b"a",
]


def test_names_of_one_part():
    assert [name for name in GOOD if not is_name(name)] == []
    assert [name for name in BAD if is_name(name)] == []
    require_names("tasks", GOOD)
    with pytest.raises(ConfigError, match=r"tasks: expected a name of at most .*'\.\./a', 'a/b'"):
        require_names("tasks", ["ok", "../a", "a/b"])


@pytest.mark.parametrize("name", [n for n in BAD if isinstance(n, str)])
def test_nothing_that_names_a_folder_takes_them(name, tmp_path):
    layer = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="sources: expected a name"):
        Recipe({name: layer, "b": layer})
    with pytest.raises(ConfigError, match="heads: expected a name"):
        Recipe({"b": layer}, heads={name: layer})
    with pytest.raises(ConfigError, match=r"data\.tasks: expected a name"):
        MergeDataModule({name: TaskData("json")})
    merged = MergedModel(Recipe({"a": layer, "b": layer}))
    merged.tasks = {name: "a"}
    for write in (
        lambda: export_merged(merged, tmp_path / "out" / "x"),
        lambda: export_tasks({name: merged.plan.reference}, tmp_path / "out" / "x"),
    ):
        with pytest.raises(ConfigError, match="tasks: expected a name"):
            write()
    assert not list(tmp_path.iterdir())


def test_sources_without_names_get_valid_ones():
    found = named(
        ["models/a", "models/.hidden", "x/" + "n" * 300, "b?.safetensors", "c.safetensors"]
    )
    assert list(found) == ["a", "source1", "source2", "source3", "c"]
    assert list(named([nn.Linear(1, 1), torch.nn.Linear(1, 1)])) == ["source0", "source1"]


def test_files_stay_in_their_folder():
    assert require_file("index", "model-1.safetensors", SourceError) == "model-1.safetensors"
    assert require_file("index", "part/model-1.safetensors", SourceError)
    for file in (*BAD[:-4], "a//b", "a/./b", "a/../../b", "//a", 1, None, ["a"], {}):
        if file == "a/b":
            continue
        with pytest.raises(SourceError, match="index: expected names of files in its own folder"):
            require_file("index", file, SourceError)
