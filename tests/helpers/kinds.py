"""Tiny networks, tokenizers and rows of every kind of task data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import transformers
from PIL import Image

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Constant
from gradmerge.coefficients import Tensor as TensorGranularity
from networks import seeded
from tiny import SPLITS, WORDS, relatives, save_family, sentences, word_tokenizer

TURN = "{{ '<s> ' + m['role'] + ' ' }}"
PLAIN = (
    "{% for m in messages %}" + TURN + "{{ m['content'] + ' </s> w0 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
"""A chat template that puts the word w0 between turns, as others put a line break."""
MARKING = (
    "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' </s>' }}{% endif %}{{ ' w0 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
"""The same with marks of what the assistant says."""

_LLAMA = {"max_position_embeddings": 96, "num_key_value_heads": 2}
_BERT = {"max_position_embeddings": 48}
_T5 = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


@dataclass
class Case:
    """A kind with a network and rows for it."""

    kind: str
    network: Callable[..., Any]
    """Makes the network; takes `vocab_size`."""
    row: Callable[[list[str]], dict[str, Any]]
    """Makes a row from four sentences of different lengths."""
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)


def _chat(s: list[str]) -> dict[str, Any]:
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, s, strict=True)]}


def _squad(s: list[str]) -> dict[str, Any]:
    words = s[3].split()
    start = len(words[0]) + 1
    return {
        "question": s[0],
        "context": s[3],
        "answers": {"text": [" ".join(words[1:3])], "answer_start": [start]},
    }


def _llama(**options: Any) -> Any:
    return seeded(transformers.LlamaForCausalLM, **{**_LLAMA, **options})


def _clip(vocab_size: int = 32) -> Any:
    text = {"vocab_size": vocab_size, "hidden_size": 8, "intermediate_size": 8}
    text["num_hidden_layers"] = 1
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    kind = transformers.CLIPModel
    return seeded(kind, text_config=text, vision_config=vision, projection_dim=8)


def picture(s: list[str]) -> dict[str, Any]:
    """An image drawn from sentences, with its class number."""
    seed = sum(map(ord, "".join(s)))
    pixels = numpy.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
    return {"image": Image.fromarray(pixels), "label": seed % 3}


CASES = {
    "chat": Case("chat", _llama, _chat),
    "packed chat": Case(
        "chat",
        _llama,
        _chat,
        {"packing": True, "max_length": 80},
    ),
    "completion": Case(
        "completion",
        _llama,
        lambda s: {"prompt": s[0] + " ", "completion": s[1]},
    ),
    "instruction": Case(
        "instruction",
        _llama,
        lambda s: {"instruction": s[0], "input": s[2] if len(s[2]) % 2 else "", "output": s[1]},
    ),
    "text per row": Case(
        "causal_lm",
        _llama,
        lambda s: {"text": s[3]},
        {"packing": False},
    ),
    "seq2seq": Case(
        "seq2seq",
        lambda **o: seeded(transformers.T5ForConditionalGeneration, **{**_T5, **o}),
        lambda s: {"source": s[0], "target": s[1]},
    ),
    "token_classification": Case(
        "token_classification",
        lambda **o: seeded(transformers.BertForTokenClassification, **{**_BERT, **o}, num_labels=3),
        lambda s: {"tokens": s[0].split(), "ner_tags": [len(w) % 3 for w in s[0].split()]},
    ),
    "question_answering": Case(
        "question_answering",
        lambda **o: seeded(transformers.BertForQuestionAnswering, **{**_BERT, **o}),
        _squad,
    ),
    "masked_lm": Case(
        "masked_lm",
        lambda **o: seeded(transformers.BertForMaskedLM, **{**_BERT, **o}),
        lambda s: {"text": s[3]},
        {"masked": 0.4},
        {"mask_token": "w28"},
    ),
    "embeddings": Case(
        "embeddings",
        lambda **o: seeded(transformers.BertModel, **{**_BERT, **o}),
        lambda s: {"anchor": s[0], "positive": s[1]},
    ),
    "scored embeddings": Case(
        "embeddings",
        lambda **o: seeded(transformers.BertModel, **{**_BERT, **o}),
        lambda s: {"sentence1": s[0], "sentence2": s[1], "score": len(s[0]) / 100},
    ),
    "text_classification": Case(
        "text_classification",
        lambda **o: seeded(
            transformers.BertForSequenceClassification, **{**_BERT, **o}, num_labels=3
        ),
        lambda s: {"text": s[0], "label": len(s[0]) % 3},
    ),
    "image_classification": Case(
        "image_classification",
        lambda **_: seeded(transformers.ViTForImageClassification, num_labels=3),
        picture,
    ),
    "zero_shot_image_classification": Case(
        "zero_shot_image_classification",
        _clip,
        picture,
        {"class_names": ["w1", "w2 w3", "w4"], "templates": ["w5 {}", "w6 w7 {} w8"]},
    ),
}


def rows(case: Case, seed: int, count: int = 6) -> list[dict[str, Any]]:
    """Rows of sentences of different lengths."""
    draw = random.Random(seed)
    lengths = [draw.randint(3, 6) for _ in range(4 * count)]
    texts = [sentences(1000 * seed + i, 1, n)[0] for i, n in enumerate(lengths)]
    return [case.row(texts[4 * i : 4 * i + 4]) for i in range(count)]


def tokenizer(
    folder: Path, template: str | None = PLAIN, words: Sequence[str] = WORDS, **settings: Any
) -> Any:
    """A tokenizer of words with a chat template."""
    word_tokenizer(folder, words)
    found = transformers.AutoTokenizer.from_pretrained(folder)
    found.chat_template = template
    found.model_max_length = 16 if "clip" in settings else 10**6
    settings.pop("clip", None)
    for name, value in settings.items():
        setattr(found, name, value)
    found.save_pretrained(folder)
    return found


def folders(root: Path, case: Case, words: Sequence[str] = WORDS) -> dict[str, str]:
    """Folders of a base and the sources a and b."""
    network = case.network(vocab_size=len(words) + 3)
    paths = save_family(root, relatives(network, scale=0.2), tokenizer=False)
    for path in paths.values():
        size = {"height": 8, "width": 8}
        if case.kind == "image_classification":
            transformers.ViTImageProcessor(size=size).save_pretrained(path)
        elif case.kind.startswith("zero_shot"):
            images = transformers.CLIPImageProcessor(size=size, crop_size=size)
            own = tokenizer(Path(path), words=words, clip=True)
            transformers.CLIPProcessor(images, own).save_pretrained(path)
        else:
            tokenizer(Path(path), words=words, **case.tokenizer)
    return paths


def task_of(case: Case, seed: int = 0, **options: Any) -> TaskData:
    """A task of seeded rows."""
    splits = {stage: rows(case, 10 * seed + i) for i, stage in enumerate(SPLITS)}
    return TaskData(path=splits, **{"kind": case.kind, **case.options, **options})


def world(
    root: Path, case: Case, objective: Any = None, start: float = 0.0, **options: Any
) -> tuple[MergeModule, MergeDataModule, dict[str, str]]:
    """A module of the base and two sources, at a coefficient, with data of both."""
    paths = folders(root, case)
    sources = {name: paths[name] for name in "ab"}
    recipe = Recipe(
        sources, base=paths["base"], init=Constant(start), coefficients=TensorGranularity()
    )
    data = MergeDataModule(
        {name: task_of(case, i, **options) for i, name in enumerate("ab")}, batch_size=2
    )
    return MergeModule(recipe, objective), data, paths
