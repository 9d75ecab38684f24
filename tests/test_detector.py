"""The whole flow: a query's numbers equal the oracle's, at the size of the image, from any number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
from PIL import Image

import spade_faiss as sf

RNG_SEED = 7


def make_images(folder: Path, n: int, seed: int = RNG_SEED, size: tuple[int, int] = (40, 48)) -> Path:
    """Write n smooth random images of (height, width)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 12)


def make_gallery(
    folder: Path, normal: Path, options: sf.FeatureOptions | None = None
) -> tuple[sf.Gallery, sf.Extractor]:
    extractor = sf.load_extractor("toy", options=options)
    gallery = sf.Gallery.create(folder, extractor.spec)
    gallery.add_images(normal, extractor)
    return gallery, extractor


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
        pytest.raises(sf.NotEnoughImagesError, match="0, found 50"),
    ):
        sf.Detector(gallery, extractor)


def test_another_extractor_is_refused(tmp_path: Path, normal: Path) -> None:
    gallery, _ = make_gallery(tmp_path / "g", normal)
    other = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64))
    with pytest.raises(sf.SpecMismatchError, match=r"resized: expected \(32, 32\), found \(64, 64\)"):
        sf.Detector(gallery, other)
