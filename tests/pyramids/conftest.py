"""Images, and a gallery of them that recomputes its patches."""

from __future__ import annotations

from pathlib import Path

import pytest

import spade_faiss as sf
from tests.helpers.images import make_images
from tests.helpers.recomputed import create


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 12)


@pytest.fixture
def queries(tmp_path: Path) -> list[Path]:
    return sorted(make_images(tmp_path / "queries", 3, seed=3).iterdir())


@pytest.fixture
def gallery(tmp_path: Path, normal: Path, toy: sf.Extractor) -> sf.Gallery:
    gallery = create(tmp_path / "toy.gallery", toy)
    gallery.add_images(normal, toy)
    return gallery
