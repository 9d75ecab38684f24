"""Keys are found as a dict would find them, by a table of hashes: opening few shards, whatever happens to its file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError
from spade_faiss.store import key_table, secondary_indexes
from spade_faiss.store.key_table import KeyTable
from spade_faiss.store.manifest import Manifest
from spade_faiss.store.row_reader import RowReader
from tests.helpers.galleries import OWN, random_features_of

N = 12
KEYS = [f"part {number % 3}/{number:02d}.png" for number in range(N)]

HASHES: dict[str, Callable[[bytes], int]] = {
    "xxh3": key_table.key_hash,
    "few": lambda key: xxhash.xxh3_64_intdigest(key) % 3 << 62,  # beyond what an int64 holds, too
    "one": lambda key: 7,
}


def create(path: Path, images: int = 1) -> sf.Gallery:
    """Of so many images a shard."""
    return sf.Gallery.create(path, OWN, sf.IndexOptions(device="cpu"), shard_bytes=images * OWN.bytes_per_image)


def reopen(path: Path) -> sf.Gallery:
    return sf.Gallery.open(path, device="cpu")


@pytest.fixture
def gallery(tmp_path: Path) -> sf.Gallery:
    gallery = create(tmp_path / "g")
    gallery.append(KEYS, random_features_of(N))
    return gallery


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of shards, as they are first read."""
    names: list[str] = []
    find = RowReader._find

    def watched(self: RowReader, number: int) -> Any:
        names.append(Path(self._shards[number].file).name)
        return find(self, number)

    monkeypatch.setattr(RowReader, "_find", watched)
    return names


def key_file(gallery: sf.Gallery) -> Path:
    (path,) = gallery.path.glob("index/keys-*.npy")
    return path


# The table alone

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=4)


@pytest.mark.parametrize("hashed", HASHES)
@settings(max_examples=60)
@given(
    blocks=st.lists(st.lists(TEXTS, max_size=8), max_size=8),
    others=st.lists(TEXTS, max_size=4),
    recent=st.integers(0, 9),
)
def test_a_table_equals_a_dict_of_lists(hashed: str, blocks: list[list[str]], others: list[str], recent: int) -> None:
    """Whatever is merged when, and read back from a file or not."""
    rows = [key for block in blocks for key in block]
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(key_table, "RECENT", recent)
        patch.setattr(key_table, "key_hash", hash_of := HASHES[hashed])
        by_hash: dict[int, list[int]] = {}
        for row, key in enumerate(rows):
            by_hash.setdefault(hash_of(key.encode()), []).append(row)
        table = KeyTable()
        for block in blocks:
            before, asked = table, table.candidates(rows)
            table = table.extended(key.encode() for key in block)
            assert before.candidates(rows) == asked  # others may be using it
        size, checksum = table.save(path := Path(folder) / "keys.npy")
        for found in (table, KeyTable.load(path, len(rows), size, checksum)):
            assert len(found) == len(rows)
            wanted = [by_hash.get(hash_of(key.encode()), []) for key in rows + others]
            assert [sorted(ids) for ids in found.candidates(rows + others)] == wanted
        assert [file.name for file in Path(folder).iterdir()] == ["keys.npy"]


def written(path: Path, content: bytes) -> tuple[Path, int, str]:
    path.write_bytes(content)
    return path, len(content), xxhash.xxh3_64_hexdigest(content)


def test_a_file_is_taken_only_when_it_is_what_was_written(tmp_path: Path) -> None:
    table = KeyTable().extended(key.encode() for key in KEYS)
    size, checksum = table.save(path := tmp_path / "keys.npy")
    content = path.read_bytes()
    for place in range(0, size, 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptGalleryError, match=r"keys\.npy: expected checksum"):
            KeyTable.load(path, N, size, checksum)
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptGalleryError, match=rf"expected {size} bytes, found {size - 1}"):
        KeyTable.load(path, N, size, checksum)
    path.unlink()
    with pytest.raises(CorruptGalleryError, match="No such file"):
        KeyTable.load(path, N, size, checksum)
    path.mkdir()
    with pytest.raises(CorruptGalleryError, match=r"keys\.npy"):
        KeyTable.load(path, N, path.stat().st_size, checksum)


def npy(array: np.ndarray, path: Path) -> bytes:
    np.save(path, array, allow_pickle=True)
    return path.read_bytes()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, N), np.int64),
        np.zeros((2, N + 1), np.uint64),
        np.zeros(2 * N, np.uint64),
        np.array([range(N, 0, -1), range(N)], np.uint64),  # not sorted
        np.array([range(N), range(1, N + 1)], np.uint64),  # an id too high
        np.array([["x"] * N] * 2, object),  # a pickle
        np.zeros((2, N), np.uint64, order="F"),
    ],
    ids=["signed", "longer", "flat", "unsorted", "no-id", "pickle", "columns"],
)
def test_an_array_that_is_no_table_is_refused_whatever_its_checksum_says(tmp_path: Path, array: np.ndarray) -> None:
    path, size, checksum = written(tmp_path / "keys.npy", npy(array, tmp_path / "other.npy"))
    with pytest.raises(CorruptGalleryError, match=r"keys\.npy: (expected|damaged)"):
        KeyTable.load(path, N, size, checksum)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x93NUMPY", b"PK\3\4", pickle.dumps([1]), b"\x93NUMPY\1\0\x80\0" + b"(" * 128, key_table._header(10**15)],
    ids=["empty", "cut", "zip", "pickle", "nested", "huge"],
)
def test_what_is_no_array_is_refused_whatever_its_checksum_says(tmp_path: Path, content: bytes) -> None:
    path, size, checksum = written(tmp_path / "keys.npy", content)
    with pytest.raises(CorruptGalleryError, match=r"keys\.npy: "):
        KeyTable.load(path, N, size, checksum)


# In a gallery


def test_looking_keys_up_opens_only_their_shards(gallery: sf.Gallery, opened: list[str]) -> None:
    reader = reopen(gallery.path)
    assert len(reader) == N
    assert "no such" not in reader
    assert reader.snapshot().ids().tolist() == list(range(N))
    assert opened == []
    assert KEYS[7] in reader
    assert opened == ["000007.h5"]
    assert reader.ids([KEYS[9], KEYS[3], KEYS[9]]) == [9, 3, 9]
    assert opened == ["000007.h5", "000003.h5", "000009.h5"]


def test_a_lookup_needs_no_shard_but_its_own(gallery: sf.Gallery) -> None:
    (gallery.path / "shards/000004.h5").unlink()
    reader = reopen(gallery.path)
    assert reader.ids([KEYS[3], KEYS[5]]) == [3, 5]
    with pytest.raises(CorruptGalleryError, match=r"000004\.h5"):
        assert KEYS[4] in reader


@pytest.mark.parametrize("wrong", ["", "\0", "\udcff", KEYS[0] + "\0", 7, None, b"part 0/00.png"])
def test_what_no_key_can_be_is_not_there(gallery: sf.Gallery, wrong: Any) -> None:
    assert wrong not in gallery
    with pytest.raises(KeyError):
        gallery.ids([KEYS[0], wrong])
    with pytest.raises(sf.OptionError, match="expected keys of images in it"):
        gallery.remove([KEYS[0], wrong])
    assert KEYS[0] in gallery


@pytest.mark.parametrize("hashed", ["few", "one"])
def test_keys_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: str) -> None:
    monkeypatch.setattr(key_table, "key_hash", HASHES[hashed])
    gallery = create(tmp_path / "g")
    gallery.append(KEYS, random_features_of(N))
    gallery.remove(KEYS[2:4])
    gallery.append(KEYS[3:5], random_features_of(2, seed=1), replace=True)
    for at in (gallery, reopen(gallery.path)):
        assert at.ids([KEYS[4], KEYS[3], KEYS[11]]) == [N + 1, N, 11]
        assert KEYS[2] not in at
        assert "no such" not in at
        assert at.keys() == [*KEYS[:2], *KEYS[5:], *KEYS[3:5]]


def test_rows_beyond_the_file_come_from_the_shards_beyond_it(tmp_path: Path, opened: list[str]) -> None:
    gallery, features = create(tmp_path / "g", images=50), random_features_of(152)
    names = [str(row) for row in range(152)]
    gallery.append(names[:150], features[:150])
    before = key_file(gallery).read_bytes()
    for row in (150, 151):
        gallery.append([names[row]], features[row : row + 1])
    assert key_file(gallery).read_bytes() == before  # two of 152: not worth writing it anew
    reader = reopen(gallery.path)
    opened.clear()
    assert "no such" not in reader
    assert opened == ["000003.h5", "000004.h5"]
    assert reader.ids(names) == list(range(152))


def test_the_file_is_written_anew_when_many_shards_are_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they are few of all the rows."""
    monkeypatch.setattr(secondary_indexes, "KEYS_LAG", 3)
    gallery, features = create(tmp_path / "g", images=50), random_features_of(204)
    names = [str(row) for row in range(204)]
    gallery.append(names[:200], features[:200])
    first = key_file(gallery)
    for row in range(200, 203):
        gallery.append([names[row]], features[row : row + 1])
        assert key_file(gallery) == first
    index = Manifest.read(gallery.path).index
    gallery.append(names[203:], features[203:])
    assert key_file(gallery) != first
    assert (Manifest.read(gallery.path).index, gallery.verify()) == (index, [])
    assert reopen(gallery.path).ids(names) == list(range(204))


def test_a_commit_makes_no_pass_over_the_shards(gallery: sf.Gallery, opened: list[str]) -> None:
    with gallery.writer() as writer:
        for number in range(5):
            writer.append([f"new {number}"], random_features_of(1, seed=number))
            writer.commit()
            assert writer.status(f"new {number}", "other content") == "differs"
            assert writer.status("no such", "content") == "new"
        writer.remove([KEYS[3]])
    assert set(opened) == {"000003.h5", *(f"{number:06d}.h5" for number in range(N, N + 5))}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [Path.unlink, damage, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_missing_or_damaged_is_rebuilt(gallery: sf.Gallery, harm: Callable[[Path], Any]) -> None:
    gallery.remove(KEYS[:1])
    harm(path := key_file(gallery))
    reader = reopen(gallery.path)
    assert [problem.file for problem in reader.verify()] == [f"index/{path.name}"]
    with pytest.warns(UserWarning, match=rf"key table is rebuilt from the shards: .*{path.name}"):
        assert reader.ids(KEYS[1:]) == list(range(1, N))
    assert KEYS[0] not in reader  # and warns once
    reader.rebuild_index()  # without a warning: it is not even looked at
    assert reader.verify() == []
    assert reopen(gallery.path).ids(KEYS[1:]) == list(range(1, N))


def test_an_append_mends_a_damaged_file(gallery: sf.Gallery) -> None:
    damage(key_file(gallery))
    with pytest.warns(UserWarning, match="key table is rebuilt from the shards"):
        gallery.append(["a", "b"], random_features_of(2, seed=3))
    assert gallery.verify() == []
    assert reopen(gallery.path).ids([*KEYS, "a", "b"]) == list(range(N + 2))


def test_a_gallery_whose_manifest_names_no_table_has_one_all_the_same(gallery: sf.Gallery) -> None:
    """As after a kill between compact's commit and the next."""
    manifest = json.loads((gallery.path / "gallery.json").read_bytes())
    del manifest["xxh3"]
    (gallery.path / "gallery.json").write_text(json.dumps(manifest | {"keys": None}))
    assert reopen(gallery.path).ids(KEYS) == list(range(N))


def test_a_snapshot_says_which_it_is_without_reading(gallery: sf.Gallery) -> None:
    gallery.remove(KEYS[2:5])
    view = gallery.snapshot()
    for file in gallery.path.glob("shards/*"):
        file.unlink()
    assert repr(view) == f"Snapshot({str(gallery.path)!r}, generation {gallery.generation}, {N - 3} images)"


def test_removed_rows_as_a_mask(gallery: sf.Gallery) -> None:
    gallery.remove(KEYS[2:5])
    gallery.remove(KEYS[11:])
    view = reopen(gallery.path).snapshot()
    assert view.removed_mask.tolist() == [row in (2, 3, 4, 11) for row in range(N)]
    assert view.ids().tolist() == [row for row in range(N) if row not in (2, 3, 4, 11)]


STEPS = st.one_of(
    st.tuples(st.sampled_from(["append", "replace"]), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("remove"), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)),
    st.tuples(st.sampled_from(["commit", "compact", "write", "reopen"]), st.just([])),
)


@pytest.mark.slow
@pytest.mark.parametrize("hashed", HASHES)
@settings(max_examples=15)
@given(steps=st.lists(STEPS, max_size=14), recent=st.integers(0, 6))
def test_any_life_equals_a_dict(hashed: str, steps: list[tuple[str, list[int]]], recent: int) -> None:
    """Of a writer that goes through appends, replacements, removals, commits and compacts, and of whoever reopens."""
    model: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(key_table, "RECENT", recent)
        patch.setattr(key_table, "key_hash", HASHES[hashed])
        gallery = sf.Gallery.create(Path(folder) / "g", OWN, sf.IndexOptions(device="cpu"), 3 * OWN.bytes_per_image)
        version, names = 0, [f"{number}.png" for number in range(10)]
        left = iter([*steps, ("reopen", [])])
        step = next(left, None)
        while step is not None:
            with gallery.writer() as writer:
                while step is not None and step[0] != "reopen":
                    what, chosen = step[0], [names[number] for number in step[1]]
                    new = [key for key in chosen if what == "replace" or key not in model]
                    if what in ("append", "replace") and new:
                        version += 1
                        features = random_features_of(len(new), seed=version)
                        writer.append(new, features, [f"{version}"] * len(new), replace=True)
                        model |= dict.fromkeys(new, f"{version}")
                    elif what == "remove" and (gone := [key for key in chosen if key in model]):
                        writer.remove(gone)
                        for key in gone:
                            del model[key]
                    elif what == "commit":
                        writer.commit()
                    elif what == "compact":
                        writer.compact()
                    elif what == "write":
                        writer.write_index()
                    for key in names:
                        wanted = "same" if key in model else "new"
                        assert writer.status(key, model.get(key, "")) == wanted
                    step = next(left, None)
            for at in (gallery, reopen(gallery.path)):
                view = at.snapshot()
                found = view.find_all(names)
                assert [row is not None for row in found] == [key in model for key in names]
                ids = [row for row in found if row is not None]
                assert sorted(ids) == view.ids().tolist()
                assert dict(zip(view.keys(ids), view.digests(ids), strict=True)) == model
            step = next(left, None)
        assert gallery.verify() == []
