"""Do the sources fit together? Headers, configs and tokenizers only; no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradmerge.errors import (
    CompatibilityError,
    ConfigError,
    Problem,
    SourceError,
    nearest,
    report,
    shorten,
)
from gradmerge.sources.base import Checkpoint
from gradmerge.sources.files import read_json

# Fields that change what the network computes from the same weights.
_FUNCTION = re.compile(
    r"^(activation|activation_function|add_cross_attention|alibi|attention_bias"
    r"|attn_logit_softcapping|d_ff|d_kv|d_model|depths|downsample_in_bottleneck"
    r"|embedding_size|feed_forward_proj|final_logit_softcapping|head_dim|hidden_act"
    r"|hidden_activation|hidden_size|hidden_sizes|image_size|intermediate_size|is_decoder"
    r"|kv_channels|layer_norm_eps|layer_norm_epsilon|layer_type|layer_types|logit_scale"
    r"|mlp_bias|model_type|n_embd|n_head|n_inner|n_layer|norm_eps|num_attention_heads"
    r"|num_channels|num_decoder_layers|num_experts_per_tok|num_heads|num_hidden_layers"
    r"|num_key_value_heads|num_layers|num_local_experts|partial_rotary_factor|patch_size"
    r"|position_embedding_type|qkv_bias|query_pre_attn_scalar"
    r"|relative_attention_max_distance|relative_attention_num_buckets|rms_norm_eps"
    r"|rope_parameters|rope_scaling|rope_theta|rotary_dim|rotary_pct"
    r"|scale_attn_by_inverse_layer_idx|scale_attn_weights|sliding_window"
    r"|tie_word_embeddings|use_parallel_residual|use_qk_norm|use_sliding_window|vocab_size)$"
)

_HARMLESS = re.compile(
    r"^(_.*|.*dropout.*|.*drop.*|architectures|auto_map|bos_token_id|chunk_size.*|classifier.*"
    r"|decoder_start_token_id|dtype|eos_token_id|finetuning_task|gradient_checkpointing|id2label"
    r"|initializer_.*|init_std|label2id|max_length|num_labels|output_.*|pad_token_id|problem_type"
    r"|return_dict|task_specific_params|tokenizer_class|torch_dtype|transformers_version|use_cache"
    r"|use_return_dict|name_or_path|is_encoder_decoder)$"
)


def check(
    checkpoints: Mapping[str, Checkpoint],
    private: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> list[Problem]:
    """Everything that keeps the checkpoints from being merged, the first one being the reference.

    Args:
        checkpoints: opened sources by name (the base, if there is one, first).
        private: regular expressions of tensors that stay with their task and are not compared.
        allow: kinds of problems (``tokenizer``, ``config.rope_theta``) taken as warnings.

    Returns:
        The problems, fatal ones and warnings.

    Raises:
        ConfigError: `allow` names what cannot be allowed.
    """
    for kind in allow:
        if kind not in ("tokenizer", "extra") and not kind.startswith("config."):
            raise ConfigError(
                f"allow: expected 'tokenizer', 'extra' or 'config.' and a field, came {kind!r}. "
                "Other problems have no meaning that a merge could go on with."
            )
    reference = next(iter(checkpoints.values()))
    problems: list[Problem] = []
    for checkpoint in checkpoints.values():
        problems += _check_precision(checkpoint, private)
        if checkpoint is not reference:
            problems += _check_tensors(reference, checkpoint, private)
            problems += _check_config(reference, checkpoint)
            problems += _check_tokenizer(reference, checkpoint)
    # A report that is cut short then still shows every kind.
    counts = Counter(problem.kind for problem in problems)
    problems.sort(key=lambda problem: counts[problem.kind])
    return [replace(p, fatal=p.fatal and p.kind not in allow) for p in problems]


def require(problems: Sequence[Problem]) -> None:
    """Stop with one report if any problem is fatal.

    Raises:
        CompatibilityError: the report of all problems.
    """
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise CompatibilityError(
            f"the sources cannot be merged as they are: {len(fatal)} problem(s).\n"
            f"{report(problems)}"
        )


def is_private(name: str, private: Sequence[str]) -> bool:
    """Whether a pattern says that this tensor stays with its task."""
    return any(re.search(pattern, name) for pattern in private)


def _check_precision(checkpoint: Checkpoint, private: Sequence[str]) -> list[Problem]:
    """Weights that a quantiser packed: their numbers are codes, which cannot be averaged."""
    packed = [
        info
        for info in checkpoint.infos.values()
        if info.dtype.itemsize < 2
        and (info.dtype.is_floating_point or re.search(r"weight$", info.name))
        and not is_private(info.name, private)
    ]
    return [
        Problem(
            "dtype",
            info.file,
            info.name,
            "at least 16 bits an entry",
            str(info.dtype),
            "A quantised tensor cannot be merged; give the unquantised checkpoint.",
        )
        for info in packed
    ]


def _check_tensors(
    reference: Checkpoint, other: Checkpoint, private: Sequence[str]
) -> list[Problem]:
    problems = []
    expected = {n: i for n, i in reference.infos.items() if not is_private(n, private)}
    came = {n: i for n, i in other.infos.items() if not is_private(n, private)}
    extra = sorted(set(came) - set(expected))
    for name in sorted(set(expected) - set(came)):
        problems.append(
            Problem(
                "missing",
                other.label,
                name,
                f"a tensor of shape {expected[name].shape} as in {expected[name].file}",
                "none of that name",
                f"Both must come from one architecture.{nearest(name, extra)} {_tie_hint(name)}"
                f"{_head_hint(name)}",
            )
        )
    for name in extra:
        problems.append(
            Problem(
                "extra",
                other.label,
                name,
                f"no such tensor, as in {reference.label}",
                f"shape {came[name].shape} in {came[name].file}",
                f"It would be dropped; accept that with allow: [extra]. {_tie_hint(name)}"
                f"{_head_hint(name)}",
            )
        )
    for name in sorted(set(expected) & set(came)):
        first, second = expected[name], came[name]
        if first.shape != second.shape:
            problems.append(
                Problem(
                    "shape",
                    second.file,
                    name,
                    f"shape {first.shape} as in {first.file}",
                    f"{second.shape}",
                    _shape_hint(name, first.shape, second.shape),
                )
            )
        elif first.dtype.is_floating_point != second.dtype.is_floating_point and (
            min(first.dtype.itemsize, second.dtype.itemsize) > 1  # else reported as quantised
        ):
            problems.append(
                Problem(
                    "dtype",
                    second.file,
                    name,
                    f"{first.dtype} as in {first.file}",
                    f"{second.dtype}",
                    "Numbers and indices do not merge; they come from different architectures.",
                )
            )
    return problems


def _looks_like_head(name: str) -> bool:
    return bool(re.search(r"classifier|^cls\.|(^|\.)(score|head|qa_outputs|fc)\.", name))


def _head_hint(name: str) -> str:
    if not _looks_like_head(name):
        return ""
    pattern = f"^{re.escape(name.rpartition('.')[0])}\\."
    return f"If it is a task's own head, declare it: private: ['{pattern}']."


def _tie_hint(name: str) -> str:
    return (
        "One of the two ties its embeddings and the other does not; save both alike. "
        if "lm_head" in name
        else ""
    )


def _shape_hint(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> str:
    if _looks_like_head(name):
        return f"The heads differ in their number of labels. {_head_hint(name)}"
    if first[1:] == second[1:] and ("embed" in name or "lm_head" in name or "wte" in name):
        return (
            "The vocabularies differ in size. Resize one to the other "
            "(`model.resize_token_embeddings`) after making their tokens agree."
        )
    return "These are different architectures or sizes."


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested `*_config`s by dotted name; rotary settings as older files spell them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif key == "rope_parameters" and isinstance(value, Mapping) and "rope_theta" in value:
            rest = {k: v for k, v in value.items() if k != "rope_theta"}
            flat[f"{prefix}rope_theta"] = value["rope_theta"]
            flat[f"{prefix}rope_scaling"] = None if rest == {"rope_type": "default"} else rest
        else:
            flat[prefix + key] = value
    return flat


def _check_config(reference: Checkpoint, other: Checkpoint) -> list[Problem]:
    if reference.config is None or other.config is None:
        return []
    first, second = _flatten(reference.config), _flatten(other.config)
    problems = []
    for key in sorted(set(first) | set(second)):
        field = key.rsplit(".", 1)[-1]
        if _HARMLESS.match(field) or first.get(key) == second.get(key):
            continue
        # A field that one file leaves at its default is not a difference that can be judged here.
        absent = key not in first or key not in second
        changes = bool(_FUNCTION.match(field))
        if absent and not changes:
            continue
        fatal = changes and not absent
        problems.append(
            Problem(
                f"config.{field}",
                f"{other.label}/config.json",
                key,
                f"{first.get(key, 'the default')!r} as in {reference.label}",
                repr(second.get(key, "the default")),
                "The same weights compute another function under another value"
                f"{'' if fatal else ', or it only differs in form'}. Allow it with "
                f"allow: [config.{field}] if it should be that of {reference.label}.",
                fatal,
            )
        )
    return problems


_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id from tokenizer.json, vocab.json or vocab.txt, whichever comes first."""
    loaded = read_json(folder / "tokenizer.json")
    if loaded is not None:
        try:
            vocabulary = (loaded.get("model") or {}).get("vocab") or {}
            if isinstance(vocabulary, list):  # unigram models store [token, score] pairs in order
                vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
            added = {entry["content"]: entry["id"] for entry in loaded.get("added_tokens") or []}
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise SourceError(
                f"{folder}/tokenizer.json: expected a vocabulary and added tokens, came another "
                f"form ({type(error).__name__}: {error})."
            ) from error
        return {**vocabulary, **added}
    plain = read_json(folder / "vocab.json")
    if plain is not None:
        return plain
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {token: index for index, token in enumerate(lines)}
    return None


def _check_tokenizer(reference: Checkpoint, other: Checkpoint) -> list[Problem]:
    if reference.folder is None or other.folder is None or reference.folder == other.folder:
        return []
    first, second = read_vocabulary(reference.folder), read_vocabulary(other.folder)
    if first is None or second is None:
        return _check_sentencepiece(reference.folder, other.folder, reference.label)
    if first == second:
        return []
    moved = sorted(token for token in first.keys() & second.keys() if first[token] != second[token])
    lost, new = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    parts = []
    for title, tokens in (("with another id", moved), ("missing", lost), ("new", new)):
        if tokens:
            parts.append(f"{len(tokens)} {title} ({shorten([repr(token) for token in tokens], 3)})")
    return [
        Problem(
            "tokenizer",
            str(other.folder),
            "vocabulary",
            f"the {len(first)} tokens of {reference.label}",
            ", ".join(parts),
            "The same embedding row stands for different tokens, so merging rows mixes meanings. "
            f"Allow it with allow: [tokenizer] if the tokens of {reference.label} should be used.",
        )
    ]


def _check_sentencepiece(reference: Path, other: Path, label: str) -> list[Problem]:
    """Compare the files of tokenizers whose vocabulary only the sentencepiece package can read."""
    problems = []
    for name in _SENTENCEPIECE:
        first, second = reference / name, other / name
        if first.is_file() and second.is_file() and first.read_bytes() != second.read_bytes():
            problems.append(
                Problem(
                    "tokenizer",
                    str(second),
                    "vocabulary",
                    f"the same file as {label}",
                    f"another one ({second.stat().st_size} bytes, {first.stat().st_size} there)",
                    "The same embedding row may stand for different tokens. Save both tokenizers "
                    "with transformers (tokenizer.json) for a comparison token by token, or allow "
                    f"it with allow: [tokenizer] if the tokens of {label} should be used.",
                )
            )
    return problems
