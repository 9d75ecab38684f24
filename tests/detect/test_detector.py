"""The whole flow: a query's numbers equal the oracle's, at the size of the image, from any number of threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.pipeline import Pipeline
from spade_faiss.store.snapshot import Snapshot
from tests import reference
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 12)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("k", "kappa", "k_score"), [(1, 1, None), (5, 3, 2), (3, 1, 7)])
@pytest.mark.parametrize("crop", [None, (32, 32)])
def test_a_query_equals_the_oracle(
    tmp_path: Path, normal: Path, dtype: str, k: int, kappa: int, k_score: int | None, crop: tuple[int, int] | None
) -> None:
    options = sf.FeatureOptions(image_size=(48, 64), crop=crop, dtype=dtype)  # type: ignore[arg-type]
    gallery, extractor = make_gallery(tmp_path / "g", normal, options)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=k, kappa=kappa, k_score=k_score))
    path = make_images(tmp_path / "query", 1, seed=99, size=(37, 53)) / "000.png"
    detection = detector.query(path)

    # The same features, but everything after them in float64, straight from the formulas.
    view = extractor.spec.view
    features = extractor.extract([view.apply(np.asarray(Image.open(path)))])
    keys = sorted(file.name for file in normal.iterdir())
    stored = extractor.extract([view.apply(np.asarray(Image.open(normal / key))) for key in keys])
    ids, sq_distances = reference.retrieve(features.image[0], stored.image, max(k, k_score or k))
    assert detection.neighbours.keys == [keys[i] for i in ids[:k]]
    np.testing.assert_allclose(detection.neighbours.sq_distances, sq_distances[:k], rtol=1e-4)
    np.testing.assert_allclose(detection.image_score, reference.image_score(sq_distances, k_score or k), rtol=1e-4)

    query_levels = [level[0].astype(np.float64) for level in features.levels]
    neighbour_levels = [level[ids[:k]].astype(np.float64) for level in stored.levels]
    patch_distances, _ = reference.search_patches(query_levels, neighbour_levels, kappa)
    expected = reference.anomaly_map(patch_distances, (37, 53), view.resized, view.crop, 4.0)
    assert detection.anomaly_map.shape == (37, 53)
    assert detection.anomaly_map.dtype == np.float32
    np.testing.assert_allclose(detection.anomaly_map, expected, rtol=1e-4, atol=1e-4 * expected.max())
    assert detection.map_max == detection.anomaly_map.max()


def test_a_crop_is_undone_and_named(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(image_size=64, crop=32))
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    detection = sf.Detector(gallery, extractor).query(image)
    left, top, right, bottom = detection.region
    assert (left, top, right, bottom) == (64, 32, 192, 96)
    assert detection.anomaly_map.shape == (128, 256)
    seen = np.zeros((128, 256), bool)
    seen[top:bottom, left:right] = True
    assert (detection.anomaly_map[seen] > 0).all()
    assert (detection.anomaly_map[~seen] == 0).all()


def test_an_image_of_the_gallery_has_no_anomaly(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detection = sf.Detector(gallery, extractor, sf.SearchOptions(k=1)).query(normal / "004.png")
    assert detection.neighbours.keys == ["004.png"]
    assert detection.image_score == 0
    assert (detection.anomaly_map == 0).all()
    rows, columns = np.indices(detection.matches.shape[:2])
    # Every patch matches itself, unless another one is exactly alike and comes first.
    same = (detection.matches[..., 0, 1] == rows) & (detection.matches[..., 0, 2] == columns)
    assert same.mean() > 0.9


def test_a_defect_is_where_the_map_peaks(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    image = np.array(Image.open(normal / "002.png"))
    image[10:18, 28:36] = 255 - image[10:18, 28:36]
    detection = sf.Detector(gallery, extractor, score=sf.ScoreOptions(sigma=0)).query(image)
    row, column = np.unravel_index(detection.anomaly_map.argmax(), detection.anomaly_map.shape)
    assert 8 <= row < 20
    assert 26 <= column < 38


def test_batch_stream_and_single_queries_agree(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(batch_size=3))
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=4))
    paths = sorted(make_images(tmp_path / "query", 25, seed=5).iterdir())
    batch = detector.query_batch(paths)
    assert [found.path for found in batch] == [str(path) for path in paths]
    for path, together, streamed in zip(paths, batch, detector.stream(paths), strict=True):
        alone = detector.query(path)
        assert alone.image_score == together.image_score == streamed.image_score
        np.testing.assert_array_equal(alone.anomaly_map, together.anomaly_map)
        np.testing.assert_array_equal(alone.matches, together.matches)
    assert set(batch[0].seconds) == {"decode", "extract", "retrieve", "read", "match", "score"}


def test_paths_arrays_and_pil_images_are_one(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor)
    path = make_images(tmp_path / "query", 1, seed=5) / "000.png"
    found = [detector.query(image) for image in (path, str(path), Image.open(path), np.asarray(Image.open(path)))]
    assert len({one.image_score for one in found}) == 1
    assert all((one.anomaly_map == found[0].anomaly_map).all() for one in found)


def test_threads_share_a_detector(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=4))
    paths = sorted(make_images(tmp_path / "query", 16, seed=3).iterdir())
    alone = [detector.query(path) for path in paths]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(detector.query, paths))
    for one, other in zip(alone, together, strict=True):
        assert one.image_score == other.image_score
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)


def test_a_detector_follows_its_gallery(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=2))
    query = normal / "004.png"
    assert detector.query(query).neighbours.keys[0] == "004.png"
    gallery.remove(["004.png"])
    assert "004.png" not in detector.query(query).neighbours.keys
    gallery.compact()
    assert "004.png" not in detector.query(query).neighbours.keys


def test_image_score_from_the_map(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    path = make_images(tmp_path / "query", 1, seed=5) / "000.png"
    found = sf.Detector(gallery, extractor, score=sf.ScoreOptions(image_score="map_max")).query(path)
    assert found.image_score == pytest.approx(found.map_max, rel=1e-3)  # of the map at the size of the view
    assert found.image_score > 0


def test_leave_one_out_never_finds_the_image_itself(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor)  # K is all 12 images: each has 11 others
    for row_id, found in zip(range(12), detector.leave_one_out(range(12)), strict=True):
        assert gallery.keys([row_id])[0] not in found.neighbours.keys
        assert len(found.neighbours.keys) == 11
        assert found.image_score > 0


def test_default_k_shrinks_to_the_gallery_but_a_given_one_does_not(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    assert sf.Detector(gallery, extractor).k == 12
    for options in (sf.SearchOptions(k=13), sf.SearchOptions(k_score=13)):
        with pytest.raises(sf.NotEnoughImagesError, match=r"12, found 13"):
            sf.Detector(gallery, extractor, options)


def test_an_empty_gallery_cannot_be_queried(tmp_path: Path) -> None:
    extractor = sf.load_extractor("toy")
    with (
        sf.Gallery.create(tmp_path / "g", extractor.spec) as gallery,
        pytest.raises(sf.NotEnoughImagesError, match="expected normal images, found none"),
    ):
        sf.Detector(gallery, extractor)


def test_another_extractor_is_refused(tmp_path: Path, normal: Path) -> None:
    gallery, _ = make_gallery(tmp_path / "g", normal)
    other = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64))
    with pytest.raises(sf.SpecMismatchError, match=r"resized: expected \(32, 32\), found \(64, 64\)"):
        sf.Detector(gallery, other)


# A stream: reading, and where a GPU takes part the network, are ahead of the search


class Streaming(sf.Detector):
    """Its runs overlap the network with the search, as with a GPU, or do not."""

    overlaps: bool

    def _pipeline(self, snapshot: Snapshot) -> Pipeline:
        run = super()._pipeline(snapshot)
        scored_by = run.scored_by
        run.scored_by = lambda *by: self._overlapping(scored_by(*by))  # type: ignore[method-assign]
        return run

    def _overlapping(self, run: Pipeline) -> Pipeline:
        run.overlaps = self.overlaps
        return run


def streaming(tmp_path: Path, normal: Path, overlaps: bool = True, **options: int) -> sf.Detector:
    """A detector with batches of 3."""
    gallery, extractor = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(batch_size=3))
    detector = Streaming(gallery, extractor, sf.SearchOptions(k=4, **options))
    detector.overlaps = overlaps
    return detector


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("cache_bytes", [0, 20_000, 10**9])
def test_a_stream_equals_single_queries(tmp_path: Path, normal: Path, overlaps: bool, cache_bytes: int) -> None:
    detector = streaming(tmp_path, normal, overlaps, cache_bytes=cache_bytes)
    paths = sorted(make_images(tmp_path / "query", 11, seed=5).iterdir())
    streamed = list(detector.stream(iter(paths)))
    assert [found.path for found in streamed] == [str(path) for path in paths]
    bare = streaming(tmp_path / "bare", normal, cache_bytes=0)
    for path, found in zip(paths, streamed, strict=True):
        alone = bare.query(path)
        assert alone.image_score == found.image_score
        np.testing.assert_array_equal(alone.anomaly_map, found.anomaly_map)
        np.testing.assert_array_equal(alone.matches, found.matches)
        assert set(found.seconds) == {"decode", "extract", "retrieve", "read", "match", "score"}
    assert detector._caches.host.bytes <= cache_bytes


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 3, 7])
def test_what_cannot_be_read_is_raised_after_what_comes_before(
    tmp_path: Path, normal: Path, overlaps: bool, bad: int
) -> None:
    detector = streaming(tmp_path, normal, overlaps)
    images: list[Path | np.ndarray] = sorted(make_images(tmp_path / "query", 9, seed=5).iterdir())  # type: ignore[assignment]
    images[bad] = tmp_path / "nowhere.png"
    stream, found = detector.stream(images), []
    with pytest.raises(sf.ImageError, match="nowhere"):
        found.extend(stream)  # keeps what came before
    assert [one.path for one in found] == [str(path) for path in images[:bad]]


@pytest.mark.parametrize("overlaps", [True, False])
def test_an_exception_of_the_iterator_comes_at_its_turn(tmp_path: Path, normal: Path, overlaps: bool) -> None:
    detector = streaming(tmp_path, normal, overlaps)
    paths = sorted(make_images(tmp_path / "query", 4, seed=5).iterdir())

    def camera() -> Iterator[Path]:
        yield from paths
        raise ConnectionError("the camera is gone")

    stream = detector.stream(camera())
    assert [next(stream).path for _ in paths] == [str(path) for path in paths]
    with pytest.raises(ConnectionError, match="camera"):
        next(stream)


def test_damage_in_the_gallery_is_raised_at_the_queries_turn(tmp_path: Path, normal: Path) -> None:
    detector = streaming(tmp_path, normal, cache_bytes=0)
    paths, read, turns = sorted(make_images(tmp_path / "query", 6, seed=5).iterdir()), detector._caches.host.read, []

    def damaged_at_2(source: Any, ids: Any) -> list[np.ndarray]:
        turns.append(ids)
        if len(turns) == 3:
            raise sf.CorruptGalleryError("damaged")
        return read(source, ids)

    detector._caches.host.read = damaged_at_2  # type: ignore[method-assign]
    stream = detector.stream(paths)
    assert [next(stream).path, next(stream).path] == [str(path) for path in paths[:2]]
    with pytest.raises(sf.CorruptGalleryError):
        next(stream)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_stream_closed_early_ends_its_threads(tmp_path: Path, normal: Path, overlaps: bool) -> None:
    detector = streaming(tmp_path, normal, overlaps)
    paths = sorted(make_images(tmp_path / "query", 12, seed=5).iterdir())
    before = set(threading.enumerate())  # some may be an earlier test's, about to end: so none is counted
    for number in (0, 1, 4):
        stream = detector.stream(paths)
        for _ in range(number):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        new = {thread.name for thread in set(threading.enumerate()) - before}
        assert all(name.startswith("spade-faiss-") for name in new), new  # those are kept


@pytest.mark.parametrize("overlaps", [True, False])
def test_memory_does_not_grow_with_a_stream(tmp_path: Path, normal: Path, overlaps: bool) -> None:
    """Neither images, nor features, nor neighbours' levels, nor detections are kept."""
    detector = streaming(tmp_path, normal, overlaps, cache_bytes=0)
    images: list[weakref.ref[np.ndarray]] = []
    levels: list[weakref.ref[np.ndarray]] = []
    maps: list[weakref.ref[np.ndarray]] = []
    read = detector._caches.host.read

    def noted(source: Any, ids: Any) -> list[np.ndarray]:
        found = read(source, ids)
        levels.append(weakref.ref(found[0]))
        return found

    detector._caches.host.read = noted  # type: ignore[method-assign]

    def camera() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for _ in range(30):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            images.append(weakref.ref(image))
            yield image
            del image

    def alive(references: list[weakref.ref[np.ndarray]]) -> int:
        return sum(reference() is not None for reference in references)

    for number, found in enumerate(detector.stream(camera())):
        maps.append(weakref.ref(found.anomaly_map))
        assert len(images) <= number + 1 + 3 * 3  # taken: three batches more at the most
        assert alive(images) <= 3 * 3
        assert alive(levels) <= 2  # the next query's; this one's are done with
        assert alive(maps) <= 2
    assert len(maps) == 30


def test_queries_that_share_neighbours_share_reads(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    paths = sorted(make_images(tmp_path / "query", 8, seed=5).iterdir())
    kept, bare = sf.Detector(gallery, extractor), sf.Detector(gallery, extractor, sf.SearchOptions(cache_bytes=0))
    kept.query_batch(paths)
    bare.query_batch(paths)
    assert (kept._caches.host.misses, kept._caches.host.hits) == (12, 7 * 12)
    assert (bare._caches.host.misses, bare._caches.host.hits) == (8 * 12, 0)


def test_a_batch_is_queried_in_the_order_that_reads_least(tmp_path: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 40))
    image = gallery.spec.bytes_per_image - 4 * gallery.spec.image_dim
    options = sf.SearchOptions(k=4, cache_bytes=6 * image)
    ordered, given = sf.Detector(gallery, extractor, options), sf.Detector(gallery, extractor, options)
    paths = [tmp_path / "normal" / f"{number:03d}.png" for number in (3, 17, 30, 8) * 4]  # one batch
    found, expected = ordered.query_batch(paths), list(given.stream(paths))
    assert [one.path for one in found] == [str(path) for path in paths]
    for one, other in zip(found, expected, strict=True):
        assert one.neighbours.keys == other.neighbours.keys
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    assert ordered._caches.host.misses < given._caches.host.misses / 2
    assert ordered._caches.host.misses <= 4 * 4  # no neighbour of these four is read again


def test_how_it_reads_is_no_setting_of_a_calibration(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    options = sf.SearchOptions(cache_bytes=1, verify_reads=False)
    assert sf.Detector(gallery, extractor, options).settings() == sf.Detector(gallery, extractor).settings()


def test_a_detector_verifies_unless_told_not_to(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    [shard] = gallery.path.glob("shards/*")
    content, [level, *_] = bytearray(shard.read_bytes()), gallery.read([4])
    content[content.index(level.tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(sf.CorruptGalleryError, match=r"004\.png"):
        sf.Detector(gallery, extractor).query(normal / "004.png")
    found = sf.Detector(gallery, extractor, sf.SearchOptions(verify_reads=False)).query(normal / "004.png")
    assert found.neighbours.keys[0] == "004.png"


def test_an_older_generation_is_queried_while_the_gallery_is_compacted(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    paths = sorted(make_images(tmp_path / "query", 6, seed=5).iterdir())
    expected = sf.Detector(gallery, extractor).query_batch(paths)
    reader = sf.Gallery.open(gallery.path)
    stream = sf.Detector(reader, extractor, sf.SearchOptions(cache_bytes=0)).stream(paths)
    found = [next(stream)]
    gallery.remove([f"{number:03d}.png" for number in range(6)])
    gallery.compact()
    found.extend(stream)
    for one, other in zip(found, expected, strict=True):
        assert one.neighbours.keys == other.neighbours.keys
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
