"""Where the time of queries goes, stage by stage, beside what a clock on the wall shows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from .detection import Detection

T = TypeVar("T")

STAGES = ("decode", "extract", "retrieve", "read", "match", "score")  # as a query passes through them


class StageTimes:
    """Seconds of queries that are made one at a time. The first of several counts apart: it also warms up.

    >>> times = StageTimes()
    >>> for found in times.of(detector.query(path) for path in ["normal/000.png", "normal/001.png", "normal/002.png"]):
    ...     pass
    >>> len(times.walls), sorted(times.stages[0])
    (3, ['decode', 'extract', 'match', 'read', 'retrieve', 'score'])
    """

    def __init__(self) -> None:
        self.stages: list[dict[str, float]] = []
        self.walls: list[float] = []  # seconds of each query

    def of(self, found: Iterator[T]) -> Iterator[T]:
        """Hand on detections, or tuples that end with one, and time how long each takes to come."""
        while True:
            start = time.perf_counter()
            item = next(found, None)
            wall = time.perf_counter() - start
            if item is None:
                return
            detection = item[-1] if isinstance(item, tuple) else item
            assert isinstance(detection, Detection)
            self.stages.append(detection.seconds)
            self.walls.append(wall)
            yield item

    def lines(self) -> list[str]:
        """Return a table of the stages, their milliseconds and share of a query; nothing where no image was queried."""
        if not self.walls:
            return []
        first = min(1, len(self.walls) - 1)
        walls, stages = self.walls[first:], self.stages[first:]
        wall = sum(walls) / len(walls)
        means = {name: sum(one.get(name, 0.0) for one in stages) / len(stages) for name in STAGES}
        means |= {"other": max(0.0, wall - sum(means.values())), "a query": wall}
        title = f"mean of {len(walls)} queries" if len(walls) > 1 else "1 query"
        after = f" after the first, which took {1000 * self.walls[0]:.0f} ms" if first else ""
        rows = [f"{name:>12} {1000 * mean:10.2f} {mean / wall:8.1%}" for name, mean in means.items()]
        return [f"{title}, one at a time{after}:", f"{'stage':>12} {'ms':>10} {'share':>8}", *rows]
