"""A shard without its levels: names, image features, checksums, and where each level lies, a fiftieth of its bytes.

The object holds the parts of the shard's file between the levels, so that HDF5 and RowReader read from it as from the
shard. Levels are then read from the shard itself, by their ranges.

Layout: MAGIC, 8 bytes little-endian n, n bytes of JSON {"bytes", "extents": [[offset, length], ...]}, the extents.
"""

from __future__ import annotations

import io
import json
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import CorruptGalleryError
from ..store.file_pool import PooledFile
from ..store.manifest import ShardEntry
from ..store.shard_format import ShardSchema
from ..store.shard_reader import ShardReader

MAGIC = b"spade-faiss rows 1\n"
START = len(MAGIC) + 8
MOST_JSON = 2**28


def rows_content(path: Path, entry: ShardEntry, schema: ShardSchema) -> bytes:
    """Check every image of a shard, and return it without its levels.

    Raises:
        CorruptGalleryError: the shard is damaged.
    """
    shard = ShardReader(path, schema, entry.images, entry.bytes)
    try:
        for key, _ in shard.problems():
            raise CorruptGalleryError(
                f"{path}: expected what was written, found image {key!r} damaged; repair it first"
            )
        levels = (
            shard.reader(lambda _: "", lambda: PooledFile(path, entry.bytes)).all_extents() if schema.has_levels else []
        )
    finally:
        shard.close()
    extents, end = [], 0
    for offset, length in [*levels, (entry.bytes, 0)]:
        if offset > end:
            extents.append((end, offset - end))
        end = max(end, offset + length)
    header = json.dumps({"bytes": entry.bytes, "extents": extents}).encode()
    with path.open("rb") as file:
        parts = [MAGIC, len(header).to_bytes(8, "little"), header]
        for offset, length in extents:
            file.seek(offset)
            parts.append(file.read(length))
    return b"".join(parts)


class RowsFile(PooledFile):
    """Reads a shard's rows as if from the shard's file. The bytes of levels are missing."""

    def __init__(self, local: Path, path: Path, size: int) -> None:
        """Open a shard's rows.

        Args:
            local: the file that holds them.
            path: of the shard, for errors.
            size: of the shard, in bytes.

        Raises:
            CorruptGalleryError: they are not those of a shard of that size.
        """
        try:
            super().__init__(local, os.stat(local).st_size)  # noqa: PTH116 (an error names the shard)
            head = bytearray(START)
            super().read_into(memoryview(head), 0)
            length = int.from_bytes(head[len(MAGIC) :], "little")
            if not head.startswith(MAGIC) or length > MOST_JSON:
                raise ValueError("not the rows of a shard")
            header = bytearray(length)
            super().read_into(memoryview(header), START)
            values = json.loads(header)
            if values["bytes"] != size:
                raise ValueError(f"expected rows of a shard of {size} bytes, found {values['bytes']}")
            self._starts = [int(offset) for offset, _ in values["extents"]]
            lengths = [int(length) for _, length in values["extents"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptGalleryError(f"{path}: its rows cannot be opened: {error.__cause__ or error}") from error
        self._ends = [start + length for start, length in zip(self._starts, lengths, strict=True)]
        self._places = [START + length + before for before in (0, *accumulate(lengths))]
        self.size = size

    def for_hdf5(self) -> Any:
        """See PooledFile."""
        return _ForHdf5(self)

    def read_into(self, rest: memoryview, offset: int, zeros: bool = False) -> None:
        """See PooledFile.

        Args:
            rest: to be filled.
            offset: in the shard's file.
            zeros: put zeros in the place of levels.

        Raises:
            OSError: the bytes cannot be read, or are those of levels.
        """
        while rest:
            at = bisect_right(self._starts, offset) - 1
            if at >= 0 and offset < self._ends[at]:
                size = min(len(rest), self._ends[at] - offset)
                super().read_into(rest[:size], self._places[at] + offset - self._starts[at])
            elif zeros:
                following = self._starts[at + 1] if at + 1 < len(self._starts) else offset + len(rest)
                size = min(len(rest), following - offset)
                rest[:size] = bytes(size)
            else:
                raise OSError("levels are not among the rows")
            rest, offset = rest[size:], offset + size


class _ForHdf5(io.RawIOBase):
    """A RowsFile as a file of Python: HDF5 reads ahead, into levels too."""

    def __init__(self, file: RowsFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._file.size - self._at)]
        self._file.read_into(view, self._at, zeros=True)
        self._at += len(view)
        return len(view)
