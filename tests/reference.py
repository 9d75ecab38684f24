"""The oracle: SPADE in plain NumPy float64, straight from the formulas; every fast path must equal it.

Slow and obvious on purpose. It imports nothing of the engine's, so that a mistake there cannot hide here. Shapes are
those of the package: (h, w) grid, c channels, K neighbours, (H, W) image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SIGMA_SIDE = 224  # px; sigma is stated for an image that the network sees at this size
TRUNCATE = 4.0  # standard deviations at which the Gaussian is cut off


def _interpolate(values: Floats, coordinates: Floats) -> Floats:
    """Linear interpolation along the first axis at fractional indices, the ends held beyond the ends."""
    last = len(values) - 1
    rows = []
    for coordinate in np.clip(coordinates, 0, last):
        below = int(np.floor(coordinate))
        above = min(below + 1, last)
        share = coordinate - below
        rows.append((1 - share) * values[below] + share * values[above])
    return np.array(rows).reshape(len(coordinates), *values.shape[1:])


def _centres(old: int, new: int) -> Floats:
    """Where the centres of `new` cells lie among the indices of `old` cells that span the same length."""
    return (np.arange(new) + 0.5) * old / new - 0.5


def resize_map(grid: Array, size: tuple[int, int]) -> Floats:
    """(h, w) -> (H, W), bilinear, align_corners=False, not antialiased."""
    values = np.asarray(grid, np.float64)
    values = _interpolate(values, _centres(values.shape[0], size[0]))
    return _interpolate(values.T, _centres(values.shape[1], size[1])).T


def upsample(level: Array, size: tuple[int, int]) -> Floats:
    """(c, h, w) -> (c, H, W), as torch.nn.functional.interpolate(mode="bilinear", align_corners=False) defines it."""
    values = np.asarray(level, np.float64).transpose(1, 2, 0)  # all channels at once
    rows = _interpolate(values, _centres(values.shape[0], size[0])).transpose(1, 0, 2)
    return _interpolate(rows, _centres(values.shape[1], size[1])).transpose(2, 1, 0)


def patch_features(levels: Sequence[Array]) -> Floats:
    """[(c, h, w), ...], finest first -> (h, w, C): every level on the finest grid, concatenated."""
    size = levels[0].shape[1:]
    return np.concatenate([upsample(level, size) for level in levels]).transpose(1, 2, 0)


def window_radii(window: float | str | None, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns on either side that a window leaves: whole cells, or a share of the sides, halves up."""
    if window is None or window == "all":
        return grid
    if isinstance(window, int):
        return window, window
    assert isinstance(window, float)
    return int(np.floor(window * grid[0] + 0.5)), int(np.floor(window * grid[1] + 0.5))


def distances_to(patch: Floats, others: Floats, metric: str) -> Floats:
    """(C,), (m, C) -> (m,) squared L2 or 1 - cos; a zero vector has no direction and is at 1 from everything."""
    if metric == "l2":
        return ((others - patch) ** 2).sum(axis=1)
    largest = np.abs(np.concatenate([others, patch[None]])).max() or 1.0  # so that no square leaves float64
    patch, others = patch / largest, others / largest
    norms = np.sqrt((patch**2).sum()) * np.sqrt((others**2).sum(axis=1))
    return np.where(norms == 0, 1, 1 - (others @ patch) / np.where(norms == 0, 1, norms))


def search_patches(
    query_levels: Sequence[Array],
    neighbour_levels: Sequence[Array],
    kappa: int,
    metric: str = "l2",
    window: float | str | None = None,
) -> tuple[Floats, Ints]:
    """Find the kappa patches nearest to each of the query's among all positions of all K neighbours.

    Args:
        query_levels: [(c, h, w), ...], finest first.
        neighbour_levels: [(K, c, h, w), ...], likewise.
        kappa: how many.
        metric: l2, squared; cosine, 1 - cos.
        window: which positions count: those at most so many rows and columns away, or that share of h and of w.

    Returns:
        (h, w, kappa) distances, ascending, and (h, w, kappa, 3) matches (neighbour, row, column). Equal distances are
        in the order of neighbour, row, column.
    """
    query = patch_features(query_levels)
    height, width, channels = query.shape
    neighbours = len(neighbour_levels[0])
    images = [patch_features([level[n] for level in neighbour_levels]) for n in range(neighbours)]
    gallery = np.array(images).reshape(-1, channels)
    _, rows, columns = np.indices((neighbours, height, width)).reshape(3, -1)
    radii = window_radii(window, (height, width))
    sq_distances = np.empty((height, width, kappa))
    matches = np.empty((height, width, kappa, 3), np.int64)
    for row in range(height):
        for column in range(width):
            to_all = distances_to(query[row, column], gallery, metric)
            outside = (np.abs(rows - row) > radii[0]) | (np.abs(columns - column) > radii[1])
            to_all = np.where(outside, np.inf, to_all)
            nearest = np.argsort(to_all, kind="stable")[:kappa]  # stable: ties keep the order of the gallery
            sq_distances[row, column] = to_all[nearest]
            matches[row, column] = np.stack(np.unravel_index(nearest, (neighbours, height, width)), axis=1)
    return sq_distances, matches


def search_levels(
    query_levels: Sequence[Array],
    neighbour_levels: Sequence[Array],
    kappa: int,
    metric: str = "l2",
    window: float | str | None = None,
) -> list[tuple[Floats, Ints]]:
    """Search each level by itself, on its own grid."""
    return [
        search_patches([own], [others], kappa, metric, window)
        for own, others in zip(query_levels, neighbour_levels, strict=True)
    ]


def search_distinct(query: Array, neighbours: Array, kappa: int) -> tuple[Floats, Ints]:
    """Find the nearest patch of each neighbour, and of these the kappa nearest.

    Args:
        query: (c, m) patches.
        neighbours: (K, c, h, w) level.
        kappa: how many, at most K.

    Returns:
        (m, kappa) squared distances, ascending, and (m, kappa) positions counted through neighbour, row, column. Equal
        distances are in the order of positions.
    """
    k, channels, height, width = neighbours.shape
    cells = np.asarray(neighbours, np.float64).reshape(k, channels, -1)
    sq_distances, places = np.empty((query.shape[1], kappa)), np.empty((query.shape[1], kappa), np.int64)
    for number, patch in enumerate(np.asarray(query, np.float64).T):
        to_all = ((cells - patch[:, None]) ** 2).sum(axis=1)
        nearest = np.argsort(to_all.min(axis=1), kind="stable")[:kappa]
        sq_distances[number] = to_all.min(axis=1)[nearest]
        places[number] = nearest * height * width + to_all.argmin(axis=1)[nearest]
    return sq_distances, places


def mean_or_trusted(sq_distances: Array, neighbours: Array, trusted: Sequence[int]) -> Floats:
    """Average distances over the matches; where the nearest lies in a trusted neighbour, it is the distance.

    Args:
        sq_distances: (m, kappa), ascending.
        neighbours: (m, kappa) in which neighbour each match lies.
        trusted: the neighbours that a person has confirmed.

    Returns:
        (m,).
    """
    pairs = zip(np.asarray(sq_distances, np.float64), neighbours, strict=True)
    return np.array([found[0] if where[0] in trusted else found.mean() for found, where in pairs])


def spacing(neighbours: Array, matches: Array, number: int) -> Floats:
    """How far matched patches are from their nearest patches in other neighbours.

    Args:
        neighbours: (K, c, h, w) level, K >= 2.
        matches: (h, w, 3) neighbour, row and column of the patches.
        number: of other neighbours, the nearest, whose distances are averaged.

    Returns:
        (h, w) mean squared distances.
    """
    found = np.empty(matches.shape[:2])
    for at in np.ndindex(*matches.shape[:2]):
        neighbour, row, column = matches[at]
        others = np.delete(np.asarray(neighbours), neighbour, axis=0)
        patch = neighbours[neighbour, :, row, column][:, None]
        found[at] = search_distinct(patch, others, min(number, len(others)))[0].mean()
    return found


def relative_map(
    found: Sequence[tuple[Array, Array | None]], figures: Sequence[tuple[float, float, float]], power: int = 0
) -> Floats:
    """Make one map of levels, each relative to normal images.

    Args:
        found: for each level (h, w) squared distances and spacing, finest first; no spacing: there is one neighbour.
        figures: for each level the least spacing, the greatest, and what a typical score is.
        power: of the mean of the levels; 0: geometric.

    Returns:
        (h, w) of the finest grid: the mean of the levels' scores, none below 0.3.
    """
    grid, scores = found[0][0].shape, []
    for (sq_distances, apart), (low, high, typical) in zip(found, figures, strict=True):
        divisor = low if apart is None else np.minimum(np.maximum(apart, low), high)
        scores.append(np.maximum(resize_map(np.sqrt(sq_distances / divisor) / typical, grid), 0.3))
    if power:
        return (np.sum([score**power for score in scores], axis=0) / len(scores)) ** (1 / power)
    return np.prod(scores, axis=0) ** (1 / len(scores))


def left_out(
    distances: Sequence[Array],
    figures: Sequence[tuple[float, float, float]],
    power: int,
    kappa: int,
    most: int,
    trusted: Sequence[int] = (),
    known: Sequence[int] | None = None,
    places: int = 16,
    tie: float = 1e-4,
) -> tuple[list[int], float, float]:
    """Choose the neighbours without which the top of a map is the highest against its mean, among some sets.

    Args:
        distances: for each level (K, h, w) squared distances to the nearest patch of each neighbour, finest first.
        figures: as for relative_map.
        power: likewise.
        kappa: how many neighbours a distance is the mean of.
        most: how many are left out at the most.
        trusted: neighbours that a person has confirmed: where one is the nearest, its distance alone counts.
        known: neighbours that are never left out, and count so for the choice; None: those that are trusted.
        places: cells of the finest grid, those that would have the highest scores if each did without its own nearest
            `most` neighbours. What is nearest there is one of the sets; at each level, all that are farther than the
            nearest kappa + most count as if they were as far as the last of these. One more set is chosen of all of
            these neighbours one by one.
        tie: share of a rise by which others are as good; then the first is taken.

    Returns:
        the neighbours, the map's mean with all of them over that with those that stay, its top's rise against its mean.
    """
    every = np.arange(len(distances[0]))
    known = trusted if known is None else known
    may_go = np.setdiff1d(every, known)

    def without(of_cell: Any, alone: Sequence[int] = known) -> Floats:
        found = []
        for number, level in enumerate(distances):
            mean = np.empty(level.shape[1:])
            for at in np.ndindex(*mean.shape):
                stay = np.setdiff1d(every, of_cell(number, at))
                near = stay[np.argsort(level[(stay, *at)], kind="stable")[:kappa]]
                mean[at] = mean_or_trusted(level[(near, *at)][None], near[None], alone)[0]
            found.append((mean, None))
        return relative_map(found, figures, power)

    def rise(some: Sequence[int]) -> float:
        values = without(lambda *_: some)
        return top_score(values) / values.mean()

    sets: list[list[int]] = []
    highest = without(lambda number, at: may_go[np.argsort(distances[number][(may_go, *at)], kind="stable")[:most]])
    for place in np.argsort(-highest, axis=None, kind="stable")[:places]:
        total = np.zeros(len(every))
        for level, (low, _, typical) in zip(distances, figures, strict=True):
            inside = np.array(np.unravel_index(place, highest.shape)) * level.shape[1:] // highest.shape
            there = level[(slice(None), *inside)]
            total += np.minimum(there, np.sort(there)[min(kappa + most, len(there)) - 1]) / low / typical**2
        sets.append(sorted(int(one) for one in may_go[np.argsort(total[may_go], kind="stable")[:most]]))
    one_by_one, among = list[int](), sorted({one for some in sets for one in some})
    while len(one_by_one) < most:  # as long as the top rises
        rises = {one: rise([*one_by_one, one]) for one in among if one not in one_by_one}
        best = max([*rises.values(), rise(one_by_one)]) * (1 - tie)
        if rise(one_by_one) >= best:
            break
        one_by_one.append(next(one for one in rises if rises[one] >= best))
    sets = [[], one_by_one, *sets]
    best = max(rise(one) for one in sets) * (1 - tie)
    chosen = next(one for one in sets if rise(one) >= best)
    with_all, with_the_others = without(lambda *_: [], trusted), without(lambda *_: chosen, trusted)
    return chosen, float(with_all.mean() / with_the_others.mean()), rise(chosen) / rise([])


def rarity(rise: float, rises: Sequence[float], tie: float = 1e-4) -> float:
    """From the share of normal images whose maps rise no more: half or less give 0, all of them 1, as none at all."""
    share = float(np.mean([other <= rise * (1 + tie) for other in rises])) if rises else 1.0
    return max(0.0, 2 * share - 1)


def top_score(values: Array) -> float:
    """(H, W) -> the mean of the highest hundredth of the pixels, one at least."""
    return float(np.sort(np.ravel(values))[::-1][: max(1, values.size // 100)].mean())


def retrieve(query: Array, gallery: Array, k: int) -> tuple[Ints, Floats]:
    """(d,), (N, d) -> the ids (k,) of the nearest and their squared L2 distances, ascending; ties by id."""
    sq_distances = ((np.asarray(gallery, np.float64) - np.asarray(query, np.float64)) ** 2).sum(axis=1)
    ids = np.argsort(sq_distances, kind="stable")[:k]
    return ids, sq_distances[ids]


def image_score(sq_distances: Array, k_score: int) -> float:
    """(K,) ascending -> the mean of the first k_score."""
    return float(np.mean(np.asarray(sq_distances, np.float64)[:k_score]))


def _smooth_rows(values: Floats, sigma: float) -> Floats:
    """Gaussian along the first axis, half-sample symmetric at the ends: (d c b a | a b c d | d c b a), and so on."""
    if sigma == 0:
        return values
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = range(-radius, radius + 1)
    weights = np.exp([-0.5 * (offset / sigma) ** 2 for offset in offsets])
    weights /= weights.sum()
    size = len(values)
    smoothed = np.zeros_like(values)
    for row in range(size):
        for offset, weight in zip(offsets, weights, strict=True):
            source = (row + offset) % (2 * size)
            smoothed[row] += weight * values[source if source < size else 2 * size - 1 - source]
    return smoothed


def gaussian(grid: Array, sigma_y: float, sigma_x: float) -> Floats:
    """(H, W) -> (H, W), with the weights, truncation and edges of scipy.ndimage.gaussian_filter's defaults."""
    return _smooth_rows(_smooth_rows(np.asarray(grid, np.float64), sigma_y).T, sigma_x).T


def anomaly_map(
    sq_distances: Array, image_size: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int], sigma: float
) -> Floats:
    """(h, w, kappa) squared distances -> the (H, W) map of the image, smoothed, 0 where the network did not look.

    Args:
        sq_distances: of each patch on the grid to its kappa nearest.
        image_size: (H, W).
        resized: (height, width) that the image was squashed to.
        crop: (height, width) of the centre of that, which is what the network saw and the grid spans.
        sigma: of the Gaussian, in pixels of an image that the network sees at 224 px.
    """
    values = np.asarray(sq_distances, np.float64).mean(axis=2)
    inside, sigmas = [], []
    for side, squashed, seen in zip(image_size, resized, crop, strict=True):
        start = (squashed - seen) // 2
        centres = (np.arange(side) + 0.5) * squashed / side - start  # of the original pixels, in pixels of the crop
        looked_at = (centres >= 0) & (centres < seen)
        inside.append(np.flatnonzero(looked_at))
        values = _interpolate(
            values, centres[looked_at] * len(values) / seen - 0.5
        ).T  # twice transposed: rows, columns
        sigmas.append(sigma * (side * seen / squashed) / SIGMA_SIDE)
    result = np.zeros(image_size)
    result[np.ix_(*inside)] = gaussian(values, *sigmas)
    return result
