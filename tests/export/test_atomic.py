"""Folders that get their name atomically, beside other runs that live, die or do the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradmerge.common.errors import ConfigError
from gradmerge.export import atomic
from gradmerge.export.atomic import new_folder, refuse_existing

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
    assert sorted(path.name for path in target.iterdir()) == ["a", "b", "c"]
    (text,) = {path.read_text() for path in target.iterdir()}
    return text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def dies(function: Callable[[], None]) -> None:
    """Run in a process that must end by `os._exit(9)`, as if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


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
    where = atomic._host()
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = 2**22 + 1  # above every process number
    try:
        live = f".merged.{where}.{sleeper.pid}.0.partial"
        kept = {
            live,
            f".merged.{where}.{sleeper.pid}.1.old",
            f".merged.{where}.{os.getpid()}.99.partial",
            f".merged.{'0' * 8}.{dead}.0.partial",  # another machine's
            f".merged.large.{where}.{dead}.0.partial",  # of another name
            f".other.{where}.{dead}.0.partial",
            f"merged.{where}.{dead}.0.partial",
            f".merged.{where}.{dead}.0.partial.mine",
            ".merged.partial",
            ".merged.old",
            ".merged.17.partial",
        }
        gone = {f".merged.{where}.{dead}.{i}.partial" for i in range(2)}
        for name in kept | gone:
            (tmp_path / name).mkdir()
        refuse_existing(tmp_path / "merged", overwrite=False)
        assert names(tmp_path) == kept
    finally:
        sleeper.kill()
        sleeper.wait()
    refuse_existing(tmp_path / "merged", overwrite=True)
    # the dead run's old folder is the target again
    assert names(tmp_path) - kept == {"merged"}
    assert live not in names(tmp_path)


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
