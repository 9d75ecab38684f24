"""What is in a shard: the features of many images in one HDF5 file, written once and never changed.

Datasets, for n images: `levels/0` ... (n, c, h, w) float16 or float32 at native resolution, one image a chunk, not
compressed; `image` (n, d) float32; `keys` and `digests`, UTF-8 of fixed length; `checksums` (n, 2 + L) uint64, of
xxh3-64: over key and digest, over the image feature, then over each level. The newest HDF5 file format is used because
it also has checksums over its own structures.

If a gallery recomputes its patches, a shard has no levels, but `sources`: the path of each image file, UTF-8 of fixed
length. The first checksum then covers the path too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import CorruptGalleryError, FeatureError, OptionError
from ..extractors.features import Features
from ..extractors.spec import ExtractorSpec
from ..options import Patches
from .damage import damaged

DAMAGED_NAMES = "key, digest or path is not what was written (checksum)"
DAMAGED_IMAGE = "image feature is not what was written (checksum)"

NAMES = ("keys", "digests", "sources")  # columns of text; sources only in shards without levels
MAX_KEY_BYTES = 4096  # a path's length


@dataclass(frozen=True)
class ShardSchema:
    """What a gallery's shards hold of each image: its levels, or the path of the file that they are recomputed from."""

    spec: ExtractorSpec
    patches: Patches = "stored"

    @property
    def has_levels(self) -> bool:
        """Whether shards hold levels; else they hold paths of image files."""
        return self.patches == "stored"

    @property
    def level_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(c, h, w) of each level in a shard, finest first."""
        return self.spec.level_shapes if self.has_levels else ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Which of NAMES a shard has."""
        return NAMES[:-1] if self.has_levels else NAMES

    @property
    def bytes_per_image(self) -> int:
        """Approximate bytes of an image in a shard."""
        return self.spec.bytes_with(self.patches)

    @property
    def least_bytes(self) -> int:
        """Bytes of an image's features in a shard: less than it takes with its names."""
        return self.spec.bytes_per_image if self.has_levels else 4 * self.spec.image_dim

    def stored(self, features: Features) -> Features:
        """Return features as shards hold them: cast by the spec, without levels where shards have none.

        Raises:
            FeatureError: wrong shapes, NaN, infinity, or values that the stored dtype cannot hold.
        """
        cast = self.spec.cast(features)
        return cast if self.has_levels else Features(cast.image, [])

    def kept_sources(
        self, sources: Sequence[str] | None, digests: Sequence[str] | None, n: int, folder: Path
    ) -> Sequence[str] | None:
        """Return the paths to keep: those of n image files where shards have no levels, else None.

        Raises:
            OptionError: shards of this gallery have no levels, and paths or digests of files are missing.
            FeatureError: paths that a shard cannot hold.
        """
        if self.has_levels:
            return None
        if sources is None or digests is None:  # a digest of features says nothing about a file
            raise OptionError(
                f"{folder}: it recomputes patches from image files, so it cannot take features without them; "
                "use add_images, or make a gallery with patches='stored'"
            )
        check_texts("sources", sources, n)
        return sources


def check_keys(keys: Sequence[str], n: int) -> None:
    """Check that n keys differ and fit a shard.

    Raises:
        FeatureError: they do not.
    """
    check_texts("keys", keys, n)
    if len(set(keys)) != n:
        twice = next(key for key, times in Counter(keys).items() if times > 1)
        raise FeatureError(f"keys: expected each once, found {twice!r} twice")


def check_texts(name: str, texts: Sequence[str], n: int) -> None:
    """Check that the texts of n images fit a shard: 1 to MAX_KEY_BYTES bytes of UTF-8 each, without NUL.

    Raises:
        FeatureError: they do not; the message starts with `name`.
    """
    if len(texts) != n:
        raise FeatureError(f"{name}: expected {n}, one for each image, found {len(texts)}")
    for text in texts:
        try:
            ok = "\0" not in text and 1 <= len(text.encode()) <= MAX_KEY_BYTES
        except (AttributeError, TypeError, UnicodeEncodeError):
            ok = False
        if not ok:
            shown = f"{text!r:.80}"
            found = type(text).__name__ if "\n" in shown else shown  # an array has several lines
            raise FeatureError(f"{name}: expected text of 1 to {MAX_KEY_BYTES} bytes without NUL, found {found}")


def features_digest(features: Features, row: int) -> str:
    """Return the digest of an image that has none of its own: that of its cast features."""
    digest = xxhash.xxh3_128()
    for array in (features.image, *features.levels):
        digest.update(array[row].data)
    return f"xxh3:{digest.hexdigest()}"


def checksums(key: str, digest: str, features: Features, row: int, source: str | None = None) -> list[int]:
    """Return the checksums of one image: its names', its image feature's, then each level's."""
    arrays = [features.image[row], *(level[row] for level in features.levels)]
    return [_of_names(key, digest, source), *(xxhash.xxh3_64_intdigest(array.data) for array in arrays)]


def _of_names(key: str, digest: str, source: str | None) -> int:
    return _of_texts([text.encode() for text in (key, digest, source) if text is not None])


def _of_texts(texts: Sequence[bytes]) -> int:
    return int(xxhash.xxh3_64_intdigest(b"\0".join(texts) + b"\0"))


class Names:
    """The names of a shard's images as they are stored, column by column: ShardSchema.columns."""

    def __init__(self, path: Path, columns: Sequence[NDArray[np.bytes_]], checksums: NDArray[np.uint64]) -> None:
        self._path = path
        self._columns = columns  # (n,) UTF-8 each
        self._checksums = checksums  # (n,)

    def column(self, number: int) -> NameColumn:
        """Return one column; reading a text compares it with its checksum."""
        return NameColumn(self, self._columns[number])

    def differ(self, row: int) -> bool:
        """Return whether the names of an image have changed since they were written; takes 2 us."""
        return _of_texts([column[row] for column in self._columns]) != int(self._checksums[row])

    def check(self, row: int) -> None:
        """Compare the names of an image with their checksum.

        Raises:
            CorruptGalleryError: they are not what was written.
        """
        if self.differ(row):
            raise damaged(self._path, f"image {self.shown(row)!r}: {DAMAGED_NAMES}")

    def were(self, row: int, key: str, digest: str, source: str | None) -> bool:
        """Return whether the checksum of an image was computed from these names."""
        return _of_names(key, digest, source) == int(self._checksums[row])

    def shown(self, row: int) -> str:
        """Return a key to show in messages, even if it is damaged."""
        return self.all_shown(row)[0]

    def all_shown(self, row: int) -> list[str]:
        """Return key, digest and, from a shard without levels, path, to show in messages, even if they are damaged."""
        return [bytes(column[row]).decode(errors="backslashreplace") for column in self._columns]


class NameColumn(Sequence[str]):
    """One column of a shard's names; only the texts that are read are decoded."""

    def __init__(self, names: Names, stored: NDArray[np.bytes_]) -> None:
        self._names = names
        self.stored = stored  # (n,) UTF-8

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, row: Any) -> Any:
        """Return the text of a row.

        Raises:
            CorruptGalleryError: it is not what was written.
        """
        self._names.check(row)
        return self.stored[row].decode()


def open_hdf5(source: Any) -> Any:
    """Open a file to read it; returns HDF5's handle, which closes the file with the last reference to it.

    h5py's own close() looks through all that the process has open in HDF5: a millisecond for a thousand files.

    Args:
        source: a path, or a file of Python.

    Raises:
        OSError: it cannot be opened, or is damaged.
    """
    return h5py.File(source, "r", libver="latest", locking=False).id


class StoredDataset:
    """A dataset of a shard, read by HDF5's own calls: h5py's objects take twice as long to open and to read."""

    def __init__(self, opened: Any, shape: tuple[int, ...], made: Any) -> None:
        """Keep HDF5's handle of the dataset, its shape, and the properties that it was made with."""
        self.id = opened
        self.shape = shape
        self.dtype: np.dtype[Any] = opened.dtype
        self.chunks: tuple[int, ...] | None = made.get_chunk() if made.get_layout() == h5py.h5d.CHUNKED else None
        self.filters: int = made.get_nfilters()

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    def read(self) -> NDArray[Any]:
        """Read all of it."""
        out = np.empty(self.shape, self.dtype)
        self.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
        return out

    def read_row(self, row: int, out: Array) -> None:
        """Read one row into a contiguous array of its shape."""
        rows = self.id.get_space()
        rows.select_hyperslab((row, *[0] * out.ndim), (1, *out.shape))
        self.id.read(h5py.h5s.create_simple(out.shape), rows, out)


def dataset_of(file: Any, name: str, file_size: int) -> StoredDataset:
    """Open a dataset of a shard safely: HDF5 itself would follow links into other files and trust any size in a header.

    Args:
        file: HDF5's handle of the open file.
        name: of the dataset.
        file_size: bytes.

    Raises:
        ValueError: it is missing, lies outside this file, or claims to be larger than the file.
    """
    steps, links = name.split("/"), file.links
    for end in range(1, len(steps) + 1):
        try:
            kind = links.get_info("/".join(steps[:end]).encode()).type
        except (KeyError, RuntimeError):
            raise ValueError(f"{name}: expected it in this file, found nothing") from None
        if kind != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{name}: expected it in this file, found a link")
    opened = h5py.h5o.open(file, name.encode())
    space = opened.get_space() if isinstance(opened, h5py.h5d.DatasetID) else None
    if space is None or space.get_simple_extent_type() == h5py.h5s.NULL:
        raise ValueError(f"{name}: expected a dataset, found none")
    made = opened.get_create_plist()
    if made.get_external_count() or made.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
        raise ValueError(f"{name}: expected it in this file, found that it is elsewhere")
    dataset = StoredDataset(opened, space.get_simple_extent_dims(), made)
    if (size := math.prod(dataset.shape) * dataset.dtype.itemsize) > file_size:
        raise ValueError(f"{name}: expected at most the file's {file_size} bytes, found a header that says {size}")
    return dataset


def is_whole(level: Array, checksum: int) -> bool:
    """Return whether a level of an image matches its checksum."""
    return bool(xxhash.xxh3_64_intdigest(level.data) == checksum)


def damaged_level(path: Path, key: str, number: int) -> CorruptGalleryError:
    """Return the error for a level that does not match its checksum."""
    return damaged(path, f"image {key!r}: level {number} is not what was written (checksum)")
