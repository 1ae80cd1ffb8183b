"""A LoRA adapter folder (PEFT) on a base: the dense tensor is formed when it is asked for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmerge.errors import SourceError, nearest, shorten
from gradmerge.sources.base import AbstractSource, Checkpoint, TensorInfo
from gradmerge.sources.files import SafetensorsCheckpoint, read_json

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")


class LoraCheckpoint(Checkpoint):
    """`W = W_0 + s * B @ A` for adapted tensors, the base's own tensor for all others.

    `s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with rank-stabilised LoRA; `rank_pattern` and
    `alpha_pattern` are honoured per module, transposed layers (`fan_in_fan_out`), embeddings and
    convolutions too. Only the factors are held beside the base (Hu et al. 2021, arXiv 2106.09685;
    file format of the PEFT library).
    """

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        self._folder_adapter = folder
        self._base = base
        settings = read_json(folder / "adapter_config.json")
        if settings is None:
            raise SourceError(f"{folder}: expected adapter_config.json of a PEFT adapter.")
        self._settings = settings
        self._refuse_unsupported()
        self._adapter = SafetensorsCheckpoint([folder / "adapter_model.safetensors"], str(folder))
        self._factors: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        self._index()

    def _refuse_unsupported(self) -> None:
        kind = self._settings.get("peft_type", "LORA")
        problems = []
        if kind != "LORA":
            problems.append(f"peft_type is {kind}, expected LORA")
        if self._settings.get("use_dora"):
            problems.append("use_dora is true: its update is not a low-rank sum")
        if self._settings.get("bias", "none") not in ("none", "all", "lora_only"):
            problems.append(f"bias is {self._settings['bias']!r}")
        if problems:
            raise SourceError(
                f"{self._folder_adapter}: {'; '.join(problems)}. Merge the adapter into its base "
                "with PEFT (`model.merge_and_unload().save_pretrained(folder)`) and give that folder."
            )

    def _index(self) -> None:
        unknown = []
        for key in self._adapter.infos:
            name = key.removeprefix(_PREFIX)
            match = _FACTOR.match(name)
            if match is None:
                target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                if target in self._base.infos:
                    self._replaced[target] = key
                else:
                    unknown.append(key)
                continue
            target = self._target(match["module"])
            if target is None:
                unknown.append(key)
                continue
            side = match["side"] if not match["kind"] else f"embedding_{match['side']}"
            self._factors.setdefault(target, {})[side] = key
        if unknown:
            raise SourceError(
                f"{self._folder_adapter}: these tensors belong to no tensor of the base "
                f"{self._base.label}: {shorten(unknown)}."
                f"{nearest(unknown[0], self._base.infos)} Is this the adapter's own base?"
            )

    def _target(self, module: str) -> str | None:
        """The base tensor that a LoRA module adapts; a missing head-model prefix is tolerated."""
        for candidate in (f"{module}.weight", module):
            if candidate in self._base.infos:
                return candidate
            inner = candidate.split(".", 1)[-1]
            if inner in self._base.infos:
                return inner
        return None

    @property
    def label(self) -> str:
        """See `Checkpoint.label`."""
        return f"{self._folder_adapter} on {self._base.label}"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """See `Checkpoint.infos`."""
        return self._base.infos

    @property
    def folder(self) -> Path | None:
        """See `Checkpoint.folder`."""
        return self._base.folder

    @property
    def config(self) -> Mapping[str, Any] | None:
        """See `Checkpoint.config`."""
        return self._base.config

    def scale(self, target: str, rank: int) -> float:
        """`s` of one adapted tensor."""
        module = target.removesuffix(".weight")
        alpha = _by_pattern(self._settings.get("alpha_pattern"), module)
        alpha = self._settings["lora_alpha"] if alpha is None else alpha
        return float(alpha) / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`; an adapted tensor is formed in float32 and kept there."""
        if name in self._replaced:
            return self._adapter.read(self._replaced[name])
        base = self._base.read(name)
        if name not in self._factors:
            return base
        return (base.float() + self.delta(name)).contiguous()

    def delta(self, name: str) -> Tensor:
        """`s * B @ A` in the orientation and shape of the base tensor, float32."""
        factors = self._factors[name]
        shape = self._base.infos[name].shape
        if "embedding_A" in factors:
            first = self._adapter.read(factors["embedding_A"]).float()
            second = self._adapter.read(factors["embedding_B"]).float()
            return self.scale(name, first.shape[0]) * (second @ first).T
        first = self._adapter.read(factors["A"]).float()
        second = self._adapter.read(factors["B"]).float()
        rank = first.shape[0]
        product = self.scale(name, rank) * (second.reshape(-1, rank) @ first.reshape(rank, -1))
        if self._settings.get("fan_in_fan_out"):
            product = product.T
        return product.reshape(shape)

    def fingerprint(self) -> str:
        """Hash of the base's fingerprint, the factors and the settings that scale them."""
        digest = hashlib.sha256(self._base.fingerprint().encode())
        digest.update(self._adapter.fingerprint().encode())
        for key in ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out"):
            digest.update(f"{key}={self._settings.get(key)}".encode())
        return digest.hexdigest()


def _by_pattern(patterns: Mapping[str, Any] | None, module: str) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None


@dataclass(frozen=True)
class Lora(AbstractSource):
    """A PEFT LoRA adapter folder on a base."""

    path: str
    """Folder with adapter_config.json and adapter_model.safetensors."""
    base: AbstractSource
    """The base that the adapter was trained on."""

    def open(self) -> Checkpoint:
        """See `AbstractSource.open`."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise SourceError(f"{self.path}: expected the folder of a PEFT adapter, none exists there.")
        if not (folder / "adapter_model.safetensors").is_file():
            raise SourceError(
                f"{folder}: expected adapter_model.safetensors. An adapter_model.bin is a pickle; "
                "save the adapter again with `save_pretrained(folder)` of a current PEFT."
            )
        return LoraCheckpoint(folder, self.base.open())


