"""Readers that tell whether what they see is of one generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import spade_faiss as sf
from tests.helpers.galleries import OWN

WORLD = range(12)  # keys; the features of each tell whose they are, and of which version


def features_of(key: int, version: int) -> sf.Features:
    levels = [np.full((1, *shape), 100 * version + key, np.float16) for shape in OWN.level_shapes]
    return sf.Features(np.full((1, OWN.image_dim), 100 * version + key, np.float32), levels)


def look(view: Any) -> None:
    """What one generation says: every key once, and keys, image features, levels and neighbours of one version."""
    ids = view.ids()
    keys, version = [int(key) for key in view.keys(ids)], None
    assert len(set(keys)) == len(keys) == len(view)
    assert view.find_all([str(key) for key in keys]) == ids.tolist()
    values = [level[:, 0, 0, 0].astype(int) for level in view.levels(ids)]
    for key, value, image in zip(keys, values[0].tolist(), view.rows.read(ids)[:, 0].tolist(), strict=True):
        version = value // 100 if version is None else version
        assert value == image == 100 * version + key
    assert values[0].tolist() == values[1].tolist()
    nearest, sq_distances = view.search(view.rows.read(ids), 1)
    assert nearest[:, 0].tolist() == ids.tolist()
    assert not sq_distances.any()


def look_on(path: Path, until: Callable[[], bool]) -> int:
    """Open the last commit again and again, and look twice at each; returns at how many."""
    seen = set()
    with sf.Gallery.open(path, device="cpu") as reader:
        while True:
            last = until()
            for _ in range(2):
                look(reader.snapshot())
            seen.add(reader.generation)
            if last:
                return len(seen)
            reader.refresh()


def query(detector: sf.Detector, image: Path) -> bytes:
    return detector.query(image).anomaly_map.tobytes()
