"""Random levels for the patch search, and what every engine must find in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from xxhash import xxh3_128_digest

from tests import reference

Levels = list[np.ndarray]

GRIDS = {  # awkward grids, as levels of one pyramid
    "one-patch": [(3, 1, 1)],
    "one-row": [(5, 1, 9)],
    "one-column": [(2, 6, 1)],
    "one-level": [(6, 7, 11)],
    "halved": [(4, 8, 6), (5, 4, 3)],
    "indivisible": [(3, 7, 11), (4, 5, 4), (2, 1, 1)],
}


def make(
    shapes: Sequence[tuple[int, int, int]], k: int, dtype: DTypeLike = np.float32, seed: int = 0, scale: float = 1
) -> tuple[Levels, Levels]:
    """Normal features: query [(c, h, w), ...] and neighbours [(K, c, h, w), ...]."""
    rng = np.random.default_rng(seed)
    query = [(scale * rng.normal(size=shape)).astype(dtype) for shape in shapes]
    return query, [(scale * rng.normal(size=(k, *shape))).astype(dtype) for shape in shapes]


def make_ties(shapes: Sequence[tuple[int, int, int]], k: int, seed: int = 0) -> tuple[Levels, Levels]:
    """Zeros and ones: many patches are equal, and at power-of-two scales every sum and product is exact in float32."""
    rng = np.random.default_rng(seed)
    query = [rng.integers(0, 2, shape).astype(np.float32) for shape in shapes]
    return query, [rng.integers(0, 2, (k, *shape)).astype(np.float32) for shape in shapes]


ORACLE: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # by the features, as every engine is asked the same


def oracle(query: Levels, neighbours: Levels, kappa: int, metric: str, window: Any) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, kappa) distances, and those of all patches from all of the gallery (h * w, K * h * w)."""
    levels = [np.ascontiguousarray(level) for level in (*query, *neighbours)]
    features = ((level.shape, level.dtype.str, xxh3_128_digest(level.tobytes())) for level in levels)
    key = kappa, metric, window, *features
    if key not in ORACLE:
        expected, _ = reference.search_patches(query, neighbours, kappa, metric, window)
        images = [reference.patch_features([level[n] for level in neighbours]) for n in range(len(neighbours[0]))]
        own = reference.patch_features(query)
        gallery = np.array(images).reshape(-1, own.shape[2])
        every = [reference.distances_to(patch, gallery, metric) for patch in own.reshape(-1, own.shape[2])]
        ORACLE[key] = expected, np.array(every)
    return ORACLE[key]


def assert_equals_oracle(
    found: tuple[Any, Any], query: Levels, neighbours: Levels, kappa: int, metric: str = "l2", window: Any = None
) -> None:
    """Equal distances, and matches that have these distances: which of two near-ties is found is left open."""
    distances, matches = found
    k, (height, width) = len(neighbours[0]), query[0].shape[1:]
    assert (distances.dtype, matches.dtype) == (np.float32, np.int32)
    assert distances.shape == (height, width, kappa)
    assert matches.shape == (height, width, kappa, 3)
    expected, every = oracle(query, neighbours, kappa, metric, window)
    # Unit vectors are rounded to float32, and so are patches that are interpolated.
    tolerance = 1e-4 * expected + (2e-7 if metric == "cosine" else 1e-6 * expected.max())
    assert (np.abs(distances - expected) <= tolerance).all()
    assert (np.diff(distances, axis=-1) >= 0).all()
    assert (matches >= 0).all()
    assert (matches < [k, height, width]).all()
    radii = reference.window_radii(window, (height, width))
    at = np.stack(np.indices((height, width)), axis=-1)[:, :, None]
    assert (np.abs(matches[..., 1:] - at) <= radii).all()
    places = matches @ [height * width, width, 1]
    assert (np.diff(np.sort(places, axis=-1), axis=-1) > 0).all()  # no patch is matched twice
    true = np.take_along_axis(every, places.reshape(-1, kappa), 1).reshape(places.shape)
    assert (np.abs(true - expected) <= tolerance).all()


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def assert_says(error: BaseException, *names: str) -> None:
    """One line that names each: a number by itself, anything else as a pattern."""
    message = str(error)
    assert "\n" not in message
    for name in names:
        pattern = rf"\b{name}\b" if name.isdigit() else name
        assert re.search(pattern, message), f"{name!r} is not in {message!r}"
