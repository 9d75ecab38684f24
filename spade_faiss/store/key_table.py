"""Which ids a key may have, without the keys: their hashes, sorted. The text is compared with what the shard says.

The file is a NumPy array (2, n) of little-endian uint64: xxh3-64 of each key in UTF-8, ascending, and its id. It is
derived: whatever is wrong with it, the shards have the keys.
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

RECENT = 65_536  # rows that are merged into the others together: a commit must not cost a pass over all

Rows = NDArray[np.uint64]  # (2, n): hashes, ascending, and ids

NONE: Rows = np.empty((2, 0), "<u8")


def key_hash(key: bytes) -> int:
    """Return what a key in UTF-8 is sorted by."""
    return int(xxhash.xxh3_64_intdigest(key))


class KeyTable:
    """Rows by the hash of their key, removed ones included. It never changes, so threads may share it."""

    def __init__(self, rows: Rows = NONE, recent: Rows = NONE) -> None:
        self._rows = rows
        self._recent = recent  # ids above those of the others

    def __len__(self) -> int:
        return len(self._rows[0]) + len(self._recent[0])

    def candidates(self, keys: Sequence[str]) -> list[list[int]]:
        """Return for each key the ids of rows whose key has the same hash, and so may be the same."""
        # No key of a gallery has surrogates or is anything but text, yet it can be asked for.
        wanted = np.array([key_hash(str(key).encode(errors="surrogatepass")) for key in keys], np.uint64)
        found: list[list[int]] = [[] for _ in keys]
        for hashes, ids in (self._rows, self._recent):
            first, end = hashes.searchsorted(wanted, "left"), hashes.searchsorted(wanted, "right")
            for at in np.flatnonzero(first < end):
                found[at] += ids[first[at] : end[at]].tolist()
        return found

    def extended(self, keys: Iterable[bytes]) -> KeyTable:
        """Return it with further rows, of these keys in UTF-8, whose ids follow."""
        hashes = np.fromiter((key_hash(key) for key in keys), "<u8")
        order = np.argsort(hashes, kind="stable")
        new = np.stack([hashes[order], order.astype("<u8") + np.uint64(len(self))])
        recent = _merged(self._recent, new)
        if recent.shape[1] <= RECENT:
            return KeyTable(self._rows, recent)
        return KeyTable(_merged(self._rows, recent))

    def save(self, path: Path) -> tuple[int, str]:
        """Write its file; returns the size in bytes and the checksum (xxh3-64, hexadecimal)."""
        buffer = io.BytesIO()
        np.save(buffer, _merged(self._rows, self._recent), allow_pickle=False)
        content = buffer.getvalue()
        with storage_errors(f"cannot write {path}"):
            write_whole(path, content)
        return len(content), xxhash.xxh3_64_hexdigest(content)

    @classmethod
    def load(cls, path: Path, images: int, size: int, checksum: str) -> KeyTable:
        """Read its file.

        Raises:
            CorruptGalleryError: it is missing, or not what was written.
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
    """Return what the file begins with. NumPy's reader would make room for any shape that a header says."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u8", "fortran_order": False, "shape": (2, images)})
    return header.getvalue()


def _merged(rows: Rows, more: Rows) -> Rows:
    return np.insert(rows, rows[0].searchsorted(more[0], "right"), more, axis=1)
