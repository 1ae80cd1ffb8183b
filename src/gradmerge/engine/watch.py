"""A watch on a network's forward passes: merged weights must not be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmerge.common.errors import ConfigError
from gradmerge.engine.install import LiveTensors, require_stand_ins

_RECENT = 4
"""Tensors that are kept to see whether `.data` of them is replaced."""


class Watch(TorchDispatchMode):
    """Rejects writes to merged tensors within its context, before they happen.

    A merged tensor may be built anew whenever it is read, live for a step, or be the source's own,
    so a write would be lost, repeated or spoil the source. Every operation passes here, which takes
    time, so that only the first passes are watched.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._live = LiveTensors()
        self._recent: deque[tuple[str, Tensor, int]] = deque(maxlen=_RECENT)
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the engine write within the context."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def add(self, key: str, theta: Tensor) -> Tensor:
        """Watch a merged tensor, and return it."""
        self.check()
        self._live.add(theta, key)
        self._recent.append((key, theta, theta.untyped_storage()._cdata))
        return theta

    def check(self) -> None:
        """Reject replaced `.data` of tensors that were read last."""
        for key, theta, storage in self._recent:
            if theta.untyped_storage()._cdata != storage:
                _refuse(key, "data")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation that does not write to a merged tensor."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if not self._paused and schema is not None and schema.is_mutable:
            for number, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[number] if number < len(args) else kwargs.get(argument.name)
                    for tensor in tree_leaves(given):
                        key = self._live.find(tensor) if isinstance(tensor, Tensor) else None
                        if key is not None:
                            _refuse(key, schema.name.removeprefix("aten::"))
        return func(*args, **kwargs)


class Watches:
    """The watch on a network: the first pass of each kind is watched."""

    def __init__(self) -> None:
        self.current: Watch | None = None
        """The watch on the pass that runs, if it is watched."""
        self._watched: set[Hashable] = set()

    def run(
        self, network: nn.Module, kind: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a network, watched if it is the first time for this kind of pass.

        Raises:
            ConfigError: the network writes to its weights, or reads them in a way that does not see
                merged ones.
        """
        if kind in self._watched or self.current is not None:
            return network(*args, **kwargs)
        self.current = Watch()
        try:
            with self.current:
                output = network(*args, **kwargs)
            self.current.check()
        finally:
            self.current = None
        require_stand_ins(network)
        self._watched.add(kind)
        return output


def _refuse(key: str, name: str) -> None:
    raise ConfigError(
        f"{key}: expected a forward that leaves its weights as they are, got one that writes to "
        f"this one (`{name}`), so the merge would not be what is computed with.\n"
        "Compute with a copy in the network's code; for RWKV set `rescale_every: 0` in the config "
        "of every source."
    )
