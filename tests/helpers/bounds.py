"""Features that few directions hold most of, and what is expected of the search by bounds."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests import reference


def expected_of(query: np.ndarray, neighbours: np.ndarray, kappa: int, distinct: bool) -> tuple[Any, Any]:
    """The oracle's squared distances and positions, (q, kappa)."""
    if distinct:
        return reference.search_distinct(query, neighbours, kappa)
    cells = neighbours.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, len(query))
    every = np.array([((cells - patch) ** 2).sum(axis=1) for patch in query.astype(np.float64).T])
    places = np.argsort(every, axis=1, kind="stable")[:, :kappa]
    return np.take_along_axis(every, places, 1), places


def low_rank(c: int, k: int, side: int, patches: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patches near three directions, (c, q) and (K, c, h, w) float32."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(3, c))

    def draw(n: int) -> Any:
        return (rng.normal(size=(n, 3)) @ basis + noise * rng.normal(size=(n, c)) + 5).astype(np.float32)

    neighbours = draw(k * side * side).reshape(k, side, side, c).transpose(0, 3, 1, 2)
    return draw(patches).T, neighbours


def halves_of_int8(panels: Any, mine: Any, largest: Any) -> Any:
    """The halves (q, n) of panels and a query packed as QUADS, in float64, less what rounding can do.

    `largest` are the norm and the error of a patch in its steps, see bounds.panels.pack_quads.
    """
    words = panels.shape[1] - 2
    theirs = panels[:, :words].view(np.uint8).reshape(len(panels), words, -1, 4).transpose(0, 2, 1, 3)
    own = mine[:, :words].view(np.int8).reshape(len(mine), words, -1, 4).transpose(0, 2, 1, 3)
    theirs, own = (side.reshape(-1, 4 * words).astype(np.int64) for side in (theirs, own))
    terms = mine[:, words:].transpose(1, 0, 2).reshape(4, -1)
    begins = np.ascontiguousarray(terms[0]).view(np.int32) + np.floor(terms[2:].T @ largest).astype(np.int64) + 1
    sums = own @ theirs.T + begins[:, None]
    steps, halves = (panels[:, words + row].reshape(-1).astype(np.float64) for row in range(2))
    return halves - terms[1].astype(np.float64)[:, None] * steps * sums


def halves_of_bytes(panels: Any, mine: Any) -> Any:
    """The halves (q, n) of panels and a query packed as BYTES, in float64, less what rounding can do."""
    words, wide = panels.shape[1] - 3, panels.shape[2]
    theirs = panels[:, :words].view(np.uint8).reshape(len(panels), words, 2, wide, 2).transpose(0, 3, 1, 2, 4)
    own = mine[:, : 2 * words].view(np.int8).reshape(len(mine), 2 * words, -1, 2, 2)
    np.testing.assert_array_equal(own[..., 0, :], own[..., 1, :])
    theirs, own = theirs.reshape(-1, 4 * words).astype(np.int64) - 128, own[..., 0, :].transpose(0, 2, 1, 3)
    own = own.reshape(-1, 4 * words).astype(np.int64)
    sums = own @ theirs.T
    assert np.abs(sums).max() < 2**15
    begins = np.ascontiguousarray(mine[:, 2 * words]).view(np.int16).reshape(len(own), 2)
    assert ((begins + 128 * own.sum(axis=1)[:, None]) % 2**16 == 0).all()
    steps = np.repeat(panels[:, words, wide // 2].astype(np.float64), wide)
    own_steps = np.repeat(mine[:, 2 * words + 1, 0].astype(np.float64), mine.shape[2])
    lengths = panels[:, words + 2].copy().view(np.uint16).reshape(-1, 2, wide).transpose(1, 0, 2).reshape(2, -1)
    factors = np.ascontiguousarray(mine[:, 2 * words + 1, 3:5]).view(np.uint16)[:, ::2].repeat(mine.shape[2], axis=0)
    doubts = 2 + (factors[:, :, None] * lengths.astype(np.int64) >> 16).sum(axis=1)
    halves = panels[:, words + 1].reshape(-1).astype(np.float64)
    return halves - np.outer(own_steps, steps) * (sums + doubts)


def halves_of_bfloat16(panels: Any, mine: Any) -> Any:
    """The halves (q, n) of panels and a query packed for tiles, in float64."""
    words = panels.shape[1]

    def values(array: Any) -> Any:  # of each word, the lower half and the upper
        bits = np.ascontiguousarray(array).view(np.uint32)
        return np.stack([bits << 16, bits & 0xFFFF0000], axis=-1).view(np.float32).astype(np.float64)

    theirs = values(panels).transpose(0, 2, 1, 3).reshape(-1, 2 * words)
    return values(mine).reshape(-1, 2 * words) @ theirs.T
