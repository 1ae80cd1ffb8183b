"""What jobs keep of their data's content, and that they refuse to go on with other data."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import json
import os
import random
import re
import subprocess
import sys

import datasets
import numpy
import pytest
import torch
from PIL import Image
from test_folds import Kill, Pairwise, build, job_of, relatives

from gradmerge import MergeDataModule, TaskData
from gradmerge.drivers import state
from gradmerge.drivers.state import describe_contents
from gradmerge.errors import ConfigError
from tiny import SPLITS, vectors


def described(rows, **options):
    """The line of a split with these rows."""
    path = {"adaptation": rows, "selection": [{"x": 0}], "test": [{"x": 1}]}
    task = TaskData(path, **{"kind": "tensors", **options})
    return describe_contents(MergeDataModule({"t": task}))["t"]["adaptation"]


CHANGES = {
    "label": lambda rows: rows[3].update(labels=torch.tensor(7)),
    "dtype": lambda rows: rows[3].update(x=rows[3]["x"].double()),
    "shape": lambda rows: rows[3].update(x=rows[3]["x"].view(2, 3)),
    "order": lambda rows: rows.reverse(),
    "number": lambda rows: rows.pop(),
    "column": lambda rows: rows[3].update(other=None),
}


def test_a_job_does_not_go_on_with_data_that_changed(tmp_path):
    models = relatives(build(), 3)
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job_of(tmp_path, models, callbacks=[Kill(1, "on_train_batch_start", 2)]))
    message = r"driver holds another job.*examples\.b\.selection: was \"12 examples, sha256 \w+\""
    for change in CHANGES.values():
        data = vectors("ab", check_disjoint=False)
        change(data.tasks["b"].path["selection"])
        with pytest.raises(ConfigError, match=message) as caught:
            Pairwise().run(job_of(tmp_path, models, data))
        assert "examples.a" not in str(caught.value)
    assert Pairwise().run(job_of(tmp_path, models)).is_dir()


def test_files_count_by_what_is_in_them(tmp_path):
    def found(test):
        for name in SPLITS:
            (tmp_path / f"{name}.txt").write_text("a b\nc d" if name != "test" else test)
        files = {name: str(tmp_path / f"{name}.txt") for name in SPLITS}
        return describe_contents(MergeDataModule({"t": TaskData("text", data_files=files)}))["t"]

    first = found("a b\nc d")
    for name in SPLITS:
        os.utime(tmp_path / f"{name}.txt", (0, 0))
    assert found("a b\nc d") == first
    changed = found("a b\nc e")
    assert [name for name in SPLITS if changed[name] != first[name]] == ["test"]


def test_of_many_rows_a_sample_counts(monkeypatch):
    monkeypatch.setattr(state, "ROWS", 8)
    rows = [{"x": i, "text": f"line {i}"} for i in range(100)]
    read = []

    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    line = described(Watched(rows))
    assert line.startswith("100 examples, sha256 of 8 ")
    assert len(set(read)) == 8
    assert described([*rows[:99], {"x": -1}]) == line, "not in the sample"
    assert described([{"x": -1} if i in read else row for i, row in enumerate(rows)]) != line
    monkeypatch.setattr(state, "ROWS", 4096)
    monkeypatch.setattr(state, "BYTES", 100)
    assert described([{"x": torch.zeros(10)}] * 9).startswith("9 examples, sha256 of 3 ")


def test_of_a_large_table_small_columns_count_whole_and_others_by_their_lengths(monkeypatch):
    monkeypatch.setattr(state, "ROWS", 8)
    monkeypatch.setattr(state, "BYTES", 4000)
    monkeypatch.setattr(state, "_CHUNK", 32)
    rows = [
        {"label": i % 7, "text": f"line {i:3}" * 9, "file": {"n": "a" * 50}} for i in range(100)
    ]
    read = random.Random(0).sample(range(100), 8)
    unread = next(i for i in range(100) if i not in read)

    def line(split=lambda table: table, **change):
        one = [{**row, **change} if i == unread else row for i, row in enumerate(rows)]
        return described(split(datasets.Dataset.from_list(one)))

    assert line().startswith("100 examples, sha256 of 8 ")
    other = rows[unread]["text"].replace("l", "m")
    assert line(text=other) == line(), "as long as it was"
    changes = [{"label": 9}, {"text": other[1:]}, {"text": None}, {"file": {"n": "b"}}]
    assert len({line(), *(line(**change) for change in changes)}) == 5

    def shuffled(table):
        return table.shuffle(seed=1)

    assert line(shuffled) != line()
    assert line(shuffled, text="") != line(shuffled)
    assert line(lambda table: table.shuffle(seed=1).flatten_indices()) == line(shuffled)


def test_when_files_were_changed_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "ROWS", 4)
    path = tmp_path / "rows.json"
    rows = [{"x": i, "y": i % 3} for i in range(60)]

    def found():
        path.write_text("\n".join(map(json.dumps, rows)))
        os.utime(path, (len(times), len(times)))
        times.append(0)
        data = TaskData("json", data_files=str(path), kind="tensors")
        data = MergeDataModule({"t": data})
        return describe_contents(data)["t"], data.splits("t")["adaptation"]._fingerprint

    times = []
    (first, mark), (again, other) = found(), found()
    assert mark != other, "`datasets` takes it for another file"
    assert again == first
    assert all("of 4" in line for line in first.values())
    for row in rows:
        row["y"] = 2 - row["y"]
    assert not set(found()[0].values()) & set(first.values())


def test_of_many_files_that_a_table_names_the_sizes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "ROWS", 2)
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for path in paths:
        Image.new("L", (4, 4), 7).save(path)
    unread = next(i for i in range(9) if i not in random.Random(0).sample(range(9), 2))

    def line():
        rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
        return described(rows, kind="image_classification")

    first = line()
    os.utime(paths[unread], (0, 0))
    assert line() == first
    Image.new("L", (64, 64), 7).save(paths[unread])
    assert line() != first


def test_rows_beyond_a_limit_do_not_count():
    rows = [{"x": i} for i in range(10)]
    assert described(rows, limit={"adaptation": 4}) == described(rows[:4])


def test_examples_that_are_drawn_anew_count_by_their_number():
    class Drawn(list):
        def __getitem__(self, index):
            return {"x": torch.rand(3)}

    assert described(Drawn(range(5))) == "5 examples, drawn anew each time"


def test_images_count_by_their_files_undecoded(tmp_path):
    paths = []
    for shade in (0, 255):
        paths.append(str(tmp_path / f"{shade}.png"))
        Image.new("L", (4, 4), shade).save(paths[-1])

    def line(columns):
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        return described(rows, kind="image_classification")

    both = line({"image": paths})
    assert both == line({"image": paths})
    content = io.BytesIO()
    Image.new("L", (4, 4), 7).save(content, "png")
    (tmp_path / "0.png").write_bytes(content.getvalue())
    assert line({"image": paths}) != both


def test_values_of_different_kinds_do_not_run_together():
    values = [1, "1", 1.0, True, b"1", None, [1], ["1"], {"1": 1}, torch.tensor(1), object()]
    assert len({described([{"x": value}]) for value in values}) == len(values)
    part = torch.arange(8)[2:4]
    assert described([{"x": part}]) == described([{"x": part.clone()}])


class Kind(enum.StrEnum):
    A = "a"
    B = "b"


class Word(str):
    __slots__ = ()


@dataclasses.dataclass
class Row:
    x: object
    note: str = ""


def objects(*values):
    """An array of Python objects."""
    array = numpy.empty(len(values), object)
    array[:] = values
    return array


PAIRS = {
    "datetime": [datetime.datetime(2020, 1, 1, second=s) for s in (0, 1)],
    "zone": [
        datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=h)))
        for h in (0, 1)
    ],
    "date": [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)],
    "time": [datetime.time(1), datetime.time(2)],
    "timedelta": [datetime.timedelta(1), datetime.timedelta(2)],
    "decimal": [decimal.Decimal("1.0"), decimal.Decimal("1.00")],
    "fraction": [fractions.Fraction(1, 2), fractions.Fraction(1, 3)],
    "complex": [1 + 2j, 1 + 3j],
    "enum": [Kind.A, Kind.B],
    "derived": [Word("a"), Word("b")],
    "dataclass": [Row(torch.zeros(2)), Row(torch.ones(2))],
    "within": [Row({"at": [Row(1)]}), Row({"at": [Row(2)]})],
    "objects": [objects("a", [1]), objects("a", [2])],
    "strings": [numpy.array(["a" * 40, t * 40], numpy.dtypes.StringDType()) for t in "bc"],
    "record": [numpy.array([(1, v)], [("a", int), ("b", object)]) for v in ("x", "y")],
    "sparse": [torch.eye(3).to_sparse(), torch.eye(3).mul(2).to_sparse()],
    "rows": [torch.eye(3).to_sparse_csr(), torch.eye(3).mul(2).to_sparse_csr()],
    "conjugate": [torch.tensor([1 + 1j]).conj(), torch.tensor([1 + 2j]).conj()],
    "set": [{"a", "b", "c"}, {"a", "b", "d"}],
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_a_value_holds_counts(name):
    first, second = ([{"x": value}] for value in PAIRS[name])
    assert described(first) != described(second)
    assert "class alone" not in described(first)


def test_what_is_said_of_values_is_the_same_in_every_process():
    def lines():
        return "".join(f"{name} {described([{'x': v}])}\n" for name, (v, _) in PAIRS.items())

    code = (
        "from test_contents import PAIRS, described\n"
        "for name, (v, _) in PAIRS.items(): print(name, described([{'x': v}]))"
    )
    path = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == lines()


def test_of_an_unknown_class_the_line_says_that_it_counts_alone():
    class Other:
        pass

    line = described([{"x": Other()}])
    assert line == described([{"x": Other()}])
    assert line.endswith("Other: class alone)")
    assert described([{"x": {Other()}}]).endswith("Other: class alone)")


def test_a_stream_and_values_without_content_are_refused():
    stream = datasets.Dataset.from_list([{"x": 1}]).to_iterable_dataset()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"x": 1}

        def __len__(self):
            return 1

    for split in (stream, Stream()):
        with pytest.raises(ConfigError, match=r"task t, adaptation: expected a dataset with a len"):
            described(split)
    loop = []
    loop.append(loop)
    for value in (torch.empty(2, device="meta"), loop):
        with pytest.raises(ConfigError, match=r"task t, adaptation: expected rows of tensors"):
            described([{"x": value}])


@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_a_table_are_read_no_further_than_the_limit(monkeypatch, nested):
    monkeypatch.setattr(state, "BYTES", 80_000)
    monkeypatch.setattr(state, "_CHUNK_BYTES", 20_000)
    read = []
    at = datasets.Dataset.__getitem__

    def watched(self, key):
        read.append(at(self, key).nbytes)
        return at(self, key)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", watched)
    values = numpy.random.default_rng(0).random((200, 3, 16, 16), "float32")  # of 3 KiB each
    features = datasets.Features({"x": datasets.Array3D((3, 16, 16), "float32")})
    if nested:
        split = datasets.Dataset.from_dict({"x": values.tolist()})
    else:
        split = datasets.Dataset.from_dict({"x": values}, features)
    line = described(split)
    count = int(re.search(r"sha256 of (\d+) ", line)[1])
    assert count == 27 if not nested else 2 < count < 27
    assert max(read) <= 20_000
    twice = 2 * 16 * 3300  # the rows that are read twice, beforehand
    assert sum(read) < twice + 80_000 + 20_000


def test_arrays_and_lists_of_numbers_in_a_table_count_by_their_values():
    def line(value, feature):
        rows = {"x": [value, [[0.0, 1.0]] if numpy.ndim(value) == 2 else [0, 1]]}
        return described(datasets.Dataset.from_dict(rows, datasets.Features({"x": feature})))

    pair = datasets.Array2D((1, 2), "float32")
    assert line([[1.0, 2.0]], pair) == line([[1.0, 2.0]], pair) != line([[1.0, 3.0]], pair)
    ids = [datasets.Value("int64")]
    values = [[1, 2], [1, 3], [1, None], None, [], [1], [1, 2, 0]]
    assert len({line(value, ids) for value in values}) == len(values)
    assert line([1, 2], ids) == line([1, 2], ids)
    assert line([1, 2], ids) != line([1, 2], [datasets.Value("int32")])
    split = datasets.Dataset.from_dict({"x": [[i] * (i % 3) for i in range(9)]})
    whole = datasets.concatenate_datasets([split.select([i]) for i in range(9)])
    assert described(whole) == described(split) == described(split.select([*range(9)]))
