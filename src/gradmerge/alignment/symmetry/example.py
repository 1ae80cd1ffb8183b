"""A tiny input for a network, to trace it with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradmerge.errors import ConfigError, nearest

_TOKENS = 6
_SIDES = (32, 28, 64, 16, 224, 8)


def candidates(skeleton: nn.Module, given: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Inputs by the name of the argument, the likeliest first.

    Args:
        skeleton: the network.
        given: tensors or shapes by name, which are taken as they are.

    Raises:
        ConfigError: nothing was given, and neither a config nor the first layer tells the shape.
    """
    generator = torch.Generator().manual_seed(0)
    if given is not None:
        yield _given(skeleton, given, generator)
        return
    config: Any = getattr(skeleton, "config", None)
    if config is not None and hasattr(skeleton, "main_input_name"):
        yield _from_config(skeleton, config, generator)
        return
    name = _first_argument(skeleton)
    shapes = _from_first_layer(skeleton)
    if name is None or shapes is None:
        raise ConfigError(
            f"alignment: neither a config nor the first layer of {type(skeleton).__name__} tells "
            "what it is called with. Give `example` of the alignment: shapes by the name of the "
            "argument, e.g. {x: [1, 3, 32, 32]}."
        )
    for shape, count in shapes:
        yield {name: _draw(shape, count, generator)}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _draw(shape: list[int], count: int, generator: torch.Generator) -> Tensor:
    if count:
        return torch.randint(count, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _arguments(skeleton: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(skeleton.forward)
    return [name for name, p in signature.parameters.items() if p.kind in kinds]


def _first_argument(skeleton: nn.Module) -> str | None:
    names = _arguments(skeleton)
    if type(skeleton).forward is nn.Sequential.forward:
        return "input"
    return names[0] if names else None


def _given(
    skeleton: nn.Module, given: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Any]:
    known = _arguments(skeleton)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"alignment.example: expected names of arguments of {type(skeleton).__name__}, "
                f"got {name!r}. It takes {', '.join(known)}."
            )
        if known and name not in known and "kwargs" not in str(inspect.signature(skeleton.forward)):
            raise ConfigError(
                f"alignment.example: {type(skeleton).__name__} is not called with {name!r}."
                f"{nearest(name, known)} It takes {', '.join(known)}."
            )
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)) and all(_is_size(n) for n in value):
            ids = name.endswith("ids")
            try:
                found[name] = _draw(list(value), _num_tokens(skeleton) if ids else 0, generator)
            except RuntimeError as error:
                raise ConfigError(
                    f"alignment.example: {name}: a tensor of shape {list(value)} cannot be made "
                    f"({str(error)[:120]}). A small one will do."
                ) from error
        else:
            raise ConfigError(
                f"alignment.example: {name}: expected a shape of positive numbers such as "
                f"[1, 3, 32, 32], or a tensor, got {value!r}."
            )
    return found


def _num_tokens(skeleton: nn.Module) -> int:
    tables = [m.num_embeddings for m in skeleton.modules() if isinstance(m, nn.Embedding)]
    return min(tables, default=2)


def _from_config(skeleton: nn.Module, config: Any, generator: torch.Generator) -> dict[str, Any]:
    """For a network of transformers: tokens, a picture, or both."""
    known = _arguments(skeleton)
    found: dict[str, Any] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if "input_ids" in known and isinstance(vocabulary, int):
        found["input_ids"] = _draw([1, _TOKENS], vocabulary, generator)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
            found["decoder_input_ids"] = _draw([1, _TOKENS - 1], vocabulary, generator)
    picture = getattr(config, "vision_config", config)
    if "pixel_values" in known:
        side = getattr(picture, "image_size", None) or 64
        sides = [side, side] if isinstance(side, int) else list(side)
        channels = getattr(picture, "num_channels", None) or 3
        found["pixel_values"] = _draw([1, channels, *sides], 0, generator)
    main = getattr(skeleton, "main_input_name", "")
    if main not in found:
        raise ConfigError(
            f"alignment: no rule tells what {main!r} of {type(skeleton).__name__} looks like. Give "
            f"`example` of the alignment: shapes by name, e.g. {{{main}: [1, 80, 3000]}}."
        )
    return found


def _from_first_layer(skeleton: nn.Module) -> list[tuple[list[int], int]] | None:
    """Shapes to try, each with the number of tokens (0: floating point)."""
    for module in skeleton.modules():
        if isinstance(module, nn.Embedding):
            return [([1, _TOKENS], module.num_embeddings)]
        if isinstance(module, nn.Linear):
            return [([1, module.in_features], 0), ([1, _TOKENS, module.in_features], 0)]
        if isinstance(module, nn.Conv1d):
            return [([1, module.in_channels, side], 0) for side in _SIDES]
        if isinstance(module, nn.Conv2d):
            return [([1, module.in_channels, side, side], 0) for side in _SIDES]
    return None


Example = Mapping[str, Any]
Found = TypeVar("Found")
_Axes = Mapping[str, Mapping[int, bool]]
"""Axes that are lengths, by argument, and whether each is a place of a picture."""

_SMALL_IDS, _SMALL_NUMBERS = 64, 4096
"""Entries of ids and of floating-point inputs up to which the example may also be enlarged."""
_SHORT, _SHORTER = 7, 5


def at_other_sizes(
    example: Example, attempt: Callable[[Example], Found]
) -> Iterator[tuple[Example, Found]]:
    """Two inputs of other sizes, as far as the network takes them, with their results.

    The first is a batch of one (of two, where the example is one) of half the length, at most 7.
    The second is a batch of three (of two, where the example is three): of twice the length and one
    more, where the example is small (64 ids, 4,096 numbers), else of 5 at most. A length is the
    second axis of tokens, one of the last two axes of floating-point inputs of three axes, and the
    places of larger ones (pictures, which get three quarters of each side; then half of it, or
    their own where they are small). What the network refuses is tried with another batch alone (of
    a large example at most two, the most that is run of it), then with another length alone.

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
    second = _longer if small else _shorter
    for batch, resize in ((1 if rows > 1 else 2, _short), (2 if rows == 3 else 3, second)):
        lengths = list(_lengths(example))
        tried = [_resized(example, rows, batch, axes, resize) for axes in lengths]
        if small or batch <= max(2, rows):
            tried.append(_resized(example, rows, batch, {}, resize))
        tried += [_resized(example, rows, rows, axes, resize) for axes in lengths]
        for other in tried:
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
        for names in (tensors, tokens):  # with masks in floating point, or without pictures
            yield {
                name: {i: False for i in range(1, value.ndim) if value.shape[i] in known}
                for name, value in tensors.items()
                if name in names
            }
        return
    for axis in (1, 2):
        found = {
            name: {axis: False} if value.ndim == 3 else dict.fromkeys(range(2, value.ndim), True)
            for name, value in tensors.items()
            if value.ndim > 2
        }
        if found:
            yield found


def _resized(
    example: Example, rows: int, batch: int, axes: _Axes, resize: Callable[[int, bool], int]
) -> Example:
    """Entries are left out at the end, or repeated from the start."""
    found: dict[str, Any] = {}
    for name, value in example.items():
        if isinstance(value, Tensor) and value.ndim:
            if len(value) == rows:
                value = _cycled(value, 0, batch)
            for axis, of_picture in axes.get(name, {}).items():
                value = _cycled(value, axis, resize(value.shape[axis], of_picture))
        found[name] = value
    return found


def _short(size: int, of_picture: bool) -> int:
    return max(1, size // 2 + size // 4 if of_picture else min(size // 2, _SHORT))


def _shorter(size: int, of_picture: bool) -> int:
    return max(1, size // 2 if of_picture else min(size // 2, _SHORTER))


def _longer(size: int, of_picture: bool) -> int:
    return size if of_picture else 2 * size + 1


def _cycled(value: Tensor, axis: int, size: int) -> Tensor:
    return value.index_select(axis, torch.arange(size) % value.shape[axis])
