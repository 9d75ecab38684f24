"""Finds the files of normal images, of which a gallery keeps features, keys and digests, but no pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from ..arrays import Pixels
from ..errors import ImageError
from ..images.decode import decode, read_file
from ..images.keys import comparable, other_forms
from ..images.sources import ImageFile
from ..images.tiling import cut, image_key
from ..system.prefetch import batched
from .snapshot import Snapshot

FILE_DIGEST = "sha256:"  # begins the digest of an image file; that of appended features begins differently
DRAWN = 200  # images that is_any_in looks for in a folder
COMPARED = 20  # files whose contents it compares: of those drawn, and of each TOGETHER that are listed
LISTED = 20_000  # files that it looks up
TOGETHER = 1000
PIXELS_DIGEST = "pixels-sha256:"  # begins the digest of an image that came without a file


def content_digest(content: bytes) -> str:
    """Return the digest that a gallery keeps of an image file."""
    return f"{FILE_DIGEST}{hashlib.sha256(content).hexdigest()}"


def pixels_digest(*parts: Pixels) -> str:
    """Return the digest that a gallery keeps of an image without a file: of its (H, W, 3) uint8 pixels.

    It says nothing of a file: the same pixels may lie in files of several formats.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part.shape).encode())
        digest.update(np.ascontiguousarray(part).data)
    return f"{PIXELS_DIGEST}{digest.hexdigest()}"


class SourceImages:
    """Finds the files of normal images by their keys. A file counts only if its digest is the gallery's."""

    def __init__(self, snapshot: Snapshot, folders: Sequence[Path] = (), files: Sequence[ImageFile] = ()) -> None:
        """Look in folders and among files; and first at the paths that the gallery keeps, if it recomputes patches.

        Args:
            snapshot: of the gallery that the images are in.
            folders: what the gallery was built from: a key is a path relative to one of them.
            files: image files, whose paths end with their keys.
        """
        self._snapshot = snapshot
        self._folders = folders
        self._files = files

    def decode(self, key: str) -> Pixels:
        """Return the pixels of a normal image, or of a tile of one; raises as find."""
        row_id = self._snapshot.find(key)
        if row_id is None:
            raise ImageError("not in the gallery")
        content, path = self.find(row_id)
        spec = self._snapshot.manifest.spec
        pixels = decode(content, str(path), spec.bits)
        return pixels if spec.tile is None else cut(pixels, spec.tiling.box(key, pixels.shape[:2]))

    def find(self, row_id: int) -> tuple[bytes, Path]:
        """Return the content and the path of a normal image's file.

        Raises:
            ImageError: the file is missing, has changed, or cannot be read; the message is a few words.
        """
        [key], [digest] = self._snapshot.keys([row_id]), self._snapshot.digests([row_id])
        kept = self._snapshot.source(row_id)
        if not self._folders and not self._files and kept is None:
            raise ImageError("no folder of normal images given")
        reason = "not found"
        if self._snapshot.manifest.spec.tile is not None:
            key = image_key(key)
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

    def is_any_in(self, folder: Path) -> bool | None:
        """Return whether a folder holds the file of any image: by its key's path and its digest.

        Images are drawn first, then the folder's files are looked up.

        Returns:
            None: not known, as the folder holds too many files, or files that cannot be looked up.
        """
        ids = self._snapshot.ids()
        drawn = ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), DRAWN)).astype(np.int64))]
        places = [
            (int(row_id), path)
            for row_id, key in zip(drawn, self._snapshot.image_keys(drawn), strict=True)
            if (path := next((one for form in (key, *other_forms(key)) if _is_file(one := folder / form)), None))
        ]
        if any(self._is_file_of(row_id, path) for row_id, path in places[:COMPARED]):
            return True
        if len(drawn) == len(ids) and len(places) <= COMPARED:
            return False
        if self._snapshot.manifest.spec.tile is not None:  # a tile's key does not follow from its image's
            return None
        names = islice((Path(at) / name for at, _, files in os.walk(folder) for name in files), LISTED + 1)
        for listed, paths in enumerate(batched(names, TOGETHER)):
            if listed * TOGETHER >= LISTED:
                return None
            found = self._snapshot.find_all([path.relative_to(folder).as_posix() for path in paths])
            near = [(row_id, path) for row_id, path in zip(found, paths, strict=True) if row_id is not None]
            if any(self._is_file_of(row_id, path) for row_id, path in near[:COMPARED]):
                return True
        return False

    def _is_file_of(self, row_id: int, path: Path) -> bool:
        [digest] = self._snapshot.digests([row_id])
        try:
            return not digest.startswith(FILE_DIGEST) or content_digest(read_file(path)) == digest
        except ImageError:
            return False

    def _candidates(self, key: str, kept: str | None) -> Iterator[Path]:
        if kept is not None and _is_file(Path(kept)):
            yield Path(kept)
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts:  # a gallery from elsewhere may name anything
            return
        forms = (key, *other_forms(key))  # copying to another system may have changed the form of its name
        yield from (path for folder in self._folders for form in forms if _is_file(path := folder / form))
        end = f"/{comparable(key)}"
        yield from (file.path for file in self._files if f"/{comparable(file.path.as_posix())}".endswith(end))


def _is_file(path: Path) -> bool:
    """Return whether a path is a regular file, no pipe or device; True if that may not be asked: reading will fail."""
    try:
        return path.is_file()
    except OSError:
        return True
