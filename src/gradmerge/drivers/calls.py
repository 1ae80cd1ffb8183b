"""How a block is called: its hidden state, and the constants beside it (masks, positions).

Arguments are taken apart into a structure and a list of tensors, each once; what the block before
gave, the hidden state, is left open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmerge.errors import ConfigError

Slot = int | str
"""Where the hidden state stands among the arguments: its position, or its keyword."""

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(None))


class _Hidden:
    """Stands for the hidden state."""


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor of the list."""

    number: int


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without its hidden state."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def filled(
        self, hidden: Tensor, constants: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the block takes them."""
        args, kwargs = _filled((self.args, dict(self.kwargs)), hidden, constants)
        return args, kwargs


class Constants:
    """Tensors beside the hidden states of a batch; one that many blocks take is kept once."""

    def __init__(self) -> None:
        # kept alive here, so that no other tensor gets the identity of one of them
        self._found: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order in which they came."""
        return [tensor.detach() for tensor in self._found]

    def add(self, tensor: Tensor) -> _Place:
        """A place for a tensor, the same each time it comes."""
        number = self._numbers.setdefault(id(tensor), len(self._found))
        if number == len(self._found):
            self._found.append(tensor)
        return _Place(number)


def take_apart(
    block: str, slot: Slot, args: tuple[Any, ...], kwargs: Mapping[str, Any], constants: Constants
) -> Call:
    """A call as structure and constants.

    Raises:
        ConfigError: an argument is neither plain nor made of tensors.
    """
    for at, argument in arguments(args, kwargs):
        for path, leaf in leaves(said(at), argument):
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise ConfigError(
                    f"LayerWise: {block} is called with {path} of type {type(leaf).__name__}, "
                    "whose contents cannot be kept from batch to batch; expected tensors, numbers, "
                    "strings, None, and tuples, lists or dicts of them. Learn end to end."
                )

    kept = {
        at: _Hidden() if at == slot else _convert(v, constants) for at, v in arguments(args, kwargs)
    }
    return Call(tuple(kept[i] for i in range(len(args))), {key: kept[key] for key in kwargs})


def _convert(value: Any, constants: Constants) -> Any:
    if isinstance(value, Tensor):
        return constants.add(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return _like(value, [_convert(item, constants) for item in value])
    if isinstance(value, dict):
        return {key: _convert(item, constants) for key, item in value.items()}
    return value


def _filled(value: Any, hidden: Tensor, constants: Sequence[Tensor]) -> Any:
    if isinstance(value, _Hidden):
        return hidden
    if isinstance(value, _Place):
        return constants[value.number]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return _like(value, [_filled(item, hidden, constants) for item in value])
    if isinstance(value, dict):
        return {key: _filled(item, hidden, constants) for key, item in value.items()}
    return value


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Slot, Any]]:
    """Arguments with their positions or keywords."""
    yield from enumerate(args)
    yield from kwargs.items()


def said(slot: Slot) -> str:
    """An argument as messages name it."""
    return f"args[{slot}]" if isinstance(slot, int) else slot


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What an argument is made of, with the path to each."""
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for i, item in enumerate(value):
            yield from leaves(f"{path}[{i}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{path}[{key!r}]", item)
    else:
        yield path, value


def hidden_of(block: str, output: Any) -> Tensor:
    """The hidden state in a block's output: the tensor itself, or the first of several.

    Raises:
        ConfigError: there is none.
    """
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise ConfigError(
            f"LayerWise: {block} returned {type(output).__name__}, expected a tensor, or a tuple "
            "or an output of transformers that begins with one."
        )
    return first


def output_with(output: Any, hidden: Tensor) -> Any:
    """An output of the same form with another hidden state, and None for what else it held."""
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)(**{str(first): hidden})
    if isinstance(output, (tuple, list)):
        return _like(output, [hidden, *[None] * (len(output) - 1)])
    return hidden


def _like(value: Any, items: list[Any]) -> Any:
    """A tuple or list of the same kind."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
