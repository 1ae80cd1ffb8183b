"""The folder of files that are only kept to save time."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder() -> Path | None:
    """Return a cache folder that only this user can write to, or None if there is none."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "gradmerge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_ours(folder.stat()):
            folder.chmod(0o700)  # fails if it is another's
    except (OSError, RuntimeError):  # no home folder, or not writable
        return None
    return folder if os.access(folder, os.W_OK) else None


def is_ours(found: os.stat_result) -> bool:
    """Return whether nobody but this user may have written a file or folder."""
    if not hasattr(os, "geteuid"):
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
