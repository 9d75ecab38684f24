"""Every file of a gallery, read and compared with what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptGalleryError
from ..images.sources import ImageFile
from ..pyramids.recomputed import missing_sources
from ..store.snapshot import Snapshot
from ..store.trusted import FILE as TRUSTED
from ..store.trusted import read_trusted_file
from ..system.sealed_json import read_sealed

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Problem:
    """Something that verify found.

    Attributes:
        file: of the gallery; or the image file that patches are recomputed from.
        message: one line.
        key: the image's, if it is about one image.

    Example:
        >>> from pathlib import Path
        >>> next(Path("toy.gallery/index").glob("keys-*")).unlink()
        >>> [problem.message for problem in gallery.verify()]
        ['...keys-...npy: ...']
    """

    file: str
    message: str
    key: str | None = None

    @property
    def is_of_images(self) -> bool:
        """Whether files of images can mend it, unlike what people or a calibration have said of them."""
        return self.file not in (TRUSTED, CALIBRATION)

    @property
    def what(self) -> str:
        """The former name of `message`."""
        return self.message


def problems_of(snapshot: Snapshot, files: bool, normal: Sequence[str | Path | ImageFile]) -> list[Problem]:
    """Read everything; see GalleryReader.verify."""
    problems, manifest = [], snapshot.manifest
    for number, entry in enumerate(manifest.shards):
        try:
            found = list(snapshot.shard(number).problems())
        except CorruptGalleryError as error:
            problems.append(Problem(entry.file, str(error)))
        else:
            problems += [Problem(entry.file, message, key) for key, message in found]
    if files and not problems:  # a damaged shard does not say reliably where a file is
        problems += [
            Problem(str(snapshot.source(row_id)), str(error), *snapshot.keys([row_id]))
            for row_id, error in missing_sources(snapshot, normal)
        ]
    indexes = snapshot.indexes
    for derived, load in ((manifest.index, indexes.load_image_index), (manifest.keys, indexes.load_key_table)):
        if derived is not None:
            try:
                load()
            except CorruptGalleryError as error:
                problems.append(Problem(derived.file, str(error)))
    for name, check in ((TRUSTED, read_trusted_file), (CALIBRATION, lambda path: read_sealed(path, "calibrate again"))):
        try:
            check(snapshot.files.path(name))
        except CorruptGalleryError as error:
            problems.append(Problem(name, str(error)))
    return problems
