"""Distances to scores: the image score, and the anomaly map at the size of the image."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..images.view import View

SIGMA_SIDE = 224  # px: sigma is stated where the network's input shows its view of the image at this size
TOP = 0.01  # share of a map's pixels, the highest, whose mean is an image score


def knn_score(sq_distances: Array, k_score: int) -> float:
    """Image score: the mean squared distance to the k_score nearest images (SPADE, eq. 1); (K,) ascending -> float."""
    return float(np.mean(sq_distances[:k_score], dtype=np.float64))


def top_score(anomaly_map: NDArray[np.float32]) -> float:
    """Image score: the mean of the highest TOP of a map's pixels, one at least; (H, W) -> float.

    The maximum is one pixel's luck; the mean of all drowns a small defect.
    """
    values = anomaly_map.ravel()
    count = max(1, int(TOP * len(values)))
    return float(np.partition(values, -count)[-count:].mean(dtype=np.float64))


def anomaly_map(
    sq_distances: Array, image_size: tuple[int, int], view: View, sigma: float, truncate: float = 4.0
) -> NDArray[np.float32]:
    """Pixel scores at the image's size: the mean over kappa, resized bilinearly, smoothed with a Gaussian.

    Args:
        sq_distances: (h, w, kappa) squared distances of the finest grid.
        image_size: (H, W) of the image.
        view: what the network saw of it; pixels outside are 0.
        sigma: px where the view is SIGMA_SIDE px; 0: no smoothing.
        truncate: sigmas at which the Gaussian is cut, as in scipy.ndimage.

    Returns:
        (H, W) float32 map, in the units of a squared distance.
    """
    grid = sq_distances.mean(axis=2, dtype=np.float64)
    # Resizing and smoothing are linear and separable: one matrix an axis does both, over the pixels that were seen.
    (height, width), (top, left) = view.crop, view.offset
    rows = _axis(image_size[0], view.resized[0], top, height, grid.shape[0], (sigma, truncate))
    columns = _axis(image_size[1], view.resized[1], left, width, grid.shape[1], (sigma, truncate))
    result = np.zeros(image_size, np.float32)
    x0, y0, x1, y1 = view.region(image_size)
    result[y0:y1, x0:x1] = _product(rows, grid, columns)
    return result


def _product(rows: NDArray[np.float64], grid: NDArray[np.float64], columns: NDArray[np.float64]) -> Array:
    """Return rows @ grid @ columns.T.

    By torch in one thread: the threads of NumPy's OpenBLAS wait for the next product with all they have for tens of
    milliseconds, and so take a core from the next query's search.
    """
    import torch  # here, as it takes long

    from ..system.threads import in_one_thread

    def multiply() -> torch.Tensor:
        first = torch.from_numpy(rows) @ torch.from_numpy(grid)
        return first @ torch.from_numpy(columns).T

    return in_one_thread(multiply).numpy()


@lru_cache(maxsize=64)
def _axis(
    side: int, resized: int, offset: int, crop: int, cells: int, smoothing: tuple[float, float]
) -> NDArray[np.float64]:
    """The matrix (pixels seen, cells) that interpolates and smooths along one axis."""
    centres = (np.arange(side) + 0.5) * resized / side - offset  # of the image's pixels, in pixels of the crop
    centres = centres[(centres >= 0) & (centres < crop)]
    at = np.clip(centres * cells / crop - 0.5, 0, cells - 1)
    low = np.minimum(at.astype(int), max(0, cells - 2))
    matrix = np.zeros((len(at), cells))
    pixel = np.arange(len(at))
    matrix[pixel, low] = 1 - (at - low)
    matrix[pixel, np.minimum(low + 1, cells - 1)] += at - low
    sigma, truncate = smoothing
    return _smooth_rows(matrix, sigma * side * crop / resized / SIGMA_SIDE, truncate)


def _smooth_rows(matrix: NDArray[np.float64], sigma: float, truncate: float) -> NDArray[np.float64]:
    """Convolve along the rows with a Gaussian; beyond the edges the rows are mirrored, the edge itself repeated."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0 or len(matrix) == 0:
        return matrix
    taps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    n = len(matrix)
    mirrored = np.arange(-radius, n + radius) % (2 * n)
    padded = matrix[np.minimum(mirrored, 2 * n - 1 - mirrored)]
    smoothed = np.zeros_like(matrix)
    for tap, weight in enumerate(weights):
        smoothed += weight * padded[tap : tap + n]
    return smoothed
