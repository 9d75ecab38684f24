"""Where the levels of neighbours lie, and where their channels go, as compiled loops are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...arrays import Array
from ..upsampling import as_tensor
from .loading import READS_HALVES, interpolate
from .plan import parts_of

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Levels of one grid that are read together: all of the finest grid, or one that is coarser."""

    numbers: list[int]  # of the levels
    grid: Grid
    channels: slice  # among those of all levels: their terms, and rows of coordinates that are channels
    spans: list[tuple[int, int]]  # parts of the channels of all levels, first and number; see Projection.blocks
    parts: Ints  # the same as load_patches takes them, its first channels counted from that of `channels`


def layouts_of(grids: Sequence[Grid], channels: Sequence[int], length: int | None) -> list[Layout]:
    """Return how levels are read, those of the finest grid first.

    Args:
        grids: of the levels, the finest first.
        channels: of the levels.
        length: distance between patches, of levels of one grid, whose channels lie side by side; None: of several,
            and they lie one after the other.
    """
    found: dict[int, tuple[list[int], slice, list[tuple[int, int]], list[tuple[int, ...]]]] = {}
    start, first = 0, 0
    for at, ((height, width), number) in enumerate(zip(grids, channels, strict=True)):
        is_finest = grids[at] == grids[0]
        of = slice(0, sum(channels)) if is_finest else slice(first, first + number)
        numbers, _, spans, parts = found.setdefault(0 if is_finest else at, ([], of, [], []))
        numbers.append(at)
        for begin, part in parts_of([number]):
            spans.append((first + begin, part))
            place = (start + begin, number) if length is None else (first + begin, length)
            parts.append((first - of.start + begin, part, *place))
        start, first = start + number * height * width, first + number
    return [
        Layout(numbers, grids[numbers[0]], of, spans, np.array(parts, np.int64))
        for numbers, of, spans, parts in found.values()
    ]


def sample_level(level: Array, shift: Floats, under: tuple[Ints, Floats], first: int, out: Floats) -> None:
    """Set some columns of out (s * m, all channels) to m patches of each level (s, c, n), less a shift (c,).

    The patches lie over cells (t, m) with weights (t, m). `first` is the first column.
    """
    taps, weights = under
    kind = kind_of({level.dtype})
    if not is_read_in_place([level]):
        cells, which = np.unique(taps, return_inverse=True)
        level = np.ascontiguousarray(level[:, :, cells] - shift[:, None], np.float32)
        kind, shift, taps = kind_of({level.dtype}), np.zeros_like(shift), which.reshape(taps.shape)
    at = level.ctypes.data + np.arange(len(level)) * level.strides[0]
    interpolate(kind, at, np.int64(level.shape[2]), shift, taps, weights, first, out)


def kind_of(dtypes: set[np.dtype[Any]]) -> Array:
    """Return an array like what compiled loops read levels of these dtypes as; float32: perhaps after conversion."""
    return np.empty(0, np.uint16 if dtypes == {np.dtype(np.float16)} and READS_HALVES else np.float32)


def is_read_in_place(levels: Sequence[Array]) -> bool:
    """Return whether compiled loops read levels [(s, ...), ...] of one grid where they are: else they are copied."""
    size = kind_of({level.dtype for level in levels}).itemsize
    return all(level.itemsize == size and level[0].flags.c_contiguous for level in levels)


@dataclass(frozen=True)
class Source:
    """Levels of some neighbours."""

    layout: Layout
    kind: Array  # of no values: float32, or uint16, the bits of float16
    at: Ints  # (s, parts) addresses
    shift: Floats  # (c,) of the layout's channels, subtracted
    levels: list[Array]  # what lies at the addresses

    @classmethod
    def of(cls, levels: Sequence[Array], shift: Floats, layout: Layout, some: range) -> Source:
        """Take the levels [(K, c, h, w), ...] of all neighbours, and what is subtracted from each channel, (c,)."""
        own = [levels[at][some.start : some.stop] for at in layout.numbers]
        dtypes = {level.dtype for level in own}
        kind = kind_of(dtypes)
        if kind.dtype == np.float32 and dtypes != {kind.dtype}:
            shifts = np.split(shift, np.cumsum([level.shape[1] for level in levels])[:-1])
            flat = (as_tensor(level.reshape(len(some), level.shape[1], -1)) for level in own)
            terms = zip(flat, (shifts[at] for at in layout.numbers), strict=True)
            own = [shifted(one, torch.from_numpy(each)[:, None]).numpy() for one, each in terms]
            shift = np.zeros_like(shift)
        own = [np.ascontiguousarray(level) for level in own]
        at = [
            level.ctypes.data + first * level.strides[1] + np.arange(len(level)) * level.strides[0]
            for level in own
            for first, _ in parts_of([level.shape[1]])
        ]
        return cls(layout, kind, np.stack(at, axis=1), shift[layout.channels], own)


def shifted(level: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return levels (s, c, n) as float32 of their own, less the shift (c, 1)."""
    if level.dtype != torch.float64:  # in place, and in the type of the product's: half the time
        return level.to(torch.float32, copy=True).sub_(shift)
    return (level - shift).float()
