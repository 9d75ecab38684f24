"""Shards: what comes back is what was written, bit for bit, and nothing of what was not finished."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import GalleryError
from spade_faiss.store.shard_format import ShardSchema
from spade_faiss.store.shard_reader import ShardReader
from spade_faiss.store.shard_writer import ShardWriter
from tests.helpers.galleries import OWN, RandomFeatures
from tests.helpers.shards import (
    DIGESTS,
    FLOAT32,
    KEYS,
    PATHS,
    WIDE_RESNET50_2,
    assert_same_bits,
    image_features,
    read,
    read_straight,
    reader_of,
    write,
)


@pytest.mark.parametrize("spec", [OWN, FLOAT32], ids=lambda spec: spec.dtype)
def test_it_reads_what_was_written(tmp_path: Path, random_features: RandomFeatures, spec: sf.ExtractorSpec) -> None:
    features = random_features(len(KEYS), spec)
    # Values that a conversion on the way would change: the smallest and largest, and a negative zero.
    limits = np.finfo(spec.dtype)
    features.levels[0][2].flat[:4] = [limits.smallest_subnormal, limits.max, limits.min, -0.0]
    shard = write(tmp_path / "s.h5", features, spec)
    assert (list(shard.keys), list(shard.digests)) == (KEYS, DIGESTS)
    assert_same_bits(image_features(shard), features.image)
    for row in range(len(KEYS)):
        assert_same_bits(shard.image_feature(row), features.image[row])
    order = [3, 0, 0, 2]
    for how in (read, read_straight):
        for found, level in zip(how(shard, order, spec), features.levels, strict=True):
            assert_same_bits(found, level[order])
    assert list(shard.problems()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "s.h5"]  # and nothing temporary is left


def test_plain_h5py_reads_it_at_native_resolution(tmp_path: Path, features: sf.Features) -> None:
    write(tmp_path / "s.h5", features).close()
    with h5py.File(tmp_path / "s.h5", "r") as file:
        assert sorted(file) == ["checksums", "digests", "image", "keys", "levels"]
        assert list(file["levels"]) == ["0", "1"]
        for number, level in enumerate(features.levels):
            dataset = file[f"levels/{number}"]
            assert_same_bits(dataset[:], level)
            assert dataset.chunks == (1, *OWN.level_shapes[number])  # one image a chunk
            assert dataset.compression is None
        assert_same_bits(file["image"][:], features.image)
        assert file["keys"].asstr()[:].tolist() == KEYS
        assert file["digests"].asstr()[:].tolist() == DIGESTS


def test_an_image_of_wide_resnet50_2_takes_at_most_2870_kb(tmp_path: Path, rng: np.random.Generator) -> None:
    n = 6
    levels = [
        rng.integers(0, 0x7C00, (n, *shape), np.uint16).view(np.float16)  # any bits but infinity and NaN
        for shape in WIDE_RESNET50_2.level_shapes
    ]
    features = sf.Features(rng.standard_normal((n, 2048), np.float32), levels)
    writer = ShardWriter(tmp_path / "s.h5", ShardSchema(WIDE_RESNET50_2))
    keys = [f"{row}.png" for row in range(n)]
    writer.append(keys, keys, features)
    size = writer.finish()
    assert size == (tmp_path / "s.h5").stat().st_size
    assert size / n <= 2.87e6


def test_a_schema_says_what_shards_hold(features: sf.Features) -> None:
    stored, paths = ShardSchema(OWN), PATHS
    assert (stored.has_levels, paths.has_levels) == (True, False)
    assert (stored.level_shapes, paths.level_shapes) == (OWN.level_shapes, ())
    assert (stored.columns, paths.columns) == (("keys", "digests"), ("keys", "digests", "sources"))
    assert (stored.least_bytes, paths.least_bytes) == (OWN.bytes_per_image, 4 * OWN.image_dim)
    assert (stored.bytes_per_image, paths.bytes_per_image) == (OWN.bytes_per_image, OWN.bytes_with("recompute"))
    wide = sf.Features(features.image.astype(np.float64), [level.astype(np.float32) for level in features.levels])
    for schema, levels in ((stored, features.levels), (paths, [])):
        found = schema.stored(wide)
        assert len(found.levels) == len(levels)
        for level, expected in zip([found.image, *found.levels], [features.image, *levels], strict=True):
            assert_same_bits(level, expected)
    wide.levels[1][2, 0, 0, 0] = np.nan  # refused even where levels are not stored
    for schema in (stored, paths):
        with pytest.raises(sf.FeatureError, match="level 1 of image 2 of 4: expected finite values"):
            schema.stored(wide)


def test_an_append_that_was_interrupted_leaves_nothing_behind(tmp_path: Path, features: sf.Features) -> None:
    """As by Ctrl-C, after which what was whole is committed."""
    writer = ShardWriter(tmp_path / "s.h5", ShardSchema(OWN))
    writer.append(KEYS[:1], DIGESTS[:1], features[:1])
    with pytest.raises(ValueError, match="argument 2 is shorter"):  # stops after the first of two levels
        writer.append(KEYS[1:], DIGESTS[1:], sf.Features(features.image[1:], features.levels[:1]))
    assert len(writer) == 1
    writer.append(KEYS[3:], DIGESTS[3:], features[3:])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        writer.append(KEYS[1:3], DIGESTS[1:3], sf.Features(features.image[1:3], features.levels[:1]))
    shard = ShardReader(tmp_path / "s.h5", ShardSchema(OWN), 2, writer.finish())
    assert list(shard.keys) == [KEYS[0], KEYS[3]]
    assert list(shard.problems()) == []
    assert_same_bits(image_features(shard), features.image[[0, 3]])
    for found, level in zip(read(shard, [0, 1]), features.levels, strict=True):
        assert_same_bits(found, level[[0, 3]])


def test_an_aborted_shard_was_never_there(tmp_path: Path, features: sf.Features) -> None:
    writer = ShardWriter(tmp_path / "s.h5", ShardSchema(OWN))
    writer.append(KEYS, DIGESTS, features)
    assert not (tmp_path / "s.h5").exists()  # not under its name before it is whole
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match=r"cannot write .*s\.h5: No such file or directory"):
        ShardWriter(tmp_path / "nowhere" / "s.h5", ShardSchema(OWN))


def test_many_threads_read_at_once_and_after_the_shard_was_closed_and_deleted(
    tmp_path: Path, features: sf.Features
) -> None:
    shard = write(tmp_path / "s.h5", features)
    reader = reader_of(shard)
    shard.close()
    (tmp_path / "s.h5").unlink()

    def read_one(number: int) -> None:
        row = number % len(KEYS)
        out = [np.empty(shape, OWN.dtype) for shape in OWN.level_shapes]
        reader.read(row, out)
        for found, level in zip(out, features.levels, strict=True):
            assert_same_bits(found, level[row])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_one, range(400)))
