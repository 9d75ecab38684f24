"""What the tests of galleries share."""

from __future__ import annotations

from pathlib import Path

import pytest

import spade_faiss as sf
from tests.helpers.galleries import RandomFeatures
from tests.helpers.own_galleries import KEYS, N, create


@pytest.fixture
def features(random_features: RandomFeatures) -> sf.Features:
    return random_features(N)


@pytest.fixture
def gallery(tmp_path: Path, features: sf.Features) -> sf.Gallery:
    """N images in two shards."""
    gallery = create(tmp_path / "own.gallery")
    gallery.append(KEYS[:5], features[:5])
    gallery.append(KEYS[5:], features[5:])
    return gallery
