"""Options of commands that read a gallery which may lie in an object store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..gallery.gallery import Gallery
from .flags import PATH, Bytes, flag


@dataclass(frozen=True)
class CacheFlags:
    """Where a gallery in an object store is cached."""

    cache: Annotated[
        Path | None,
        flag(
            "--cache",
            type=PATH,
            metavar="DIR",
            help="If GALLERY is in an object store, as s3://bucket/tiles.gallery: keep what is fetched in this folder."
            "  [default: $SPADE_FAISS_CACHE, or spade-faiss among the user's caches]",
        ),
    ]
    cache_size: Annotated[
        int | None,
        flag("--cache-size", type=Bytes(), help="Limit of that folder, as 20GB.  [default: 10GiB]"),
    ]

    def open(self, gallery: Path, device: str = "auto") -> Gallery:
        """Open a gallery to read."""
        return Gallery.open(gallery, device, self.cache, self.cache_size)
