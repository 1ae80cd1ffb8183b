"""Masks for secrets, which are never written: tokens, keys, passwords in addresses.

What is recorded of a merge or a run passes `to_plain`, configurations pass `masked`, and deliberate
errors pass `mask`. A masked token is not needed again: the login or the environment has it.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

MASK = "***"
_FIELDS = (
    "token|hf_?token|hub_?token|auth_?token|use_auth_token|access_?token|api_?token|api_?key|"
    "api_?secret|passwd|password|secret|secret_?key|client_?secret|access_?key|"
    "aws_secret_access_key|secret_?access_?key|session_?token|private_?key|authorization|"
    "credentials?|storage_options|connection_string"
)
_FIELD = re.compile(rf"({_FIELDS})", re.IGNORECASE)
_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/@'\"<>]+@", re.IGNORECASE)
# in the query of an address, also as signed addresses have it
_QUERY = re.compile(
    rf"([?&](?:{_FIELDS}|key|sig|signature|[\w-]*-(?:signature|credential|token))=)[^\s&#'\"]+",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|wandb_v\d+_\w{20,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[\w-]{32,}"
    r"|AKIA[0-9A-Z]{16})\b"
)
_GIVEN = re.compile(
    rf"(\b(?:{_FIELDS})['\"]?\s*[:=]\s*)(?!None\b|null\b|true\b|false\b|expected\b|\*\*\*)"
    r"('[^']+'|\"[^\"]+\"|\{[^{}]*\}|[^\s,;)}\]'\"]+)",
    re.IGNORECASE,
)
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
_LEAST = 8
_known: set[str] = set()


def remember(secret: str | None) -> None:
    """Mask a secret from now on, wherever it occurs."""
    if secret and len(secret) >= _LEAST:
        _known.add(secret)


def is_secret(field: str) -> bool:
    """Return True for the name of an option that holds a secret."""
    return _FIELD.fullmatch(field) is not None


def mask(text: str) -> str:
    """Return a text without the secrets in it: known ones, logins and keys in addresses.

    Examples:
        >>> mask("https://me:word@host/data.json?token=abc")
        'https://***@host/data.json?token=***'
    """
    known = [*_known, *(os.environ.get(name, "") for name in _ENVIRONMENT)]
    for secret in known:
        if len(secret) >= _LEAST:
            text = text.replace(secret, MASK)
    if "://" in text:
        text = _QUERY.sub(rf"\1{MASK}", _LOGIN.sub(rf"\1{MASK}@", text))
    return _SHAPES.sub(MASK, text)


def mask_given(text: str) -> str:
    """Return a text that quotes options without their secrets, e.g. those in `token: abc`."""
    return _GIVEN.sub(rf"\1{MASK}", mask(text))


def masked(value: Any, names: bool = False) -> Any:
    """Return nested plain data, or a parser's configuration, without the secrets in it.

    Args:
        value: mappings, namespaces, lists and scalars.
        names: the keys are names that the user has chosen.
    """
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {
            key: hidden(item, key)
            if not names and isinstance(key, str) and is_secret(key)
            else masked(item, key in ("sources", "heads", "tasks", "task_weights"))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked(item) for item in value]
    if isinstance(value, Namespace):
        return type(value)(**masked(vars(value), names))
    return value


def hidden(value: Any, field: str = "") -> Any:
    """Return what stands for a secret: a value of the same type, as parsers check it.

    A `token` is left out instead, because the login or the environment has another.
    """
    if isinstance(value, Mapping):
        return {key: hidden(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hidden(item) for item in value]
    if value is None or isinstance(value, (bool, float)):
        return value
    if field == "token":
        return None
    return 0 if isinstance(value, int) else MASK
