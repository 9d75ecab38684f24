"""Repair of galleries in tiles: an image comes back with all of its tiles, or goes with all of them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.images.tiling import image_key
from spade_faiss.options import Patches
from spade_faiss.store.manifest import Manifest
from tests.helpers.images import write_images

TILED = sf.FeatureOptions(tile=(24, 32), overlap=6, batch_size=3)
SIZES = {"a": (60, 70), "strips": (17, 130), "columns": (95, 20), "small": (20, 30)}  # several tiles, or one


@pytest.fixture
def extractor() -> sf.Extractor:
    return sf.load_extractor("toy", options=TILED)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, (name, size) in enumerate(SIZES.items()):
        write_images(tmp_path / "images" / name, 3, seed, size)
    return tmp_path / "images"


def build(
    path: Path, images: Path, extractor: sf.Extractor, tiles: int | None = None, patches: Patches = "stored"
) -> sf.Gallery:
    """A gallery whose shards hold about so many tiles."""
    spec = extractor.spec
    size = None if tiles is None else tiles * spec.bytes_with(patches)
    gallery = sf.Gallery.create(path, spec, sf.IndexOptions(device="cpu"), size, patches=patches)
    gallery.add_images(images, extractor)
    return gallery


def tiles_of(keys: Iterable[str]) -> Counter[str]:
    return Counter(map(image_key, keys))


def by_shard(gallery: sf.Gallery) -> list[list[str]]:
    snapshot = gallery.snapshot()
    found: list[list[str]] = [[] for _ in snapshot.manifest.shards]
    for row_id in snapshot.ids().tolist():
        found[snapshot.shard_number(row_id)] += snapshot.keys([row_id])
    return found


def harm(gallery: sf.Gallery, key: str, what: str) -> None:
    """Change a byte of a tile's level, image feature, key or digest."""
    [row_id] = gallery.ids([key])
    number, row = gallery.snapshot()._locate(row_id)
    path = gallery.path / Manifest.read(gallery.path).shards[number].file
    copy = path.with_name("copy")  # the file that somebody has open stays as it is
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        if what in ("keys", "digests"):
            texts = file[what][:]
            texts[row] = b"?" + texts[row][1:] if what == "keys" else texts[row][:-3] + b"zzz"
            file[what][:] = texts
        else:
            values = file[what][row]
            values.ravel().view(np.uint8)[1] ^= 4
            file[what][row] = values
    copy.replace(path)
    gallery.refresh()


@pytest.mark.parametrize("what", ["levels/0", "image", "keys", "digests"])
@pytest.mark.parametrize("tile", [0, 1, -1])
@pytest.mark.parametrize("table", [True, False])
def test_an_image_goes_with_all_of_its_tiles(
    tmp_path: Path, images: Path, extractor: sf.Extractor, what: str, tile: int, table: bool
) -> None:
    """One of its tiles was dropped, and `add` passed over what was left of the image, or made it half anew."""
    gallery = build(tmp_path / "g", images, extractor)
    before = gallery.keys()
    own = [key for key in before if image_key(key) == "strips/001.png"]
    harm(gallery, own[tile], what)
    if not table and what in ("keys", "digests"):
        for file in gallery.path.glob("index/keys-*"):
            file.unlink()
    done = gallery.repair(drop_unreadable=True)
    assert gallery.verify() == []
    left = [key for key in before if key not in own]
    if table or what in ("levels/0", "image"):
        assert "strips/001.png" in done.dropped
        assert (sorted(gallery.keys()), done.dropped_images) == (sorted(left), len(own))
    else:  # the names are lost for good: an image that cannot be told from the torn one goes as well
        assert set(gallery.keys()) <= set(left)
    assert all(count == tiles_of(before)[image] for image, count in tiles_of(gallery.keys()).items())
    gallery.add_images(images, extractor)
    assert sorted(gallery.keys()) == sorted(before)
    assert gallery.verify() == []


@pytest.mark.parametrize("patches", ["stored", "recompute"])
@pytest.mark.parametrize(("table", "compacted"), [(True, False), (True, True), (False, False)])
def test_a_lost_shard_takes_the_images_that_it_had_a_part_of(
    tmp_path: Path, images: Path, extractor: sf.Extractor, patches: Patches, table: bool, compacted: bool
) -> None:
    """Whichever shard: its keys cannot be read, and the rest of its images lies in other shards."""
    whole = build(tmp_path / "whole", images, extractor, 7, patches)
    if compacted:  # the parts of an image do not lie beside each other
        whole.remove(["a/001.png", "strips/000.png"])
        with whole.writer() as writer:
            writer.rewrite([1, 2])
    if not table:
        for file in whole.path.glob("index/keys-*"):
            file.unlink()
    whole = sf.Gallery.open(whole.path, "cpu")
    every, shards = tiles_of(whole.keys()), by_shard(whole)
    assert len(shards) > 4
    for number, lost in enumerate(shards):
        gallery = sf.Gallery.open(shutil.copytree(whole.path, tmp_path / f"{number}"), "cpu")
        os.truncate(gallery.path / gallery.snapshot().manifest.shards[number].file, 99)
        done = gallery.repair(drop_unreadable=True)
        assert gallery.verify() == []
        left = tiles_of(gallery.keys())
        expected = {image: count for image, count in every.items() if image not in tiles_of(lost)}
        if table:
            assert left == expected
            assert done.dropped_images == every.total() - left.total()
        else:
            assert left.items() <= expected.items()
        readable = {image_key(key) for keys in shards if keys is not lost for key in keys}
        assert set(done.dropped) == readable - set(left) | {whole.snapshot().manifest.shards[number].file}
        gallery.add_images(images, extractor)
        assert every.items() <= tiles_of(gallery.keys()).items()


def test_a_tile_that_was_re_extracted_goes_with_the_image_too(
    tmp_path: Path, images: Path, extractor: sf.Extractor
) -> None:
    gallery = build(tmp_path / "g", images, extractor, 7)
    before, shards = gallery.keys(), by_shard(gallery)
    torn = next(image for image in tiles_of(shards[0]) if image in tiles_of(shards[1]))
    harm(gallery, next(key for key in shards[0] if image_key(key) == torn), "levels/1")
    os.truncate(gallery.path / gallery.snapshot().manifest.shards[1].file, 99)
    done = gallery.repair(extractor, [images], drop_unreadable=True)
    assert [image_key(key) for key in done.extracted] == [torn]
    assert gallery.verify() == []
    assert torn not in tiles_of(gallery.keys())
    gallery.add_images(images, extractor)
    assert sorted(gallery.keys()) == sorted(before)


@pytest.mark.parametrize("patches", ["stored", "recompute"])
@pytest.mark.parametrize("what", ["keys", "digests", "checksums"])
@pytest.mark.parametrize("tile", [0, 2, -1])
def test_a_tile_whose_names_are_damaged_comes_back(
    tmp_path: Path, images: Path, extractor: sf.Extractor, patches: Patches, what: str, tile: int
) -> None:
    """Of all tiles of an image only the first was looked for by the image's file."""
    gallery = build(tmp_path / "g", images, extractor, patches=patches)
    before = gallery.keys()
    key = [key for key in before if image_key(key) == "columns/002.png"][tile]
    [row_id] = gallery.ids([key])
    feature, levels = gallery.snapshot().image_feature(row_id), gallery.read([row_id], extractor)
    harm(gallery, key, what)
    assert len(gallery.verify()) == 1
    assert gallery.repair(extractor, [images]).extracted == [key]
    assert gallery.verify() == []
    assert sorted(gallery.keys()) == sorted(before)
    [row_id] = gallery.ids([key])
    assert gallery.snapshot().image_feature(row_id).tobytes() == feature.tobytes()
    assert [level.tobytes() for level in gallery.read([row_id], extractor)] == [level.tobytes() for level in levels]
