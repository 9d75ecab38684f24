"""A labelled set, and a detector over its normal images."""

from __future__ import annotations

from pathlib import Path

import pytest

import spade_faiss as sf
from tests.helpers.datasets import detector_over, make_set


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_set(tmp_path / "tiles")


@pytest.fixture
def detector(tmp_path: Path, dataset: Path) -> sf.Detector:
    return detector_over(tmp_path / "tiles.gallery", dataset)
