"""The recipe `rad` from image to score, against RAD in plain NumPy (which equals anomalib's: tests/peers)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from tests.helpers.images import make_images
from tests.helpers.rad import rad
from tests.helpers.vision_transformers import make_tiny, with_random_weights

RAD = sf.RECIPES["rad"]
SIDE = 160  # px of test_vit's view


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_maps_and_scores_equal_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, k: int | None
) -> None:
    make_tiny(monkeypatch)
    _, weights = with_random_weights("test_vit", folder=tmp_path)
    options = replace(RAD.features, image_size=SIDE, crop=SIDE, dtype=dtype, device="cpu")
    extractor = sf.load_extractor("timm:test_vit", weights, options)
    gallery = sf.Gallery.create(tmp_path / "g", extractor.spec, recipe="rad")
    files = sorted(make_images(tmp_path / "normal", 6, size=(SIDE, SIDE)).iterdir())
    gallery.add_images(files, extractor)
    # At 448 px the Gaussian has a sigma of 1 px; here the same, over what the view shows at 160.
    score = replace(RAD.score, sigma=224 / SIDE)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=k), score)
    assert detector.k == (k or 6)  # 150, or all
    [query] = make_images(tmp_path / "test", 1, seed=3, size=(SIDE, SIDE)).iterdir()
    exact = sf.load_extractor("timm:test_vit", weights, replace(options, dtype="float32"))
    normal, own = (exact.extract([np.asarray(Image.open(file)) for file in some]) for some in (files, [query]))
    expected, expected_score = rad(own, normal, (SIDE, SIDE), k or 150)
    found = detector.query(query)
    np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4)
    assert found.image_score == pytest.approx(expected_score, abs=1e-4)
    assert len(found.levels) == 4


@pytest.mark.parametrize("name", ["efficientnet_lite0", "toy"])
def test_other_networks_are_told_what_to_take(name: str) -> None:
    with pytest.raises(sf.OptionError, match=r"vision transformer with a class token.*take image_feature=.pooled."):
        sf.load_extractor(name, options=RAD.features)
