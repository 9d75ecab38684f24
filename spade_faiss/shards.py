"""A shard: the features of many images in one HDF5 file, written once and never changed.

Datasets, for n images: `levels/0` ... (n, c, h, w) float16 or float32 at native resolution, one image a chunk, not
compressed; `image` (n, d) float32; `keys` and `digests`, UTF-8 of fixed length; `checksums` (n, 2 + L) uint64, of
xxh3-64: over key and digest, over the image feature, then over each level. The newest HDF5 file format is used because
it also has checksums over its own structures.

Where a gallery recomputes its patches there are no levels, but `sources`, the path of each image file, UTF-8 of fixed
length; it counts into the first checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from .chunks import LevelReader, damaged_level, dataset_of, is_whole
from .errors import CorruptGalleryError
from .failpoints import failpoint
from .features import Array, ExtractorSpec, Features
from .open_files import OpenFile
from .options import Patches
from .storage import TEMPORARY, PatientFile, publish, storage_errors

DAMAGED_NAMES = "key, digest or path is not what was written (checksum)"
DAMAGED_IMAGE = "image feature is not what was written (checksum)"

NAMES = ("keys", "digests", "sources")  # columns of text; the last where there are no levels

T = TypeVar("T")


def checksums(key: str, digest: str, features: Features, row: int, source: str | None = None) -> list[int]:
    """Return the checksums of one image: of its names, of the image feature, then of levels."""
    arrays = [features.image[row], *(level[row] for level in features.levels)]
    return [_of_names(key, digest, source), *(xxhash.xxh3_64_intdigest(array.data) for array in arrays)]


def _of_names(key: str, digest: str, source: str | None) -> int:
    return _of_texts([text.encode() for text in (key, digest, source) if text is not None])


def _of_texts(texts: Sequence[bytes]) -> int:
    return int(xxhash.xxh3_64_intdigest(b"\0".join(texts) + b"\0"))


def names_of(patches: Patches) -> tuple[str, ...]:
    """Return which of NAMES a shard has."""
    return NAMES if patches == "recompute" else NAMES[:-1]


class ShardWriter:
    """Writes one shard under a temporary name; finish() gives it its own."""

    def __init__(self, path: Path, spec: ExtractorSpec, patches: Patches = "stored") -> None:
        self.path = path
        self.keys: list[str] = []
        self._digests: list[str] = []
        self._sources: list[str] | None = None if patches == "stored" else []
        self._image: list[Array] = []  # small beside the levels: written in one piece at the end
        self._checksums: list[list[int]] = []
        self.temporary = path.with_name(path.name + TEMPORARY)
        with storage_errors(f"cannot write {self.path}"):
            self._disk = PatientFile(self.temporary)
            self._file = h5py.File(self._disk, "w", libver="latest")
            self._levels = [
                self._file.create_dataset(f"levels/{number}", (0, *s), spec.dtype, maxshape=(None, *s), chunks=(1, *s))
                for number, s in enumerate(_level_shapes(spec, patches))
            ]
        failpoint("opened", self.path)

    def __len__(self) -> int:
        return len(self.keys)

    def append(
        self, keys: Sequence[str], digests: Sequence[str], features: Features, sources: Sequence[str] = ()
    ) -> None:
        """Append n images whose features were cast by the spec.

        Args:
            keys: n names.
            digests: n digests.
            features: of n images; without levels where patches are recomputed.
            sources: n paths where patches are recomputed.

        Raises:
            GalleryError: the disk is full or refuses; the shard is then to be aborted.
        """
        start = len(self.keys)
        with storage_errors(f"cannot write {self.path}"):
            for dataset, level in zip(self._levels, features.levels, strict=True):
                dataset.resize(start + len(keys), axis=0)
                for row in range(len(keys)):  # straight into the chunk: no selection, no conversion
                    dataset.id.write_direct_chunk((start + row, 0, 0, 0), level[row])
            self._disk.check()
        failpoint("appended to", self.path)
        self._image.append(features.image.copy())
        named: Sequence[str | None] = [None] * len(keys) if self._sources is None else sources
        self._checksums += [
            checksums(key, digest, features, row, source)
            for row, (key, digest, source) in enumerate(zip(keys, digests, named, strict=True))
        ]
        self.keys += keys
        self._digests += digests
        if self._sources is not None:
            self._sources += sources

    def finish(self) -> int:
        """Complete the file, flush to disk, give it its name; returns its size in bytes."""
        size = self.complete()
        with storage_errors(f"cannot write {self.path}"):
            publish(self.temporary, self.path)
        return size

    def complete(self) -> int:
        """Write what is still in memory; the file keeps its temporary name. Returns its size in bytes."""
        with storage_errors(f"cannot write {self.path}"):
            for dataset in self._levels:  # an append that was interrupted may have made them longer
                dataset.resize(len(self.keys), axis=0)
            self._file.create_dataset("image", data=np.concatenate(self._image))
            failpoint("image features in", self.path)
            for name, strings in zip(NAMES, (self.keys, self._digests, self._sources), strict=True):
                if strings is None:
                    continue
                # Of fixed length: HDF5 keeps others in a heap that has no checksums, and can hang on a damaged one.
                encoded = [text.encode() for text in strings]
                utf8 = h5py.string_dtype("utf-8", max(map(len, encoded)))
                self._file.create_dataset(name, data=np.array(encoded, utf8))
            self._file.create_dataset("checksums", data=np.array(self._checksums, np.uint64))
            self._file.close()
            self._disk.check()
            self._disk.close()
            failpoint("completed", self.path)
            return self.temporary.stat().st_size

    def abort(self) -> None:
        """Throw away what was written."""
        self._file.close()
        self._disk.close()
        self.temporary.unlink(missing_ok=True)


class Names:
    """The keys, digests and, where there are no levels, paths of a shard as they are stored; column by column."""

    def __init__(self, path: Path, columns: Sequence[NDArray[np.bytes_]], checksums: NDArray[np.uint64]) -> None:
        self._path = path
        self._columns = columns  # (n,) UTF-8 each
        self._checksums = checksums  # (n,)

    def column(self, number: int) -> Texts:
        """Return one column, each text of which is compared with the checksum when it is read."""
        return Texts(self, self._columns[number])

    def differ(self, row: int) -> bool:
        """Tell whether the names of an image are not what was written, in 2 us."""
        return _of_texts([column[row] for column in self._columns]) != int(self._checksums[row])

    def check(self, row: int) -> None:
        """Compare the names of an image with their checksum.

        Raises:
            CorruptGalleryError: they are not what was written.
        """
        if self.differ(row):
            raise CorruptGalleryError(f"{self._path}: image {self.shown(row)!r}: {DAMAGED_NAMES}")

    def were(self, row: int, key: str, digest: str, source: str | None) -> bool:
        """Tell whether these are the names that the checksum of an image was made of."""
        return _of_names(key, digest, source) == int(self._checksums[row])

    def shown(self, row: int) -> str:
        """Return a key for people, whatever has become of it."""
        return self.all_shown(row)[0]

    def all_shown(self, row: int) -> list[str]:
        """Return key, digest and, where there is one, path, whatever has become of them."""
        return [bytes(column[row]).decode(errors="backslashreplace") for column in self._columns]


class Texts(Sequence[str]):
    """The keys, digests or paths of a shard as they are stored: opening one for one key makes no string of the rest."""

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


class Shard:
    """Reads one shard. Every read is verified against the checksums."""

    def __init__(self, path: Path, spec: ExtractorSpec, images: int, size: int, patches: Patches = "stored") -> None:
        """Open a shard.

        Raises:
            CorruptGalleryError: the file is missing, cut short, or does not hold what the manifest says.
        """
        self.path = path
        self._level_shapes = _level_shapes(spec, patches)
        self._dtype = spec.dtype
        self._size = size
        try:
            found = path.stat().st_size
            if found != size:
                raise CorruptGalleryError(f"{path}: expected {size} bytes, found {found}")
            self._file: Any = h5py.File(path, "r", libver="latest", locking=False)
            expected = [(images, *shape) for shape in self._level_shapes]
            self._levels = [self._dataset(f"levels/{n}", shape, spec.dtype) for n, shape in enumerate(expected)]
            self._image = self._dataset("image", (images, spec.image_dim), "float32")
            self._checksums: NDArray[np.uint64] = self._dataset("checksums", (images, 2 + len(expected)), "uint64")[:]
            columns = [self._column(name, images) for name in names_of(patches)]
            self.names = Names(path, columns, self._checksums[:, 0])
            self.keys, self.digests = self.names.column(0), self.names.column(1)
            # Paths of the image files; None where there are levels instead.
            self.sources = None if patches == "stored" else self.names.column(2)
        except CorruptGalleryError:
            raise
        except FileNotFoundError as error:
            raise CorruptGalleryError(f"{path}: expected a shard of {images} images, found nothing there") from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            # The system says why it cannot be opened by a number; what HDF5 makes no sense of has none.
            what = "cannot be opened" if getattr(error, "errno", None) else "damaged"
            raise CorruptGalleryError(f"{path}: {what}: {str(error).splitlines()[0]}") from error

    def _dataset(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        dataset = dataset_of(self._file, name, self._size)
        if (dataset.shape, dataset.dtype) != (shape, dtype):
            raise ValueError(f"{name}: expected {shape} {dtype}, found {dataset.shape} {dataset.dtype}")
        return dataset

    def _column(self, name: str, images: int) -> NDArray[np.bytes_]:
        dataset = dataset_of(self._file, name, self._size)
        if dataset.shape != (images,) or dataset.dtype.kind != "S":
            raise ValueError(f"{name}: expected {images} of fixed length, found {dataset.shape} {dataset.dtype}")
        column: NDArray[np.bytes_] = dataset[:]
        return column

    def close(self) -> None:
        """Close the file; a reader stays good."""
        self._file.close()

    def image_features(self) -> Array:
        """Read all image features, (n, d) float32.

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written.
        """
        image: Array = self._read("image features", lambda: self._image[:])
        for row in self._damaged_images(image):
            raise CorruptGalleryError(f"{self.path}: image {self.names.shown(row)!r}: {DAMAGED_IMAGE}")
        return image

    def image_feature(self, row: int) -> Array:
        """Read one image feature, (d,) float32; raises as image_features."""
        image: Array = self._read("image features", lambda: self._image[row : row + 1])
        if xxhash.xxh3_64_intdigest(image.data) != self._checksums[row, 1]:
            raise CorruptGalleryError(f"{self.path}: image {self.names.shown(row)!r}: {DAMAGED_IMAGE}")
        feature: Array = image[0]
        return feature

    def reader(self, key: Callable[[int], str], open_file: Callable[[], OpenFile]) -> LevelReader:
        """Return what reads the levels without HDF5, from any number of threads, also after close.

        Args:
            key: of the image in a row, for errors.
            open_file: gives the shard's file, to read from it.

        Raises:
            CorruptGalleryError: the levels are not stored as written, or lie outside the file.
        """
        return self._read(
            "where the levels are",
            lambda: LevelReader(self.path, self._size, self._levels, self._checksums[:, 2:].copy(), key, open_file),
        )

    def read_into(self, row: int, out: Sequence[Array], verify: bool = True) -> None:
        """Read the levels of one image, through HDF5, into `out`, contiguous arrays [(c, h, w), ...].

        Raises:
            CorruptGalleryError: they cannot be read, or are not what was written (unless `verify` is off).
        """
        for number, (dataset, target) in enumerate(zip(self._levels, out, strict=True)):
            self._read(f"level {number}", lambda: dataset.read_direct(target, np.s_[row]))  # noqa: B023 (called at once)
            if verify and not is_whole(target, self._checksums[row, 2 + number]):
                raise damaged_level(self.path, self.names.shown(row), number)

    def read(self, row: int) -> list[Array]:
        """Read the levels of one image, [(c, h, w), ...]; none where they are recomputed. Raises as read_into."""
        out = [np.empty(shape, self._dtype) for shape in self._level_shapes]
        self.read_into(row, out)
        return out

    def problems(self) -> Iterator[tuple[str, str]]:
        """Check every image; yields (key, what is wrong), at most one for each image."""
        for row, what in self.damaged().items():
            yield self.names.shown(row), what

    def damaged(self) -> dict[int, str]:
        """Check every image; returns for each row that is damaged what is wrong: of its names before all else.

        Raises:
            CorruptGalleryError: the image features cannot be read.
        """
        image: Array = self._read("image features", lambda: self._image[:])
        damaged = dict.fromkeys(self._damaged_images(image), DAMAGED_IMAGE)
        for row in range(len(self.keys)):
            try:
                self.read(row)
            except CorruptGalleryError as error:
                damaged.setdefault(row, str(error))
            if self.names.differ(row):
                damaged[row] = DAMAGED_NAMES
        return dict(sorted(damaged.items()))

    def _damaged_images(self, image: Array) -> list[int]:
        return self._differing(1, [xxhash.xxh3_64_intdigest(feature.data) for feature in image])

    def _differing(self, column: int, found: list[int]) -> list[int]:
        """Return the rows whose checksums of one column are not those found."""
        return [int(row) for row in np.flatnonzero(np.array(found, np.uint64) != self._checksums[:, column])]

    def _read(self, what: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, RuntimeError) as error:
            raise CorruptGalleryError(f"{self.path}: {what} cannot be read: {str(error).splitlines()[0]}") from error


def _level_shapes(spec: ExtractorSpec, patches: Patches) -> tuple[tuple[int, int, int], ...]:
    return spec.level_shapes if patches == "stored" else ()
