"""Folders that get their name atomically, beside other runs that live, die or do the same."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from gradmerge.common import atomic as files
from gradmerge.common.errors import ConfigError
from gradmerge.export import atomic
from gradmerge.export.atomic import new_folder, refuse_existing
from processes import dies

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(params=["exchange", "two renames"])
def way(request, tmp_path, monkeypatch):
    """Both ways to replace an existing folder."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    else:
        for name in "xy":
            (tmp_path / "probe" / name).mkdir(parents=True)
        exchanged = atomic._exchanged(tmp_path / "probe/x", tmp_path / "probe/y")
        shutil.rmtree(tmp_path / "probe")
        if not exchanged:
            pytest.skip("the system or file system cannot exchange names")
    return request.param


def put(target: Path, text: str, overwrite: bool = True) -> None:
    with new_folder(target, overwrite) as work:
        for name in "abc":
            (work / name).write_text(text)


def content(target: Path) -> str:
    """Return the text of a complete folder."""
    assert names(target) == {".gradmerge", *"abc"}
    (text,) = {(target / name).read_text() for name in "abc"}
    return text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def kill(*_: object, **__: object) -> None:
    os._exit(9)


def test_a_folder_takes_a_free_or_a_taken_name_and_nothing_is_left(tmp_path, way):
    put(tmp_path / "merged", "first")
    put(tmp_path / "merged", "second")
    assert content(tmp_path / "merged") == "second"
    assert names(tmp_path) == {"merged"}


def test_a_link_in_the_way_is_replaced_and_what_it_points_at_stays(tmp_path, way):
    put(tmp_path / "real", "old")
    (tmp_path / "merged").symlink_to(tmp_path / "real")
    put(tmp_path / "merged", "new")
    assert not (tmp_path / "merged").is_symlink()
    assert content(tmp_path / "merged") == "new"
    assert content(tmp_path / "real") == "old"
    assert names(tmp_path) == {"merged", "real"}


def test_a_name_that_was_taken_meanwhile_is_not_overwritten_unasked(tmp_path, way):
    target = tmp_path / "merged"
    with (
        pytest.raises(ConfigError, match="merged exists; give another folder"),
        new_folder(target, overwrite=False),
    ):
        put(target, "another's")
    assert content(target) == "another's"
    assert names(tmp_path) == {"merged"}


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    put(tmp_path / "merged", "old")
    renamed = atomic._renamed

    def fail(path, name):
        if path.suffix == ".partial" and not name.exists():
            raise OSError("input/output error")
        return renamed(path, name)

    monkeypatch.setattr(atomic, "_renamed", fail)
    with pytest.raises(OSError, match="input/output error"):
        put(tmp_path / "merged", "new")
    assert content(tmp_path / "merged") == "old"
    assert names(tmp_path) == {"merged"}


# ---- runs that die --------------------------------------------------------------------------


def test_a_run_that_dies_at_work_is_tidied_up_by_the_next(tmp_path, monkeypatch):
    target = tmp_path / "merged"
    put(target, "old")
    monkeypatch.setattr(atomic, "_take_name", kill)
    dies(lambda: put(target, "half"))
    assert len(names(tmp_path)) == 2
    with pytest.raises(ConfigError, match="merged exists"):
        refuse_existing(target, overwrite=False)
    assert names(tmp_path) == {"merged"}
    assert content(target) == "old"


def test_a_run_that_dies_after_its_exchange_leaves_the_new_folder(tmp_path, way, monkeypatch):
    target = tmp_path / "merged"
    put(target, "old")
    monkeypatch.setattr(atomic, "_put_away", kill)
    dies(lambda: put(target, "new"))
    monkeypatch.undo()
    assert content(target) == "new"
    assert len(names(tmp_path)) == 2
    refuse_existing(target, overwrite=True)
    assert names(tmp_path) == {"merged"}
    assert content(target) == "new"


def test_a_run_that_dies_between_two_renames_is_put_right_by_the_next(tmp_path, monkeypatch):
    target = tmp_path / "merged"
    put(target, "old")

    def die_where_the_name_is_free(*_):
        return kill() if not target.exists() else False

    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    monkeypatch.setattr(atomic, "_renamed", die_where_the_name_is_free)
    dies(lambda: put(target, "new"))
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(ConfigError, match="merged exists"):
        refuse_existing(target, overwrite=False)
    assert content(target) == "old"
    assert names(tmp_path) == {"merged"}


def test_half_of_a_removed_folder_never_gets_the_name(tmp_path, monkeypatch):
    target = tmp_path / "merged"
    put(target, "old")

    def die_half_way(path, **_):
        (Path(path) / "a").unlink()
        kill()

    monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    monkeypatch.setattr(shutil, "rmtree", die_half_way)
    dies(lambda: put(target, "new"))
    monkeypatch.undo()
    assert content(target) == "new"
    shutil.rmtree(target)
    refuse_existing(target, overwrite=False)
    assert names(tmp_path) == set()


# ---- what is not ours to remove -------------------------------------------------------------


def test_work_of_runs_that_live_and_what_is_not_ours_stays(tmp_path):
    here, elsewhere = files.kernel(), "0" * 8
    kept = {
        f".merged.{elsewhere}.1.partial",  # of another machine, and less than a day old
        f".merged.{elsewhere}.17.2.partial",  # as earlier versions named it
        f".merged.large.{here}.1.partial",  # of another name
        f".other.{here}.1.partial",
        f"merged.{here}.1.partial",
        f".merged.{here}.1.partial.mine",
        ".merged.partial",
        ".merged.old",
        ".merged.17.partial",
    }
    live = {f".merged.{here}.{i}.partial" for i in (2, 3)} | {f".merged.{here}.4.old"}
    gone = {f".merged.{here}.{i}.partial" for i in (5, 6)}
    for name in kept | live | gone:
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        assert all(stack.enter_context(files.lock(tmp_path / name)) for name in live)
        refuse_existing(tmp_path / "merged", overwrite=False)
        assert names(tmp_path) == kept | live
    refuse_existing(tmp_path / "merged", overwrite=True)
    # the dead run's old folder is the target again
    assert names(tmp_path) == kept | {"merged"}


def test_what_another_machine_left_goes_after_a_day(tmp_path):
    other = "0" * 8
    for name, age in (("1", 25), ("17.2", 25), ("3", 23)):
        folder = tmp_path / f".merged.{other}.{name}.partial"
        (folder / "inner").mkdir(parents=True)
        for path in (folder / "inner", folder):
            os.utime(path, (time.time() - age * 3600,) * 2)
    fresh = tmp_path / f".merged.{other}.4.partial"
    fresh.mkdir()
    (fresh / "weights").touch()
    os.utime(fresh, (0, 0))
    refuse_existing(tmp_path / "merged", overwrite=False)
    assert names(tmp_path) == {f".merged.{other}.3.partial", fresh.name}


@pytest.mark.parametrize("other", ["merged", "merged2"])
def test_runs_at_once_leave_one_another_s_work_alone(tmp_path, way, other):
    target = tmp_path / "merged"
    put(target, "start")
    children = []
    for i, own in enumerate((target, tmp_path / other, target)):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for trial in range(60):
                    put(own, f"{i} {trial}")
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    missing = 0
    waiting = set(children)
    while waiting:
        missing += not os.path.lexists(target)
        for child in list(waiting):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0
                waiting.discard(child)
    if way == "exchange":
        assert missing == 0
    assert names(tmp_path) == {"merged", other}
    assert all(content(tmp_path / name).endswith(" 59") for name in names(tmp_path))
