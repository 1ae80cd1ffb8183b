"""Content hashes of splits, by which a job detects changed data on resume."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import os
import re
import subprocess
import sys

import datasets
import numpy
import pytest
import torch
from PIL import Image

from folds import Kill, job_of
from gradmerge import MergeDataModule, TaskData
from gradmerge.common.errors import ConfigError
from gradmerge.drivers import Pairwise, state
from gradmerge.drivers.state import describe_contents
from tiny import SPLITS, build, relatives, vectors


def described(rows, **options):
    """Return the description of a split with these rows."""
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


def test_a_job_does_not_resume_with_changed_data(tmp_path):
    models = relatives(build(), 3)
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job_of(tmp_path, models, callbacks=[Kill(1, "on_train_batch_start", 2)]))
    message = r"driver holds another job.*examples\.b\.selection: was \"12 examples, content \w+\""
    for change in CHANGES.values():
        data = vectors("ab", check_disjoint=False)
        change(data.tasks["b"].path["selection"])
        with pytest.raises(ConfigError, match=message) as caught:
            Pairwise().run(job_of(tmp_path, models, data))
        assert "examples.a" not in str(caught.value)
    assert Pairwise().run(job_of(tmp_path, models)).is_dir()


def test_a_job_of_an_earlier_version_resumes_if_the_numbers_of_its_examples_match(tmp_path):
    models = relatives(build(), 3)
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job_of(tmp_path, models, callbacks=[Kill(1, "on_train_batch_start", 2)]))
    path = tmp_path / "driver/job.json"
    path.write_text(path.read_text().replace(", content ", ", sha256 "))
    data = vectors("ab", check_disjoint=False)
    CHANGES["number"](data.tasks["b"].path["selection"])
    message = r'examples\.b\.selection: was "12 examples", is "11 examples"'
    with pytest.raises(ConfigError, match=message):
        Pairwise().run(job_of(tmp_path, models, data))
    said = []
    job = job_of(tmp_path, models)
    job.say = said.append
    assert Pairwise().run(job).is_dir()
    assert f"{path} was written by an earlier version, whose hashes" in said[0]


def test_files_count_by_their_content(tmp_path):
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
    monkeypatch.setattr(state, "_SAMPLE", 8)
    rows = [{"x": i, "text": f"line {i}"} for i in range(100)]
    read = []

    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    line = described(Watched(rows))
    assert line.startswith("100 examples, content of 8 ")
    assert len(set(read)) == 8
    assert described([*rows[:99], {"x": -1}]) == line, "not in the sample"
    assert described([{"x": -1} if i in read else row for i, row in enumerate(rows)]) != line


def test_every_row_of_a_table_counts(monkeypatch):
    monkeypatch.setattr(state, "_SAMPLE", 8)
    monkeypatch.setattr(state, "_BATCH", 32)
    rows = [{"label": i % 7, "text": f"line {i:3}" * 9, "file": {"n": "a"}} for i in range(100)]

    def line(split=lambda table: table, **change):
        one = [{**row, **change} if i == 77 else row for i, row in enumerate(rows)]
        return described(split(datasets.Dataset.from_list(one)))

    assert re.fullmatch(r"100 examples, content \w{16}", line())
    other = rows[77]["text"].replace("l", "m")
    changes = [{"label": 9}, {"text": other}, {"text": None}, {"file": {"n": "b"}}]
    assert len({line(), *(line(**change) for change in changes)}) == 5

    def shuffled(table):
        return table.shuffle(seed=1)

    assert line(shuffled) != line()
    assert line(shuffled, text="") != line(shuffled)
    assert line(lambda table: table.shuffle(seed=1).flatten_indices()) == line(shuffled)
    named = datasets.Dataset.from_list(rows).rename_column("label", "labels")
    assert described(named) != line()


def test_when_files_were_changed_does_not_count(tmp_path):
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
    for row in rows:
        row["y"] = 2 - row["y"]
    assert not set(found()[0].values()) & set(first.values())


def test_rows_beyond_a_limit_do_not_count():
    rows = [{"x": i} for i in range(10)]
    assert described(rows, limit={"adaptation": 4}) == described(rows[:4])


def test_examples_drawn_anew_count_by_their_number():
    class Drawn(list):
        def __getitem__(self, index):
            return {"x": torch.rand(3)}

    assert described(Drawn(range(5))) == "5 examples, drawn anew each time"


def test_images_count_by_their_files_undecoded(tmp_path):
    def line(root, stamp=0):
        paths = [str(root / f"{shade}.png") for shade in (0, 255)]
        for path in paths:
            os.utime(path, (stamp, stamp))
        rows = datasets.Dataset.from_dict({"image": paths})
        return described(rows.cast_column("image", datasets.Image()), kind="image_classification")

    first = tmp_path / "first"
    first.mkdir()
    for shade in (0, 255):
        Image.new("L", (4, 4), shade).save(first / f"{shade}.png")
    both = line(first)
    assert both == line(first, stamp=9)
    moved = first.rename(tmp_path / "moved")
    assert both == line(moved)
    Image.new("L", (4, 4), 7).save(moved / "0.png")
    assert line(moved) != both
    (moved / "0.png").write_bytes(b"no image")
    assert line(moved) != both, "not decoded"


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


class Other:
    def __init__(self, value):
        self.value = value


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
    "float8": [torch.tensor([v]).to(torch.float8_e4m3fn) for v in (1.0, 2.0)],
    "image": [Image.new("L", (2, 2), v) for v in (1, 2)],
    "set": [{"a", "b", "c"}, {"a", "b", "d"}],
    "frozen": [frozenset("abc"), frozenset("abd")],
    "other": [Other(1), Other(2)],
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_content_of_a_value_counts(name):
    first, second = ([{"x": value}] for value in PAIRS[name])
    assert described(first) != described(second)


def every_line():
    table = datasets.Dataset.from_dict({"x": [[1], [2, 3]], "text": ["a", None]})
    values = {name: described([{"x": first}]) for name, (first, _) in PAIRS.items()}
    return json.dumps({**values, "table": described(table)})


def test_hashes_of_values_are_the_same_in_every_process():
    code = "import test_contents\nprint(test_contents.every_line())"
    path = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == every_line() + "\n"


def test_streams_and_unreadable_values_are_rejected():
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


def test_rows_of_a_table_beyond_a_limit_are_not_read(monkeypatch):
    monkeypatch.setattr(state, "_BATCH", 4)
    read = []
    at = datasets.Dataset.__getitem__

    def watched(self, key):
        read.append(at(self, key).num_rows)
        return at(self, key)

    split = datasets.Dataset.from_dict({"x": [[i] * 9 for i in range(200)]})
    first = described(split.select(range(10)))
    monkeypatch.setattr(datasets.Dataset, "__getitem__", watched)
    assert described(split, limit={"adaptation": 10}) == first
    assert read == [4, 4, 2]


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
