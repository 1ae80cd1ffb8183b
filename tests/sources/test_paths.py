"""Paths that do not exist, and ids of the hub."""

from __future__ import annotations

import json
import socket
import threading

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from gradmerge.common import hub
from gradmerge.common.errors import ConfigError, GradmergeError, SourceError
from gradmerge.sources import HuggingFace, SafetensorsFile, TorchFile, as_source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with some models, and an empty cache of the hub."""
    for folder in ("alpha", "models/beta"):
        (tmp_path / folder).mkdir(parents=True)
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./x", "./x: expected a folder or file, but none exists"),
        ("../alpah/x", r"none exists\. Its parent ../alpah does not exist, either"),
        ("/nowhere/x", r"none exists\. Its parent /nowhere does not exist"),
        ("~/no-such-folder", "none exists"),
        ("~no-such-user/x", "expected a path or a hub id: Could not determine home"),
        ("alpah", "(?s)none exists. Did you mean alpha.*it has no owner: write owner/name"),
        (
            "gpt2",
            "(?s)none exists.*it has no owner: write owner/name, or `class_path: HuggingFace`",
        ),
        ("alpha/", None),
        ("alpah/", "(?s)none exists. Did you mean alpha.*it looks like a path"),
        ("models/betta", "(?s)Did you mean models/beta.*models is a folder here"),
        ("models/a/b", r"(?s)Its parent models/a does not exist, either.*it looks like a path"),
        (r"models\beta", "looks like a path"),
        (r"C:\models\beta", "looks like a path"),
        ("owner/na me", "looks like a path"),
        ("owner/../x", "looks like a path"),
        ("owner/--x", "looks like a path"),
        ("https://huggingface.co/owner/name", "looks like a path"),
        ("hf://owner/name", "looks like a path"),
        ("a\nb", r"a\\nb: expected a folder or file"),
        ("a\0b", "expected a (path|folder)"),
        ("\ud800", "expected a (path|folder)"),
        ("n" * 5000, "expected a path or a hub id: File name too long"),
        ("", "expected a path or hub id as a source, got an empty text"),
        ("alpha@main", "alpha exists here, where it has no revision; remove @main"),
        ("owner/" + "n" * 100, "looks like a path"),
        ("y.safetensors", r"expected a safetensors file.*Did you mean x\.safetensors"),
        ("x.bin", "expected a torch file, but no such file exists"),
        ("owner/name@../../x", r"expected a branch, tag or commit as revision, got '\.\./\.\./x'"),
        ("owner/name@", r"owner/name \(revision main\): no such local folder, not complete in the"),
        ("owner/name@refs/pr/1", r"revision refs/pr/1\): no such local folder"),
    ],
)
def test_what_does_not_exist_is_named(path, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if message is None:
        assert as_source(path) == HuggingFace("alpha")
        return
    with pytest.raises(GradmergeError, match=message) as caught:
        as_source(path).open()
    assert isinstance(caught.value, (SourceError, ConfigError))
    assert len(str(caught.value).splitlines()) <= 3


def test_nothing_local_is_looked_up(monkeypatch):
    """With a network, too."""
    import huggingface_hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    for path in ("./x", "alpah", "alpah/", "models/betta", "models/a/b", r"a\b", "gpt2", "a/b/"):
        with pytest.raises(SourceError, match="none exists"):
            as_source(path).open()
        if path.startswith(".") or path.endswith("/") or "\\" in path:
            with pytest.raises(SourceError, match="none exists"):
                HuggingFace(path).open()


def test_old_ids_without_an_owner(here):
    """Stated as such, named by an adapter, or in the cache."""
    (here / "ad").mkdir()
    settings = {"base_model_name_or_path": "gpt2", "revision": "v1"}
    (here / "ad" / "adapter_config.json").write_text(json.dumps(settings))
    base = as_source("ad").base
    assert (base.path, base.revision) == ("gpt2", "v1")
    with pytest.raises(SourceError, match=r"gpt2 \(revision main\): no such local folder"):
        HuggingFace("gpt2").open()
    (here / "cache" / "models--gpt2").mkdir(parents=True)
    assert as_source("gpt2") == HuggingFace("gpt2")
    (here / "cache" / "models--models--betta").mkdir()
    assert as_source("models/betta@v2") == HuggingFace("models/betta", "v2")


@pytest.fixture
def silent():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept():
            while True:
                try:
                    kept.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_a_silent_hub_is_not_waited_for(here, silent, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(hub, "_SECONDS", 0.3)
    with pytest.raises(SourceError, match=r"and the hub did not answer \(ReadTimeout"):
        as_source("owner/name").open()
    # what is in the cache is used
    snapshot = here / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert as_source("owner/name").open().read("w").tolist() == [1, 1]


def test_files_at_paths_that_the_system_refuses():
    for kind in (SafetensorsFile, TorchFile):
        with pytest.raises(ConfigError, match="File name too long"):
            kind("n" * 5000).open()


# ---- shards --------------------------------------------------------------------------------------


def folder_with(path, places):
    path.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, path / "model-1.safetensors")
    index = {"weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "../../x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        ".hidden.safetensors",
        "model-1.safetensors\0",
        "",
        ".",
        "..",
        None,
        7,
        ["model-1.safetensors"],
        "ABSOLUTE",
    ],
)
def test_shards_are_in_the_folder_of_their_index(here, file):
    file = str(here / "x.safetensors") if file == "ABSOLUTE" else file
    folder = folder_with(here / "broken", {"w": "model-1.safetensors", "v": file})
    with pytest.raises(
        SourceError, match=r"index\.json: expected names of files in its own folder"
    ):
        as_source(folder).open()


def test_shards_of_a_task_may_be_those_of_the_merge(here):
    """An exported task shares the weights of the folder above `tasks`, and nothing else."""
    (here / "out").mkdir()
    save_file({"w": torch.ones(2)}, here / "out" / "model.safetensors")
    shared = {"w": "../../model.safetensors"}
    folder = folder_with(here / "out" / "tasks" / "a", shared)
    (folder / "model-1.safetensors").unlink()
    assert as_source(folder).open().read("w").tolist() == [1, 1]
    for places in ({"w": "../../../x.safetensors"}, {"w": "../b/model.safetensors"}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(SourceError, match="expected names of files in its own folder"):
            as_source(folder).open()
    other = folder_with(here / "out" / "other" / "a", shared)
    with pytest.raises(SourceError, match="expected names of files in its own folder"):
        as_source(other).open()


def test_links_of_the_cache_are_followed(here):
    folder = folder_with(here / "snapshot", {"w": "model-1.safetensors"})
    (folder / "model-1.safetensors").rename(here / "blob")
    (folder / "model-1.safetensors").symlink_to(here / "blob")
    assert as_source(folder).open().read("w").tolist() == [1, 1]
