"""A tiny input for a network, to trace it with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

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
                f"came {name!r}. It takes {', '.join(known)}."
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
                f"[1, 3, 32, 32], or a tensor, came {value!r}."
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
