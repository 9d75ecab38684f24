"""Images in tiles into a gallery: whole or not at all, by one process or several, and out of it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.extractors.toy import ToyExtractor
from spade_faiss.images.tiling import image_key
from spade_faiss.ingest import workers
from spade_faiss.options import Patches
from tests.helpers.galleries import make_gallery
from tests.helpers.images import write_images
from tests.helpers.processes import FORKSERVER

TILED = sf.FeatureOptions(tile=32, overlap=8, batch_size=4)
SIZE = (40, 120)  # 2 x 5 tiles
TILES = 10


class Failing(ToyExtractor):
    """The toy, which fails at one of its batches."""

    def __init__(self, at: int) -> None:
        super().__init__(TILED)
        self.left = at

    def extract(self, views: Sequence[Pixels]) -> sf.Features:
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of memory")
        return super().extract(views)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", 5, size=SIZE)
    write_images(tmp_path / "images" / "small", 1, size=(32, 20))
    return tmp_path / "images"


def whole(gallery: sf.Gallery) -> dict[str, int]:
    """How many tiles of each image are there."""
    return dict(Counter(map(image_key, gallery.keys())))


def content(gallery: sf.Gallery, extractor: sf.Extractor | None = None) -> dict[str, tuple[bytes, ...]]:
    found = {}
    for key in gallery.keys():  # noqa: SIM118 # a gallery is no dict
        [row] = ids = gallery.ids([key])
        levels = [level.tobytes() for level in gallery.read(ids, extractor)]
        found[key] = (gallery.snapshot().image_feature(row).tobytes(), *levels)
    return found


@pytest.mark.parametrize(("at", "shard_images"), [(2, 7), (5, 7), (8, 1), (11, 1000)])
def test_an_image_is_there_with_all_its_tiles_or_not(tmp_path: Path, images: Path, at: int, shard_images: int) -> None:
    failing = Failing(at)
    gallery = sf.Gallery.create(tmp_path / "g", failing.spec, shard_bytes=shard_images * failing.spec.bytes_per_image)
    with pytest.raises(RuntimeError, match="out of memory"):
        gallery.add_images(images, failing)
    assert set(whole(gallery).values()) <= {TILES, 1}
    kept = len(whole(gallery))
    report = gallery.add_images(images, sf.load_extractor("toy", options=TILED))
    assert (report.added, report.unchanged) == (6 - kept, kept)
    assert whole(gallery) == {**{f"{number:03d}.png": TILES for number in range(5)}, "small/000.png": 1}
    assert content(gallery) == content(make_gallery(tmp_path / "once", images, TILED)[0])
    assert gallery.verify() == []


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SPAWN", FORKSERVER)
    one, extractor = make_gallery(tmp_path / "one", images, TILED)
    two = sf.Gallery.create(tmp_path / "two", extractor.spec, shard_bytes=25 * extractor.spec.bytes_per_image)
    assert two.add_images(images, extractor, workers=2).added == 6
    assert two.keys() == one.keys()
    assert content(two) == content(one)
    most = max(shard.images for shard in two.snapshot().manifest.shards)
    assert most <= 30  # a run is cut by tiles, not by images
    Image.new("RGB", (120, 40), "red").save(images / "002.png")
    report = two.add_images(images, extractor, workers=2, replace=True)
    assert (report.added, report.replaced, report.unchanged) == (1, 1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(40, 120), (40, 60), (20, 20), (90, 130)])
def test_replaced_by_an_image_of_another_size_no_old_tile_stays(
    tmp_path: Path, images: Path, size: tuple[int, int]
) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", images, TILED)
    write_images(images, 1, seed=5, size=size)
    [skipped] = gallery.add_images(images, extractor).skipped
    assert "'000.png' is in the gallery with other content" in skipped.reason
    report = gallery.add_images(images, extractor, replace=True)
    assert (report.added, report.replaced, report.unchanged) == (1, 1, 5)
    assert content(gallery) == content(make_gallery(tmp_path / "anew", images, TILED)[0])
    gallery.compact()
    assert content(gallery) == content(make_gallery(tmp_path / "again", images, TILED)[0])


def test_an_image_is_removed_with_all_its_tiles(tmp_path: Path, images: Path) -> None:
    gallery, _ = make_gallery(tmp_path / "g", images, TILED)
    with pytest.raises(
        sf.OptionError, match=r"expected keys of whole images, found '001\.png#xywh=22,0,32,32', a tile"
    ):
        gallery.remove(["000.png", "001.png#xywh=22,0,32,32"])
    assert len(gallery) == 5 * TILES + 1
    gallery.remove(["000.png", "small/000.png"])
    assert whole(gallery) == {f"{number:03d}.png": TILES for number in range(1, 5)}
    gallery.compact()
    gallery.remove(["003.png"])
    assert len(gallery) == 3 * TILES


@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_recomputed_tiles_are_the_stored_ones(tmp_path: Path, images: Path, patches: Patches) -> None:
    stored, extractor = make_gallery(tmp_path / "stored", images, TILED)
    gallery = sf.Gallery.create(tmp_path / "g", extractor.spec, patches=patches)
    gallery.add_images(images, extractor)
    assert content(gallery, extractor) == content(stored)
    query = write_images(tmp_path / "test", 1, seed=9, size=SIZE) / "000.png"
    search = sf.SearchOptions(k=5)
    found, expected = (sf.Detector(one, extractor, search).query(query) for one in (gallery, stored))
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


def test_a_damaged_tile_is_extracted_again(tmp_path: Path, images: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", images, TILED)
    before = content(gallery)
    [shard] = gallery.path.glob("shards/*.h5")
    broken = bytearray(shard.read_bytes())
    [row] = gallery.ids(["002.png#xywh=22,0,32,32"])
    needle = gallery.snapshot().levels([row])[0].tobytes()[:64]
    broken[broken.index(needle)] ^= 1
    gallery.close()
    shard.write_bytes(broken)
    damaged = sf.Gallery.open(tmp_path / "g")
    assert len(damaged.verify()) == 1
    assert damaged.repair(extractor, [images]).extracted == ["002.png#xywh=22,0,32,32"]
    assert content(damaged) == before
    assert damaged.verify() == []


def test_names_that_look_like_tiles_stay_names_without_tiles(tmp_path: Path, toy: sf.Extractor) -> None:
    """Keys of one's own features, in a gallery whose images are seen whole."""
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    features = toy.extract([np.zeros((32, 32, 3), np.uint8), np.ones((32, 32, 3), np.uint8)])
    assert gallery.append(["a", "a#xywh=1,2,3,4"], features).added == 2
    gallery.remove(["a#xywh=1,2,3,4"])
    assert gallery.keys() == ["a"]
