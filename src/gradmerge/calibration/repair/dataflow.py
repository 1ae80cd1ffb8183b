"""Where the outputs of a network's layers go: into other layers, or out of the network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmerge.engine.install import LiveTensors

# What outputs of transformers hold beside predictions.
_BESIDE = re.compile(r"(hidden_states?|attentions?|past_key_values|cache_params|mems)$")
_PURGE = 4096


class Flow(TorchDispatchMode):
    """Follows layers' outputs through every operator until another layer takes them in.

    Tensors are told by their storage, so that views and writes in place are followed, too; what
    leaves torch (numpy, numbers) is lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        """Layers whose output reached another."""
        self.given: set[str] = set()
        """Layers whose output, as it was, the network gave out."""
        self._inside, self._made = LiveTensors(), LiveTensors()
        self._count = 0

    def enters(self, inputs: Any) -> None:
        """A layer takes these in."""
        self.read |= self._sources(inputs)

    def leaves(self, place: str, output: Any) -> None:
        """A layer gives this."""
        for tensor in _tensors(output):
            self._inside.add(tensor, frozenset({place}))
            self._made.add(tensor, (place, version(tensor)))

    def ends(self, output: Any) -> None:
        """The network gives this."""
        for tensor in outputs_of(output):
            made = self._made.find(tensor)
            if made is not None and made[1] == version(tensor):
                self.given.add(made[0])

    def _sources(self, values: Any) -> frozenset[str]:
        found = (self._inside.find(tensor) for tensor in _tensors(values))
        return frozenset().union(*(places for places in found if places))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator; what comes out, or is written to, holds what went in."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        places = self._sources((args, kwargs))
        if places:
            for tensor in (*_tensors(out), *_written(func, args, kwargs)):
                self._inside.add(tensor, places | (self._inside.find(tensor) or frozenset()))
        self._count += 1
        if self._count % _PURGE == 0:
            self._inside.purge()
            self._made.purge()
        return out


def _tensors(values: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if not tensor.is_sparse and tensor.device.type != "meta"]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    changed = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    return _tensors([named.get(name) for name in changed])


def outputs_of(out: Any) -> Iterable[Tensor]:
    """The tensors that a network gives, but for states and caches beside its predictions."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        predicts = any(str(name).startswith("logits") for name in out)
        for name, value in out.items():
            main = name == "last_hidden_state" and not predicts
            if main or not _BESIDE.search(str(name)):
                yield from outputs_of(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from outputs_of(value)
    elif dataclasses.is_dataclass(out):
        for field in dataclasses.fields(out):
            yield from outputs_of(getattr(out, field.name))


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
