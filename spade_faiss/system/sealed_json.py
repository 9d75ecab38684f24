"""JSON files that show whether they were damaged or edited: a checksum of their values stands among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

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


def _checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())
