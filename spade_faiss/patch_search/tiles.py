"""The least bounds of groups of patches, by what is fastest on the device.

On a GPU that is plain torch or the fused kernel at one of several sizes of its blocks: measured once for each kind of
work, on the first patches that are searched. Where Triton is missing, or does not compile, plain torch serves.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from .tiles_torch import Least, least_plain, slow

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Least]

ROUNDS = 3  # of each way, before one is chosen
FEW = 64  # patches of a query: beyond them the work is of another kind

_lock = threading.Lock()
_fastest: dict[tuple[Any, ...], Way] = {}  # by the kind of work


def least(own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Least:
    """Return the least of limits - <own, theirs> of each group, for the patches of n neighbours.

    Args:
        own: (b, q, c) float16.
        theirs: (b, n, cells, c) float16.
        limits: (b, n, cells) float32.
    """
    if own.device.type != "cuda":
        return least_plain(own, theirs, limits)
    kind = own.device, own.shape[2], theirs.shape[2], own.shape[1] > FEW
    with _lock:
        if kind not in _fastest:
            _fastest[kind] = fastest(_ways(), own, theirs, limits)
    return _fastest[kind](own, theirs, limits)


def chosen() -> dict[str, str]:
    """Return what was measured to be fastest so far, in words, by the kind of work."""
    return {f"{channels} channels, {cells} cells": str(way) for (_, channels, cells, _), way in _fastest.items()}


@lru_cache(maxsize=1)
def _ways() -> Sequence[Way]:
    """Return the ways that this installation has; the plain one first."""
    try:
        from .tiles_triton import WAYS
    except ImportError:
        return (least_plain,)
    return least_plain, *WAYS


def fastest(ways: Sequence[Way], *sides: torch.Tensor) -> Way:
    """Return the way that takes the fewest seconds; waits for the device. A way that fails is left out.

    Warns if all but the first do.
    """
    seconds, failed = {way: _milliseconds(way, *sides) for way in ways[:1]}, None
    for way in ways[1:]:
        try:
            seconds[way] = _milliseconds(way, *sides)
        except Exception as error:  # a compiler says many things; the answer is the same without it
            failed = error
    if failed is not None and len(seconds) == 1:
        warnings.warn(slow(failed), stacklevel=2)
    return min(seconds, key=lambda way: seconds[way])


def _milliseconds(way: Way, *sides: torch.Tensor) -> float:
    """Return the least of a few times on the device."""
    way(*sides)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        way(*sides)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)
