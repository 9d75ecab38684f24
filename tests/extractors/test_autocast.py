"""A caller's settings of torch change no distance: torch.autocast, torch.set_default_dtype."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

import spade_faiss as sf
from spade_faiss.extractors.registry import load_extractor

RNG = np.random.default_rng(0)
PIXELS = [RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
OPTIONS = sf.FeatureOptions(image_size=64, batch_size=4)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sf.Detector]:
    folder = tmp_path_factory.mktemp("autocast")
    (folder / "normal").mkdir()
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / "normal" / f"{number}.png")
    extractor = load_extractor("efficientnet_lite0", options=OPTIONS)
    with sf.Gallery.create(folder / "g", extractor.spec) as gallery:
        gallery.add_images(folder / "normal", extractor)
        yield sf.Detector(gallery, extractor, sf.SearchOptions(k=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distance_of_an_image_to_itself_is_0_under_autocast(detector: sf.Detector, dtype: torch.dtype) -> None:
    """torch's manual (torch.amp) has whole evaluation loops run under autocast, as PyTorch Lightning does."""
    plain = detector.query(PIXELS[1])
    assert plain.image_score == 0
    with torch.autocast("cpu", dtype=dtype):
        found = detector.query(PIXELS[1])
        assert torch.is_autocast_enabled("cpu")  # the caller's own stays as it was
    assert found.neighbours.keys == ["1.png"]
    assert found.image_score == 0
    assert np.array_equal(found.anomaly_map, plain.anomaly_map)
    assert np.array_equal(found.sq_distances, plain.sq_distances)


@pytest.mark.parametrize("engine", ["flat", "pyramid"])
def test_patch_search_under_autocast(engine: str) -> None:
    query = [RNG.standard_normal((8, 6, 6)).astype(np.float32), RNG.standard_normal((16, 3, 3)).astype(np.float32)]
    gallery = [RNG.standard_normal((4, *level.shape)).astype(np.float32) for level in query]
    plain = sf.search_patches(query, gallery, engine=engine)
    with torch.autocast("cpu"):
        for one, other in zip(plain, sf.search_patches(query, gallery, engine=engine), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype(detector: sf.Detector, dtype: torch.dtype) -> None:
    plain = detector.query(PIXELS[1])
    torch.set_default_dtype(dtype)
    try:
        extractor = load_extractor("efficientnet_lite0", options=OPTIONS)
        found = sf.Detector(detector.gallery, extractor, sf.SearchOptions(k=1)).query(PIXELS[1])
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert extractor.spec == detector.extractor.spec
    assert found.image_score == 0
    assert np.array_equal(found.sq_distances, plain.sq_distances)
