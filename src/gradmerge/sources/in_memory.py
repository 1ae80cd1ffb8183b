"""Sources that already live in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from gradmerge.errors import SourceError, shorten
from gradmerge.sources.base import AbstractSource, Checkpoint, TensorInfo, without_aliases


class MemoryCheckpoint(Checkpoint):
    """Tensors of a module or a state dict; nothing is copied and nothing is ever written to."""

    def __init__(
        self, tensors: Mapping[str, Tensor], label: str, config: Mapping[str, Any] | None = None
    ) -> None:
        wrong = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
        if wrong:
            raise SourceError(
                f"{label}: expected tensors only, got other values under {shorten(wrong)}."
            )
        empty = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
        if empty:
            raise SourceError(
                f"{label}: expected weights, got tensors on the meta device, which hold none: "
                f"{shorten(empty)}. Load the weights first."
            )
        self._tensors = {name: tensor.detach() for name, tensor in without_aliases(tensors).items()}
        self._label = label
        self._config = config

    @property
    @override
    def label(self) -> str:
        return self._label

    @property
    @override
    def config(self) -> Mapping[str, Any] | None:
        return self._config

    @property
    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(name, tuple(tensor.shape), tensor.dtype, self._label)
            for name, tensor in self._tensors.items()
        }

    @override
    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


@dataclass(frozen=True)
class InMemory(AbstractSource):
    """An `nn.Module` or a state dict from Python."""

    module: nn.Module | Mapping[str, Tensor] = field(repr=False)
    """The module or state dict. Tied tensors appear once, under their first name."""
    label: str = "in memory"
    """Name that messages show."""

    @override
    def open(self) -> Checkpoint:
        if not isinstance(self.module, nn.Module):
            return MemoryCheckpoint(self.module, self.label)
        config = getattr(self.module, "config", None)
        plain = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
        return MemoryCheckpoint(persistent_tensors(self.module), self.label, plain)


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers of a module, by name."""
    saved = set(module.state_dict(keep_vars=True))
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors.update({name: buffer for name, buffer in module.named_buffers() if name in saved})
    return tensors
