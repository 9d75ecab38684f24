"""RAD from features to scores in plain NumPy float64, straight from the formulas of docs/recipes.md."""

from __future__ import annotations

import numpy as np

from spade_faiss.arrays import Array
from spade_faiss.extractors.features import Features


def rad(query: Features, normal: Features, size: tuple[int, int], k: int = 150) -> tuple[Array, float]:
    """Compare one image with normal ones.

    Args:
        query: of one image.
        normal: of n images. Image features and tokens of both have length 1.
        size: (H, W) px of the network's view, a multiple of the levels' grid.
        k: images that are retrieved.

    Returns:
        the map (H, W), in [0, 2], and the image score.
    """
    near = np.argsort(-(normal.image.astype(np.float64) @ query.image[0]), kind="stable")[:k]
    cells = np.mean(
        [patch_scores(own[0], others[near]) for own, others in zip(query.levels, normal.levels, strict=True)], axis=0
    )
    rows, columns = (interpolation(*each) for each in zip(cells.shape, size, strict=True))
    pixels = smoothed(rows @ cells @ columns.T)
    highest = np.sort(pixels, axis=None)[::-1][: max(1, int(pixels.size * 0.01))]
    return pixels, float(highest.mean())


def patch_scores(query: Array, normal: Array, radius: int = 1) -> Array:
    """1 - the largest cosine of each (c, h, w) patch with those of (k, c, h, w) that are no further off: (h, w)."""
    query, normal = query.astype(np.float64), normal.astype(np.float64)
    h, w = query.shape[1:]
    scores = np.empty((h, w))
    for row in range(h):
        for column in range(w):
            rows, columns = (slice(max(0, at - radius), at + radius + 1) for at in (row, column))
            cosines = np.einsum("kchw,c->khw", normal[:, :, rows, columns], query[:, row, column])
            scores[row, column] = 1 - cosines.max()
    return scores


def interpolation(cells: int, pixels: int) -> Array:
    """The matrix (pixels, cells) of linear interpolation whose corners are not aligned."""
    at = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells)))


def smoothed(pixels: Array) -> Array:
    """Smooth (H, W) with a Gaussian of 5 x 5 px, sigma 1 px; beyond the border, pixels are mirrored at its centre."""
    weights = np.exp(-(np.arange(-2.0, 3) ** 2) / 2)
    padded = np.pad(pixels, 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    return np.einsum("hwij,ij->hw", windows, kernel)
