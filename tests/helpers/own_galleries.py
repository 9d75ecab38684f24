"""Galleries of twelve random images, and what must hold of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import spade_faiss as sf
from tests.helpers.galleries import OWN

N = 12
KEYS = [f"part {number % 3}/{number:02d}.png" for number in range(N)]
BIG = sf.ExtractorSpec(name="big", level_shapes=((16, 16, 16),), image_dim=4)  # 8 KiB an image: outweighs a file's own


def create(path: Path, spec: sf.ExtractorSpec = OWN, index: str = "auto", **options: Any) -> sf.Gallery:
    return sf.Gallery.create(path, spec, sf.IndexOptions(index, device="cpu"), **options)


def reopen(path: Path) -> sf.Gallery:
    return sf.Gallery.open(path, device="cpu")


def named(path: Path) -> dict[str, bytes]:
    """Every byte of a gallery but the locks'."""
    files = [path / "gallery.json", *path.glob("shards/*"), *path.glob("index/*")]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def pick(features: sf.Features, rows: list[int]) -> sf.Features:
    return features[rows]


def assert_holds(gallery: sf.Gallery, keys: list[str], features: sf.Features) -> None:
    """It holds exactly these images: by key, bit for bit, and found by search."""
    assert len(gallery) == len(keys)
    assert sorted(gallery.keys()) == sorted(keys)
    assert all(key in gallery for key in keys)
    ids = gallery.ids(keys)
    assert gallery.keys(ids) == keys
    for found, level in zip(gallery.read(ids), features.levels, strict=True):
        assert found.dtype == level.dtype
        assert found.tobytes() == level.tobytes()
    nearest, sq_distances = gallery.search(features.image, 1)
    assert nearest[:, 0].tolist() == ids
    assert sq_distances.max() == 0
    everything, _ = gallery.search(features.image[:1], len(keys))
    assert sorted(everything[0].tolist()) == sorted(ids)


def join(first: sf.Features, second: sf.Features) -> sf.Features:
    levels = [np.concatenate(pair) for pair in zip(first.levels, second.levels, strict=True)]
    return sf.Features(np.concatenate([first.image, second.image]), levels)
