"""Tiny model folders whose real tokenizers differ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

SPECIAL = ("<unk>", "<s>", "</s>")
CORPUS = {
    "base": "low lower lowest new newer newest wide wider widest",
    "a": "newest wide wider merge merged merging low",
    "b": "widest model models token tokens low lower",
}


def bpe(
    folder: Path,
    corpus: str,
    size: int = 40,
    special: Sequence[str] = SPECIAL,
    added: Sequence[str | tokenizers.AddedToken] = (),
    **options: Any,
) -> transformers.PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on a corpus and saved; added tokens come last."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False
    )
    inner.train_from_iterator([corpus] * 5, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    outer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    for token in added:
        marked = isinstance(token, tokenizers.AddedToken) and token.special
        outer.add_tokens([token], special_tokens=marked)
    outer.save_pretrained(folder)
    return outer


def words(folder: Path, tokens: Sequence[str], **options: Any) -> None:
    """A tokenizer of whole words in the order given, saved; the first is the unknown word."""
    model = tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0])
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": tokens[0], **options}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def llama(rows: int, seed: int = 0, tied: bool = False, **options: Any) -> nn.Module:
    """A tiny Llama with seeded weights."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{
                "vocab_size": rows,
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": tied,
                "max_position_embeddings": 32,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **options,
            }
        )
    )


def bpe_family(root: Path, padding: int = 0, **options: Any) -> dict[str, str]:
    """Folders `base`, `a`, `b` of Llamas whose BPE tokenizers differ in tokens, order and size."""
    special = tokenizers.AddedToken("<tool>", special=True, normalized=False)
    shared = tokenizers.AddedToken("<shared>", special=True, normalized=False)
    extra: dict[str, Sequence[Any]] = {
        "base": (),
        "a": (shared, special, "merging together"),
        "b": ("<think>", shared),
    }
    paths = {}
    for i, (name, corpus) in enumerate(CORPUS.items()):
        folder = root / name
        tokenizer = bpe(folder, corpus, 36 + 2 * i, added=extra[name])
        llama(len(tokenizer) + padding, seed=i, **options).save_pretrained(folder)
        paths[name] = str(folder)
    return paths


def vocabulary_of(folder: str | Path) -> dict[str, int]:
    """Token -> id as transformers reads a folder."""
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def rows_by_token(folder: str | Path, name: str) -> dict[str, Tensor]:
    """The row of each token in a tensor of a saved folder."""
    from gradmerge.sources import HuggingFace

    tensor = HuggingFace(str(folder)).open().read(name)
    return {token: tensor[i] for token, i in vocabulary_of(folder).items()}


def copies(model: nn.Module, count: int, scale: float = 0.3) -> list[nn.Module]:
    """Copies of a network with seeded noise."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in other.parameters():
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
        found.append(other)
    return found
