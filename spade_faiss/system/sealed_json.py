"""JSON files that show whether they were damaged or edited: a checksum of their values stands among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CorruptGalleryError

CHECKSUM = "xxh3"  # its name in the file


def sealed(values: Mapping[str, Any]) -> bytes:
    """Return values as a file's content, with their checksum."""
    return json.dumps({**values, CHECKSUM: _checksum(values)}, indent=1).encode()


def unsealed(content: bytes) -> tuple[Any, bool]:
    """Return the values of a file's content without their checksum, and whether they are those that were sealed.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    values = json.loads(content)
    if not isinstance(values, dict):
        return values, False
    found = values.pop(CHECKSUM, None)
    return values, found is not None and found == _checksum(values)


def read_sealed(path: Path, mend: str) -> Any:
    """Return the values of a file that `sealed` wrote; None: there is no file.

    Args:
        path: of the file.
        mend: what to do if it is damaged.

    Raises:
        CorruptGalleryError: it cannot be read, or is not what was written.
    """
    try:
        values, whole = unsealed(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptGalleryError(f"{path}: cannot be read: {error}; {mend}") from error
    if not whole:
        raise CorruptGalleryError(f"{path}: damaged or edited (checksum); {mend}")
    return values


def read_format(path: Path, format: str, version: int, mend: str) -> Any:
    """Return the values of a file that `sealed` wrote, without their format and version; None: there is no file.

    Args:
        path: of the file.
        format: that the file is to have.
        version: of the format.
        mend: what to do if it is damaged, or has another.

    Raises:
        CorruptGalleryError: as read_sealed, or it is of another format or version.
    """
    values = read_sealed(path, mend)
    if values is None:
        return None
    if (other := values.pop("format", None)) != format:
        raise CorruptGalleryError(f"{path}: expected a file of format {format!r}, found {other!r}; {mend}")
    if (found := values.pop("format_version", None)) != version:
        raise CorruptGalleryError(f"{path}: expected format version {version}, found {found}; {mend}")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
