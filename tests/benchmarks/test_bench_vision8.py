"""The image suites: splits without overlap, the proxy apart from the tasks, the probe, experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

PROGRAM = "suites.vision8"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "suites"
SIZES = {"test": 20, "selection": 10, "adaptation": 30, "train": 60}


@pytest.fixture(name="form")
def small(bench: ModuleType) -> Any:
    quick = bench.Training(2, 1e-3, 8)
    return replace(
        bench.QUICK, tasks=("one", "two"), images=SIZES, probe=40, base=quick, expert=quick
    )


def pool(bench, seed, count, classes):
    drawn = np.random.default_rng(seed)
    pictures = drawn.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    names = [f"class {k}" for k in range(classes)]
    return bench.Pool(pictures, np.arange(count) % classes, np.arange(count), names)


@pytest.fixture(name="world")
def tiny(bench, form, tmp_path, monkeypatch):
    """A suite of two tasks and a proxy, which has half of the first task's images as well."""
    one, two, other = (pool(bench, k, 200, 3 + k) for k in range(3))
    drawings = np.concatenate([one.images[::2], other.images])
    proxy = bench.Pool(drawings, np.arange(300) % 4, np.arange(300), list("abcd"))
    readers = {"one": lambda cache: one, "two": lambda cache: two}
    monkeypatch.setattr(bench, "READERS", readers)
    monkeypatch.setattr(bench, "read_proxy", lambda cache: proxy)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    monkeypatch.setattr(bench, "MODEL", bench.MODEL | sizes)
    root = tmp_path / "vision4-seed0"
    threads = torch.get_num_threads()
    for piece in ("data", "base", "experts/one"):
        (root / piece).mkdir(parents=True)
        bench.make_piece(form, piece, root / piece, root, 0)
    yield root, one
    torch.set_num_threads(threads)


def pictures(part):
    return {image.tobytes() for image in part.images}


def test_an_image_is_in_the_same_split_of_every_task(bench, form):
    wide = pool(bench, 0, 400, 5)
    # the same images, of which another task has a part, in another order
    narrow = wide.at(np.arange(100, 400)[::-1])
    found, other = (bench.split(part, 3, form) for part in (wide, narrow))
    for name, part in other.items():
        assert 0 < len(part.labels) <= SIZES[name]
        assert not pictures(part) & {p for k, v in found.items() if k != name for p in pictures(v)}
    everything = [picture for part in found.values() for picture in pictures(part)]
    assert len(set(everything)) == sum(len(part.labels) for part in found.values())
    again = bench.split(wide, 4, form)
    assert pictures(again["test"]) != pictures(found["test"])


def test_the_proxy_has_no_image_of_a_task(bench, world):
    root, one = world
    proxy = bench.images.read_arrays(root / "data" / "proxy.npz")
    assert len(proxy.labels) == 200
    assert not pictures(proxy) & pictures(one)


def test_written_images_reach_a_network_as_they_did_in_training(bench, world):
    import datasets
    from transformers import AutoImageProcessor

    root, one = world
    path = root / "data" / "one" / "test.parquet"
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(root / "cache"))
    processor = AutoImageProcessor.from_pretrained(root / "experts" / "one")
    labels = dict(zip(map(bytes, one.images), one.labels.tolist(), strict=True))
    assert len(rows) == SIZES["test"]
    for row in rows:
        grey = np.asarray(row["image"])[..., 0]
        assert labels[grey.tobytes()] == row["label"]
        read = processor(row["image"], return_tensors="pt")["pixel_values"]
        trained = bench.images.normalised(bench.images.pixels_of(torch.tensor(grey[None])))
        torch.testing.assert_close(read, trained, atol=1e-6, rtol=0)


def test_an_expert_moves_its_encoder_and_keeps_its_probe(bench, form, world):
    from transformers import AutoModel, AutoModelForImageClassification

    root, _ = world
    base = AutoModel.from_pretrained(root / "base", add_pooling_layer=False)
    expert = AutoModelForImageClassification.from_pretrained(root / "experts" / "one")
    moved = [
        not torch.equal(tensor, expert.vit.state_dict()[key])
        for key, tensor in base.state_dict().items()
    ]
    assert sum(moved) > len(moved) / 2
    # the head is the probe of the base, which has the minimum of the penalised loss
    train = bench.images.read_arrays(root / "data" / "one" / "train.npz")
    pixels = bench.images.normalised(
        bench.images.pixels_of(torch.tensor(train.images[: form.probe]))
    )
    with torch.no_grad():
        token = base.eval()(pixels).last_hidden_state[:, 0]
    labels = torch.tensor(train.labels[: form.probe])
    loss = torch.nn.functional.cross_entropy(expert.classifier(token), labels)
    loss = loss + bench.PENALTY * expert.classifier.weight.square().sum()
    loss.backward()
    # zero at the minimum; a head of zeros has a gradient of about 0.05
    assert expert.classifier.weight.grad.abs().max() == pytest.approx(0, abs=1e-3)
    assert expert.config.id2label == {k: f"class {k}" for k in range(3)}


def test_the_characters_of_a_font_are_found_by_their_codes(bench, tmp_path):
    rows = [f"{chr(code)}{line}$@" for code in range(32, 127) for line in range(4)]
    font = tmp_path / "small.flf"
    font.write_text("\n".join(["flf2a$ 4 3 9 0 1", "a comment", *rows]))
    letters = bench.images._figlet_letters(font, "!7k")
    assert letters == [[f"{c}{line} " for line in range(4)] for c in "!7k"]


@pytest.mark.parametrize("name", ["FULL", "QUICK"])
def test_the_configuration_names_what_is_built(bench, name):
    form = getattr(bench, name)
    config = yaml.safe_load((CONFIGS / f"{form.name}.yaml").read_text())
    recipe, place = config["model"]["recipe"], f".cache/suites/{form.name}-seed0"
    experts = {f"experts/{task}" for task in form.tasks}
    assert set(bench.suite(form).marks(0)) == {"data", "base", *experts}
    assert {f"{place}/base", *recipe["sources"].values()} == {
        f"{place}/{piece}" for piece in ("base", *experts)
    }
    for task in form.tasks:
        given = config["data"]["tasks"][task]["data_files"]
        parts = ("adaptation", "selection", "test")
        assert given == {part: f"{place}/data/{task}/{part}.parquet" for part in parts}
