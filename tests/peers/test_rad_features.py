"""Features of the options that RAD needs, against those that anomalib's Rad keeps of the same pixels.

This joins the suite where the extra `peers` is installed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.models.vision_transformer
import torch
from PIL import Image

import spade_faiss as sf
from tests.helpers import benchmarks  # noqa: F401 - finds benchmarks/
from tests.helpers.rad import rad
from tests.helpers.vision_transformers import make_tiny, with_random_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    pytest.importorskip("anomalib", reason="anomalib is not installed: pip install '.[peers]'")
    from anomalib.models import Rad
    from anomalib.models.image.rad.torch_model import RadModel
    from peers_rad import files_in, run_rad

RECIPE: dict[str, Any] = {
    "image_size": 512,
    "crop": 448,
    "normalisation": "imagenet",
    "blocks": (0.25, 0.5, 0.75, 1),
    "tokens": "normalised",
    "image_feature": "class_token",
}
LAYERS = [3, 6, 9, 11]  # Rad's default


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rad replaces a function of timm's for the whole process; one thread, as elsewhere."""
    vit = timm.models.vision_transformer
    monkeypatch.setattr(vit, "resample_abs_pos_embed", vit.resample_abs_pos_embed)  # and back
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def banks(name: str, layers: list[int], weights: Path, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rad's class tokens (layers, n, d) and patches (layers, n, d, h, w) of (n, 3, H, W) normalised pixels."""
    model = RadModel(name, pre_trained=False, layers=layers)
    model.feature_extractor.feature_extractor.load_state_dict(torch.load(weights, weights_only=True))
    model.train()
    model(pixels)
    model.build_memory_bank()
    rows, columns = model.bank_grid.tolist()
    patches = model.patch_banks.unflatten(1, (rows, columns)).permute(0, 3, 4, 1, 2)
    return model.cls_banks.numpy(), patches.numpy()


@pytest.mark.parametrize(
    ("name", "layers", "own"),
    [
        ("vit_small_patch16_dinov3", LAYERS, {}),  # the kind of Rad's default network, at Rad's size
        ("vit_small_patch14_reg4_dinov2", LAYERS, {"image_size": 80, "crop": 70}),
        ("test_vit", [1, 3, 4, 5], {"image_size": (200, 180), "crop": 160}),
    ],
)
def test_features_equal_rads(
    name: str, layers: list[int], own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny(monkeypatch)
    _, weights = with_random_weights(name, tmp_path)
    options = sf.FeatureOptions(**{**RECIPE, **own}, dtype="float32", device="cpu")
    extractor = sf.load_extractor(f"timm:{name}", weights, options)
    assert extractor.spec.level_names == tuple(map(str, layers))
    resized, crop = options.sizes((0, 0))  # images of this size are not resized: pixels are the same
    images = np.random.default_rng(0).integers(0, 256, (2, *resized, 3), dtype=np.uint8)

    found = extractor.extract([extractor.spec.view.apply(image) for image in images])
    transform: Any = Rad.configure_pre_processor(resized, crop).transform
    pixels = transform(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    tokens, patches = banks(name, layers, weights, pixels)

    assert np.abs(found.image - tokens[-1]).max() < 1e-4
    for level, expected in zip(found.levels, patches, strict=True):
        assert level.shape == expected.shape
        assert np.abs(level - expected).max() < 1e-4


def test_the_formulas_equal_rads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From our features, and by the oracle that others are tested with, to its maps and scores."""
    make_tiny(monkeypatch)
    name = "vit_small_patch16_dinov3"
    _, weights = with_random_weights(name, tmp_path)
    small = {"image_size": 112, "crop": (112, 96)}
    for folder, n in (("normal", 5), ("test", 2)):
        (tmp_path / folder).mkdir()
        for number in range(n):
            pixels = np.random.default_rng([n, number]).integers(0, 256, (90, 130, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    found = run_rad(tmp_path / "normal", tmp_path / "test", weights, name, k_image=3, **small)

    options = sf.FeatureOptions(**{**RECIPE, **small}, dtype="float32", device="cpu")
    extractor = sf.load_extractor(f"timm:{name}", weights, options)
    normal, test = (
        extractor.extract([extractor.spec.view.apply(np.asarray(Image.open(path))) for path in files_in(folder)])
        for folder in (tmp_path / "normal", tmp_path / "test")
    )
    for number in range(2):
        anomaly_map, score = rad(test[[number]], normal, (112, 96), k=3)
        assert np.abs(found.maps[number] - anomaly_map).max() < 1e-5
        assert found.scores[number] == pytest.approx(score, abs=1e-5)


def test_the_recipe_equals_rad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images to maps and scores, through a gallery on disk."""
    make_tiny(monkeypatch)
    name, side = "vit_small_patch16_dinov3", 112
    _, weights = with_random_weights(name, tmp_path)
    for folder, n in (("normal", 5), ("test", 2)):
        (tmp_path / folder).mkdir()
        for number in range(n):
            pixels = np.random.default_rng([n, number]).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    expected = run_rad(tmp_path / "normal", tmp_path / "test", weights, name, k_image=3, image_size=side, crop=side)
    recipe = sf.RECIPES["rad"]
    options = dataclasses.replace(recipe.features, image_size=side, crop=side, dtype="float32", device="cpu")
    extractor = sf.load_extractor(f"timm:{name}", weights, options)
    gallery = sf.Gallery.create(tmp_path / "g", extractor.spec, recipe="rad")
    gallery.add_images(tmp_path / "normal", extractor)
    score = dataclasses.replace(recipe.score, sigma=224 / side)  # 1 px, as at 448
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=3), score)
    for number, found in enumerate(detector.stream(files_in(tmp_path / "test"))):
        assert np.abs(found.anomaly_map - expected.maps[number]).max() < 1e-4
        assert found.image_score == pytest.approx(expected.scores[number], abs=1e-4)
        print("largest difference", np.abs(found.anomaly_map - expected.maps[number]).max())


def test_the_published_defaults_are_the_recipes() -> None:
    steps = Rad.configure_pre_processor().transform.transforms
    options = sf.FeatureOptions(**RECIPE)
    assert (tuple(steps[0].size), tuple(steps[1].size)) == options.sizes((0, 0))
    assert (tuple(steps[2].mean), tuple(steps[2].std)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    depth = 12
    assert [min(depth - 1, int(share * depth)) for share in RECIPE["blocks"]] == LAYERS
