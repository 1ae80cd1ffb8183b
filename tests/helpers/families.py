"""Every family of transformers that a generic small config builds, with a batch for it.

Families that do not build or run with it in plain transformers are left out; a battery states how
many it must at least find.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto

KINDS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
)
SMALL: dict[str, Any] = {
    "attention_head_dim": 8,
    "attention_hidden_size": 16,
    "channels": 3,
    "classifier_proj_size": 8,
    "conv_dim": (8, 8),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "d_ff": 24,
    "d_head": 8,
    "d_inner": 24,
    "d_kv": 8,
    "d_model": 16,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "decoder_hidden_size": 16,
    "decoder_layers": 2,
    "decoder_start_token_id": 0,
    "depths": [1, 1, 1, 1],
    "dim": 16,
    "embedding_size": 16,
    "embed_dim": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "encoder_layers": 2,
    "ffn_dim": 24,
    "ffn_hidden_size": 24,
    "head_dim": 8,
    "hidden_dim": 24,
    "hidden_size": 16,
    "image_size": 32,
    "intermediate_size": 24,
    "kv_channels": 8,
    "mamba_expand": 2,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "n_ctx": 64,
    "n_embd": 16,
    "n_head": 2,
    "n_heads": 2,
    "n_inner": 24,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 64,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 8,
    "num_decoder_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_feat_extract_layers": 2,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "num_local_experts": 4,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "patch_size": 8,
    "rotary_dim": 4,
    "state_size": 4,
    "vocab_size": 64,
    "word_embed_proj_dim": 16,
}
OTHER: dict[str, dict[str, Any]] = {
    "ConvNextConfig": {"hidden_sizes": [8, 8, 8, 8]},
    "ConvNextV2Config": {"hidden_sizes": [8, 8, 8, 8]},
    "EfficientNetConfig": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    "MobileViTConfig": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 6 + [16]},
    "MobileViTV2Config": {"hidden_sizes": [16, 16, 16]},
    "RegNetConfig": {"hidden_sizes": [8, 8, 8, 8], "groups_width": 4},
    "ResNetConfig": {"hidden_sizes": [8, 8, 8, 8]},
    "SwinConfig": {"embed_dim": 16, "num_heads": [2, 2, 2, 2], "window_size": 2, "patch_size": 2},
    "SwiftFormerConfig": {"embed_dims": [8, 8, 8, 8]},
}
"""Fields of configs that need sizes of their own."""
LARGEST = 4_000_000


def count_runs(network: nn.Module) -> list[nn.Module]:
    """Return a list that gets the first leaf of a checkpointable layer each time that it runs."""
    found: list[nn.Module] = []
    for layer in network.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            leaves = [part for part in layer.modules() if not list(part.children())]
            leaves[0].register_forward_pre_hook(lambda part, _: found.append(part))
    return found


def families() -> Iterator[tuple[str, str]]:
    """Yield the class name and the kind of every family."""
    seen = set()
    for kind in KINDS:
        for name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            if isinstance(name, str) and name not in seen:
                seen.add(name)
                yield name, kind


def family_of(name: str) -> nn.Module | None:
    """A small network of a class of transformers with seeded weights; None if it does not build."""
    kind = getattr(transformers, name, None)
    config_class = getattr(kind, "config_class", None)
    if kind is None or config_class is None or getattr(kind, "__module__", "") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = config_class()
            own = OTHER.get(config_class.__name__, {})
            config = config_class(**{**_sizes(plain), **_noise(plain), **own})
            for part in vars(config).values():
                if isinstance(part, transformers.PretrainedConfig):
                    _shrink(part)
            with torch.device("meta"):
                size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                return None
            torch.manual_seed(0)
            network: nn.Module = kind(config).eval()
    except Exception:
        return None
    return network


def _sizes(config: Any) -> dict[str, Any]:
    """Return the fields of `SMALL` that the config has with this type."""
    plain = {key: getattr(config, key) for key in SMALL if hasattr(config, key)}
    return {
        key: SMALL[key]
        for key, value in plain.items()
        if value is None or isinstance(value, int) == isinstance(SMALL[key], int)
    }


def _noise(config: Any) -> dict[str, float]:
    """Turn on whatever is random in training mode."""
    random = {k: v for k, v in vars(config).items() if "drop" in k or "jitter" in k}
    return {k: 0.25 for k, v in random.items() if type(v) is float}


def _shrink(config: Any) -> None:
    for key, value in {**_sizes(config), **_noise(config)}.items():
        with suppress(Exception):
            setattr(config, key, value)


def batch_of(network: nn.Module, kind: str) -> dict[str, Tensor]:
    """A small seeded batch."""
    generator = torch.Generator().manual_seed(7)
    config: Any = network.config
    if network.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        images = torch.randn(2, channels, height, width, generator=generator)
        return {"pixel_values": images}
    if kind == "AUDIO_CLASSIFICATION" and network.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if network.main_input_name != "input_ids":
        length = getattr(config, "max_source_positions", 32)
        mels = getattr(config, "num_mel_bins", 16)
        return {network.main_input_name: torch.randn(2, mels, 2 * length, generator=generator)}
    ids = torch.randint(3, 60, (2, 8), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < 64:
        ids[ids == end] = 60
        ids[:, -1] = end
    batch = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False) and kind == "SEQ_TO_SEQ_CAUSAL_LM":
        batch["decoder_input_ids"] = ids.flip(1)
    return batch
