"""Galleries that recompute their patches, and how their answers are compared."""

from __future__ import annotations

from pathlib import Path

import spade_faiss as sf
from spade_faiss.options import Patches


def create(path: Path, extractor: sf.Extractor, patches: Patches = "recompute", shard_bytes: int = 2**28) -> sf.Gallery:
    return sf.Gallery.create(path, extractor.spec, sf.IndexOptions(device="cpu"), shard_bytes, patches=patches)


def assert_same_detection(found: sf.Detection, expected: sf.Detection) -> None:
    assert found.image_score == expected.image_score
    assert found.neighbours.keys == expected.neighbours.keys
    for one, other in (
        (found.anomaly_map, expected.anomaly_map),
        (found.sq_distances, expected.sq_distances),
        (found.matches, expected.matches),
    ):
        assert one.tobytes() == other.tobytes()
