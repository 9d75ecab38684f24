"""The kappa nearest of a patch as heaps: the farthest comes first, and makes room for what is nearer."""

from __future__ import annotations

from typing import Any

from .compiled import jit


@jit
def sink(keys: Any, value: float) -> None:
    """Replace the greatest value of a heap, keys[0], by a smaller one."""
    at, size = 0, len(keys)
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= value:
            break
        keys[at] = keys[child]
        at = child
    keys[at] = value


@jit
def sink_pair(keys: Any, at: Any, here: int, value: Any, place: int) -> None:
    """Lower the entry `here` of a heap (kappa,) to value and place: the last in order is on top."""
    size = len(keys)
    while True:
        child = 2 * here + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (keys[other] > keys[child] or (keys[other] == keys[child] and at[other] > at[child])):
            child = other
        if keys[child] < value or (keys[child] == value and at[child] < place):
            break
        keys[here], at[here] = keys[child], at[child]
        here = child
    keys[here], at[here] = value, place


@jit
def keep_nearest(lanes: Any, places: Any, sq_distances: Any, best: Any, best_at: Any) -> None:
    """Put candidates into the heaps best (q, kappa) float32 and best_at int64: the last in order is on top."""
    for i in range(len(lanes)):
        keys, at = best[lanes[i]], best_at[lanes[i]]
        value, place = sq_distances[i], places[i]
        if not (value < keys[0] or (value == keys[0] and place < at[0])):
            continue
        sink_pair(keys, at, 0, value, place)
