"""Image features in memory, and their nearest by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


class Held:
    """Image features in memory, which come in blocks of uneven size."""

    def __init__(self, xb: np.ndarray) -> None:
        self.xb = xb

    def __len__(self) -> int:
        return len(self.xb)

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        yield from np.array_split(self.xb[start:], 4)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self.xb[ids]


def brute_force(xq: np.ndarray, xb: np.ndarray, k: int, without: Any = ()) -> tuple[np.ndarray, np.ndarray]:
    sq_distances = np.array([((query - xb) ** 2).sum(axis=1) for query in xq.astype(np.float64)])
    sq_distances[:, list(without)] = np.inf
    ids = np.argsort(sq_distances, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(sq_distances, ids, 1)
