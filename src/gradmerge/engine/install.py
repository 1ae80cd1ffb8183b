"""Handing merged tensors to any architecture without forking its code.

Every parameter of the skeleton becomes a property of its module, which asks the engine for the
tensor at each access. Modelling code, tied weights, weight access across modules, activation
checkpointing (the recomputation asks again, inside backward) and autocast go on as before.
`functional_call` would break under checkpointing: its swap is undone before backward recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradmerge.errors import ConfigError
from gradmerge.sources.skeleton import empty_like_parameter

Fetch = Callable[[str, bool], Tensor]
_SLOT = "_gradmerge_slots"
_classes: dict[tuple[type, tuple[str, ...]], type] = {}

# Modules whose weight autocast runs in the low-precision dtype.
_AUTOCAST = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


def install(
    skeleton: nn.Module,
    parameters: Mapping[str, tuple[str, ...]],
    fetch: Fetch,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Turn the skeleton's parameters into properties that call `fetch(key, autocast_weight)`.

    Args:
        skeleton: a network whose parameters hold no weights; changed in place.
        parameters: key -> every parameter name in the module that stands for it.
        fetch: gives the tensor; the flag says that autocast would cast it for its layer.
        dtype: dtype of the stand-ins that remain in `parameters()`, which take no memory.
        device: their device.
    """
    by_module: dict[str, dict[str, str]] = {}
    for key, places in parameters.items():
        for place in places:
            owner, _, attribute = place.rpartition(".")
            by_module.setdefault(owner, {})[attribute] = key
    for owner, attributes in by_module.items():
        module = skeleton.get_submodule(owner)
        casts = isinstance(module, _AUTOCAST) or type(module).__name__ == "Conv1D"
        module.__dict__[_SLOT] = {
            name: (fetch, key, casts and name in ("weight", "bias"))
            for name, key in attributes.items()
        }
        if isinstance(module, nn.RNNBase):
            # RNNs keep a flat list of their weights; fill it for the length of a call.
            module.register_forward_pre_hook(_fill_flat_weights)
        module.__class__ = _with_properties(type(module), tuple(sorted(attributes)))
    restamp(skeleton, dtype, device)


def restamp(skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give stand-ins and buffers their device (code reads `model.device` and `model.dtype`)."""
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = dtype if parameter.dtype.is_floating_point else parameter.dtype
                stand_in = empty_like_parameter(parameter, kind, device)
                module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def checkpoint_blocks(skeleton: nn.Module) -> None:
    """Have a transformers network recompute each block's activations in backward.

    Raises:
        ConfigError: the network does not support it.
    """
    enable: Any = getattr(skeleton, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(skeleton, "supports_gradient_checkpointing", True):
        raise ConfigError(
            f"{type(skeleton).__name__} offers no gradient checkpointing; leave it off or wrap its "
            "blocks with torch.utils.checkpoint yourself."
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _with_properties(cls: type, names: tuple[str, ...]) -> type:
    if (cls, names) not in _classes:
        namespace: dict[str, Any] = {name: property(_getter(name)) for name in names}
        namespace["__module__"] = cls.__module__
        _classes[cls, names] = type(cls.__name__, (cls,), namespace)
    return _classes[cls, names]


def _getter(name: str) -> Callable[[nn.Module], Tensor]:
    def get(module: nn.Module) -> Tensor:
        fetch, key, casts = module.__dict__[_SLOT][name]
        try:
            return fetch(key, casts)
        except AttributeError as error:
            # nn.Module.__getattr__ would swallow it and report a missing parameter instead
            raise RuntimeError(f"{name} of {type(module).__name__}: {error}") from error

    return get


def _fill_flat_weights(module: nn.Module, _: Any) -> None:
    names = module._flat_weights_names
    module._flat_weights = [getattr(module, name) for name in names]  # type: ignore[union-attr, assignment]


class LiveTensors:
    """Recognises merged tensors, and views of them, by their live storage.

    An address is not enough: the allocator reuses it, and a foreign tensor would be taken for a
    merged one. The weak reference keeps the storage's control block, so its address is not reused
    while the entry stands.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, Any]] = {}

    def __reduce__(self) -> tuple[type[LiveTensors], tuple[()]]:
        """A copy knows nothing: the references are to this one's tensors."""
        return LiveTensors, ()

    def add(self, tensor: Tensor, tag: Any) -> None:
        """Remember a tensor under a tag."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._entries[reference.cdata] = (reference, tag)

    def find(self, tensor: Tensor) -> Any | None:
        """The tag of the tensor whose storage this one shares."""
        if tensor.is_sparse or tensor.device.type == "meta":
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def purge(self) -> None:
        """Forget the dead."""
        self._entries = {k: e for k, e in self._entries.items() if not e[0].expired()}
