"""Tiny inputs for a network: to trace it with, and to check it in other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError, nearest

_TOKENS = 6
_SIDES = (32, 28, 64, 16, 224, 8)


def candidates(skeleton: nn.Module, given: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield inputs by the name of the argument, the likeliest first.

    Args:
        skeleton: the network.
        given: tensors or shapes by name, the only candidate if there are any.

    Raises:
        ConfigError: nothing was given, and neither a config nor the first layer tells the shape.
    """
    generator = torch.Generator().manual_seed(0)
    if given is not None:
        yield _given(skeleton, given, generator)
        return
    if getattr(skeleton, "config", None) is not None and hasattr(skeleton, "main_input_name"):
        yield _from_config(skeleton, generator)
        return
    names, shapes = _arguments(skeleton), list(_from_first_layer(skeleton))
    if not names or not shapes:
        raise ConfigError(
            f"alignment: neither a config nor the first layer of {type(skeleton).__name__} tells "
            "the shape of its input.\nGive `example` of the alignment: shapes by the name of the "
            "argument, e.g. {x: [1, 3, 32, 32]}."
        )
    for shape, tokens in shapes:
        yield {names[0]: _draw(shape, tokens, generator)}


def _draw(shape: Sequence[int], tokens: int, generator: torch.Generator) -> Tensor:
    """Ids below a number of tokens, or floating-point numbers for 0."""
    if tokens:
        return torch.randint(tokens, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _arguments(skeleton: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(skeleton.forward)
    return [name for name, p in signature.parameters.items() if p.kind in kinds]


def _given(
    skeleton: nn.Module, given: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Any]:
    known, kind = _arguments(skeleton), type(skeleton).__name__
    takes_any = not known or "kwargs" in str(inspect.signature(skeleton.forward))
    tables = [m.num_embeddings for m in skeleton.modules() if isinstance(m, nn.Embedding)]
    found: dict[str, Any] = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"alignment.example: expected names of arguments of {kind}, got {name!r}. It takes "
                f"{', '.join(known)}."
            )
        if name not in known and not takes_any:
            raise ConfigError(
                f"alignment.example: {kind} is not called with {name!r}.{nearest(name, known)} It "
                f"takes {', '.join(known)}."
            )
        if isinstance(value, Tensor):
            found[name] = value
            continue
        if not isinstance(value, (list, tuple)) or not all(type(n) is int and n > 0 for n in value):
            raise ConfigError(
                f"alignment.example: {name}: expected a shape of positive numbers such as "
                f"[1, 3, 32, 32], or a tensor, got {value!r}."
            )
        try:
            tokens = min(tables, default=2) if name.endswith("ids") else 0
            found[name] = _draw(value, tokens, generator)
        except RuntimeError as error:
            raise ConfigError(
                f"alignment.example: {name}: a tensor of shape {list(value)} cannot be made "
                f"({str(error)[:120]}). A small one is enough."
            ) from error
    return found


def _from_config(skeleton: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """For a network of transformers: tokens, a picture, or both."""
    known, main = _arguments(skeleton), skeleton.main_input_name
    config: Any = skeleton.config
    found: dict[str, Any] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if "input_ids" in known and isinstance(vocabulary, int):
        found["input_ids"] = _draw([1, _TOKENS], vocabulary, generator)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
            found["decoder_input_ids"] = _draw([1, _TOKENS - 1], vocabulary, generator)
    if "pixel_values" in known:
        picture = getattr(config, "vision_config", config)
        side = getattr(picture, "image_size", None) or 64
        sides = [side, side] if isinstance(side, int) else list(side)
        channels = getattr(picture, "num_channels", None) or 3
        found["pixel_values"] = _draw([1, channels, *sides], 0, generator)
    if main not in found:
        raise ConfigError(
            f"alignment: no rule tells the shape of {main!r} of {type(skeleton).__name__}. Give "
            f"`example` of the alignment: shapes by name, e.g. {{{main}: [1, 80, 3000]}}."
        )
    return found


def _from_first_layer(skeleton: nn.Module) -> Iterator[tuple[list[int], int]]:
    """Shapes to try, each with the number of tokens (0: floating point)."""
    kinds = (nn.Embedding, nn.Linear, nn.Conv1d, nn.Conv2d)
    first = next((module for module in skeleton.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Embedding):
        yield [1, _TOKENS], first.num_embeddings
    elif isinstance(first, nn.Linear):
        yield [1, first.in_features], 0
        yield [1, _TOKENS, first.in_features], 0
    elif first is not None:
        for side in _SIDES:
            yield [1, first.in_channels, *[side] * len(first.kernel_size)], 0


Example = Mapping[str, Any]
Found = TypeVar("Found")
_Axes = Mapping[str, Mapping[int, bool]]
"""Axes that are lengths, by argument, and whether each is a place of a picture."""

_SMALL_IDS, _SMALL_NUMBERS = 64, 4096
"""Entries of ids and of floating-point inputs up to which the example may also be enlarged."""


def at_other_sizes(
    example: Example, attempt: Callable[[Example], Found]
) -> Iterator[tuple[Example, Found]]:
    """Yield two inputs of other sizes, as far as the network takes them, with their results.

    The first is a batch of one (of two, where the example is one) of half the length, at most 7.
    The second is a batch of three (of two, where the example is three): of twice the length and one
    more, where the example is small (64 ids, 4,096 numbers), else of 5 at most. A length is the
    second axis of tokens, one of the last two axes of floating-point inputs of three axes, and the
    places of larger ones (pictures, which get three quarters of each side; then half of it, or
    their own where they are small). A size that the network refuses is tried with another batch
    alone (of a large example at most two, the most that is run of it), then with another length
    alone.

    Args:
        example: arguments of the network's forward by name.
        attempt: runs the network; raises where it refuses an input.
    """
    tensors = [value for value in example.values() if isinstance(value, Tensor) and value.ndim]
    rows = len(tensors[0]) if tensors else 0
    if not rows:
        return
    small = all(
        t.numel() <= (_SMALL_NUMBERS if t.is_floating_point() else _SMALL_IDS) for t in tensors
    )
    lengths = list(_lengths(example))
    # share of a picture's side, and the largest of other lengths (0: twice the length and one more)
    second = (1.0, 0) if small else (0.5, 5)
    for batch, limits in ((1 if rows > 1 else 2, (0.75, 7)), (2 if rows == 3 else 3, second)):
        sizes = [(batch, axes) for axes in lengths]
        if small or batch <= max(2, rows):
            sizes.append((batch, {}))
        sizes += [(rows, axes) for axes in lengths]
        for count, axes in sizes:
            other = _resized(example, rows, count, axes, *limits)
            try:
                found = attempt(other)
            except Exception:  # whatever a network raises on a size that is not its own
                continue
            yield other, found
            break


def _lengths(example: Example) -> Iterator[_Axes]:
    """Axes that may be lengths, by argument."""
    tensors = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    tokens = {name: t for name, t in tensors.items() if not t.is_floating_point() and t.ndim > 1}
    if tokens:
        known = {value.shape[1] for value in tokens.values()}
        for group in (tensors, tokens):  # with masks in floating point, or without pictures
            yield {
                name: {i: False for i in range(1, value.ndim) if value.shape[i] in known}
                for name, value in group.items()
            }
        return
    larger = {name: value for name, value in tensors.items() if value.ndim > 2}
    for axis in (1, 2) if larger else ():
        yield {
            name: {axis: False} if value.ndim == 3 else dict.fromkeys(range(2, value.ndim), True)
            for name, value in larger.items()
        }


def _resized(
    example: Example, rows: int, batch: int, axes: _Axes, share: float, most: int
) -> Example:
    """Entries are left out at the end, or repeated from the start."""
    found: dict[str, Any] = {}
    for name, value in example.items():
        if isinstance(value, Tensor) and value.ndim:
            if len(value) == rows:
                value = _cycled(value, 0, batch)
            for axis, of_picture in axes.get(name, {}).items():
                size = value.shape[axis]
                other = min(size // 2, most) if most else 2 * size + 1
                value = _cycled(value, axis, max(1, int(size * share) if of_picture else other))
        found[name] = value
    return found


def _cycled(value: Tensor, axis: int, size: int) -> Tensor:
    return value.index_select(axis, torch.arange(size) % value.shape[axis])
