"""Files that change while they are in use."""

from __future__ import annotations

import hashlib
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmerge import MergedModel, Recipe, merge
from gradmerge.common.errors import FingerprintError, SourceError
from gradmerge.common.faults import explain_bus_errors
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.sources import as_source, identity
from gradmerge.sources.base import require_same_files, side_hashes, tensor_bytes, watched_files
from gradmerge.sources.identity import require_unchanged
from tiny import build, relatives


@pytest.fixture
def recipe(tmp_path):
    """A recipe on three files."""
    for name, model in zip(("base", "a", "b"), relatives(build()), strict=True):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    path = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")}
    return Recipe({"a": path["a"], "b": path["b"]}, path["base"])


def rewrite(file):
    """Write other values of the same size in place."""
    state = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(state, f"{file}.new")
    with open(f"{file}.new", "rb") as new, open(file, "r+b") as old:
        old.write(new.read())
    os.utime(file, ns=(1, 1))  # clocks of file systems are coarse
    os.unlink(f"{file}.new")


def replace(file):
    save_file(load_file(file), f"{file}.new")
    os.replace(f"{file}.new", file)


def cut(file):
    os.truncate(file, os.stat(file).st_size - 8)


CHANGES = {
    "written": (rewrite, "it was written to"),
    "replaced": (replace, "another file has taken its place"),
    "cut": (cut, r"its size was \d+ bytes and is \d+"),
    "gone": (os.unlink, "it is gone"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_step_notices(recipe, kind):
    merged = MergedModel(recipe, build())
    batch = torch.ones(2, 6)
    loss, _ = merged.accumulate([lambda: merged(batch).square().mean()])
    loss.backward()
    change, message = CHANGES[kind]
    change(recipe.sources["b"])
    with pytest.raises(SourceError, match=rf"b.safetensors: {message}"):
        merged.accumulate([lambda: merged(batch).square().mean()])
    with pytest.raises(SourceError, match=rf"b.safetensors: {message}"):
        merged(batch)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("early", [True, False], ids=["before reading", "after hashing"])
def test_an_export_notices(recipe, tmp_path, kind, early):
    plan = open_plan(recipe, with_skeleton=False)
    state = FitState.start(plan)
    if not early:
        assert plan.fingerprints
    change, message = CHANGES[kind]
    change(recipe.sources["a"])
    with pytest.raises(SourceError, match=rf"a.safetensors: {message}"):
        export_state(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite_unseen(file):
    """Write other values, and set the time of the change back."""
    before = os.stat(file)
    rewrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_time_that_is_set_back_hides_no_other_beginning(recipe):
    states = watched_files([as_source(recipe.sources["a"]).open()])
    os.chmod(recipe.sources["a"], 0o400)
    os.link(recipe.sources["a"], f"{recipe.sources['a']}.link")
    require_unchanged(states)
    os.chmod(recipe.sources["a"], 0o600)
    rewrite_unseen(recipe.sources["a"])
    with pytest.raises(SourceError, match=r"a.safetensors: it was written to"):
        require_unchanged(states)


def test_other_bytes_behind_the_same_identity_are_noticed_by_their_hash(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(identity, "_HEAD", 8)  # the files are small
    plan = open_plan(recipe, with_skeleton=False)
    state = FitState.start(plan)
    assert plan.fingerprints
    rewrite_unseen(recipe.sources["a"])
    with pytest.raises(FingerprintError, match="other weights of: a"):
        export_state(state, tmp_path / "out")


def test_a_file_that_changes_between_its_header_and_its_first_tensor(recipe):
    checkpoint = as_source(recipe.sources["a"]).open()
    replace(recipe.sources["a"])
    with pytest.raises(SourceError, match="another file has taken its place"):
        checkpoint.read("head.bias")


def test_bin_files_are_watched(tmp_path):
    file = tmp_path / "x.bin"
    torch.save(build().state_dict(), file)
    states = watched_files([as_source(file).open()])
    require_unchanged(states)
    cut(file)
    with pytest.raises(SourceError, match=r"x.bin: its size was"):
        require_unchanged(states)


def test_reading_and_touching_nothing_is_no_change(recipe, tmp_path):
    merge(recipe, tmp_path / "one")
    merge(recipe, tmp_path / "two")
    assert (tmp_path / "two" / "model.safetensors").is_file()


def folder(path, config="{}"):
    path.mkdir()
    save_file(build().state_dict(), path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "modeling_own.py"):
        (path / name).write_text(config)
    for name in ("README.md", "generation_config.json", "trainer_state.json"):
        (path / name).write_text("{}")
    return path


def test_configs_and_tokenizers_have_hashes_of_their_own(tmp_path):
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    kept = {"a": side_hashes(as_source(one).open())}
    assert list(kept["a"]) == ["config.json", "tokenizer.json"]
    code = folder(tmp_path / "code", '{"auto_map": {}}')
    found = list(side_hashes(as_source(code).open()))
    assert found == ["config.json", "modeling_own.py", "tokenizer.json"]
    (two / "README.md").write_text("other")
    require_same_files("it was made", kept, {"a": side_hashes(as_source(two).open())})
    require_same_files("it was made", {}, kept)  # checkpoints of earlier versions have none
    assert as_source(one).open().fingerprint() == as_source(two).open().fingerprint()
    (two / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(FingerprintError, match=r"a: tokenizer.json differ"):
        require_same_files("it was made", kept, {"a": side_hashes(as_source(two).open())})
    (two / "special_tokens_map.json").write_text("{}")
    with pytest.raises(FingerprintError, match=r"a: tokenizer.json, a: special_tokens_map.json"):
        require_same_files("it was made", kept, {"a": side_hashes(as_source(two).open())})


def test_settings_of_an_adapter_are_watched(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"A": torch.ones(2, 6), "B": torch.ones(8, 2)}
    save_file(
        {f"base_model.model.body.lora_{n}.weight": t for n, t in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    checkpoint = as_source(str(adapter), as_source(build())).open()
    assert list(side_hashes(checkpoint)) == ["1:adapter_config.json"]
    states = watched_files([checkpoint])
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 64}')
    with pytest.raises(SourceError, match=r"adapter_config\.json"):
        require_unchanged(states)


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no such signal")
@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "another thread"])
def test_a_file_that_is_cut_off_while_its_mapping_is_read(tmp_path, monkeypatch, in_thread):
    """The process names the file and exits with 2; forked, as it does not survive."""
    monkeypatch.setattr(identity, "_opened", {})
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(1 << 20)}, file)
    weight = as_source(file).open().read("w")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        explain_bus_errors.cache_clear()  # a handler of pytest may have come since
        explain_bus_errors()
        os.truncate(file, 4096)
        if in_thread:
            thread = threading.Thread(target=hashlib.sha256, args=(tensor_bytes(weight),))
            thread.start()
            thread.join()
        else:
            bytes(tensor_bytes(weight))
        os._exit(0)
    os.close(write)
    with open(read) as stream:
        message = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert f"{file}: its size was {(1 << 22) + 80} bytes and is 4096" in message.replace("\n", "")
