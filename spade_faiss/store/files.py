"""Where a snapshot gets its files from: its folder. Another room gets them from an object store in the same shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..arrays import Array
from .file_pool import PooledFile
from .level_reader import LevelReader, share_out

Job = tuple[LevelReader, int, list[Array]]  # whose levels are read: the shard's reader, the row, where to


class GalleryFiles:
    """The files of a gallery in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Return the path of a whole file, by its name in the manifest."""
        return self.folder / name

    def identity(self, name: str, opened: Callable[[], PooledFile]) -> str:
        """Return what no other shard is ever called: where another gallery takes the folder's place, it has the names.

        Args:
            name: of the shard.
            opened: opens it, and raises as FilePool.open.
        """
        return f"{name} {opened().stamp}"

    def open_shard(self, path: Path, size: int) -> PooledFile:
        """Open a shard to read its rows, all but the levels; raises as FilePool.open."""
        return PooledFile(path, size)

    def prefetch(self, paths: Iterable[Path]) -> None:
        """Get the rows of several shards at once, where getting each takes a round trip."""

    def for_hdf5(self, path: Path, size: int) -> Any:
        """Return what HDF5 opens in the place of a shard's path; None: the path."""
        return None

    def read_levels(self, jobs: Sequence[Job], verify: bool) -> None:
        """Read the levels of images, with several threads; raises as LevelReader.read."""
        share_out(lambda share: _read(share, verify), jobs)


def _read(jobs: Sequence[Job], verify: bool) -> None:
    for reader, row, out in jobs:
        reader.read(row, out, verify)
