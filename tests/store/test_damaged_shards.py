"""Shards that were damaged: what is read is what was written, or an error names the file and the image."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError
from spade_faiss.store.shard_format import ShardSchema
from spade_faiss.store.shard_reader import ShardReader
from spade_faiss.store.shard_writer import ShardWriter
from tests.helpers.galleries import OWN
from tests.helpers.processes import run
from tests.helpers.shards import (
    DIGESTS,
    KEYS,
    PATHS,
    assert_same_bits,
    image_features,
    read,
    read_straight,
    reader_of,
    write,
)

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
