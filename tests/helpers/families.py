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
    "depth": 2,
    "depths": [1, 1, 1, 1],
    "dim": 16,
    "embed_dim": 16,
    "embedding_size": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "encoder_layers": 2,
    "ffn_dim": 24,
    "ffn_hidden_size": 24,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_dim": 24,
    "hidden_size": 16,
    "image_size": 32,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "intermediate_size": 24,
    "kv_channels": 8,
    "kv_lora_rank": 8,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 8,
    "mamba_d_state": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "max_position_embeddings": 64,
    "merged_hidden_size": 64,
    "moe_intermediate_size": 16,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "n_ctx": 64,
    "n_embd": 16,
    "n_group": 1,
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
    "out_hidden_size": 16,
    "pad_token_id": 0,
    "patch_size": 8,
    "projector_hidden_size": 16,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rotary_dim": 4,
    "shared_expert_intermediate_size": 16,
    "state_size": 4,
    "topk_group": 1,
    "v_head_dim": 8,
    "vocab_size": 64,
    "window_size": 4,
    "word_embed_proj_dim": 16,
}
OTHER: dict[str, dict[str, Any]] = {
    "AXK1Config": {"n_group": 2},
    "BambaConfig": {"attn_layer_indices": [1]},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "Dots1Config": {"n_shared_experts": 1},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [1, 1, 2],
        }
    },
    "Qwen2VLTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        }
    },
    **{
        name: {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            }
        }
        for name in (
            "Glm4vTextConfig",
            "GlmOcrTextConfig",
            "PaddleOCRTextConfig",
            "Qwen2_5OmniTextConfig",
            "Qwen2_5_VLTextConfig",
        )
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Mamba2Config": {"num_heads": 4, "head_dim": 8, "n_groups": 2},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "JambaConfig": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MiMoV2FlashConfig": {
        "num_attention_heads": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "Mistral4Config": {"qk_rope_head_dim": 4},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 4,
        "ngram_vocab_size_base": 64,
        "ple_embed_dim": 16,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "Step3p7TextConfig": {"sliding_window": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffLlamaConfig": {"attention_dropout": 0.0},
    "Glm5NextTextConfig": {"index_kpool": 2},
    "MistralLarge4TextConfig": {"kv_source_layers": [0, 1]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "Gemma4TextConfig": {
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "per_layer_config": {},
    },
    "Gemma4UnifiedTextConfig": {"head_dim": 8, "global_head_dim": 8, "per_layer_config": {}},
    "Gemma3nTextConfig": {
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": [24, 24],
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
    },
    "Llama4TextConfig": {"intermediate_size_mlp": 24},
    "Llama4VisionConfig": {
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "vision_output_dim": 16,
    },
    "BitConfig": {"num_groups": 4},
    "ConvNextConfig": {"hidden_sizes": [8, 8, 8, 8]},
    "ConvNextV2Config": {"hidden_sizes": [8, 8, 8, 8]},
    "EfficientNetConfig": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    "MobileViTConfig": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 6 + [16]},
    "MobileViTV2Config": {"hidden_sizes": [16, 16, 16]},
    "RegNetConfig": {"hidden_sizes": [8, 8, 8, 8], "groups_width": 4},
    "ResNetConfig": {"hidden_sizes": [8, 8, 8, 8]},
    **{
        name: {"embed_dim": 16, "num_heads": [2, 2, 2, 2], "window_size": 2, "patch_size": 2}
        for name in ("DonutSwinConfig", "SwinConfig", "Swinv2Config")
    },
    "SwiftFormerConfig": {"embed_dims": [8, 8, 8, 8]},
}
"""Fields of configs that need sizes of their own."""
LARGEST = 8_000_000


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
    try:
        return build_family(name)
    except Exception:
        return None


def build_family(name: str) -> nn.Module:
    """The same, or an error that says why not."""
    kind = getattr(transformers, name, None)
    config_class = getattr(kind, "config_class", None)
    if kind is None or config_class is None or getattr(kind, "__module__", "") is None:
        raise ValueError("not in transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = config_class()
        own = OTHER.get(config_class.__name__, {})
        config = config_class(**{**_sizes(plain), **_noise(plain), **_layers(plain), **own})
        parts = [p for p in vars(config).values() if isinstance(p, transformers.PretrainedConfig)]
        for part in parts:
            _shrink(part)
        if parts:
            config = config_class.from_dict(config.to_dict())  # as it will be loaded
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise ValueError(f"{size:,} parameters, too many to try")
        torch.manual_seed(0)
        network: nn.Module = kind(config).eval()
    return network


def _sizes(config: Any) -> dict[str, Any]:
    """Return the fields of `SMALL` that the config has with this type."""
    fixed = {key for key, value in vars(type(config)).items() if isinstance(value, property)}
    plain: dict[str, Any] = {}
    for key in SMALL.keys() - fixed:
        with suppress(AttributeError, RuntimeError):  # the latter: it differs by layer
            plain[key] = getattr(config, key)
    return {
        key: SMALL[key]
        for key, value in plain.items()
        if value is None or isinstance(value, int) == isinstance(SMALL[key], int)
    }


def _layers(config: Any) -> dict[str, Any]:
    """Give a network of several kinds of layers one layer of each."""
    kinds = list(dict.fromkeys(vars(config).get("layer_types") or ()))
    mlps = list(dict.fromkeys(vars(config).get("mlp_layer_types") or ()))
    count = max(2, len(kinds), len(mlps))
    own = {"layer_types": kinds, "mlp_layer_types": mlps}
    found = {key: [(some * count)[i] for i in range(count)] for key, some in own.items() if some}
    return {**found, "num_hidden_layers": count} if found else {}


def _noise(config: Any) -> dict[str, float]:
    """Turn on whatever is random in training mode."""
    random = {k: v for k, v in vars(config).items() if "drop" in k or "jitter" in k}
    return {k: 0.25 for k, v in random.items() if type(v) is float}


def _shrink(config: Any) -> None:
    own = OTHER.get(type(config).__name__, {})
    for key, value in {**_sizes(config), **_noise(config), **_layers(config), **own}.items():
        with suppress(Exception):
            setattr(config, key, value)
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _shrink(part)


def batch_of(network: nn.Module, kind: str) -> dict[str, Tensor]:
    """A small seeded batch."""
    generator = torch.Generator().manual_seed(7)
    config: Any = network.config
    if network.main_input_name == "pixel_values" and kind != "IMAGE_TEXT_TO_TEXT":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        images = torch.randn(2, channels, height, width, generator=generator)
        return {"pixel_values": images}
    if kind == "AUDIO_CLASSIFICATION" and network.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if network.main_input_name != "input_ids" and kind != "IMAGE_TEXT_TO_TEXT":
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
