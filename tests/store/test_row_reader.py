"""Image features and names straight from the shard files: the same as through HDF5, and never what was not written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError
from spade_faiss.store import file_pool, row_reader
from spade_faiss.store.file_pool import FilePool
from spade_faiss.store.row_reader import RowReader

N, D = 23, 6


@pytest.fixture
def gallery(tmp_path: Path, own_spec: sf.ExtractorSpec, random_features: object) -> sf.Gallery:
    """Of several shards."""
    features = random_features(N)  # type: ignore[operator]
    gallery = sf.Gallery.create(tmp_path / "g", own_spec, "flat", shard_bytes=1000)
    gallery.append([f"{row}" for row in range(N)], features)
    assert len(gallery.snapshot().manifest.shards) > 3
    return gallery


def of(gallery: sf.Gallery) -> RowReader:
    return RowReader(gallery.path, gallery.snapshot().manifest.shards, gallery.snapshot().manifest.schema, FilePool())


def test_any_rows_in_any_order(gallery: sf.Gallery, random_features: object) -> None:
    expected = random_features(N).image  # type: ignore[operator]
    for ids in ([0], [22, 0, 7, 7, 13], list(range(N)), list(range(N))[::-1], []):
        found = of(gallery).read(np.array(ids, np.int64))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[ids])


def test_blocks_from_any_start(gallery: sf.Gallery, random_features: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reader, "BLOCK_BYTES", 5 * 4 * D)
    expected = random_features(N).image  # type: ignore[operator]
    for start in (0, 1, 12, 22):
        blocks = list(of(gallery).blocks(start))
        assert max(map(len, blocks)) == min(5, N - start)
        np.testing.assert_array_equal(np.concatenate(blocks), expected[start:])
    assert list(of(gallery).blocks(N)) == []


@pytest.mark.parametrize("most", [4, 9, 1000])
def test_texts_are_kept_for_whoever_asks_again(gallery: sf.Gallery, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few are; more than that are read."""
    monkeypatch.setattr(row_reader, "TEXTS", most)
    rows, reads, names_of = of(gallery), list[int](), row_reader._Place.names_of
    monkeypatch.setattr(
        row_reader._Place,
        "names_of",
        lambda self, file, first, count: reads.append(count) or names_of(self, file, first, count),
    )
    digests = [gallery.snapshot().digests([row])[0] for row in range(N)]
    for ids in ([5, 5, 2], [2, 5], [20, 0, 5, 13], [22, 0, 7, 7, 13, 5, 1, 9, 8, 2], [13, 8], list(range(N)), []):
        assert rows.texts(np.array(ids, np.int64), "keys") == [str(one) for one in ids]
        assert rows.texts(np.array(ids, np.int64), "digests") == [digests[one] for one in ids]
        assert all(len(kept) <= max(most, len({*ids})) for kept in rows._texts.values())
    reads.clear()
    for _ in range(3):
        rows.texts(np.array([3, 21, 3]), "keys")
    assert len(reads) == (0 if most > N else 2)  # in the first turn


def test_where_a_system_cannot_read_at_a_place(
    gallery: sf.Gallery, random_features: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows: threads take turns at seeking and reading."""
    monkeypatch.setattr(file_pool, "read_at", file_pool.seek_and_read)
    monkeypatch.setattr(file_pool.os, "preadv", None)
    stored, expected = of(gallery), random_features(N).image  # type: ignore[operator]
    drawn = np.random.default_rng(0).integers(N, size=(200, 9))
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(drawn, pool.map(stored.read, drawn), strict=True):
            np.testing.assert_array_equal(found, expected[ids])


def test_names_in_any_order(gallery: sf.Gallery) -> None:
    for ids in ([0], [22, 0, 7, 7, 13, 6], list(range(N)), list(range(N))[::-1], []):
        assert of(gallery).texts(np.array(ids, np.int64), "keys") == [f"{row}" for row in ids]


def test_few_files_are_open_at_a_time(
    gallery: sf.Gallery, random_features: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_pool, "MOST_OPEN", 2)
    stored, expected = of(gallery), random_features(N).image  # type: ignore[operator]
    drawn = np.random.default_rng(0).integers(N, size=(40, 9))
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(drawn, pool.map(stored.read, drawn), strict=True):
            np.testing.assert_array_equal(found, expected[ids])
        for ids, texts in zip(drawn, pool.map(lambda ids: stored.texts(ids, "keys"), drawn), strict=True):
            assert texts == [f"{row}" for row in ids]
    assert len(stored._files) == 2


def test_every_changed_byte_of_a_name_is_noticed(gallery: sf.Gallery) -> None:
    """And named, with the file; but for zeros at the end, which are no part of a text."""
    snapshot = gallery.snapshot()
    [digest] = snapshot.digests([3])
    path = gallery.path / snapshot.manifest.shards[snapshot.shard_number(3)].file
    content = path.read_bytes()
    first = content.index(digest.encode())
    for place in range(first, first + len(digest)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        for name in ("keys", "digests"):
            with pytest.raises(CorruptGalleryError, match=rf"{path.name}: image '3': key, digest or path is not what"):
                of(gallery).texts(np.array([2, 3]), name)
    assert of(gallery).texts(np.array([22]), "keys") == ["22"]


def test_every_flipped_bit_of_an_image_feature_is_noticed(gallery: sf.Gallery) -> None:
    """And named, with the file."""
    image = gallery.snapshot().rows.read(np.array([3]))[0]
    [path] = [path for path in sorted((gallery.path / "shards").iterdir()) if image.tobytes() in path.read_bytes()]
    content = path.read_bytes()
    first = content.index(image.tobytes())
    for place in range(first, first + 4 * D):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(CorruptGalleryError, match=rf"{path.name}: image feature \d is not what was written"):
            of(gallery).read(np.array([3]))


@pytest.mark.parametrize("done", ["gone", "cut", "emptied", "zeroed", "of another size"])
def test_a_file_that_is_not_what_it_was(gallery: sf.Gallery, done: str) -> None:
    path = gallery.path / gallery.snapshot().manifest.shards[0].file
    content = path.read_bytes()
    if done == "gone":
        path.unlink()
    else:
        changed = {"cut": content[:-1], "emptied": b"", "zeroed": bytes(len(content)), "of another size": content * 2}
        path.write_bytes(changed[done])
    with pytest.raises(CorruptGalleryError, match=path.name) as caught:
        of(gallery).read(np.array([0]))
    with pytest.raises(CorruptGalleryError, match=path.name):
        of(gallery).texts(np.array([0]), "keys")
    assert "\n" not in str(caught.value)


def test_a_search_by_codes_reports_damage(tmp_path: Path, rng: np.random.Generator) -> None:
    xb = rng.normal(size=(300, D)).astype(np.float32)
    spec = sf.ExtractorSpec("own", ((1, 1, 1),), D)
    with sf.Gallery.create(tmp_path / "g", spec, "SQ8") as gallery:
        gallery.append([f"{row}" for row in range(300)], sf.Features(xb, [np.zeros((300, 1, 1, 1), np.float16)]))
    shard = tmp_path / "g" / "shards" / "000000.h5"
    content = bytearray(shard.read_bytes())
    content[content.index(xb[7].tobytes())] ^= 1
    shard.write_bytes(content)
    with (
        sf.Gallery.open(tmp_path / "g", "cpu") as gallery,
        pytest.raises(CorruptGalleryError, match="image feature 7 is not what was written"),
    ):
        gallery.search(xb[7:8], 3)
