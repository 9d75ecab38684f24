"""Shards: what comes back is what was written, bit for bit, or an error that names the file."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError, GalleryError
from spade_faiss.store.file_pool import FilePool
from spade_faiss.store.manifest import ShardEntry
from spade_faiss.store.row_reader import RowReader
from spade_faiss.store.shard_format import ShardSchema, StoredDataset
from spade_faiss.store.shard_reader import ShardReader
from spade_faiss.store.shard_writer import ShardWriter
from tests.helpers.galleries import OWN, RandomFeatures
from tests.helpers.processes import run
from tests.helpers.shards import (
    DIGESTS,
    FLOAT32,
    KEYS,
    PATHS,
    WIDE_RESNET50_2,
    image_features,
    read,
    read_straight,
    reader_of,
    write,
)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.fixture
def features(random_features: RandomFeatures) -> sf.Features:
    return random_features(len(KEYS))


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


# Runs apart from the tests, because damage may also make the HDF5 library hang or crash.
FLIP = """
import sys
from pathlib import Path
from spade_faiss.errors import CorruptGalleryError
from tests.helpers.shards import *
path, changed = Path(sys.argv[1]), Path(sys.argv[1]).with_name("changed.h5")
content, n = path.read_bytes(), len(KEYS)

def state():
    shard = ShardReader(changed, ShardSchema(OWN), n, len(content))
    problems = list(shard.problems())
    if problems:
        return "reported"
    levels = read(shard, list(range(n))) + read_straight(shard, list(range(n)))
    return [*shard.keys, *shard.digests, image_features(shard).tobytes(), *(level.tobytes() for level in levels)]

changed.write_bytes(content)
expected = state()
for line in sys.stdin:
    place = int(line)
    print(place, end=" ", flush=True)
    flipped = bytearray(content)
    flipped[place] ^= 1 << place % 8
    changed.unlink()  # a file that is written anew in place waits for the disk
    changed.write_bytes(flipped)
    try:
        found = state()
        print("WRONG" if found not in ("reported", expected) else "same" if found == expected else found)
    except CorruptGalleryError as error:
        print("refused" if str(changed) in str(error) and len(str(error).splitlines()) == 1 else f"UNCLEAR {error!r}")
    except BaseException as error:
        print(f"UNCAUGHT {error!r}")
"""


def flip(path: Path, places: list[int]) -> dict[int, str]:
    """Flip one bit of the byte at each place, each in a fresh copy of the file; returns what reading made of it."""
    done = run(FLIP, path, given="\n".join(map(str, places)), timeout=20)
    assert done.returncode != -signal.SIGKILL, f"reading hangs with a bit flipped in byte {done.stdout.split()[-1]}"
    assert done.returncode == 0, f"{done.stdout[-200:]} {done.stderr}"
    outcomes = {int(place): outcome for place, outcome in (line.split(" ", 1) for line in done.stdout.splitlines())}
    assert list(outcomes) == places
    return outcomes


@pytest.mark.slow
def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path, features: sf.Features) -> None:
    path = tmp_path / "s.h5"
    write(path, features).close()
    rng = np.random.default_rng(5)
    places = rng.choice(path.stat().st_size, 150, replace=False).tolist()
    outcomes = flip(path, places)
    assert set(outcomes.values()) <= {"reported", "refused", "same"}, outcomes
    assert {"reported", "refused"} <= set(outcomes.values())  # it did hit data, and structures of the file


def test_a_flipped_bit_in_what_was_stored_is_noticed(tmp_path: Path, features: sf.Features) -> None:
    path = tmp_path / "s.h5"
    write(path, features).close()
    content = path.read_bytes()
    with h5py.File(path, "r") as file:
        stored = [file["checksums"][:].tobytes(), features.image[2].tobytes(), KEYS[1].encode(), DIGESTS[3].encode()]
    stored += [level[row].tobytes() for row, level in enumerate(features.levels)]
    places = [content.index(part) + offset for part in stored for offset in (0, len(part) // 2, len(part) - 1)]
    outcomes = flip(path, places)
    assert set(outcomes.values()) <= {"reported", "refused"}, outcomes


def test_a_flipped_bit_in_front_of_a_key_is_noticed_or_harmless(tmp_path: Path, features: sf.Features) -> None:
    """Where HDF5 may keep its length: these lengths have no checksum of HDF5's own."""
    path = tmp_path / "s.h5"
    write(path, features).close()
    content = path.read_bytes()
    starts = [content.index(text.encode()) for text in KEYS + DIGESTS]
    outcomes = flip(path, [start - back for start in starts for back in (1, 7, 8, 12, 16)])
    assert set(outcomes.values()) <= {"reported", "refused", "same"}, outcomes


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


def test_paths_in_place_of_levels_are_under_the_checksum_too(tmp_path: Path, features: sf.Features) -> None:
    path, places = tmp_path / "s.h5", [f"/somewhere/{key}" for key in KEYS]
    writer = ShardWriter(path, PATHS)
    writer.append(KEYS, DIGESTS, sf.Features(features.image, []), places)
    size = writer.finish()
    shard = ShardReader(path, PATHS, len(KEYS), size)
    assert shard.sources is not None
    assert list(shard.sources) == places
    assert_same_bits(image_features(shard), features.image)
    assert list(shard.problems()) == []
    content = bytearray(path.read_bytes())
    content[content.index(places[1].encode()) + 4] ^= 1
    path.write_bytes(content)
    [(key, what)] = ShardReader(path, PATHS, len(KEYS), size).problems()
    assert (key, what) == (KEYS[1], "key, digest or path is not what was written (checksum)")


def test_damage_names_the_image_and_spares_the_others(tmp_path: Path, features: sf.Features) -> None:
    path = tmp_path / "s.h5"
    size = write(path, features).path.stat().st_size
    content = bytearray(path.read_bytes())
    content[content.index(features.levels[1][2].tobytes()) + 3] ^= 1
    path.write_bytes(content)
    shard = ShardReader(path, ShardSchema(OWN), len(KEYS), size)
    assert [key for key, _ in shard.problems()] == [KEYS[2]]
    for how in (read, read_straight):
        with pytest.raises(CorruptGalleryError, match=f"{KEYS[2]}.*level 1"):
            how(shard, [0, 2])
        assert_same_bits(how(shard, [3])[0], features.levels[0][[3]])
    unverified = read_straight(shard, [2], verify=False)
    assert_same_bits(unverified[0], features.levels[0][[2]])
    assert unverified[1].tobytes() in content  # as it is in the file
    assert unverified[1].tobytes() != features.levels[1][2].tobytes()
    assert_same_bits(image_features(shard), features.image)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "found nothing there"),
        (lambda path: path.write_bytes(b""), "found 0"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, found"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, found"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000].ljust(path.stat().st_size, b"\0")), "damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes, found|damaged"),
    ],
    ids=["missing", "empty", "short", "long", "zeros", "zero-tail", "folder"],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, features: sf.Features, damage: object, expected: str
) -> None:
    path = tmp_path / "s.h5"
    write(path, features).close()
    size = path.stat().st_size
    damage(path)  # type: ignore[operator]
    with pytest.raises(CorruptGalleryError, match=expected) as caught:
        ShardReader(path, ShardSchema(OWN), len(KEYS), size)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_a_file_cut_short_while_it_is_open(tmp_path: Path, features: sf.Features) -> None:
    shard = write(tmp_path / "s.h5", features)
    reader = reader_of(shard)
    end = int(reader._offsets[1, 2])
    out = [np.empty(shape, OWN.dtype) for shape in OWN.level_shapes]
    os.truncate(tmp_path / "s.h5", end + 3)
    for verify in (True, False):
        with pytest.raises(
            CorruptGalleryError, match=rf"s\.h5: level 1 of image '{KEYS[2]}' cannot be read: .*cut short"
        ):
            reader.read(2, out, verify)


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


@pytest.mark.parametrize("column", ["keys", "digests", "sources"])
def test_a_damaged_name_is_refused_when_it_is_read(tmp_path: Path, features: sf.Features, column: str) -> None:
    path, places = tmp_path / "s.h5", [f"/somewhere/{key}" for key in KEYS]
    writer = ShardWriter(path, PATHS)
    writer.append(KEYS, DIGESTS, sf.Features(features.image, []), places)
    size = writer.finish()
    with h5py.File(path, "r+") as file:
        texts = file[column][:]
        texts[1] = texts[1][:-1] + b"X"
        file[column][:] = texts
    shard = ShardReader(path, PATHS, len(KEYS), size)
    for texts in (shard.keys, shard.digests, shard.sources or []):
        with pytest.raises(CorruptGalleryError, match=r"s\.h5: image 'with space.*key, digest or path is not what was"):
            texts[1]
        texts[0], texts[2], texts[3]
    assert_same_bits(shard.image_feature(1), features.image[1])
    assert len(list(shard.problems())) == 1


def other_file(path: Path, name: str) -> None:
    """Put a dataset that lies in another file, of the same shape, into a shard's place of one."""
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        del file[name]
        with h5py.File(path.with_name("other.h5"), "w") as other:
            other[name] = values
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
        values = file[name][:]
        del file[name]
        with h5py.File(path.with_name("other.h5"), "w") as other:
            other[name] = values
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource(path.with_name("other.h5"), name, values.shape)
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
