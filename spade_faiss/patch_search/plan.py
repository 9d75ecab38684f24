"""What the pyramid engine prepares once a query, and how it loads and rounds a level."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from ..features import Array
from ..image_index import ROUNDING
from . import kernels
from .patches import as_tensor, shift_of, taps
from .vectors import PAIR, TAPS, VECTOR

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BFLOAT16 = 2.0**-8  # relative rounding of a bfloat16, at most
TYPICAL = 0.0017  # of a vector's length is lost to it; bounds hold for any value here, and are tightest at the true one


@dataclass(frozen=True)
class Plan:
    """The query's side of the products, and where upsampling takes its values from. Level 0 is the finest."""

    narrow: bool  # products in bfloat16
    scale: float  # a power of two that the products are taken at, so that squares neither overflow nor vanish
    shifts: list[torch.Tensor]  # (c, 1, 1), taken from both sides
    native: list[Floats]  # (c, cells) float32, shifted
    operands: list[torch.Tensor]  # (c, cells) as the product takes them; the finest's cells are padded
    grids: list[tuple[int, int]]
    rows: Ints  # (L, h, 2) rows of every level under each row of patches
    row_weights: Floats  # (L, h, 2)
    columns: Ints  # (L, w, 2)
    column_weights: Floats  # (L, w, 2)
    across: list[torch.Tensor]  # (level's w, w) upsampling of a coarser level's columns
    sq_norms: Floats  # (h * w,) of the query's patches, at scale
    doubts: Floats  # (h * w,) the query's part of what half a squared distance may be off by, at scale

    @classmethod
    def make(cls, query: list[Array], narrow: bool) -> Plan:
        """Prepare the levels [(c, h, w), ...] of a query."""
        grids = [level.shape[1:] for level in query]
        height, width = grids[0]
        shifts = [shift_of(level) for level in query]
        native = [
            (as_tensor(level) - shift).float().reshape(len(level), -1).numpy()
            for level, shift in zip(query, shifts, strict=True)
        ]
        size = max(float(np.sqrt(np.mean(np.square(level, dtype=np.float64)))) for level in native)
        scale = 1.0 if size == 0 or 1e-10 < size < 1e10 else 2.0 ** -np.rint(np.log2(size))
        rows, row_weights = (np.stack(part) for part in zip(*(taps(grid[0], height) for grid in grids), strict=True))
        columns, weights = (np.stack(part) for part in zip(*(taps(grid[1], width) for grid in grids), strict=True))
        norms, operands = np.zeros((3, height, width), np.float32), []
        for number, level in enumerate(native):
            padded = -(-level.shape[1] // VECTOR) * VECTOR if number == 0 else level.shape[1]
            operand, sums = rounded(level, grids[number][1], np.zeros(len(level), np.float32), scale, narrow, padded)
            operands.append(operand)
            kernels.add_norms(
                sums, grids[number][1], rows[number], row_weights[number], columns[number], weights[number], norms
            )
        channels = sum(len(level) for level in native)
        return cls(
            narrow, scale, shifts, native, operands, grids, rows, row_weights, columns, weights,
            [_matrix(*level) for level in zip(columns[1:], weights[1:], (grid[1] for grid in grids[1:]), strict=True)],
            norms[0].reshape(-1), doubts(norms, channels, narrow).reshape(-1),
        )  # fmt: skip

    @property
    def channels(self) -> int:
        """Of all levels."""
        return sum(len(level) for level in self.native)

    def pairs(self) -> tuple[Ints, Floats]:
        """For each pair of columns of patches, what it takes of the coarser levels' columns, stacked.

        Returns:
            cells (pairs, (L - 1) * TAPS) and weights (pairs, 2, (L - 1) * TAPS).
        """
        width = self.grids[0][1]
        pairs, levels = -(-width // PAIR), len(self.grids) - 1
        cells, weights = np.zeros((pairs, levels, TAPS), np.int64), np.zeros((pairs, PAIR, levels, TAPS), np.float32)
        base = 0
        for level in range(levels):
            (_, across), at = self.grids[level + 1], self.columns[level + 1]
            first = at[::PAIR, 0]
            cells[:, level] = base + np.minimum(first[:, None] + np.arange(TAPS), across - 1)
            for x in range(width):
                for side in range(2):
                    tap = at[x, side] - first[x // PAIR]
                    weights[x // PAIR, x % PAIR, level, tap] += self.column_weights[level + 1, x, side]
            base += across
        return cells.reshape(pairs, -1), weights.reshape(pairs, PAIR, -1)


def _matrix(columns: Ints, weights: Floats, old: int) -> torch.Tensor:
    matrix = np.zeros((old, len(columns)), np.float32)
    for side in range(2):
        np.add.at(matrix, (columns[:, side], np.arange(len(columns))), weights[:, side])
    return torch.from_numpy(matrix)


def load(level: Array, shift: torch.Tensor) -> tuple[Floats, Floats]:
    """Return a level (c, h, w) as (c, h * w) float32, and what is still to be taken from each channel."""
    values = as_tensor(level)
    if values.dtype == torch.float64:  # differences that float32 does not hold
        return (values - shift).float().reshape(len(level), -1).numpy(), np.zeros(len(level), np.float32)
    return values.float().reshape(len(level), -1).numpy(), shift.reshape(-1).numpy()


def rounded(
    level: Floats, width: int, shift: Floats, scale: float, narrow: bool, padded: int
) -> tuple[torch.Tensor, Floats]:
    """Return a level (c, cells) as the product takes it, (c, padded), and kernels.prepare's sums."""
    out = np.empty((len(level), padded), np.uint16 if narrow else np.float32)
    out[:, level.shape[1] :] = 0
    sums = np.empty((6, level.shape[1]), np.float32)
    kernels.prepare(level, width, shift, np.float32(scale), narrow, True, out, sums)
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(out), sums


def doubts(norms: Floats, channels: int, narrow: bool) -> Floats:
    """One side's part of what half a squared distance may be off by.

    With a' for a as it is rounded, |<a, b> - <a', b'>| <= |a - a'| |b| + |a'| |b - b'|, and 2 x y <= x^2 / t + t y^2
    splits each product into a part of a and a part of b. Upsampling adds products up with weights that sum to 1, so
    that the upsampled squares bound them. The product itself is rounded to bfloat16 once more.

    Args:
        norms: of kernels.add_norms, (3, ...).
        channels: of all levels.
        narrow: whether the products are in bfloat16.
    """
    _, squares, residuals = norms
    result = 2 * ROUNDING * np.sqrt(channels) * squares
    if narrow:
        result += 1.02 * ((TYPICAL + BFLOAT16) / 2 * squares + residuals / (2 * TYPICAL))
    elif torch.get_float32_matmul_precision() != "highest":  # then torch may multiply float32 as bfloat16
        result += 1.02 * BFLOAT16 * squares
    return np.asarray(result, np.float32)


@lru_cache(maxsize=1)
def bfloat16_pays() -> bool:
    """Tell whether this machine multiplies bfloat16 at least twice as fast as float32, by trying it once."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(224, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return 2 * seconds[torch.bfloat16] < seconds[torch.float32]
