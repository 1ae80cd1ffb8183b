"""Truncated, missing, stale and unrelated files are rejected by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from architectures import ARCHITECTURES
from gradmerge.common.errors import SourceError
from gradmerge.sources import HuggingFace, SafetensorsFile, as_source


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A tiny Llama in shards."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "sharded"
    ARCHITECTURES["llama"][0]().save_pretrained(folder, max_shard_size="4KB")
    return folder


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def header_of(text: bytes, data: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"1234", "header too small"),
        (b"\xff" * 64, "header too large"),
        (header_of(b"garbage!"), "invalid JSON in header"),
        (header_of(b"\xff\xfe{}"), "header"),
        (header_of(b"[1, 2]"), "invalid JSON in header"),
        (header_of(b'{"w": {"shape": [1]}}'), "invalid JSON in header.*dtype"),
        (
            header_of(b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', 8),
            "invalid shape, data type, or offset for tensor",
        ),
        (
            header_of(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 4),
            "incomplete metadata, file not fully covered",
        ),
        (
            header_of(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 12),
            "incomplete metadata, file not fully covered",
        ),
        (
            header_of(b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', 1),
            "tensor w: unsupported dtype F4",
        ),
    ],
)
def test_damaged_safetensors_file(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=rf"bad\.safetensors: .*{message}"):
        SafetensorsFile(str(path)).open()


def test_missing_files(sharded, tmp_path):
    with pytest.raises(SourceError, match=r"none\.safetensors.*no such file exists"):
        SafetensorsFile(str(tmp_path / "none.safetensors")).open()
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(SourceError, match=r"dir\.safetensors: expected a complete"):
        SafetensorsFile(str(tmp_path / "dir.safetensors")).open()
    with pytest.raises(SourceError, match=r"nowhere: expected a folder or file, but none exists"):
        as_source(str(tmp_path / "nowhere")).open()
    broken = copied(sharded, tmp_path / "broken")
    lost = sorted(broken.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(SourceError, match=rf"shards that do not exist: {lost.name}"):
        as_source(broken).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: expected model.safetensors.*got nothing"):
        as_source(tmp_path / "empty").open()


def test_index_that_does_not_fit_its_shards(sharded, tmp_path):
    broken = copied(sharded, tmp_path / "broken")
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"shards do not hold: ghost.weight"):
        as_source(broken).open()
    path.write_text("{}")
    with pytest.raises(SourceError, match="expected a `weight_map`"):
        as_source(broken).open()
    path.write_text("{")
    with pytest.raises(SourceError, match=r"index.json: expected JSON"):
        as_source(broken).open()


def test_tensor_in_two_shards(sharded, tmp_path):
    broken = copied(sharded, tmp_path / "broken")
    first, second = sorted(broken.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(SourceError, match=r"is in both .* remove the stale shard"):
        as_source(broken).open()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_device_in_place_of_weights_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).symlink_to(os.devnull)
    with pytest.raises(SourceError, match=rf"{name}: expected a file, got .* a device"):
        HuggingFace(str(tmp_path)).open()
