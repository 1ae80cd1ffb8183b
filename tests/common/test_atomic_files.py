"""Files that exist completely or not at all, and temporary folders that no kill leaves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gradmerge.common import atomic, memory
from gradmerge.common.atomic import Scratch, require_space, whole_file, writing
from gradmerge.common.errors import OutputError
from gradmerge.common.memory import in_file
from gradmerge.export.atomic import refuse_existing
from processes import dies

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=["nameless", "hidden"])
def way(request, monkeypatch):
    """Both ways to write a file."""
    if request.param == "hidden":
        monkeypatch.setattr(atomic, "nameless", lambda folder: None)
    return request.param


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_takes_its_name_when_it_is_complete(tmp_path, way):
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with whole_file(path) as work:
            work.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names(path.parent) == {"file"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_after_an_error_the_earlier_file_is_there(tmp_path, way):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with whole_file(path) as work:
            work.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_full_disk_leaves_the_earlier_file_and_is_said(disk, way):
    path = disk / "last.ckpt"
    path.write_bytes(b"a" * 30_000)

    def save():
        with whole_file(path) as work, work.open("wb") as file:
            torch.save(torch.zeros(20_000), file)  # raises an error of its own

    with pytest.raises(OutputError, match=r"last\.ckpt: cannot be written: the disk is full"):
        save()
    assert path.read_bytes() == b"a" * 30_000
    assert names(disk) == {"last.ckpt"}
    kept = r"The earlier last\.ckpt is as it was"
    with pytest.raises(OutputError, match=kept), whole_file(path) as work:
        work.write_bytes(b"b" * 50_000)


def test_a_file_of_a_killed_run_goes_with_the_next(tmp_path, way):
    path = tmp_path / "file"

    def half():
        with whole_file(path) as work:
            work.write_text("half")
            os._exit(9)

    dies(half)
    assert len(names(tmp_path)) == (0 if way == "nameless" else 1)
    with whole_file(path) as work:
        assert len(names(tmp_path)) == (0 if way == "nameless" else 1)  # its own
        work.write_text("whole")
    assert names(tmp_path) == {"file"}


def test_a_long_name_has_room_for_a_hidden_one(tmp_path, way):
    path = tmp_path / ("n" * 255)
    with whole_file(path) as work:
        work.write_text("text")
    assert path.read_text() == "text"


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_however_it_is_said(tmp_path, error):
    expected = r"merged: cannot be written: the disk is full .*Nothing is left"
    with (
        pytest.raises(OutputError, match=expected),
        writing(tmp_path / "merged", "Nothing is left."),
    ):
        raise error


def test_errors_about_something_else_pass(tmp_path):
    for error in (
        OSError(errno.EIO, "input", "/models/a"),
        RuntimeError("os error 280"),
        OSError(),
    ):
        with (
            pytest.raises(type(error), match=r"input|280|^$") as raised,
            writing(tmp_path / "merged"),
        ):
            raise error
        assert raised.value is error


def test_space_is_compared_before_any_work(tmp_path, disk):
    require_space(disk / "new" / "merged", 30_000, "the merge")
    with pytest.raises(OutputError, match=r"expected 1\.2 MB of free space for the merge, got"):
        require_space(disk / "new" / "merged", 1_200_000, "the merge")


# ---- temporary tensors and folders ---------------------------------------------------------------


def test_a_tensor_in_a_file_leaves_no_name(tmp_path):
    tensor = in_file((3, 5), torch.float64, tmp_path)
    assert names(tmp_path) == set()
    assert tensor.fill_(2).sum() == 30


def test_a_tensor_in_a_file_without_room_says_so(disk):
    with pytest.raises(OutputError, match=r"disk is full.*set it to a folder on a larger disk"):
        in_file((100_000,), torch.float32, disk)


def test_where_files_need_a_name_it_is_gone_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "other")
    assert in_file((2,), torch.float32, tmp_path).fill_(1).sum() == 2
    assert names(tmp_path) == set()


def test_temporary_folders_go_with_their_object_and_after_a_kill(tmp_path):
    with Scratch("test", tmp_path) as live:
        assert live.is_dir()
        kept = []
        for kind in ("test", "other"):
            dies(lambda kind=kind: (kept.append(Scratch(kind, tmp_path)), os._exit(9)))
        assert len(names(tmp_path)) == 3
        second = Scratch("test", tmp_path)
        assert {live.name, second.path.name} < names(tmp_path)
        assert len(names(tmp_path)) == 3  # the other kind is another's business
        del second
    assert {name.partition(".")[0] for name in names(tmp_path)} == {"gradmerge-other"}


def test_a_fork_does_not_remove_the_folder_of_its_parent(tmp_path):
    scratch = Scratch("test", tmp_path)
    dies(lambda: (scratch.close(), os._exit(9)))
    assert scratch.path.is_dir()


NAMESPACE = """
import os, sys
from pathlib import Path
from gradmerge.common.atomic import Scratch, hidden_name
from gradmerge.export.atomic import new_folder
root = Path(sys.argv[1])
scratch = Scratch("test", root)
with new_folder(root / "merged", False) as work:
    (work / "weights").touch()
    print(os.getpid(), flush=True)
    input()
"""


def test_a_live_run_in_a_container_keeps_its_folders_and_a_dead_one_does_not(tmp_path):
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a process namespace")
    run = [*command, sys.executable, "-c", NAMESPACE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(run, **pipes, text=True) as process:
        assert int(process.stdout.readline()) < 10  # numbers within are others
        before = names(tmp_path)
        refuse_existing(tmp_path / "merged", False)
        Scratch("test", tmp_path).close()
        assert names(tmp_path) == before
        assert len(before) == 2
        process.kill()
        process.wait()
        for _ in range(100):  # until the system has ended the namespace
            refuse_existing(tmp_path / "merged", False)
            Scratch("test", tmp_path).close()
            if not names(tmp_path):
                break
            time.sleep(0.1)
    assert names(tmp_path) == set()
