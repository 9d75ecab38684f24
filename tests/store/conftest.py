"""Features that the tests of shards share."""

from __future__ import annotations

import pytest

import spade_faiss as sf
from tests.helpers.galleries import RandomFeatures
from tests.helpers.shards import KEYS


@pytest.fixture
def features(random_features: RandomFeatures) -> sf.Features:
    """Those of the shard in helpers/shards.py."""
    return random_features(len(KEYS))
