"""The files of a gallery's normal images: a gallery keeps their features, their keys and digests, not their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..arrays import Pixels
from ..errors import ImageError
from ..images.decode import decode, read_file
from ..images.sources import ImageFile
from .snapshot import Snapshot

FILE_DIGEST = "sha256:"  # how the digest of an image file begins; features appended without one have another kind


def content_digest(content: bytes) -> str:
    """Return what a gallery remembers the content of an image file by."""
    return f"{FILE_DIGEST}{hashlib.sha256(content).hexdigest()}"


class SourceImages:
    """Finds the files of normal images by their keys; a file that is not the one in the gallery is not taken for it."""

    def __init__(self, generation: Snapshot, folders: Sequence[Path] = (), sources: Sequence[ImageFile] = ()) -> None:
        """Say where to look, besides the paths that a gallery keeps which recomputes its patches.

        Args:
            generation: of a gallery, that the images are in.
            folders: the sources that it was built from: a key is a path relative to one of them.
            sources: or the files themselves, of which a key is the end of a path.
        """
        self._generation = generation
        self._folders = folders
        self._sources = sources

    def decode(self, key: str) -> Pixels:
        """Return the pixels of a normal image; raises as find."""
        row_id = self._generation.find(key)
        if row_id is None:
            raise ImageError("not in the gallery")
        content, path = self.find(row_id)
        return decode(content, str(path))

    def find(self, row_id: int) -> tuple[bytes, Path]:
        """Return the content of a normal image's file, and where it is.

        Raises:
            ImageError: its file is not there, is another one, or cannot be read; the message is a few words.
        """
        [key], [digest] = self._generation.keys([row_id]), self._generation.digests([row_id])
        kept = self._generation.source(row_id)
        if not self._folders and not self._sources and kept is None:
            raise ImageError("no folder of normal images given")
        reason = "not found"
        for path in self._candidates(key, kept):
            try:
                content = read_file(path)
            except ImageError as error:
                reason = str(error)
                continue
            if not digest.startswith(FILE_DIGEST) or content_digest(content) == digest:
                return content, path
            reason = "not the file that is in the gallery"
        raise ImageError(reason)

    def _candidates(self, key: str, kept: str | None) -> Iterator[Path]:
        if kept is not None and _is_file(Path(kept)):
            yield Path(kept)
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts:  # a gallery from elsewhere may name anything
            return
        yield from (path for folder in self._folders if _is_file(path := folder / key))
        yield from (source.path for source in self._sources if f"/{source.path.as_posix()}".endswith(f"/{key}"))


def _is_file(path: Path) -> bool:
    """Tell whether it is a file, neither a pipe nor a device; what may not be looked at is left for reading to say."""
    try:
        return path.is_file()
    except OSError:
        return True
