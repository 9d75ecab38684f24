"""Maps keys to candidate ids by a sorted hash table. The caller compares the key with the one in the shard.

The file is a NumPy array (2, n) of little-endian uint64: xxh3-64 of each key in UTF-8, ascending, and its id. It can
be rebuilt from the shards at any time.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptGalleryError
from ..system.atomic_files import storage_errors, write_whole

RECENT = 65_536  # rows kept apart until so many can be merged at once: a commit must not cost a pass over all rows

Rows = NDArray[np.uint64]  # (2, n): hashes, ascending, and ids

NONE: Rows = np.empty((2, 0), "<u8")


def key_hash(key: bytes) -> int:
    """Return the hash of a key in UTF-8."""
    return int(xxhash.xxh3_64_intdigest(key))


class KeyTable:
    """Rows by the hash of their keys, removed rows included. It never changes, so threads may share it."""

    def __init__(self, rows: Rows = NONE, recent: Rows = NONE) -> None:
        self._rows = rows
        self._recent = recent  # newer rows, with higher ids

    def __len__(self) -> int:
        return len(self._rows[0]) + len(self._recent[0])

    def hashes(self) -> Rows:
        """Return the hashes of all keys, ascending, and their ids, (2, n)."""
        return _merged(self._rows, self._recent)

    def candidates(self, keys: Sequence[str]) -> list[list[int]]:
        """Return for each key the ids of rows whose key has the same hash."""
        # Callers may ask for keys that no gallery can hold: other types, or text with surrogates.
        wanted = np.array([key_hash(str(key).encode(errors="surrogatepass")) for key in keys], np.uint64)
        found: list[list[int]] = [[] for _ in keys]
        for hashes, ids in (self._rows, self._recent):
            first, end = hashes.searchsorted(wanted, "left"), hashes.searchsorted(wanted, "right")
            for at in np.flatnonzero(first < end):
                found[at] += ids[first[at] : end[at]].tolist()
        return found

    def extended(self, keys: Iterable[bytes]) -> KeyTable:
        """Return a table with further rows, whose ids follow; `keys` are theirs in UTF-8."""
        hashes = np.fromiter((key_hash(key) for key in keys), "<u8")
        order = np.argsort(hashes, kind="stable")
        new = np.stack([hashes[order], order.astype("<u8") + np.uint64(len(self))])
        recent = _merged(self._recent, new)
        if recent.shape[1] <= RECENT:
            return KeyTable(self._rows, recent)
        return KeyTable(_merged(self._rows, recent))

    def save(self, path: Path) -> tuple[int, str]:
        """Write the table's file; returns its size in bytes and its checksum (xxh3-64, hexadecimal)."""
        buffer = io.BytesIO()
        np.save(buffer, _merged(self._rows, self._recent), allow_pickle=False)
        content = buffer.getvalue()
        with storage_errors(f"cannot write {path}"):
            write_whole(path, content)
        return len(content), xxhash.xxh3_64_hexdigest(content)

    @classmethod
    def load(cls, path: Path, images: int, size: int, checksum: str) -> KeyTable:
        """Read a table's file.

        Args:
            path: the file.
            images: number of its rows.
            size: of the file, in bytes.
            checksum: that save returned.

        Raises:
            CorruptGalleryError: the file is missing, or not what was written.
        """
        try:
            found = path.stat().st_size
            if found != size:
                raise CorruptGalleryError(f"{path}: expected {size} bytes, found {found}")
            content = path.read_bytes()
        except OSError as error:
            raise CorruptGalleryError(f"{path}: cannot be read: {error.strerror or error}") from error
        if (digest := xxhash.xxh3_64_hexdigest(content)) != checksum:
            raise CorruptGalleryError(f"{path}: expected checksum {checksum}, found {digest}")
        header = _header(images)
        if not content.startswith(header) or len(content) != len(header) + 16 * images:
            raise CorruptGalleryError(f"{path}: expected an array (2, {images}) uint64, found something else")
        rows = np.frombuffer(content, "<u8", offset=len(header)).reshape(2, images)
        hashes, ids = rows
        if (hashes[1:] < hashes[:-1]).any() or (ids >= images).any():
            raise CorruptGalleryError(f"{path}: expected ascending hashes, and ids below {images}, found others")
        return cls(rows)


def _header(images: int) -> bytes:
    """Return how the file begins. NumPy's own reader would allocate memory for any shape that a header claims."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u8", "fortran_order": False, "shape": (2, images)})
    return header.getvalue()


def _merged(rows: Rows, more: Rows) -> Rows:
    return np.insert(rows, rows[0].searchsorted(more[0], "right"), more, axis=1)
