"""Folders of small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, n: int, seed: int = 0, size: tuple[int, int] = (40, 48)) -> Path:
    """Write n noise images of (height, width) as 000.png, 001.png, ..."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number:03d}.png", compress_level=1)
    return folder


def make_images(folder: Path, n: int, seed: int = 7, size: tuple[int, int] = (40, 48)) -> Path:
    """Write n smooth random images of (height, width)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return folder
