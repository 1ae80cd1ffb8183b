"""Tiny networks, folders and data that the tests of training, export and command line share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Constant
from gradmerge.coefficients import Tensor as TensorGranularity
from networks import seeded

SPLITS = ("adaptation", "selection", "test")
WORDS = [f"w{i}" for i in range(29)]


class Perceptron(nn.Module):
    """Two linear layers; `extra` takes no part in the forward pass."""

    def __init__(self, classes: int = 3, extra: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)
        self.extra = nn.Linear(2, 2) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Normalised(nn.Module):
    """A linear layer, BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


def relatives(first: nn.Module, count: int = 3, scale: float = 0.3) -> list[nn.Module]:
    """`first` and copies with seeded noise on every parameter and floating-point buffer."""
    generator = torch.Generator().manual_seed(11)
    models = [first.eval()]
    for _ in range(count - 1):
        other = copy.deepcopy(first).eval()
        with torch.no_grad():
            for tensor in other.parameters():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.add_(scale * noise.to(tensor.dtype))
            for name, buffer in other.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand(buffer.shape, generator=generator))
        models.append(other)
    return models


def build(kind: type[nn.Module] = Perceptron, **options: Any) -> nn.Module:
    """A network with seeded weights."""
    torch.manual_seed(0)
    return kind(**options)


def recipe_of(models: Sequence[nn.Module], **options: Any) -> Recipe:
    """Base and sources `a`, `b`, ..."""
    sources: dict[str, Any] = dict(zip("abcdef", models[1:], strict=False))
    return Recipe(sources, base=models[0], **{"init": Constant(0.3), **options})


def examples(seed: int, count: int, classes: int = 3) -> list[dict[str, Tensor]]:
    """Vectors with labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(6, generator=generator),
            "labels": torch.randint(classes, (), generator=generator),
        }
        for _ in range(count)
    ]


def vectors(
    tasks: Sequence[str] = ("a", "b"), count: int = 12, classes: int = 3, **options: Any
) -> MergeDataModule:
    """A data module of random vectors, the same each time."""
    described = {
        task: TaskData(
            path={s: examples(100 * i + j, count, classes) for j, s in enumerate(SPLITS)},
            kind="tensors",
        )
        for i, task in enumerate(tasks)
    }
    return MergeDataModule(described, **{"batch_size": 4, **options})


def trainer_of(path: Path, **options: Any) -> lightning.Trainer:
    """A stock CPU trainer without loggers and bars."""
    settings: dict[str, Any] = {
        "default_root_dir": path,
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    if "callbacks" not in options:
        settings["enable_checkpointing"] = False
    return lightning.Trainer(**{**settings, **options})


def module_of(
    models: Sequence[nn.Module] | None = None,
    objective: Any = None,
    coefficients: Any = None,
    **options: Any,
) -> MergeModule:
    """A module of perceptrons; fields of the recipe may stand among the options."""
    recipe = {"coefficients": coefficients or TensorGranularity()}
    own = ("init", "private", "trained", "adapters", "buffers", "unused", "base", "origin")
    for name in own:
        if name in options:
            recipe[name] = options.pop(name)
    return MergeModule(recipe_of(models or relatives(build()), **recipe), objective, **options)


def fit(
    path: Path, module: MergeModule | None = None, data: Any = None, **options: Any
) -> tuple[MergeModule, lightning.Trainer]:
    """A short fit."""
    module = module or module_of()
    trainer = trainer_of(path, **options)
    trainer.fit(module, datamodule=data or vectors())
    return module, trainer


def validate(trainer: lightning.Trainer, module: MergeModule, data: Any) -> dict[str, float]:
    """All scores of the selection split, by name."""
    found = trainer.validate(module, datamodule=data, verbose=False)
    return {name: value for loader in found for name, value in loader.items()}


def raws(module: MergeModule) -> dict[str, Tensor]:
    """A copy of the raw coefficients."""
    return {key: value.detach().clone() for key, value in module.merged.raw.items()}


def word_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """A tokenizer of these words and three special tokens, saved as transformers saves one."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    outer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    outer.save_pretrained(folder)
    return folder


def save_family(
    folder: Path, models: Sequence[nn.Module], tokenizer: bool = True
) -> dict[str, str]:
    """Hugging Face folders `base`, `a`, `b`, ... with a tokenizer; returns their paths."""
    paths = {}
    for name, model in zip(["base", *"abcdef"], models, strict=False):
        model.save_pretrained(folder / name)
        if tokenizer:
            word_tokenizer(folder / name)
        paths[name] = str(folder / name)
    return paths


def sentences(seed: int, count: int, length: int = 8) -> list[str]:
    """Random sentences of the tokenizer's words."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(WORDS), (count, length), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in draws]


def write_yaml(path: Path, *parts: dict[str, Any]) -> str:
    """A YAML file of merged dictionaries."""

    def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        both = {**first, **second}
        for key in first.keys() & second.keys():
            if isinstance(first[key], dict) and isinstance(second[key], dict):
                both[key] = merge(first[key], second[key])
        return both

    import yaml

    whole: dict[str, Any] = {}
    for part in parts:
        whole = merge(whole, part)
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def text_world(root: Path) -> dict[str, Any]:
    """Folders of a tiny text classifier, files of two tasks, and a configuration of both."""
    import json

    import transformers

    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = seeded(transformers.BertForSequenceClassification, num_labels=3, **sizes)
    paths = save_family(root, relatives(model, scale=0.2))
    tasks = {}
    for i, task in enumerate("ab"):
        files = {}
        for j, split in enumerate(SPLITS):
            rows = [{"text": t, "label": k % 3} for k, t in enumerate(sentences(10 * i + j, 6))]
            path = root / f"{task}-{split}.json"
            path.write_text("\n".join(json.dumps(row) for row in rows))
            files[split] = str(path)
        tasks[task] = {"path": "json", "kind": "text_classification", "data_files": files}
    recipe = {"base": paths["base"], "sources": {k: paths[k] for k in "ab"}}
    return {
        # a method of its own: without any, `gradmerge fit` takes the default one
        "model": {"recipe": {**recipe, "coefficients": {"class_path": "Tensor"}}},
        "data": {"tasks": tasks, "batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


def close_wandb_run() -> None:
    """Finish the W&B run that is open, if any."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def plain_statistics(module: MergeModule, models: Sequence[nn.Module], data: Any) -> Any:
    """Running statistics of the merged network by PyTorch's own, all examples in one batch."""
    merged: Any = copy.deepcopy(models[0])
    for name, parameter in merged.named_parameters():
        parameter.data.copy_(module.merged.state.materialise(name))
    return recomputed(merged, data)


def recomputed(network: Any, data: Any) -> Any:
    """The norm of a network with running statistics of all adaptation examples in one batch."""
    network.norm.reset_running_stats()
    network.norm.momentum = None
    network.train()
    loaders = data.evaluation_loaders("adaptation")
    with torch.no_grad():
        network(torch.cat([batch["x"] for loader in loaders for batch in loader]))
    return network.norm
