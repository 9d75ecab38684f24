"""Listing the image files under files and folders, and their keys."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ImageError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageFile:
    """An image file and its key.

    `find_images` sets the key to the path relative to the listed folder, with forward slashes; the key of a file that
    is listed by itself is its name.
    """

    path: Path
    key: str  # names the image in a gallery


def find_images(sources: Sequence[str | Path | ImageFile]) -> list[ImageFile]:
    """List the images of files and folders (searched to any depth), each folder in the order of its keys.

    In folders, hidden files and folders and files without an image suffix are omitted. An ImageFile is kept as it is.

    Args:
        sources: files, folders and ImageFiles.

    Returns:
        the images in the order of the sources.

    Raises:
        ImageError: a source does not exist or holds no image, or two images have the same key.
    """
    found: dict[str, ImageFile] = {}
    for source in sources:
        listed = [source] if isinstance(source, ImageFile) else _list_source(Path(source))
        if not listed:
            suffixes = " ".join(sorted(SUFFIXES))
            raise ImageError(f"{source}: expected a folder with images ({suffixes}), found none in it")
        for image in listed:
            other = found.setdefault(image.key, image)
            if other is not image:
                raise ImageError(
                    f"two images would have the key {image.key!r}: {other.path} and {image.path}; "
                    "give a folder that holds both sources, so that their keys differ"
                )
    return list(found.values())


def _list_source(source: Path) -> list[ImageFile]:
    """List the images of a file or a folder."""
    if source.is_file():
        return [ImageFile(source, source.name)]
    if not source.is_dir():
        raise ImageError(f"{source}: expected an image or a folder of images, found nothing there")
    images = []
    for folder, folders, files in os.walk(source, followlinks=True):
        above = Path(folder).relative_to(source).parents
        if os.path.realpath(folder) in {os.path.realpath(source / parent) for parent in above}:
            folders.clear()  # a link to a folder above it
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                images.append(ImageFile(path, path.relative_to(source).as_posix()))
    return sorted(images, key=lambda image: image.key)
