"""A gallery's files: shards, manifest, image index, key table; one writer, many readers."""

from .manifest import Manifest
from .snapshot import Snapshot
from .source_images import SourceImages
from .writer import Appended, GalleryWriter

__all__ = ["Appended", "GalleryWriter", "Manifest", "Snapshot", "SourceImages"]
