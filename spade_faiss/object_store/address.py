"""The address of a gallery in an object store, as s3://bucket/tiles.gallery."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import GalleryError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least: one is a drive of Windows
SLASHES = {"file": "///", "local": "///"}  # behind a scheme of paths from the root of this machine

_LocalPath: Any = type(Path())  # PosixPath or WindowsPath: before Python 3.12 nothing else can be subclassed


class Address(_LocalPath):  # type: ignore[misc]
    """A path in an object store, so that what names a gallery's files in messages names its objects as well.

    It keeps both slashes behind the scheme. No file system has it: what would open it as a file finds nothing.
    """

    def __str__(self) -> str:
        text = super().__str__()
        scheme, _, rest = text.partition(":/")
        return text if rest.startswith("/") else f"{scheme}:{SLASHES.get(scheme.lower(), '//')}{rest}"


def is_address(path: object) -> bool:
    """Return whether a path is that of a gallery in an object store: an Address, or text with a scheme."""
    return isinstance(path, Address) or (isinstance(path, str) and SCHEME.match(path) is not None)


def refuse_address(path: object) -> None:
    """Refuse a gallery in an object store where a folder is needed.

    Raises:
        GalleryError: the path is an address.
    """
    if is_address(path):
        raise GalleryError(
            f"{path}: expected a folder, found the address of an object store, which is read only; "
            "pull the gallery, work on the folder, and push what has changed"
        )
