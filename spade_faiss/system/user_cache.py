"""The user's cache folder: what can be made again, and is kept as that takes long."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder of what is kept under a name, which need not exist.

    Raises:
        OSError: the user has no home folder.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return Path(base, "spade-faiss", name)
