"""LoRA adapters (PEFT) on a base; dense tensors are computed on reading."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.common.errors import ConfigError, SourceError, nearest, shorten
from gradmerge.common.files import read_json
from gradmerge.common.low_rank import LowRank
from gradmerge.common.patterns import require_pattern, search
from gradmerge.common.schema import a_count, require_shape
from gradmerge.sources.adapted import AdaptedFolder
from gradmerge.sources.base import AbstractSource, Checkpoint
from gradmerge.sources.files import HuggingFace, SafetensorsCheckpoint
from gradmerge.sources.names import block_of
from gradmerge.sources.quantised import require_dense
from gradmerge.sources.skeleton import bind, build_skeleton, renames, tied_groups
from gradmerge.sources.tokenizers.files import has_tokenizer

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?$")

# Initialisations that subtract the first factors from the base: the adapter fits the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")

# Options with which the update is not `s * B @ A` on the weight of a module.
_OTHER_UPDATES = {
    "use_dora": "its update is not low-rank",
    "lora_bias": "its second factor has a bias",
    "layer_replication": "its layers are not those of the base",
    "target_parameters": "it adapts parameters outside of linear layers",
    "trainable_token_indices": "it trains individual rows of the embedding",
    "use_qalora": "its update is pooled for quantised weights",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes the base's weights",
    "monteclora_config": "its factors are random",
    "megatron_config": "its layers are Megatron's",
}

# Models of transformers that mix both layouts, and their layers that store `[in, out]`.
_MIXED_LAYOUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TRANSPOSED = ("c_attn", "q_attn", "c_proj", "c_fc")


@dataclass
class _Factors:
    """The two factors of one adapted tensor."""

    module: str
    """The module's name as the adapter knows it."""
    keys: dict[str, str]
    """`A` and `B` -> the adapter's tensor."""


class LoraCheckpoint(Checkpoint):
    """`W = W_0 + s * B @ A` for adapted tensors, the base's own tensor for all others.

    `s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with rank-stabilised LoRA. Supports per-module
    `rank_pattern` and `alpha_pattern`, transposed layers (`fan_in_fan_out`), embeddings,
    convolutions, and tensors that the adapter stores in full (`modules_to_save`, biases). Only the
    factors are held in memory beside the base (Hu et al. 2021, arXiv 2106.09685; file format of the
    PEFT library).

    Args:
        folder: the adapter's folder.
        base: the base it was trained on.
    """

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        require_dense(base)
        self._folder_adapter = folder
        self._base = base
        self._settings = read_adapter(folder)
        self._reject_unsupported()
        self._adapter = SafetensorsCheckpoint(
            [folder / "adapter_model.safetensors"], str(folder), side=folder
        )
        require_dense(self._adapter)
        self._factors: dict[str, _Factors] = {}
        self._replaced: dict[str, str] = {}
        self._updates: dict[str, LowRank] = {}
        self._index()
        self._copies = self._copy_tied()
        copies = {n: replace(base.infos[own], name=n) for n, own in self._copies.items()}
        full = {n: replace(self._adapter.infos[k], name=n) for n, k in self._replaced.items()}
        # adapted tensors have the base's dtype
        before, infos = {**base.infos, **copies}, {**base.infos, **copies, **full}
        label = f"{folder} on {base.label}"
        changed = {n: i for n, i in full.items() if n not in before or before[n].shape != i.shape}
        if not changed or base.folder is None or base.config is None:
            super().__init__(label, infos, base.folder, base.config)
        else:
            self._adapted = AdaptedFolder(folder, self._settings, base, changed)
            unused = self._adapted.unused(before)
            infos = {name: info for name, info in infos.items() if name not in unused}
            super().__init__(label, infos, self._adapted.path, self._adapted.config)
        self._reject_misfits()

    def _reject_unsupported(self) -> None:
        settings = self._settings
        kind = settings.get("peft_type", "LORA")
        problems = []
        if isinstance(self._base, LoraCheckpoint) and self._shares_base(self._base):
            raise SourceError(
                f"{self._folder_adapter}: expected the base that the adapter was trained on"
                f"{self._named_base()}, got {self._base._folder_adapter}, another adapter on that "
                "base. Give the base itself."
            )
        if kind != "LORA":
            problems.append(f"peft_type is {kind}, expected LORA")
        for option, why in _OTHER_UPDATES.items():
            if settings.get(option):
                problems.append(f"{option} is set: {why}")
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            problems.append(f"init_lora_weights is {start!r}, which changes the base's weights")
        if settings.get("bias", "none") not in ("none", "all", "lora_only"):
            problems.append(f"bias is {settings['bias']!r}")
        if problems:
            raise SourceError(
                f"{self._folder_adapter}: {'; '.join(problems)}. Merge the adapter into its base "
                "with PEFT (`model.merge_and_unload().save_pretrained(folder)`) and use that "
                "folder."
            )

    def _index(self) -> None:
        """Find the base tensor of each of the adapter's tensors."""
        unknown = []
        for key in self._adapter.infos:
            if ".original_module." in key:  # the base's, beside `modules_to_save`
                continue
            name = key.removeprefix(_PREFIX)
            match = _FACTOR.match(name)
            if match is not None:
                module = match["module"].removesuffix(".base_layer")
                target = self._target(f"{module}.weight")
            else:
                name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                target = self._target(name) or (name if self._is_own(name) else None)
            if target is None:
                unknown.append(key)
            elif match is None:
                self._replaced[target] = key
            else:
                factors = self._factors.setdefault(target, _Factors(module, {}))
                factors.keys[match["side"]] = key
        if unknown:
            hint = "Is this the adapter's own base?"
            raise SourceError(
                f"{self._folder_adapter}: these tensors belong to no tensor of the base "
                f"{self._base.label}: {shorten(unknown)}."
                f"{nearest(unknown[0].removeprefix(_PREFIX), self._base.infos)} {hint}"
            )

    def _is_own(self, name: str) -> bool:
        """Return whether the adapter adds this module (`modules_to_save`), such as a new head."""
        saved = self._settings.get("modules_to_save") or []
        module = f".{name.rpartition('.')[0]}."
        return any(f".{part}." in module for part in saved)

    def _target(self, name: str) -> str | None:
        """Return the base's name of the tensor that the module calls `name`."""
        if name in self._base.infos:
            return name
        place = self._places.get(name)
        if place is not None:
            return place
        # only one of the two was saved with the prefix of a model with a head
        inner = name.partition(".")[2]
        if inner in self._base.infos:
            return inner
        outer = [known for known in self._base.infos if known.partition(".")[2] == name]
        if len(outer) == 1:
            return outer[0]
        if self._text_model is not None:
            for own in (name, inner):  # saved with a head, or without
                place = self._places.get(f"{self._text_model}.{own}")
                if place is not None:
                    return place
        return name if name in self._tied else None

    @cached_property
    def _network(self) -> nn.Module | None:
        if self._base.folder is None or self._base.config is None:
            return None
        try:
            return build_skeleton(self._base.folder)
        except SourceError:  # custom code or an unknown class: only the names in the files are left
            return None

    @cached_property
    def _places(self) -> dict[str, str]:
        """Names in the module -> names in the base's files, if transformers renames on loading."""
        if self._network is None:
            return {}
        return bind(self._network, list(self._base.infos)).file_names

    @cached_property
    def _text_model(self) -> str | None:
        """Path of the text model in the network of a base that also sees or hears."""
        network: Any = self._network
        if getattr(getattr(network, "config", None), "text_config", None) is None:
            return None
        text = network.get_decoder()
        return next((path for path, part in network.named_modules() if part is text), None)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Tied parameters that the base does not store -> its tensor that is loaded for them."""
        if self._network is None:
            return {}
        places = renames(self._network, list(self._base.infos))
        stored = {place: name for name, place in places.items()}
        found = {}
        for group in tied_groups(self._network):
            held = next((stored[place] for place in group if place in stored), None)
            if held is not None:
                found.update({place: held for place in group if place not in stored})
        return found

    def _copy_tied(self) -> dict[str, str]:
        """Return tensors that the adapter unties: name -> the base's tensor that they were.

        PEFT replaces one module (`modules_to_save`) and leaves those that are tied to it as they
        are in the base, unless it stores all of them. A low-rank update is added to the tied tensor
        itself, as PEFT merges it, so those of several names must be the same one.
        """
        touched = {*self._factors, *self._replaced}
        if all(block_of(name) is not None for name in touched):
            return {}
        for place, held in self._tied.items():
            if place in self._factors and not self._is_updated_alike(place, held):
                keys = list(self._factors[place].keys.values())
                module = place.rpartition(".")[0]
                raise SourceError(
                    f"{self._folder_adapter}: expected the same update of {place} and {held}, got "
                    f"another one: {shorten(keys)}. The base ties {module} to its embeddings; "
                    "updating one of them unties them. Train both with ensure_weight_tying."
                )
            if place in self._factors:
                del self._factors[place]
                self._replaced.pop(place, None)
        whole = {*self._replaced} - {*self._factors}
        changed = {held for place, held in self._tied.items() if {place, held} & whole}
        return {place: held for place, held in self._tied.items() if held in changed}

    def _is_updated_alike(self, place: str, held: str) -> bool:
        """Return whether two tied tensors have the same factors, so that they stay tied."""
        both = [self._factors.get(name) for name in (place, held)]
        first, second = both
        if first is None or second is None:
            return False
        factors = [[self._adapter.read(f.keys[s]) for s in "AB"] for f in (first, second)]
        if len({"lora_embedding_" in f.keys["A"] for f in (first, second)}) == 2:
            factors[1] = [factor.T for factor in reversed(factors[1])]  # those of an embedding
        scales = {self.scale(name, factors[0][0].shape[0]) for name in (place, held)}
        full = [self._replaced.get(name) for name in (place, held)]
        if full[0] != full[1]:
            stored = [self._base.read(held) if k is None else self._adapter.read(k) for k in full]
            if not torch.equal(*stored):
                return False
        return len(scales) == 1 and all(map(torch.equal, *factors))

    def _reject_misfits(self) -> None:
        wrong = []
        for name, factors in self._factors.items():
            self._stated("alpha_pattern", "lora_alpha", factors.module)  # in time
            rank = self._stated("rank_pattern", "r", factors.module)
            if set(factors.keys) != {"A", "B"}:
                wrong.append(f"{name}: only {', '.join(factors.keys.values())}")
                continue
            form, stored = self._form(name), self._stored_shape(name)
            if self._is_transposed(name):
                form = form[::-1]
            if stored != form:
                wrong.append(f"{name}: factors for {form[0]} x {form[1]}, base {stored}")
            own = self._adapter.infos[factors.keys["A"]].shape[0]
            if rank not in (None, own):
                wrong.append(f"{name}: factors of rank {own}, adapter_config.json {rank}")
        if wrong:
            raise SourceError(
                f"{self._folder_adapter}: the factors do not fit the base {self._base.label}: "
                f"{shorten(wrong, 2)}. Give the base that the adapter was trained on"
                f"{self._named_base()}."
            )

    def _shares_base(self, other: LoraCheckpoint) -> bool:
        """Return whether two adapters name the same base."""
        names = [x._settings.get("base_model_name_or_path") for x in (self, other)]
        return bool(names[0]) and names[0] == names[1]

    def _named_base(self) -> str:
        """Return the base that adapter_config.json names, in brackets, or an empty text."""
        name = self._settings.get("base_model_name_or_path")
        return f" (adapter_config.json names {name})" if name else ""

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an adapted tensor as a matrix, `[out, in * kernel]`."""
        shape = self.infos[name].shape
        return shape if len(shape) < 2 else (shape[0], math.prod(shape[1:]))

    def _form(self, name: str) -> tuple[int, int]:
        """Return the shape of `B @ A`, `(out, in * kernel)`."""
        first, second = (self._adapter.infos[self._factors[name].keys[side]] for side in "AB")
        return second.num_elements // first.shape[0], first.num_elements // first.shape[0]

    def _is_transposed(self, name: str) -> bool:
        """Return whether the base stores this tensor as `[in, out]`, as embeddings are.

        PEFT writes one `fan_in_fan_out` for the whole adapter, that of the last layer it adapted,
        so shapes decide unless the matrix is square.
        """
        if "lora_embedding_" in self._factors[name].keys["A"]:
            return True
        out, inputs = self._form(name)
        if out != inputs or len(self.infos[name].shape) > 2:
            return self.infos[name].shape == (inputs, out)
        if (self._base.config or {}).get("model_type") in _MIXED_LAYOUT:
            return self._factors[name].module.rpartition(".")[-1] in _TRANSPOSED
        return bool(self._settings.get("fan_in_fan_out"))

    @property
    @override
    def parts(self) -> Sequence[Checkpoint]:
        return (*self._base.parts, self._adapter)

    @property
    @override
    def tokenizer_folder(self) -> Path | None:
        own = self._folder_adapter
        return own if has_tokenizer(own) else self._base.tokenizer_folder

    def scale(self, name: str, rank: int) -> float:
        """Return `s` of one adapted tensor."""
        alpha = self._stated("alpha_pattern", "lora_alpha", self._factors[name].module)
        alpha = 8 if alpha is None else alpha
        return float(alpha) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _stated(self, patterns: str, option: str, module: str) -> Any:
        """Return a module's value: of the first pattern for the end of its name (PEFT), or all's.

        Raises:
            SourceError: a pattern takes too long.
        """
        for pattern, value in self._settings.get(patterns, {}).items():
            try:
                if search(rf"(.*\.)?({pattern})", module, whole=True):
                    return value
            except ConfigError as error:
                raise SourceError(f"{self._folder_adapter}: {patterns}: {error}") from error
        return self._settings.get(option)

    @override
    def read(self, name: str) -> Tensor:
        # in float32 or wider: 16 bits would round away most of an update that is small
        key = self._replaced.get(name)
        own = self._copies.get(name, name)
        stored = self._base.read(own) if key is None else self._adapter.read(key)
        if name not in self._factors:
            return stored
        wide = torch.promote_types(stored.dtype, torch.float32)
        return (stored.to(wide) + self.delta(name, wide).to(stored.device)).contiguous()

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `s * B @ A` in the orientation and shape of the base tensor."""
        left, right = self._product(name, dtype)
        return (left @ right).reshape(self._infos[name].shape)

    def _product(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the factors of an update in the orientation of the base tensor, with the scale."""
        keys = self._factors[name].keys
        first, second = (self._adapter.read(keys[side]).to(dtype) for side in "AB")
        rank = first.shape[0]
        left, right = second.reshape(-1, rank) * self.scale(name, rank), first.reshape(rank, -1)
        return (right.T, left.T) if self._is_transposed(name) else (left, right)

    @override
    def stored_as(self, name: str) -> Hashable | None:
        if name in self._factors:
            return None
        key = self._replaced.get(name)
        if key is not None:
            return self._adapter.stored_as(key)
        return self._base.stored_as(self._copies.get(name, name))

    @override
    def update(self, name: str) -> LowRank | None:
        own = self._copies.get(name, name)
        stored = None if name in self._replaced else self._base.stored_as(own)
        if name not in self._factors or stored is None:
            return None
        if name not in self._updates:
            wide = torch.promote_types(self._base.infos[own].dtype, torch.float32)
            left, right = self._product(name, wide)
            self._updates[name] = LowRank(left.contiguous(), right.contiguous(), stored)
        return self._updates[name]

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._base.fingerprint().encode())
        digest.update(self._adapter.fingerprint().encode())
        for key in ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out"):
            digest.update(f"{key}={self._settings.get(key)}".encode())
        return digest.hexdigest()


# The fields that decide what is computed, with null where PEFT may write it.
_SETTINGS = {
    "peft_type?": str,
    "r?": a_count,
    "lora_alpha?": float,
    "use_rslora?": (bool, None),
    "fan_in_fan_out?": (bool, None),
    "alpha_pattern?": ({str: float}, None),
    "rank_pattern?": ({str: a_count}, None),
    "modules_to_save?": ([str], None),
    "target_modules?": ([str], str, None),
    "bias?": str,
    "init_lora_weights?": (bool, str, None),
    "base_model_name_or_path?": (str, None),
    "revision?": (str, None),
}


def read_adapter(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter.

    Raises:
        SourceError: there are none, or they are damaged.
    """
    path = folder / "adapter_config.json"
    settings = read_json(path)
    if settings is None:
        raise SourceError(f"{folder}: expected adapter_config.json of a PEFT adapter.")
    require_shape(path, settings, _SETTINGS, "Save or download the adapter again.")
    for option in ("alpha_pattern", "rank_pattern"):
        for pattern in settings.get(option) or {}:
            try:
                require_pattern(option, pattern)
            except ConfigError as error:
                raise SourceError(f"{path}: {error}") from error
    return {key: value for key, value in settings.items() if value is not None}


@dataclass(frozen=True)
class Lora(AbstractSource):
    """A PEFT LoRA adapter on a base."""

    path: str
    """Folder with adapter_config.json and adapter_model.safetensors, or a hub id."""
    base: AbstractSource
    """The base that the adapter was trained on."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    @override
    def open(self) -> Checkpoint:
        folder = HuggingFace(self.path, self.revision).local_folder()
        if not (folder / "adapter_model.safetensors").is_file():
            raise SourceError(
                f"{folder}: expected adapter_model.safetensors. If there is an adapter_model.bin, "
                "it is a pickle: save the adapter again with `save_pretrained(folder)` of a "
                "current PEFT."
            )
        return LoraCheckpoint(folder, self.base.open())
