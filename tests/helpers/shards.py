"""One shard of four images, written and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import spade_faiss as sf
from spade_faiss.store.file_pool import PooledFile
from spade_faiss.store.level_reader import LevelReader
from spade_faiss.store.shard_format import ShardSchema
from spade_faiss.store.shard_reader import ShardReader
from spade_faiss.store.shard_writer import ShardWriter
from tests.helpers.galleries import OWN

FLOAT32 = sf.ExtractorSpec(name="own", level_shapes=OWN.level_shapes, image_dim=6, dtype="float32")
WIDE_RESNET50_2 = sf.ExtractorSpec(
    name="wide", level_shapes=((256, 56, 56), (512, 28, 28), (1024, 14, 14)), image_dim=2048
)
PATHS = ShardSchema(OWN, "recompute")
KEYS = ["a.png", "with space/näme.png", "日本.png", "x" * 300]
DIGESTS = [f"sha256:{number:064x}" for number in range(len(KEYS))]


def write(path: Path, features: sf.Features, spec: sf.ExtractorSpec = OWN) -> ShardReader:
    """Write one shard in two appends, and open it."""
    writer = ShardWriter(path, ShardSchema(spec))
    for rows in (slice(0, 1), slice(1, len(features))):
        writer.append(KEYS[rows], DIGESTS[rows], features[rows])
    return ShardReader(path, ShardSchema(spec), len(features), writer.finish())


def read(shard: ShardReader, rows: list[int], spec: sf.ExtractorSpec = OWN) -> list[np.ndarray]:
    out = [np.empty((len(rows), *shape), spec.dtype) for shape in spec.level_shapes]
    for position, row in enumerate(rows):
        shard.read_into(row, [level[position] for level in out])
    return out


def image_features(shard: ShardReader) -> np.ndarray:
    return np.stack([shard.image_feature(row) for row in range(len(shard.keys))])


def reader_of(shard: ShardReader) -> LevelReader:
    file = PooledFile(shard.path, shard.path.stat().st_size)
    return shard.reader(shard.names.shown, lambda: file)


def read_straight(
    shard: ShardReader, rows: list[int], spec: sf.ExtractorSpec = OWN, verify: bool = True
) -> list[np.ndarray]:
    """Read without HDF5."""
    out = [np.empty((len(rows), *shape), spec.dtype) for shape in spec.level_shapes]
    reader = reader_of(shard)
    for position, row in enumerate(rows):
        reader.read(row, [level[position] for level in out], verify)
    return out


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()
