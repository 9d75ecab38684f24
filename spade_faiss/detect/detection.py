"""What a query found, and what it carries on its way there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from .calibration import Judgement
from .regions import Region


@dataclass(frozen=True)
class Neighbours:
    """The K normal images nearest to a query, nearest first."""

    keys: list[str]
    sq_distances: NDArray[np.float32]  # (K,) of image features


@dataclass(frozen=True)
class Detection:
    """What a query found.

    Attributes:
        image_score: higher is more anomalous.
        anomaly_map: (H, W) float32 at the image's size, higher is more anomalous; 0 outside the region, and where the
            patch search was skipped.
        region: (left, top, right, bottom), half-open: the pixels of the image that were looked at.
        neighbours: the K normal images that were searched.
        sq_distances: (h, w, kappa) float32 of the finest grid, ascending; kappa is 0 where the search was skipped.
        matches: (h, w, kappa, 3) int32: neighbour (as in `neighbours`), row and column of each matched patch.
        seconds: time of each stage's own work; of stages that work on a batch, this image's share. In a stream stages
            overlap, so that all of them together may be more than the time that passed.
        path: where the image came from, if it was a path.
        judgement: verdict, p-value and regions, where the gallery is calibrated.
    """

    image_score: float
    anomaly_map: NDArray[np.float32]
    region: tuple[int, int, int, int]
    neighbours: Neighbours
    sq_distances: NDArray[np.float32]
    matches: NDArray[np.int32]
    seconds: dict[str, float] = field(default_factory=dict)
    path: str | None = None
    judgement: Judgement | None = None

    @property
    def verdict(self) -> str | None:
        """Either "normal" or "anomalous"; None where the gallery is not calibrated."""
        return self.judgement.verdict if self.judgement else None

    @property
    def regions(self) -> list[Region]:
        """Regions above the pixel threshold, worst first; none where the gallery is not calibrated."""
        return self.judgement.regions if self.judgement else []

    @property
    def map_max(self) -> float:
        """The largest pixel score."""
        return float(self.anomaly_map.max())


@dataclass(frozen=True)
class Retrieved:
    """A query between retrieval and localisation."""

    levels: list[Array]  # [(c, h, w), ...]
    ids: Ids  # of the neighbours
    sq_distances: Array
    image_size: tuple[int, int]
    path: str | None
    watch: Stopwatch
    key: str | None = None  # of the normal image that is queried, where it is one of the gallery's


class Stopwatch:
    """Seconds by stage. What is timed for a batch is shared out among its images."""

    def __init__(self, images: int) -> None:
        self.seconds: dict[str, float] = {}
        self._images = images

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block; blocks of one stage are added up."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def of_one_image(self) -> Stopwatch:
        """Share out what was timed so far."""
        own = Stopwatch(1)
        own.seconds = {stage: seconds / self._images for stage, seconds in self.seconds.items()}
        return own


def one_by_one(
    batches: Iterable[tuple[list[Retrieved], Exception | None]],
    next_of: Callable[[Sequence[Retrieved]], int],
    order: list[int] | None,
) -> Iterator[Retrieved]:
    """Hand on the queries of batches, and raise what ended a batch early.

    Args:
        batches: the queries of each, and what could not be read after them.
        next_of: the index of the one that comes next, among those left of a batch.
        order: receives the position of each among all.
    """
    start = 0
    for queries, error in batches:
        positions = list(range(start, start + len(queries)))
        start += len(queries)
        while queries:
            at = next_of(queries)
            if order is not None:
                order.append(positions.pop(at))
            yield queries.pop(at)  # and keep none
        if error is not None:
            raise error
