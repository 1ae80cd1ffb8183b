"""The folder that every kind of fault starts from: tiny models, data, and files of earlier runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("adaptation", "selection", "test")
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 2,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def build_world(root: Path) -> Path:
    """Write the world and run the commands whose outputs some kinds damage."""
    root.mkdir(parents=True)
    with contextlib.chdir(root) if hasattr(contextlib, "chdir") else _chdir(root):
        _language_models()
        _classifiers()
        _vision()
        _adapters()
        _configs()
        _runs()
    return root


@contextlib.contextmanager
def _chdir(root: Path) -> Any:
    before = Path.cwd()
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)


def _save(names: tuple[str, ...], models: Any, **options: Any) -> None:
    from tiny import word_tokenizer

    for name, model in zip(names, models, strict=True):
        model.save_pretrained(name, **options)
        word_tokenizer(Path(name))


def _language_models() -> None:
    import transformers

    from networks import seeded
    from tiny import relatives, sentences

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    models = relatives(seeded(transformers.LlamaForCausalLM, **sizes, **heads), scale=0.1)
    _save(("base", "a", "b"), models)
    _save(("sharded",), models[1:2], max_shard_size="6KB")
    import torch

    Path("torch_file").mkdir()
    torch.save(models[1].state_dict(), "torch_file/pytorch_model.bin")
    shutil.copy("a/config.json", "torch_file")
    for i, task in enumerate("ab"):
        for j, split in enumerate(SPLITS):
            rows = [json.dumps({"text": text}) for text in sentences(10 * i + j, 12)]
            Path(f"{task}-{split}.jsonl").write_text("\n".join(rows))


def _classifiers() -> None:
    import transformers

    from networks import seeded
    from tiny import relatives, sentences

    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = seeded(transformers.BertForSequenceClassification, num_labels=3, **sizes)
    names = dict(enumerate(("contradiction", "neutral", "entailment")))
    model.config.id2label, model.config.label2id = names, {v: k for k, v in names.items()}
    _save(("c_base", "c_a", "c_b"), relatives(model, scale=0.2))
    for split in SPLITS:
        rows = [{"text": t, "label": k % 3} for k, t in enumerate(sentences(len(split), 6))]
        Path(f"labels-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _vision() -> None:
    import torch
    import transformers

    from networks import seeded
    from tiny import relatives

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    model = seeded(transformers.ViTForImageClassification, **sizes, **heads)
    for name, one in zip(("v_base", "v_a", "v_b"), relatives(model, scale=0.1), strict=True):
        one.save_pretrained(name)
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(name)
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in SPLITS:
        folder = Path("images", split)
        folder.mkdir(parents=True)
        rows = []
        for i in range(4):
            pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "label": i % 3}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))


def _adapters() -> None:
    import torch
    from safetensors.torch import save_file

    for i, name in enumerate(("l_a", "l_b")):
        generator = torch.Generator().manual_seed(i)
        factors = {
            f"{ADAPTER}A.weight": torch.randn(2, 16, generator=generator),
            f"{ADAPTER}B.weight": torch.randn(16, 2, generator=generator),
        }
        Path(name).mkdir()
        save_file(factors, f"{name}/adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": "base",
            "bias": "none",
        }
        Path(name, "adapter_config.json").write_text(json.dumps(settings))


def text_task(task: str) -> dict[str, Any]:
    files = {split: f"{task}-{split}.jsonl" for split in SPLITS}
    return {"path": "json", "max_length": 8, "data_files": files}


def _configs() -> None:
    half = {"class_path": "Uniform"}
    lm = {"base": "base", "sources": {"a": "a", "b": "b"}}
    texts = {"tasks": {task: text_task(task) for task in "ab"}, "batch_size": 2}
    labels = {**text_task("labels"), "kind": "text_classification"}
    images = {"path": "imagefolder", "kind": "image_classification"}
    images["data_files"] = {s: f"images/{s}/*" for s in SPLITS}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}

    def fit(recipe: dict[str, Any], data: dict[str, Any], **model: Any) -> dict[str, Any]:
        return {
            "seed_everything": 0,
            "model": {"recipe": {**recipe, "coefficients": "Tensor"}, **model},
            "data": data,
            "optimizer": adam,
            "trainer": TRAINER,
        }

    def family(letter: str) -> dict[str, Any]:
        return {"base": f"{letter}_base", "sources": {k: f"{letter}_{k}" for k in "ab"}}

    written: dict[str, Any] = {
        "merge": {"recipe": {**lm, "init": half}},
        "fit": fit(lm, texts),
        "classes": {"recipe": {**family("c"), "init": half}},
        "classes_fit": fit(family("c"), {"tasks": dict.fromkeys("ab", labels), "batch_size": 2}),
        "images_fit": fit(family("v"), {"tasks": dict.fromkeys("ab", images), "batch_size": 2}),
        "adapters": {"recipe": {"base": "base", "sources": {"a": "l_a", "b": "l_b"}, "init": half}},
        "heads": fit({**lm, "private": ["^lm_head"]}, texts),
        "emr": {"recipe": {**lm, "preprocess": ["Unify"], "coefficients": "Model", "init": half}},
        "fisher": {"recipe": {**lm, "preprocess": ["FisherScale"], "init": half}, "data": texts},
        "fisher_merge": {
            "recipe": {
                **lm,
                "preprocess": ["FisherScale"],
                "init": half,
                "statistics": "statistics",
            }
        },
    }
    for name, content in written.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))


def _runs() -> None:
    """Checkpoints of fits, collected statistics, and compact tasks."""
    from gradmerge.cli import main

    keep = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "every_n_train_steps": 1},
    }
    for name in ("fit", "heads"):
        keep["init_args"]["dirpath"] = f"kept_{name}"  # type: ignore[index]
        callbacks = json.dumps([keep])
        _run(main, "fit", "--config", f"{name}.yaml", "--trainer.callbacks", callbacks)
        shutil.copy(f"kept_{name}/last.ckpt", f"{name}.ckpt")
        shutil.rmtree(f"kept_{name}")
    _run(main, "collect", "--config", "fisher.yaml", "--output", "statistics")
    _run(main, "merge", "--config", "emr.yaml", "--outputs", "compact", "--output", "compact")
    Path("config.yaml").unlink(missing_ok=True)
    for left in ("outputs", "lightning_logs"):
        shutil.rmtree(left, ignore_errors=True)


def _run(main: Any, *arguments: str) -> None:
    if main(list(arguments)) != 0:
        raise RuntimeError(f"the world could not be built: gradmerge {' '.join(arguments)}")
