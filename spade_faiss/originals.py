"""The files of a gallery's normal images: a gallery keeps their features, their keys and digests, not their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from .errors import ImageError
from .gallery import Gallery
from .images import Pixels, Source, decode, read_file


class Originals:
    """Finds the files of normal images by their keys; a file that is not the one in the gallery is not taken for it."""

    def __init__(self, gallery: Gallery, folders: Sequence[Path] = (), sources: Sequence[Source] = ()) -> None:
        """Say where to look.

        Args:
            gallery: of the images.
            folders: the sources that it was built from: a key is a path relative to one of them.
            sources: or the files themselves, of which a key is the end of a path.
        """
        self._generation = gallery.snapshot()
        self._folders = folders
        self._sources = sources

    def decode(self, key: str) -> Pixels:
        """Return the pixels of a normal image.

        Raises:
            ImageError: its file is not there, is another one, or cannot be read; the message is a few words.
        """
        if not self._folders and not self._sources:
            raise ImageError("no folder of normal images given")
        digest = self._generation.digests([self._generation.id_of[key]])[0]
        reason = "not found"
        for path in self._candidates(key):
            content = read_file(path)
            # Features that were appended without images have digests of another kind: nothing to compare with.
            if digest.startswith("sha256:") and digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
                reason = "not the file that is in the gallery"
                continue
            return decode(content, str(path))
        raise ImageError(reason)

    def _candidates(self, key: str) -> list[Path]:
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts:  # a gallery from elsewhere may name anything
            return []
        found = [path for folder in self._folders if (path := folder / key).is_file()]
        return found + [source.path for source in self._sources if f"/{source.path.as_posix()}".endswith(f"/{key}")]
