"""Numbers that may differ from source to source and from tensor to tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gradmerge.errors import ConfigError

Setting = float | list[float] | dict[str, float | list[float]]
"""A number; a list with one a source, in their order; or either by regular expression of tensor
names, of which the first that matches counts (a whole name goes before all expressions)."""


def settle(who: str, setting: Setting, tensor: str, sources: Sequence[str]) -> list[float]:
    """The setting's number for each source at a tensor.

    Args:
        who: the option, for messages.
        setting: see `Setting`.
        tensor: the tensor's name.
        sources: names of the sources, in order.

    Raises:
        ConfigError: no expression matches the tensor, or a list is not as long as the sources are
            many.
    """
    if isinstance(setting, dict):
        if tensor in setting:
            setting = setting[tensor]
        else:
            found = next((key for key in setting if re.search(key, tensor)), None)
            if found is None:
                raise ConfigError(
                    f"{who}: no expression matches the tensor {tensor}; came {list(setting)[:5]}. "
                    "Add a last one for the rest: '.*'."
                )
            setting = setting[found]
    if not isinstance(setting, list):
        return [float(setting)] * len(sources)
    if len(setting) != len(sources):
        raise ConfigError(
            f"{who}: expected one value or {len(sources)} (for {', '.join(sources)}), came "
            f"{len(setting)}."
        )
    return [float(value) for value in setting]


def require_setting(
    who: str, setting: Setting, expected: str, holds: Callable[[float], bool]
) -> None:
    """Refuse a number that does not hold what is expected of it, or what is no expression.

    Raises:
        ConfigError: says which.
    """
    if isinstance(setting, dict):
        if not setting:
            raise ConfigError(f"{who}: expected at least one expression, came none.")
        for pattern, value in setting.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"{who}: {pattern!r} is no regular expression: {error}"
                ) from error
            require_setting(f"{who}[{pattern!r}]", value, expected, holds)
        return
    for value in setting if isinstance(setting, list) else [setting]:
        if not holds(float(value)):
            raise ConfigError(f"{who}: expected {expected}, came {value}.")
