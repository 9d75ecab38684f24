"""What the tests share: random features, a folder of small images, a toy gallery of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf

OWN = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7), (2, 3, 3)), image_dim=6)

RandomFeatures = Callable[..., sf.Features]


def random_features_of(n: int, spec: sf.ExtractorSpec = OWN, seed: int = 0) -> sf.Features:
    """Standard normal features of n images, in the dtypes that a gallery of that spec stores."""
    rng = np.random.default_rng(seed)
    levels = [rng.standard_normal((n, *shape), np.float32).astype(spec.dtype) for shape in spec.level_shapes]
    return sf.Features(rng.standard_normal((n, spec.image_dim), np.float32), levels)


def write_images(folder: Path, n: int, seed: int = 0, size: tuple[int, int] = (40, 48)) -> Path:
    """Write n noise images of (height, width) as 000.png, 001.png, ..."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number:03d}.png", compress_level=1)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _quick_disk() -> Iterator[None]:
    """Flushing costs more than all else here, and no test cuts the power; child processes do flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def own_spec() -> sf.ExtractorSpec:
    """Features that were not made from images here."""
    return OWN


@pytest.fixture(scope="session")
def random_features() -> RandomFeatures:
    return random_features_of


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 12)


@pytest.fixture(scope="session")
def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))


@pytest.fixture
def toy_gallery(tmp_path: Path, image_folder: Path, toy: sf.Extractor) -> sf.Gallery:
    """A gallery of the 12 images in image_folder."""
    gallery = sf.Gallery.create(tmp_path / "toy.gallery", toy.spec, index=sf.IndexOptions(device="cpu"))
    gallery.add_images(image_folder, toy)
    return gallery
