"""Shards that are not as they are written: what lies elsewhere, or otherwise, is refused unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError
from spade_faiss.store.file_pool import FilePool
from spade_faiss.store.manifest import ShardEntry
from spade_faiss.store.row_reader import RowReader
from spade_faiss.store.shard_format import ShardSchema, StoredDataset
from spade_faiss.store.shard_reader import ShardReader
from tests.helpers.galleries import OWN
from tests.helpers.shards import FLOAT32, KEYS, reader_of, write


def test_a_shard_that_holds_something_else_is_refused(tmp_path: Path, features: sf.Features) -> None:
    path = tmp_path / "s.h5"
    write(path, features).close()
    size = path.stat().st_size
    other_shape = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7), (2, 3, 4)), image_dim=6)
    more_levels = sf.ExtractorSpec(name="own", level_shapes=(*OWN.level_shapes, (2, 1, 1)), image_dim=6)
    other_dim = sf.ExtractorSpec(name="own", level_shapes=OWN.level_shapes, image_dim=7)
    for spec in (other_shape, more_levels, other_dim, FLOAT32):
        with pytest.raises(CorruptGalleryError, match=r"s\.h5"):
            ShardReader(path, ShardSchema(spec), len(KEYS), size)
    with pytest.raises(CorruptGalleryError, match=r"expected \(5, 3, 5, 7\) float16, found \(4, 3, 5, 7\)"):
        ShardReader(path, ShardSchema(OWN), 5, size)


@pytest.mark.parametrize(
    "options",
    [{"chunks": (2, 3, 5, 7)}, {"compression": "gzip"}, {}],
    ids=["larger chunks", "compressed", "contiguous"],
)
def test_levels_that_are_stored_otherwise_are_refused(
    tmp_path: Path, features: sf.Features, options: dict[str, Any]
) -> None:
    path = tmp_path / "s.h5"
    write(path, features).close()
    with h5py.File(path, "r+", libver="latest") as file:
        del file["levels/0"]
        file.create_dataset("levels/0", data=features.levels[0], **options)
    shard = ShardReader(path, ShardSchema(OWN), len(KEYS), path.stat().st_size)
    with pytest.raises(CorruptGalleryError, match=r"s\.h5: level 0: expected 4 chunks of 210 bytes, not compressed"):
        reader_of(shard)


class Far:
    """A dataset whose chunks HDF5 says are elsewhere."""

    def __init__(self, dataset: StoredDataset, place: int) -> None:
        self.shape, self.dtype, self.chunks, self.filters = dataset.shape, dataset.dtype, dataset.chunks, 0
        self.id, self._dataset, self._place = self, dataset, place

    def chunk_iter(self, callback: Any) -> None:
        self._dataset.id.chunk_iter(lambda chunk: callback(chunk._replace(byte_offset=self._place)))


@pytest.mark.parametrize("place", [-1, 10**6, 2**64 - 1])
def test_levels_outside_the_file_are_refused(tmp_path: Path, features: sf.Features, place: int) -> None:
    shard = write(tmp_path / "s.h5", features)
    shard._levels[1] = Far(shard._levels[1], place)
    with pytest.raises(
        CorruptGalleryError, match=rf"level 1 of image .*within the file's \d+ bytes, found it at {place}"
    ):
        reader_of(shard)


def move(file: h5py.File, name: str, to: Path) -> tuple[int, ...]:
    """Move a dataset to another file; returns its shape."""
    with h5py.File(to, "w") as other:
        other[name] = file[name][:]
        shape: tuple[int, ...] = other[name].shape
    del file[name]
    return shape


def other_file(path: Path, name: str) -> None:
    """Put a dataset that lies in another file, of the same shape, into a shard's place of one."""
    with h5py.File(path, "r+") as file:
        move(file, name, path.with_name("other.h5"))
        file[name] = h5py.ExternalLink(path.with_name("other.h5"), name)


def raw_file(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        del file[name]
        path.with_name("raw").write_bytes(values.tobytes())
        file.create_dataset(
            name, values.shape, values.dtype, external=[(str(path.with_name("raw")), 0, h5py.h5f.UNLIMITED)]
        )


def virtual(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        dtype, shape = file[name].dtype, move(file, name, path.with_name("other.h5"))
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(path.with_name("other.h5"), name, shape)
        file.create_virtual_dataset(name, layout)


def soft_link(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        file.move(name, "elsewhere")
        file[name] = h5py.SoftLink("/elsewhere")


def huge(path: Path, name: str) -> None:
    """Of so many rows that no memory holds them; not one is in the file."""
    with h5py.File(path, "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        file.create_dataset(name, (10**12, *shape[1:]), dtype, chunks=(1, *shape[1:]), fillvalue=None)


def compressed(path: Path, name: str) -> None:
    """A few bytes that claim to be a gigabyte."""
    with h5py.File(path, "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        file.create_dataset(name, (10**7, *shape[1:]), dtype, chunks=(10**4, *shape[1:]), compression="gzip")


def of_any_length(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        n = len(file[name])
        del file[name]
        file.create_dataset(name, data=["x" * 1000] * n, dtype=h5py.string_dtype())


@pytest.mark.parametrize("name", ["keys", "digests", "image", "checksums", "levels/0"])
@pytest.mark.parametrize("harm", [other_file, raw_file, virtual, soft_link, huge, compressed, of_any_length])
def test_a_dataset_that_is_elsewhere_or_larger_than_the_file_is_refused_unread(
    tmp_path: Path, features: sf.Features, harm: Any, name: str
) -> None:
    path = tmp_path / "s.h5"
    write(path, features).close()
    harm(path, name)
    with pytest.raises(CorruptGalleryError, match=rf"s\.h5: damaged: {name}: expected"):
        ShardReader(path, ShardSchema(OWN), len(KEYS), path.stat().st_size)
    if name != "levels/0":
        entry = ShardEntry("s.h5", len(KEYS), path.stat().st_size)
        with pytest.raises(CorruptGalleryError, match=rf"^{path}: damaged: {name}: expected"):
            RowReader(tmp_path, [entry], ShardSchema(OWN), FilePool()).read(np.array([0]))
