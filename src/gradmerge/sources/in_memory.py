"""Sources that are already in memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from gradmerge.common.errors import SourceError, shorten
from gradmerge.sources.base import AbstractSource, Checkpoint, infos_of, without_aliases


class MemoryCheckpoint(Checkpoint):
    """Tensors of a module or a state dict; nothing is copied and nothing is ever written to."""

    def __init__(
        self, tensors: Mapping[str, Tensor], label: str, config: Mapping[str, Any] | None = None
    ) -> None:
        wrong = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
        if wrong:
            raise SourceError(
                f"{label}: expected tensors only, got other values under {shorten(wrong)}. "
                "Give only the module's state_dict()."
            )
        empty = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
        if empty:
            raise SourceError(
                f"{label}: expected weights, got tensors on the meta device, which have no values: "
                f"{shorten(empty)}. Load the weights first."
            )
        self._tensors = {name: tensor.detach() for name, tensor in without_aliases(tensors).items()}
        super().__init__(label, infos_of(self._tensors, label), config=config)

    @override
    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()

    @override
    def stored_as(self, name: str) -> Hashable | None:
        tensor = self._tensors[name]
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


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
        to_dict = getattr(getattr(self.module, "config", None), "to_dict", None)
        config = None if to_dict is None else to_dict()
        return MemoryCheckpoint(persistent_tensors(self.module), self.label, config)


def persistent_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters (tied ones once) and persistent buffers of a module, by name."""
    saved = set(module.state_dict(keep_vars=True))
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors.update({name: buffer for name, buffer in module.named_buffers() if name in saved})
    return tensors
