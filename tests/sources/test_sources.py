"""Opening checkpoints: reading, rejected files, and fingerprints."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from gradmerge import Recipe
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.engine.opening import open_plan
from gradmerge.sources import (
    AbstractSource,
    Checkpoint,
    HuggingFace,
    InMemory,
    Lora,
    SafetensorsFile,
    TorchFile,
    as_source,
)
from gradmerge.sources.base import infos_of

GIB = 1 << 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny Llama, saved in one file and in shards."""
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"][0]()
    root = tmp_path_factory.mktemp("checkpoints")
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "sharded", max_shard_size="4KB")
    return model, root / "whole", root / "sharded"


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def private_bytes() -> int:
    """Return the memory of this process without mapped files, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a valid safetensors file of zeros that uses no disk space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


# ---- reading ------------------------------------------------------------------------------------


def test_folder_gives_the_tensors_of_the_model(folders):
    model, whole, sharded = folders
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for folder in (whole, sharded):
        checkpoint = HuggingFace(str(folder)).open()
        assert set(checkpoint.infos) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.infos[name].shape == tuple(tensor.shape)
            assert checkpoint.infos[name].dtype == tensor.dtype
        assert checkpoint.folder == folder
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.label == str(folder)


def test_file_names_the_shard_a_tensor_stands_in(folders):
    _, _, sharded = folders
    checkpoint = HuggingFace(str(sharded)).open()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: Path(i.file).name for n, i in checkpoint.infos.items()} == index


def test_single_file_wins_over_an_index_as_in_transformers(folders, tmp_path):
    model, whole, sharded = folders
    both = copied(sharded, tmp_path / "both")
    changed = {n: t + 1 for n, t in load_file(whole / "model.safetensors").items()}
    save_file(changed, both / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(both)
    name = "model.embed_tokens.weight"
    assert torch.equal(HuggingFace(str(both)).open().read(name), loaded.state_dict()[name])


def test_bare_safetensors_file(folders):
    model, whole, _ = folders
    checkpoint = SafetensorsFile(str(whole / "model.safetensors")).open()
    assert torch.equal(checkpoint.read("lm_head.weight"), model.lm_head.weight)
    assert checkpoint.config is None
    assert checkpoint.folder is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_stored_dtype_is_kept(tmp_path, dtype):
    tensors = {"x": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        checkpoint = as_source(str(tmp_path / name)).open()
        for key, tensor in tensors.items():
            assert checkpoint.infos[key].dtype == checkpoint.read(key).dtype == dtype
            assert torch.equal(checkpoint.read(key), tensor)


def test_opening_reads_headers_only(tmp_path):
    path = sparse_file(tmp_path / "huge.safetensors", {"w": (1 << 15, 1 << 20), "b": (1 << 15,)})
    assert path.stat().st_size > 60 * GIB
    before = private_bytes()
    checkpoint = SafetensorsFile(str(path)).open()
    assert checkpoint.infos["w"].num_bytes == 64 * GIB
    assert private_bytes() - before < 50 << 20


def test_reading_maps_instead_of_copying(tmp_path):
    path = sparse_file(tmp_path / "large.safetensors", {"a": (1 << 10, 1 << 17), "b": (4,)})
    checkpoint = SafetensorsFile(str(path)).open()
    checkpoint.read("b")
    before = private_bytes()
    tensor = checkpoint.read("a")
    total = tensor.view(torch.int16).sum()  # touches every page
    assert total == 0
    assert private_bytes() - before < 50 << 20 < checkpoint.infos["a"].num_bytes


def test_torch_file_is_mapped(tmp_path):
    torch.save({"a": torch.zeros(1 << 26, dtype=torch.int16)}, tmp_path / "a.pt")
    before = private_bytes()
    tensor = TorchFile(str(tmp_path / "a.pt")).open().read("a")
    assert tensor.sum() == 0
    assert private_bytes() - before < 50 << 20 < tensor.numel() * 2


# ---- `.bin` and `.pt` ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True], ids=["state dict", "under state_dict"])
def test_torch_file(folders, tmp_path, wrap):
    model, _, _ = folders
    state = model.state_dict()
    torch.save({"state_dict": state} if wrap else state, tmp_path / "model.pt")
    checkpoint = as_source(tmp_path / "model.pt").open()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
    assert set(checkpoint.infos) == set(state)


def test_folder_of_sharded_torch_files(folders, tmp_path):
    model, whole, _ = folders
    names = list(model.state_dict())
    halves = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for file, part in halves.items():
        torch.save({name: model.state_dict()[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    checkpoint = HuggingFace(str(tmp_path)).open()
    assert set(checkpoint.infos) == set(names)
    assert checkpoint.fingerprint() == HuggingFace(str(whole)).open().fingerprint()
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(SourceError, match=r"shards that do not exist: pytorch_model-00002"):
        HuggingFace(str(tmp_path)).open()


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "legacy.pth"])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, name):
    fuse = tmp_path / "ran"
    content = {"weight": torch.ones(2), "extra": Bomb(fuse)}
    if name == "legacy.pth":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(
        SourceError, match=r"(?s)memory-mapped|run code.*save_pretrained.*safetensors"
    ):
        as_source(tmp_path / name).open()
    assert not fuse.exists()
    if name != "legacy.pth":  # the bomb itself works, so the refusal above is what stopped it
        torch.load(tmp_path / name, weights_only=False)
        assert fuse.exists()


def test_torch_file_with_other_content_is_refused(tmp_path):
    torch.save({"epoch": 3, "weight": torch.ones(2)}, tmp_path / "a.pt")
    torch.save([torch.ones(2)], tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"not a torch file")
    torch.save({"w": torch.ones(2)}, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    for name, text in {
        "a.pt": r"tensors only, got other values under epoch.*only the module.s state_dict",
        "b.pt": "a dict of tensors, got list",
        "c.pt": "expected a",
        "d.pt": "can be memory-mapped.*Convert it once",
        "none.pt": "no such file exists",
    }.items():
        with pytest.raises(SourceError, match=rf"(?s){name}.*{text}"):
            TorchFile(str(tmp_path / name)).open()


def test_tied_tensors_of_a_torch_file_count_once(tmp_path):
    model = ARCHITECTURES["llama-tied"][0]()
    assert "lm_head.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "folder")
    expected = HuggingFace(str(tmp_path / "folder")).open()
    for source in (
        TorchFile(str(tmp_path / "model.pt")),
        InMemory(model),
        InMemory(model.state_dict()),
    ):
        checkpoint = source.open()
        assert set(checkpoint.infos) == set(expected.infos)
        assert checkpoint.fingerprint() == expected.fingerprint()


# ---- hub ids ------------------------------------------------------------------------------------


def test_hub_id_offline_is_a_clear_error():
    source = as_source("owner/name@v1.2")
    assert source == HuggingFace("owner/name", revision="v1.2")
    with pytest.raises(
        SourceError, match=r"owner/name \(revision v1\.2\): no such local folder.*was not asked"
    ):
        source.open()
    with pytest.raises(SourceError, match=r"revision main"):
        as_source("owner/name").open()


def test_hub_snapshot(folders, tmp_path, monkeypatch):
    """`snapshot_download` is replaced by one that hands out a local folder, by pattern."""
    import huggingface_hub

    model, whole, _ = folders
    calls = []

    def download(repository, revision, token, allow_patterns, local_files_only):
        assert local_files_only  # HF_HUB_OFFLINE
        calls.append((repository, revision, token, allow_patterns))
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = HuggingFace("owner/name", "abc", token="secret").open()
    assert torch.equal(checkpoint.read("lm_head.weight"), model.lm_head.weight)
    assert checkpoint.label == "owner/name@abc"
    assert calls[0][:3] == ("owner/name", "abc", "secret")
    assert not any("bin" in pattern for pattern in calls[0][3])
    assert "secret" not in repr(HuggingFace("owner/name", token="secret"))

    def download_bin(repository, revision, token, allow_patterns, local_files_only):
        if "pytorch_model*.bin" in allow_patterns:
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_bin)
    checkpoint = HuggingFace("owner/old").open()
    assert torch.equal(checkpoint.read("lm_head.weight"), model.lm_head.weight)


# ---- memory -------------------------------------------------------------------------------------


def test_module_and_state_dict_are_used_as_they_are(family):
    model = family("convolutions", dtype=torch.float32)[0][0]
    for source in (as_source(model), as_source(model.state_dict())):
        checkpoint = source.open()
        assert set(checkpoint.infos) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert checkpoint.read(name).data_ptr() == tensor.data_ptr()
            assert not checkpoint.read(name).requires_grad


def test_module_with_config_carries_it(family):
    model = family("bert")[0][0]
    assert as_source(model).open().config["model_type"] == "bert"


def test_non_persistent_buffers_are_no_weights():
    model = ARCHITECTURES["llama"][0]()
    assert any("inv_freq" in name for name, _ in model.named_buffers())
    assert not any("inv_freq" in name for name in as_source(model).open().infos)


def test_meta_tensors_are_refused():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
    message = "in memory: expected weights, got tensors on the meta device.*weight.*bias"
    for value in (module, module.state_dict()):
        with pytest.raises(SourceError, match=message):
            as_source(value).open()


def test_other_values_are_refused(tmp_path):
    with pytest.raises(SourceError, match="tensors only, got other values under step"):
        as_source({"weight": torch.ones(2), "step": 3}).open()
    with pytest.raises(ConfigError, match=r"expected a path, hub id, .* got int"):
        as_source(3)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=r"model\.gguf: expected a folder or a file ending in"):
        as_source(tmp_path / "model.gguf")


def test_as_source_by_kind(folders, tmp_path):
    model, whole, _ = folders
    assert as_source(whole) == HuggingFace(str(whole))
    assert as_source(str(whole / "model.safetensors")) == SafetensorsFile(
        str(whole / "model.safetensors")
    )
    source = InMemory(model)
    assert as_source(source) is source
    (tmp_path / "adapter_config.json").write_text("{}")
    assert as_source(tmp_path, source) == Lora(str(tmp_path), source)


# ---- fingerprints -------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_not_the_files(folders):
    model, whole, sharded = folders
    expected = HuggingFace(str(whole)).open().fingerprint()
    assert HuggingFace(str(sharded)).open().fingerprint() == expected
    assert InMemory(model).open().fingerprint() == expected
    assert InMemory(dict(reversed(model.state_dict().items()))).open().fingerprint() == expected


def flip_one_bit(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[-1] ^= 1
    return bits.view(torch.float32)


def test_fingerprint_sees_every_change():
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    variants = [
        {"w": tensor},
        {"w": flip_one_bit(tensor)},
        {"v": tensor},
        {"w": tensor.reshape(6, 4)},
        {"w": tensor.view(torch.int32)},
        {"w": tensor, "empty": torch.empty(0)},
        {"w": tensor, "w2": tensor.clone()},
    ]
    prints = [InMemory(tensors).open().fingerprint() for tensors in variants]
    assert len(set(prints)) == len(variants)
    assert prints[0] == InMemory({"w": tensor.clone()}).open().fingerprint()
    # a transposed view has other bytes in order, so it must not pass for the original
    square = tensor[:, :4]
    assert (
        InMemory({"w": square}).open().fingerprint()
        != InMemory({"w": square.T}).open().fingerprint()
    )


def test_a_checkpoint_of_one_s_own_may_define_properties_alone(tmp_path):
    class Ones(Checkpoint):
        label = "ones"
        infos = property(lambda self: self.headers)

        def __init__(self):
            self.headers = infos_of({"w": torch.ones(2, 3)}, "ones")

        def read(self, name):
            return torch.ones(self.infos[name].shape)

    class Source(AbstractSource):
        def open(self):
            return Ones()

    opened = Source().open()
    assert (opened.folder, opened.tokenizer_folder, opened.config) == (None, None, None)
    twin = InMemory({"w": torch.ones(2, 3)}).open()
    assert opened.fingerprint() == twin.fingerprint()
    plan = open_plan(Recipe({"a": Source(), "b": {"w": torch.zeros(2, 3)}}, origin="zero"))
    assert torch.equal(plan.read("a", "w"), torch.ones(2, 3))
