"""The least bounds of groups of patches, by what is fastest on the device.

On a GPU that is plain torch or the fused kernel at one of several sizes of its blocks: measured once for each kind of
work, on the first patches that are searched. Where Triton is missing, or does not compile, plain torch serves.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from .tiles_torch import Apart, Least, Likeliest, Plain, Way, Window, likeliest_plain, slow

W = TypeVar("W")

ROUNDS = 3  # of each way, before one is chosen
FEW = 64  # patches of a query: beyond them the work is of another kind
PLAIN = Plain()

_lock = threading.Lock()
_fastest: dict[tuple[Any, ...], Way] = {}  # by the kind of work
_choosing: dict[tuple[Any, ...], Callable[[Least, int], Likeliest]] = {}  # likewise


def least(own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None = None) -> Least:
    """Return the least of limits - <own, theirs> of each group, for the patches of n neighbours.

    Args:
        own: (b, q, c) float16.
        theirs: (b, n, cells, c) float16.
        limits: (b, n, cells) float32.
        window: which pairs are compared; None: all. The bounds of others are infinite.
    """
    return _way(False, own, theirs, limits, window)(own, theirs, limits, window)


def apart(own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Apart:
    """Return the least of limits - <own, theirs> of each neighbour; args are those of `least`."""
    return _way(True, own, theirs, limits, None).apart(own, theirs, limits)


def likeliest(found: Least, count: int) -> Likeliest:
    """Return so many groups with the least bounds; fewer, if there are fewer."""
    (b, q, n, groups), device = found.first.shape, found.first.device
    count = min(count, n * groups)
    if device.type != "cuda":
        return likeliest_plain(found, count)
    kind = device, "likeliest", n, count, b * q > FEW
    with _lock:
        if kind not in _choosing:
            calls: Any = _choosers()
            _choosing[kind] = fastest({call: partial(call, count=count) for call in calls}, found)
    return _choosing[kind](found, count)


def _way(is_apart: bool, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None) -> Way:
    """Return the fastest way for a kind of work."""
    if own.device.type != "cuda":
        return PLAIN
    kind = own.device, own.shape[2], theirs.shape[2], own.shape[1] > FEW, is_apart, window
    with _lock:
        if kind not in _fastest:
            ways: Any = {way: way.apart if is_apart else partial(way, window=window) for way in _ways()}
            _fastest[kind] = fastest(ways, own, theirs, limits)
    return _fastest[kind]


def chosen() -> dict[str, str]:
    """Return what was measured to be fastest so far, in words, by the kind of work."""
    return {
        f"{channels} channels, {cells} cells{', in a window' if window else ''}": str(way)
        for (_, channels, cells, _, _, window), way in _fastest.items()
    }


@lru_cache(maxsize=1)
def _ways() -> Sequence[Way]:
    """Return the ways that this installation has; the plain one first."""
    try:
        from .tiles_triton import WAYS
    except ImportError:
        return (PLAIN,)
    return PLAIN, *WAYS


@lru_cache(maxsize=1)
def _choosers() -> Sequence[Callable[[Least, int], Likeliest]]:
    """Return what finds the likeliest groups in this installation; the plain way first."""
    try:
        from .tiles_triton import likeliest as by_kernel
    except ImportError:
        return (likeliest_plain,)
    return likeliest_plain, by_kernel


def fastest(ways: Mapping[W, Callable[..., Any]], *sides: Any) -> W:
    """Return the way whose call takes the fewest seconds; waits for the device. A way that fails is left out.

    Warns if all but the first do.
    """
    (plain, call), *others = ways.items()
    seconds, failed = {plain: _milliseconds(call, *sides)}, None
    for way, call in others:
        try:
            seconds[way] = _milliseconds(call, *sides)
        except Exception as error:  # a compiler says many things; the answer is the same without it
            failed = error
    if failed is not None and len(seconds) == 1:
        warnings.warn(slow(failed), stacklevel=2)
    return min(seconds, key=lambda way: seconds[way])


def _milliseconds(call: Callable[..., Any], *sides: Any) -> float:
    """Return the least of a few times on the device."""
    call(*sides)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call(*sides)
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)
