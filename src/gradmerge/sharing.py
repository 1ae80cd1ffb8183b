"""What a copy of a merge has in common with the original."""

from __future__ import annotations

from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
Self = TypeVar("Self", bound="Shared")


class Shared:
    """What is frozen, and may be as large as all sources: a deep copy of its owner shares it."""

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """Itself."""
        return self


class SharedDict(Shared, dict[Key, Value]):
    """Copies of frozen tensors, made when they are first wanted."""
