"""Checkpoints and data by formula: the same bits on every machine and in every version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from networks import transformer
from tiny import SPLITS, WORDS, word_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = Path(__file__).with_name("expected.json")


def numbers(count: int, seed: int) -> np.ndarray:
    """Integers from 0 to 65535, by integer arithmetic alone."""
    mask = np.uint64(0xFFFFFFFF)
    x = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 40503 + 977)
    x &= mask
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        x ^= x >> np.uint64(shift)
        x = x * np.uint64(factor) & mask
    return (x >> np.uint64(16)).astype(np.int64)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Multiples of 2^-15 in [-1, 1), which float32 holds exactly."""
    count = int(np.prod(shape, dtype=np.int64))
    found = (numbers(count, seed) - 32768) / 32768
    return torch.from_numpy(found).float().reshape(shape)


def fill(model: nn.Module, seed: int, near: bool = True) -> nn.Module:
    """Give a network the weights of a seed: 0 is the base, others lie near it or apart."""
    state = model.state_dict()
    for number, (name, tensor) in enumerate(state.items()):
        if not tensor.is_floating_point():
            continue
        i = number if near else 1000 * seed + number
        if name.endswith("running_var"):
            weight = 1.25 + values(tensor.shape, i) / 4
        elif tensor.ndim == 1 and name.endswith("weight"):
            weight = 1 + values(tensor.shape, i) / 8
        else:
            weight = values(tensor.shape, i) / 4
        if seed and near:
            weight = weight + values(tensor.shape, 1000 * seed + i) / 16
        state[name] = weight
    model.load_state_dict(state)
    return model.eval()


def bert(seed: int, near: bool = True) -> nn.Module:
    kind = transformers.BertForSequenceClassification
    sizes = {"intermediate_size": 8, "max_position_embeddings": 16, "num_labels": 3}
    return fill(transformer(kind, **sizes), seed, near)


def llama(seed: int, **options: Any) -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    sizes = {"num_key_value_heads": 1, **ends, **options}
    return fill(transformer(transformers.LlamaForCausalLM, **sizes), seed)


def resnet(seed: int, near: bool = True) -> nn.Module:
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes, num_labels=3, downsample_in_first_stage=False)
    return fill(transformers.ResNetForImageClassification(config), seed, near)


def sentence(seed: int, length: int = 6) -> str:
    return " ".join(WORDS[i % len(WORDS)] for i in numbers(length, seed))


def write_tasks(root: Path, tasks: str, count: int = 4) -> None:
    """Labelled sentences and plain text of each task, a file per split."""
    for i, task in enumerate(tasks):
        for j, split in enumerate(SPLITS):
            seeds = [1000 * i + 100 * j + k for k in range(count)]
            rows = [{"text": sentence(seed), "label": seed % 3} for seed in seeds]
            lines = "\n".join(map(json.dumps, rows))
            (root / f"{task}-{split}.json").write_text(f"{lines}\n")
            (root / f"{task}-{split}.txt").write_text("\n".join(sentence(s, 9) for s in seeds))


def task(name: str, kind: str = "text_classification") -> dict[str, Any]:
    """Options of `TaskData` for the files of a task, by relative paths."""
    builder, end = ("text", "txt") if kind == "causal_lm" else ("json", "json")
    files = {split: f"{name}-{split}.{end}" for split in SPLITS}
    return {"path": builder, "kind": kind, "data_files": files, "max_length": 8}


def images(name: str, count: int = 6) -> dict[str, list[dict[str, Tensor]]]:
    """Images with labels of each split, in memory."""
    seeds = {s: 10_000 * (1 + "abcd".index(name)) + 100 * j for j, s in enumerate(SPLITS)}
    return {
        split: [
            {"pixel_values": values((3, 16, 16), seed + k), "labels": torch.tensor(k % 3)}
            for k in range(count)
        ]
        for split, seed in seeds.items()
    }


def write_model(folder: Path, model: Any, tokenizer: bool = True) -> None:
    model.save_pretrained(folder)
    if tokenizer:
        word_tokenizer(folder)


def write_adapter(folder: Path, base: Mapping[str, Tensor]) -> None:
    """A LoRA adapter of rank 2 on the queries, as PEFT writes one."""
    folder.mkdir()
    tensors = {}
    for i, name in enumerate(n for n in base if n.endswith("query.weight")):
        rows, columns = base[name].shape
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = values((2, columns), 7000 + i) / 2
        tensors[f"{key}.lora_B.weight"] = values((rows, 2), 8000 + i) / 2
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_wordings(root: Path) -> None:
    """Language models whose tokenizers differ in their last words."""
    import tokenizers

    layouts = {"base": ["x", "y"], "a": ["y", "x", "z"], "b": ["y", "v"]}
    for i, (name, words) in enumerate(layouts.items()):
        order = ["<unk>", "<s>", "</s>", *words]
        write_model(root / "words" / name, llama(i, vocab_size=len(order)), tokenizer=False)
        model = tokenizers.models.WordLevel({w: k for k, w in enumerate(order)}, "<unk>")
        inner = tokenizers.Tokenizer(model)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        outer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **ends)
        outer.save_pretrained(root / "words" / name)
    for name in "ab":
        for split in SPLITS:
            (root / "words" / f"{name}-{split}.txt").write_text("x y x\ny x y y\nx x y\n")


MERGEKIT = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: [0.1, 0.5]}
  - model: b
    parameters: {weight: 0.4}
"""


def write_world(root: Path, tasks: str = "abc") -> None:
    """All that the fixtures name by relative path: models, data, and files that fixtures hold."""
    for i, name in enumerate(["base", *tasks]):
        write_model(root / name, bert(i))
    write_tasks(root, tasks)
    for i, name in enumerate("ab", 1):
        write_model(root / "far" / name, bert(i, near=False))
        weights = load_file(root / name / "model.safetensors")
        save_file(weights, root / f"{name}.safetensors", {"format": "pt"})
        torch.save(weights, root / f"{name}.pt")
    write_adapter(root / "adapter", load_file(root / "base/model.safetensors"))
    write_wordings(root)
    (root / "merge.yaml").write_text(MERGEKIT)
    copy_fixtures(root)


def copy_fixtures(root: Path) -> None:
    """Files of the old version that other fixtures read."""
    for name in ("statistics", "compact"):
        if (FIXTURES / name).is_dir():
            shutil.copytree(FIXTURES / name, root / name, dirs_exist_ok=True)
    if (FIXTURES / "export").is_dir():
        shutil.copy(FIXTURES / "export/coefficients.safetensors", root)


# ---- the command line --------------------------------------------------------------------------


CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "recipe": {"sources": {"a": "a", "b": "b"}, "base": "base", "coefficients": "Tensor"}
    },
    "data": {"tasks": {n: task(n) for n in "ab"}, "batch_size": 2, "check_disjoint": False},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": "run",
    },
}


def configured(path: str, part: dict[str, Any] | None = None, **more: Any) -> str:
    """A YAML of the command line; `part` changes the recipe."""
    whole = {**CONFIG, **more}
    whole["model"] = {"recipe": {**CONFIG["model"]["recipe"], **(part or {})}}
    Path(path).write_text(yaml.safe_dump(whole))
    return path


JOBS = {
    "pairwise": (["--driver", "Pairwise", "--driver.every_n_steps", "1"], 3),
    "layerwise": (["--driver", "LayerWise", "--driver.steps", "2"], 3),
}


def job_config() -> str:
    """Three sources for drivers."""
    data = {**CONFIG["data"], "tasks": {name: task(name) for name in "abc"}}
    part = {"sources": {name: name for name in "abc"}, "private": ["^classifier"]}
    return configured("job.yaml", part, data=data)


def job(name: str, *options: str) -> int:
    from gradmerge.cli import main

    return main(["fit", "--config", job_config(), *JOBS[name][0], *options])


# ---- comparisons -------------------------------------------------------------------------------


def summary(tensor: Tensor) -> list[float]:
    """Sum of squares, and a sum with weights that tell the places of entries."""
    flat = tensor.detach().double().flatten()
    weights = torch.from_numpy(numbers(len(flat), 5) / 65536)
    return [float(f"{float(v):.8g}") for v in ((flat**2).sum(), (flat * weights).sum())]


def differences(
    found: Mapping[str, Tensor], expected: Mapping[str, list[float]], tolerance: float = 1e-4
) -> Iterator[str]:
    """Tensors whose summaries differ by more than the tolerance, relative to their norm."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            yield f"{name}: {'not expected' if name in found else 'missing'}"
            continue
        (squares, weighted), now = expected[name], summary(found[name])
        bound = tolerance * (squares * max(1, found[name].numel())) ** 0.5 + 1e-7
        close = abs(now[0] - squares) <= 2 * tolerance * squares + 1e-7
        if not close or abs(now[1] - weighted) > bound:
            yield f"{name}: {expected[name]}, now {now}"


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, of one file or of shards."""
    return {n: t for file in folder.glob("model*.safetensors") for n, t in load_file(file).items()}


def exported(folder: Path) -> dict[str, Any]:
    """Summaries of an exported folder: each tensor, and all coefficients together."""
    model = weights_of(folder)
    coefficients = sorted(load_file(folder / "coefficients.st").items())
    return {
        "model": {name: summary(tensor) for name, tensor in sorted(model.items())},
        "coefficients": summary(torch.cat([c.flatten() for _, c in coefficients])),
    }


def assert_exported(folder: Path, name: str) -> None:
    """Compare an exported folder with what the old version made of the same fixture."""
    known = json.loads(EXPECTED.read_text())
    expected = known[name]
    names = known["names"][expected["names"]]
    summaries = dict(zip(names, expected["model"], strict=True))
    assert not list(differences(weights_of(folder), summaries))
    found = exported(folder)["coefficients"]
    assert np.allclose(found, expected["coefficients"], rtol=1e-4), (found, expected)
