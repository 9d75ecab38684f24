"""Queries whose neighbours stay on the device of the search: the same answers, within the bound.

The cache by itself has the suite of test_reading.py. Without a GPU the device is the CPU, by a name of torch's that no
code takes for it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.detect.matching import scaled
from spade_faiss.pyramids.cache import PyramidCache
from spade_faiss.pyramids.device_cache import DeviceCache, device_cache
from spade_faiss.system.devices import as_arrays
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

N = 12


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `SearchOptions.device` is to be."""
    if request.param == "cpu":
        for module in ("pyramids.device_cache", "patch_search.search", "patch_search.spacing"):
            monkeypatch.setattr(f"spade_faiss.{module}.torch_device", lambda _: "cpu:0")
    return str(request.param)


class Made:
    """A gallery of N images, and detectors over it whose patch search is on the device."""

    def __init__(self, folder: Path, device: str, dtype: str = "float16") -> None:
        options = sf.FeatureOptions(batch_size=5, dtype=dtype)  # type: ignore[arg-type]
        self.gallery, self.extractor = make_gallery(folder / "g", make_images(folder / "normal", N), options)
        self.paths = sorted(make_images(folder / "query", 7, seed=5).iterdir())
        self.device = device
        self.image = self.gallery.spec.bytes_per_image - 4 * self.gallery.spec.image_dim

    def detector(self, images: int, **options: Any) -> sf.Detector:
        """Make one that keeps so many images on the device."""
        bound = images * self.image
        search = sf.SearchOptions(engine="pyramid", device=self.device, device_cache_bytes=bound, **options)
        return sf.Detector(self.gallery, self.extractor, search)


def assert_equal(found: list[sf.Detection], expected: list[sf.Detection]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.image_score == other.image_score
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        np.testing.assert_array_equal(one.sq_distances, other.sq_distances)
        np.testing.assert_array_equal(one.matches, other.matches)


def kept(detector: sf.Detector) -> DeviceCache:
    assert isinstance(detector._caches.device, DeviceCache)
    assert detector._caches.device.bytes <= detector._caches.device.limit
    return detector._caches.device


@pytest.mark.slow
@pytest.mark.parametrize(  # each with each of another kind
    ("images", "weights", "dtype"),
    [
        *[(4, "equal", "float16"), (6, "spread", "float16"), (100, "equal", "float16")],
        *[(4, "spread", "float32"), (6, "equal", "float32"), (100, "spread", "float32")],
    ],
)
def test_queries_find_the_same(tmp_path: Path, device: str, dtype: str, weights: str, images: int) -> None:
    made = Made(tmp_path, device, dtype)
    bare = made.detector(0, k=4, kappa=2, level_weights=weights)
    detector = made.detector(images, k=4, kappa=2, level_weights=weights)
    expected = bare.query_batch(made.paths)
    assert_equal(detector.query_batch(made.paths), expected)
    assert_equal(list(detector.stream(made.paths)), expected)
    assert_equal([detector.query(path) for path in made.paths], expected)
    assert len(kept(detector)) <= images
    assert kept(detector).hits > 0


def test_what_is_on_the_device_is_not_read_again(tmp_path: Path, device: str) -> None:
    made = Made(tmp_path, device)
    detector = made.detector(N, cache_bytes=0)  # K is all images
    detector.query_batch(made.paths)
    cache = kept(detector)
    assert (cache.misses, cache.hits, cache.bytes) == (N, (len(made.paths) - 1) * N, N * made.image)
    assert detector._caches.host.misses == N
    [level, *_] = cache.read(detector.pipeline().pyramids, [3])
    assert (level.device.type, level.dtype) == (device, torch.float16)


def test_relative_maps_are_those_of_the_cpu(tmp_path: Path, device: str) -> None:
    """Distinct matches and their spacing are searched on the device too."""
    made = Made(tmp_path, device)
    score = sf.ScoreOptions(fusion="relative", image_score="map_top", positions="equal")
    options = sf.SearchOptions(k=5, kappa=3, matching="by_level", distinct=True, level_weights="equal", device=device)
    detector = sf.Detector(made.gallery, made.extractor, options, score)
    found = [[detector.query(path) for path in made.paths[:3]]]
    assert kept(detector).misses > 0
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pyramids.device_cache", "patch_search.search", "patch_search.spacing"):
            patch.setattr(f"spade_faiss.{module}.torch_device", lambda _: "cpu")
        detector = sf.Detector(made.gallery, made.extractor, options, score)
        found.append([detector.query(path) for path in made.paths[:3]])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-4)
        assert one.image_score == pytest.approx(other.image_score, rel=1e-4)


@pytest.mark.parametrize("images", [0, 3])
def test_neighbours_beyond_the_bound_stay_off_the_device(tmp_path: Path, device: str, images: int) -> None:
    made = Made(tmp_path, device)
    detector = made.detector(images, k=4)
    assert_equal(detector.query_batch(made.paths), made.detector(N, k=4).query_batch(made.paths))
    assert (len(kept(detector)), kept(detector).misses) == (0, 0)
    assert detector._caches.host.hits > 0


def test_a_batch_is_queried_in_the_order_that_uploads_least(tmp_path: Path, device: str) -> None:
    made = Made(tmp_path, device)
    paths = [tmp_path / "normal" / f"{number:03d}.png" for number in (3, 7) * 2]
    ordered, given = (made.detector(4, k=4, cache_bytes=0) for _ in range(2))
    assert_equal(ordered.query_batch(paths), list(given.stream(paths)))
    assert kept(ordered).misses < kept(given).misses


def test_threads_share_it(tmp_path: Path, device: str) -> None:
    made = Made(tmp_path, device)
    expected = made.detector(0, k=4).query_batch(made.paths)
    detector = made.detector(6, k=4)
    with ThreadPoolExecutor(2) as pool:
        assert_equal(list(pool.map(detector.query, made.paths * 3)), expected * 3)
    assert len(kept(detector)) <= 6


def test_an_image_that_is_removed_is_not_found_by_its_former_id(tmp_path: Path, device: str) -> None:
    made = Made(tmp_path, device)
    detector = made.detector(N)
    detector.query_batch(made.paths)
    made.gallery.remove(["000.png", "004.png"])
    made.gallery.compact()
    assert_equal(detector.query_batch(made.paths), made.detector(0).query_batch(made.paths))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_levels_are_scaled_as_arrays_are(dtype: type) -> None:
    rng = np.random.default_rng(0)
    arrays = [(300 * rng.standard_normal((2, 3, 4, 4))).astype(dtype) for _ in range(3)]
    for scales in ((), (0.3, 1.7, 900.0), (7.0, 1e-6, 1e-3)):  # beyond what float16 holds, and below
        tensors = scaled([torch.from_numpy(level) for level in arrays], scales)
        for found, expected in zip(as_arrays(tensors), scaled(arrays, scales), strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_the_flat_engine_searches_arrays(device: str) -> None:
    assert device_cache(sf.SearchOptions(device=device), PyramidCache(0)) is not None
    assert device_cache(sf.SearchOptions(engine="flat", device=device), PyramidCache(0)) is None


def test_on_the_cpu_there_is_none() -> None:
    assert device_cache(sf.SearchOptions(engine="pyramid", device="cpu"), PyramidCache(0)) is None
