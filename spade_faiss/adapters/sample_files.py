"""Which sample of a data set is which image: by the place of its file, or by name and content."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from ..errors import ImageError
from ..images.decode import read_file
from ..store.snapshot import Snapshot
from ..store.source_images import FILE_DIGEST, content_digest


def by_place(files: Mapping[str, str], root: str | Path) -> dict[str, str]:
    """Return the key of each sample whose file lies in a folder: its path from there, with forward slashes.

    Args:
        files: path of each sample's file, by the sample's id.
        root: the folder that keys are relative to.
    """
    folder, found = Path(os.path.realpath(root)), dict[str, str]()
    for sample, file in files.items():
        real = Path(os.path.realpath(file))
        if real.is_relative_to(folder):
            found[sample] = real.relative_to(folder).as_posix()
    return found


def by_content(files: Mapping[str, str], snapshot: Snapshot, folder: str) -> dict[str, int]:
    """Return the row of each sample that is an image of a gallery: its path ends with the key, and it has the content.

    Only files whose names may be those of the gallery are read.

    Args:
        files: path of each sample's file, by the sample's id.
        snapshot: of the gallery.
        folder: the caller's parameter that names the folder of the gallery's images, for by_place instead.

    Raises:
        ImageError: such a file cannot be read.
    """
    names = [(sample, name) for sample, file in files.items() for name in _names(file)]
    rows = snapshot.find_all([name for _, name in names])
    found, contents = dict[str, int](), dict[str, str]()
    for (sample, _), row in zip(names, rows, strict=True):
        if row is None or sample in found:
            continue
        [kept] = snapshot.digests([row])
        if sample not in contents:
            contents[sample] = content_digest(
                content_of(sample, files[sample], f"give {folder}, the folder of the normal images")
            )
        if kept.startswith(FILE_DIGEST) and contents[sample] == kept:
            found[sample] = row
    return found


def content_of(sample: str, file: str, advice: str) -> bytes:
    """Read a sample's file.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return read_file(Path(file))
    except ImageError as error:
        raise ImageError(f"{error}; put the file of sample {sample} back, delete the sample, or {advice}") from error


def _names(file: str) -> Iterator[str]:
    """Yield the ends of a path, longest first."""
    parts = PurePath(os.path.abspath(file)).parts[1:]  # noqa: PTH100 # as the file is called, links and all
    return ("/".join(parts[first:]) for first in range(len(parts)))
