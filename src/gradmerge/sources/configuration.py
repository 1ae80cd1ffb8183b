"""Compare configs: omitted fields have the defaults of their class."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from gradmerge.common.errors import Problem
from gradmerge.sources.base import Checkpoint

# Fields that change what a network computes from the same weights.
_FUNCTION = re.compile(
    r"^(activation|activation_function|add_cross_attention|alibi|attention_bias"
    r"|attn_logit_softcapping|classifier_activation|classifier_pooling|d_ff|d_kv|d_model|depths|downsample_in_bottleneck"
    r"|embedding_size|feed_forward_proj|final_logit_softcapping|head_dim|hidden_act"
    r"|hidden_activation|hidden_size|hidden_sizes|image_size|intermediate_size|is_decoder"
    r"|kv_channels|layer_norm_eps|layer_norm_epsilon|layer_type|layer_types|logit_scale|logits_scaling"
    r"|mlp_bias|model_type|n_embd|n_head|n_inner|n_layer|norm_eps|norm_epsilon|num_attention_heads"
    r"|num_channels|num_decoder_layers|num_experts_per_tok|num_heads|num_hidden_layers"
    r"|num_key_value_heads|num_layers|num_local_experts|partial_rotary_factor|patch_size"
    r"|position_embedding_type|qkv_bias|query_pre_attn_scalar"
    r"|relative_attention_max_distance|relative_attention_num_buckets|rms_norm_eps"
    r"|rope_parameters|rope_scaling|rope_theta|rotary_dim|rotary_pct"
    r"|scale_attn_by_inverse_layer_idx|scale_attn_weights|sliding_window"
    r"|tie_word_embeddings|use_parallel_residual|use_qk_norm|use_sliding_window|vocab_size|.*_multipliers?)$"
)

_HARMLESS = re.compile(
    r"^(_.*|.*dropout.*|.*drop.*|architectures|auto_map|bos_token_id|chunk_size.*"
    r"|decoder_start_token_id|dtype|eos_token_id|finetuning_task|gradient_checkpointing|id2label"
    r"|initializer_.*|init_std|label2id|max_length|num_labels|output_.*|pad_token_id|problem_type"
    r"|return_dict|task_specific_params|tokenizer_class|torch_dtype|transformers_version|use_cache"
    r"|use_return_dict|name_or_path|is_encoder_decoder)$"
)

_BY_TOKEN = " Or match rows by token: tokenizer: {source: union}."


def check_config(reference: Checkpoint, other: Checkpoint) -> list[Problem]:
    """Return the fields that differ; fatal if they change the function of the network."""
    if reference.config is None or other.config is None:
        return []
    first, second = _Fields(reference.config), _Fields(other.config)
    problems = []
    for key in _differing(first, second):
        field = key.rsplit(".", 1)[-1]
        fatal = bool(_FUNCTION.match(field))
        if not first.states(key) or not second.states(key):
            if not fatal:
                continue
            # the class of the config, and so the default, is unknown
            fatal = False
        problems.append(
            Problem(
                f"config.{field}",
                f"{other.label}/config.json",
                key,
                f"{first.show(key)} as in {reference.label}",
                second.show(key),
                "With another value, the same weights compute another function"
                f"{'' if fatal else ', unless it differs only in form'}. To use the value of "
                f"{reference.label}: allow: [config.{field}]."
                f"{_BY_TOKEN if field == 'vocab_size' else ''}",
                fatal,
            )
        )
    return problems


def _differing(first: _Fields, second: _Fields) -> list[str]:
    """Return the fields that differ in meaning, as far as their classes are known."""
    keys = sorted(set(first.written) | set(second.written))
    unequal = [
        key
        for key in keys
        if not _HARMLESS.match(key.rsplit(".", 1)[-1])
        and not key.startswith("quantization_config.")
        and first.written.get(key) != second.written.get(key)
    ]
    if not unequal or not (first.complete and second.complete):
        return unequal
    found = []
    consumed = False
    for key in unequal:
        if key in first.complete and key in second.complete:
            if first.complete[key] != second.complete[key]:
                found.append(key)
        elif key in first.complete or key in second.complete:
            found.append(key)
        else:  # an older spelling, which the class reads into another field
            consumed = True
    if consumed:
        found += [
            key
            for key in first.complete.keys() & second.complete.keys()
            if key not in keys
            and key not in first.aliases
            and first.complete[key] != second.complete[key]
        ]
    return sorted(found)


class _Fields:
    """The fields of a config.json, as written and as completed by transformers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.written = _flatten(config)
        self.aliases: dict[str, str] = {}

    @cached_property
    def complete(self) -> dict[str, Any]:
        """All fields with the defaults of the config's class; empty if the class is unknown."""
        from transformers import CONFIG_MAPPING

        try:
            config = CONFIG_MAPPING[self._config["model_type"]].from_dict(
                copy.deepcopy(dict(self._config))
            )
            fields = _flatten(config.to_dict())
        # files of other versions raise various errors; the fields as written are left
        except Exception:
            return {}
        self.aliases = dict(_aliases(config))
        for alias, name in self.aliases.items():
            if name in fields:
                fields.setdefault(alias, fields[name])
        return fields

    def states(self, key: str) -> bool:
        """Return whether the value of a field is known, written or by default."""
        return key in self.written or key in self.complete

    def show(self, key: str) -> str:
        """Format a value for a message."""
        if key in self.written:
            return repr(self.written[key])
        return f"{self.complete[key]!r} (the default)" if key in self.complete else "'the default'"


def _aliases(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for alias, name in config.attribute_map.items():
        yield prefix + alias, prefix + name
    for part in config.sub_configs:
        if hasattr(getattr(config, part, None), "sub_configs"):
            yield from _aliases(getattr(config, part), f"{prefix}{part}.")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested `*_config`s to dotted names; spell rotary settings as in older files."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif key == "rope_parameters" and isinstance(value, Mapping) and "rope_theta" in value:
            flat[f"{prefix}rope_theta"] = value["rope_theta"]
            flat[f"{prefix}rope_scaling"] = _rotary(value)
        else:
            flat[prefix + key] = _rotary(value) if key == "rope_scaling" else _plain(value)
    return flat


def _rotary(value: Any) -> Any:
    """Return rotary settings with one name for their type; None for the default ones."""
    if not isinstance(value, Mapping):
        return value
    rest = {k: _plain(v) for k, v in value.items() if k not in ("type", "rope_type", "rope_theta")}
    kind = value.get("rope_type", value.get("type", "default"))
    return {"rope_type": kind, **rest} if rest or kind != "default" else None


def _plain(value: Any) -> Any:
    """Return a value as JSON reads it, in which a tuple is a list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
