"""Small real architectures that every battery uses, with seeded random weights."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
import transformers
from torch import Tensor, nn

from networks import transformer
from tiny import close_wandb_run

transformers.logging.set_verbosity_error()

WIDE = {"hidden_size": 16, "intermediate_size": 24}


class Convolutions(nn.Module):
    """Convolution, depthwise and transposed convolution, BatchNorm, an LSTM and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.recurrent = nn.LSTM(4, 5, batch_first=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(5, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.norm(self.first(pixel_values)).relu()
        hidden = self.up(self.depthwise(hidden)).flatten(2).mT
        return self.head(self.recurrent(hidden)[0][:, -1]) * self.scale


def _tokens(length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {"input_ids": torch.randint(0, 32, (2, length), generator=generator)}


def _images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)}


def _llama(tied: bool) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    options = {**WIDE, **heads, **ends, "tie_word_embeddings": tied}
    return transformer(transformers.LlamaForCausalLM, **options)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _bert() -> nn.Module:
    kind = transformers.BertForSequenceClassification
    return transformer(kind, **WIDE, max_position_embeddings=16)


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32,
            d_model=16,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            d_kv=8,
            decoder_start_token_id=0,
        )
    )


def _vit() -> nn.Module:
    return transformer(transformers.ViTForImageClassification, **WIDE)


def _t5_batch() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": _tokens(4)["input_ids"]}


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (lambda: _llama(False), _tokens),
    "llama-tied": (lambda: _llama(True), _tokens),
    "gpt2": (_gpt2, _tokens),
    "bert": (_bert, _tokens),
    "t5": (_t5, _t5_batch),
    "vit": (_vit, _images),
    "convolutions": (Convolutions, _images),
}


@pytest.fixture
def family() -> Callable[..., tuple[list[nn.Module], dict[str, Tensor]]]:
    """Models of one architecture with weights near one another, and a batch for them."""

    def make(
        name: str, count: int = 3, dtype: torch.dtype = torch.float64
    ) -> tuple[list[nn.Module], dict[str, Tensor]]:
        torch.manual_seed(0)
        build, batch = ARCHITECTURES[name]
        first = build().to(dtype).eval()
        models = [first]
        for _ in range(count - 1):
            other = copy.deepcopy(first)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            models.append(other)
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in batch().items()
        }
        return models, inputs

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny text classifiers, data and a configuration, as the command line takes them."""
    from tiny import text_world

    return text_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs go to the test's own folder; no test talks to W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradmerge"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("WANDB_MODE", "disabled")


def logits_of(output: object) -> Tensor:
    """The logits of a transformers output, or the output itself."""
    return getattr(output, "logits", output)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _no_run_left_open() -> Iterator[None]:
    """No test logs to the W&B run of another."""
    yield
    close_wandb_run()


@pytest.fixture(scope="module")
def small_collections() -> Iterator[None]:
    """Keep existing objects out of garbage collections, for drivers that collect after each block:
    beside tiny blocks, searching everything that was imported would take most of the time.
    """
    from layerwise_jobs import frozen

    with frozen():
        yield
