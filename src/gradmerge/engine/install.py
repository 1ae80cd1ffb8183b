"""Installation of merged tensors in any architecture, without changes to its code.

What a parameter leaves behind in `parameters()` is a stand-in that has no numbers, so that nothing
computes with it unnoticed.

Every parameter of the skeleton becomes a property of its module that fetches the tensor from the
engine at each access. Modelling code, tied weights, access to other modules' weights, autocast and
activation checkpointing (recomputation fetches again, inside backward) work unchanged.
`functional_call` would break under checkpointing: it restores the parameters before backward
recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gradmerge.common.errors import ConfigError
from gradmerge.sources.skeleton import empty_like_parameter

Fetch = Callable[[str, bool], Tensor]
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
_SLOT = "_gradmerge_slots"
_HELD = "_gradmerge_held"
_AGAIN = "_gradmerge_again"
_classes: dict[tuple[type, tuple[str, ...]], type] = {}
_checkpointed: dict[type, type] = {}

# Modules whose weights autocast casts to its low-precision dtype.
_AUTOCAST = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)


# What may be asked of a stand-in: everything but numbers.
_HARMLESS = {
    *("shape", "size", "dim", "ndim", "numel", "nelement", "__len__", "stride", "storage_offset"),
    *("is_contiguous", "dtype", "type", "itemsize", "element_size", "nbytes", "device"),
    *("get_device", "layout", "names", "is_floating_point", "is_complex", "is_quantized"),
    *("is_sparse", "is_nested", "is_mkldnn", "is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu"),
    *("is_leaf", "is_inference", "requires_grad", "requires_grad_", "grad", "grad_fn", "_version"),
}


class StandIn(nn.Parameter):
    """The rest of a replaced parameter in `parameters()`: its shape, dtype and device.

    Raises:
        ConfigError: something reads or writes its numbers.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer questions about the tensor; reject the rest by its name."""
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        if name in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        found = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn))
        raise ConfigError(
            f"{found.place}: expected the network's forward to read it as an attribute of its "
            f"module, got `{name}` of what `parameters()`, `state_dict()` or `_parameters` holds.\n"
            "A merge gives each module its merged weights as attributes; change the network's "
            "code to read `module.weight` there."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        """Return itself, for it never changes."""
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name it."""
        return f"StandIn({self.place})"

    @classmethod
    def of(cls, place: str, parameter: Tensor, dtype: torch.dtype, device: torch.device) -> StandIn:
        """Make the stand-in of a parameter."""
        with torch._C.DisableTorchFunctionSubclass():
            found = cls(empty_like_parameter(parameter, dtype, device), requires_grad=False)
        found.place = place
        return found

    place: str
    """Name of the parameter in the network."""


def install(
    skeleton: nn.Module,
    parameters: Mapping[str, tuple[str, ...]],
    fetch: Fetch,
) -> None:
    """Turn the skeleton's parameters into properties that call `fetch(key, autocast_weight)`.

    Args:
        skeleton: a network whose parameters hold no weights; changed in place.
        parameters: every parameter name in the skeleton that refers to a key, by key.
        fetch: function that returns the tensor of a key; the flag tells it that autocast would cast
            the tensor for its layer.
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
        if reads_often(module):
            module.register_forward_pre_hook(_hold)
            module.register_forward_hook(_release, always_call=True)
        if isinstance(module, nn.RNNBase):
            # RNNs read their weights from a flat list; refill it before every call.
            module.register_forward_pre_hook(_fill_flat_weights)
        module.__class__ = _with_properties(type(module), tuple(sorted(attributes)))


def reads_often(module: nn.Module) -> bool:
    """Return whether a module may read a weight once for each of the experts stacked in it."""
    own = [parameter.dim() for parameter in module.parameters(recurse=False)]
    return max(own, default=0) > 2 and not type(module).__module__.startswith("torch.")


def _hold(module: nn.Module, _: Any) -> None:
    module.__dict__.setdefault(_HELD, {})[get_ident()] = {}  # passes of tasks may take turns


def _release(module: nn.Module, *_: Any) -> None:
    module.__dict__.get(_HELD, {}).pop(get_ident(), None)


def restamp(skeleton: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Replace what remains in `parameters()` by stand-ins of a dtype (by place) and a device.

    They take no memory. Modelling code reads `model.device` and `model.dtype` from them.
    """
    for path, module in skeleton.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                place = f"{path}.{name}" if path else name
                module._parameters[name] = StandIn.of(place, parameter, dtypes[place], device)


def checkpoint_blocks(skeleton: nn.Module, contexts: Contexts) -> None:
    """Make a network recompute the activations of transformers' checkpointable layers in backward.

    transformers itself does so only in training mode, which would turn dropout, layer drop and
    router noise on. Here every module stays in evaluation mode.

    Args:
        skeleton: the network; changed in place.
        contexts: called by each pass; returns the contexts of the pass and of its recomputation.

    Raises:
        ConfigError: the network does not support activation checkpointing.
    """
    blocks: list[Any] = []
    if getattr(skeleton, "supports_gradient_checkpointing", True):
        blocks = [module for module in skeleton.modules() if _is_checkpointable(module)]
        # the stages of some networks are layers of layers, whose insides would run three times
        blocks = [block for block in blocks if not any(map(_is_checkpointable, _below(block)))]
    if not blocks:
        raise ConfigError(
            "activation_checkpointing: expected a network of transformers' checkpointable layers, "
            f"got {type(skeleton).__name__}, which has none.\n"
            "Leave the option off, or wrap the blocks with torch.utils.checkpoint."
        )
    for block in blocks:
        block.__dict__[_AGAIN] = contexts
        block.__class__ = _with_checkpoint(type(block))
    for module in skeleton.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # recomputation would write to the cache again


def _below(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if inner is not module)


def _is_checkpointable(module: nn.Module) -> bool:
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:
        return False
    return isinstance(module, GradientCheckpointingLayer)


def _with_checkpoint(cls: Any) -> type:
    if cls in _checkpointed:
        return _checkpointed[cls]
    plain = cls.forward

    @wraps(plain)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        writes = any("Cache" in type(value).__name__ for value in (*args, *kwargs.values()))
        if writes or not torch.is_grad_enabled():
            return plain(module, *args, **kwargs)
        run, contexts = partial(plain, module), module.__dict__[_AGAIN]
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    names = {"forward": forward, "__module__": cls.__module__}
    _checkpointed[cls] = type(cls.__name__, (cls,), names)
    return _checkpointed[cls]


def _with_properties(cls: type, names: tuple[str, ...]) -> type:
    if (cls, names) not in _classes:
        namespace: dict[str, Any] = {
            name: property(_getter(name), partial(_refuse_assignment, name)) for name in names
        }
        namespace["__module__"] = cls.__module__
        _classes[cls, names] = type(cls.__name__, (cls,), namespace)
    return _classes[cls, names]


def _getter(name: str) -> Callable[[nn.Module], Tensor]:
    def get(module: nn.Module) -> Tensor:
        own = module.__dict__["_parameters"].get(name)
        if type(own) is not StandIn and own is not None:
            return own  # put there by the network's own code (`functional_call`)
        fetch, key, casts = module.__dict__[_SLOT][name]
        held = module.__dict__.get(_HELD, {}).get(get_ident(), {})
        if name in held:
            return held[name]
        try:
            held[name] = fetch(key, casts)
            return held[name]
        except AttributeError as error:
            # nn.Module.__getattr__ would swallow this and report a missing parameter instead
            raise RuntimeError(f"{name} of {type(module).__name__}: {error}") from error

    return get


def _refuse_assignment(name: str, module: nn.Module, _: object) -> None:
    raise ConfigError(
        f"{type(module).__name__}: expected a forward that leaves its weights as they are, got "
        f"one that assigns to {name}, which a merge provides.\n"
        "Compute with a variable of its own there instead."
    )


def require_stand_ins(skeleton: nn.Module) -> None:
    """Reject a network whose forward has put parameters of its own in the place of merged ones.

    Raises:
        ConfigError: a parameter was replaced.
    """
    for path, module in skeleton.named_modules():
        for name in module.__dict__.get(_SLOT, ()):
            if type(module._parameters.get(name)) is not StandIn:
                _refuse_assignment(f"{path}.{name}" if path else name, module, None)


def _fill_flat_weights(module: nn.Module, _: Any) -> None:
    names = module._flat_weights_names
    module._flat_weights = [getattr(module, name) for name in names]  # type: ignore[union-attr, assignment]


class LiveTensors:
    """Registry that recognises merged tensors, and views of them, by their live storage.

    A data address alone is not enough: the allocator reuses addresses, so another tensor could be
    mistaken for a merged one. The weak reference keeps the storage's control block alive, so that
    its address is not reused while the entry exists.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[StorageWeakRef, Any]] = {}

    def __reduce__(self) -> tuple[type[LiveTensors], tuple[()]]:
        """Copy as an empty registry: the references are to this object's tensors."""
        return LiveTensors, ()

    def add(self, tensor: Tensor, tag: Any) -> None:
        """Register a tensor under a tag."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._entries[reference.cdata] = (reference, tag)

    def find(self, tensor: Tensor) -> Any | None:
        """Return the tag of the registered tensor that shares this tensor's storage, or None."""
        if tensor.is_sparse or tensor.device.type == "meta":
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def purge(self) -> None:
        """Remove entries whose storage has been freed."""
        self._entries = {k: e for k, e in self._entries.items() if not e[0].expired()}
