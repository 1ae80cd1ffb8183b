"""Output that would take something away is refused, and what cannot be written is found at once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gradmerge.common.errors import ConfigError, OutputError
from gradmerge.common.output import (
    paths_in,
    require_apart,
    require_output,
    require_output_file,
    write_manifest,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A source, as a folder with one file."""
    folder = tmp_path / "models" / "a"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def written(folder: Path, *names: str) -> Path:
    """A folder that gradmerge wrote, with files of these names."""
    for name in names or ("model.safetensors",):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"merged")
    write_manifest(folder)
    return folder


def mounted(folder: Path, *options: str) -> None:
    """Mount something on a folder, or skip the test."""
    folder.mkdir()
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")


@pytest.fixture
def unmounting(tmp_path):
    yield
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(str(tmp_path)):
            subprocess.run(["umount", place], check=True)


# ---- overlaps with input -------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["models/a", "models", "models/../models/a", "link", "up"])
def test_a_folder_that_is_or_holds_an_input_is_never_replaced(model, tmp_path, place):
    written(model)
    write_manifest(tmp_path / "models")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "up").symlink_to(tmp_path / "models")
    with pytest.raises(ConfigError, match=r"apart from the input, got one (that holds|in) .*a"):
        require_output(tmp_path / place, True, [model])
    assert (model / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["new", "deep/er/new"])
def test_nothing_is_written_into_an_input(model, place):
    with pytest.raises(ConfigError, match=r"apart from the input, got one in .*a, which is read"):
        require_output(model / place, False, [model])


def test_weights_that_a_source_links_to_are_input_too(model, tmp_path):
    other = written(tmp_path / "other")
    (model / "linked.safetensors").symlink_to(other / "model.safetensors")
    require_output(other, True, [model])
    with pytest.raises(ConfigError, match=r"holds .*linked\.safetensors"):
        require_output(other, True, [model, model / "linked.safetensors"])


@pytest.mark.usefixtures("unmounting")
def test_mounts_are_seen_through(model, tmp_path):
    mounted(tmp_path / "bound", "--bind", str(tmp_path / "models"))
    with pytest.raises(ConfigError, match=r"holds .*a, which is read"):
        require_output(tmp_path / "bound", True, [model])
    with pytest.raises(ConfigError, match=r"in .*a, which is read"):
        require_output(tmp_path / "bound" / "a" / "new", False, [model])
    mounted(tmp_path / "disk", "-t", "tmpfs", "none")
    with pytest.raises(ConfigError, match="is a mount point, which cannot be replaced"):
        require_output(tmp_path / "disk", True)


def test_beside_and_around_inputs_there_is_room(model, tmp_path):
    require_output(tmp_path / "models" / "merged", False, [model])
    require_output(tmp_path / "models" / "ab", False, [model])
    require_output(written(tmp_path / "models" / "again"), True, [model])
    require_apart(tmp_path / "models", [model], replaced=False)  # files are only added


def test_home_and_the_current_folder_stay(tmp_path, monkeypatch):
    inner = tmp_path / "home" / "work"
    inner.mkdir(parents=True)
    write_manifest(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match="is the home folder, or holds it"):
        require_output(tmp_path / "home", True)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.chdir(inner)
    for place in (".", "..", "/", str(inner)):
        with pytest.raises(ConfigError, match="is the current folder, or holds it"):
            require_output(Path(place), True)


def test_paths_are_found_in_any_plain_data(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").touch()
    recipe = {"base": "models/a", "sources": {"b": {"init_args": {"path": str(model)}}}}
    found = paths_in(recipe, ["no/such", "a" * 5000, "nul\0", "~nobody/x", 3, None, 0.5])
    assert [path.resolve() for path in found] == [model, model]
    assert paths_in({"files": "*.json"}, patterns=True) == [Path("rows.json")]
    assert paths_in({"private": "*.json"}) == []


# ---- what gradmerge did not write ----------------------------------------------------------------


def test_a_folder_of_others_is_not_replaced(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("text")
    with pytest.raises(ConfigError, match=r"that gradmerge wrote.* got one with chapter\.tex"):
        require_output(folder, True)
    (folder / "chapter.tex").unlink()
    require_output(folder, True)  # empty


def test_files_of_others_in_a_written_folder_are_named(tmp_path):
    folder = written(tmp_path / "merged", "model.safetensors", "tasks/a/config.json")
    require_output(folder, True)
    (folder / "notes.txt").write_text("mine")
    (folder / "tasks" / "a" / "scores.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"got also notes\.txt, tasks/a/scores\.json; move"):
        require_output(folder, True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provenance.json", {"versions": {"gradmerge": "0.1"}}),
        ("a/provenance.json", {"versions": {"gradmerge": "0.1"}}),
        ("emr.json", {"scales": {}}),
        ("statistics.json", {"versions": {"gradmerge": "0.1"}}),
    ],
)
def test_folders_of_earlier_versions_are_known_by_their_description(tmp_path, name, content):
    path = tmp_path / "merged" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    (tmp_path / "merged" / "model.safetensors").touch()
    require_output(tmp_path / "merged", True)
    (tmp_path / "merged" / "photo.jpg").touch()
    with pytest.raises(ConfigError, match=r"got also photo\.jpg"):
        require_output(tmp_path / "merged", True)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"versions": {}}', "[" * 10**5])
def test_a_damaged_description_is_none(tmp_path, text):
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in (".gradmerge", "provenance.json"):
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match="expected a folder that gradmerge wrote"):
        require_output(folder, True)


def test_only_our_yaml_is_overwritten_and_not_while_it_is_read(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("models: []\n")
    with pytest.raises(ConfigError, match="expected a file that gradmerge wrote"):
        require_output_file(path, True)
    path.write_text("# Coefficients of gradmerge 0.2: a weight per tensor\nmodels: []\n")
    require_output_file(path, True)
    with pytest.raises(ConfigError, match=r"holds .*merge\.yaml, which is read"):
        require_output_file(path, True, [path])
    with pytest.raises(ConfigError, match="exists; give another file"):
        require_output_file(path, False)


# ---- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n" * 256, "at most 255 bytes, got one of 256"),
        ("é" * 128, "at most 255 bytes, got one of 256"),
        ("/".join(["n" * 200] * 25), "paths of at most 4096 bytes"),
        ("a\0b", "got a NUL character"),
        ("file", "file is a file; give a folder"),
        ("file/below", "cannot be written: Not a directory"),
        ("nothing", "is a link to nothing"),
    ],
)
def test_names_that_no_folder_can_have(tmp_path, name, expected):
    (tmp_path / "file").touch()
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    with pytest.raises((ConfigError, OutputError), match=expected):
        require_output(tmp_path / name, True)


@pytest.mark.usefixtures("unmounting")
def test_a_read_only_disk_is_found_before_any_work(tmp_path):
    mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "none")
    for name in ("merged", "deep/er/merged"):
        with pytest.raises(OutputError, match=r"cannot be written: Read-only file system \(.*disk"):
            require_output(tmp_path / "disk" / name, False)


def test_a_folder_without_permission_is_found_before_any_work(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind the superuser")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        require_output(tmp_path / "locked" / "merged", False)
