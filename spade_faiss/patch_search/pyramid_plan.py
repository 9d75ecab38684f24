"""What the pyramid engine prepares once a query, and how it loads and rounds a level."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..arrays import ROUNDING, Array
from ..system.threads import in_one_thread
from . import pyramid_kernels as kernels
from .pyramid_simd import PAIR, TAPS, VECTOR
from .upsampling import as_tensor, shift_of, taps

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BLOCK_PATCHES = 192  # of a query compared at a time, at least; their blended coarser products stay in cache
BFLOAT16_SPEED = 7  # of its products over float32's, where it pays
BFLOAT16 = 2.0**-8  # relative rounding of a bfloat16, at most
TYPICAL = 0.0017  # of a vector's length is lost to it; bounds hold for any value here, and are tightest at the true one


@dataclass(frozen=True)
class Coarse:
    """The query's side of a level that is coarser than the finest.

    Either it is upsampled before the product, or the product at native resolution is, by one more product: that is
    less work where there are many channels and float32 is as fast as bfloat16.
    """

    level: int
    lifted: list[torch.Tensor]  # of each block (c, n), upsampled; empty if the product is upsampled
    native: torch.Tensor  # (c, cells) where lifted is empty
    spread: list[tuple[int, torch.Tensor]]  # of each block its first cell, and weights (cells, n) of cells from there


@dataclass(frozen=True)
class Plan:
    """The query's side of the products, and where upsampling takes its values from. Level 0 is the finest."""

    narrow: list[bool]  # of each level: whether its product is in bfloat16
    scale: float  # a power of two that the products are taken at, so that squares neither overflow nor vanish
    shifts: list[torch.Tensor]  # (c, 1, 1), taken from both sides
    native: list[Floats]  # (c, cells) float32, shifted
    grids: list[tuple[int, int]]
    rows: Ints  # (L, h, 2) rows of every level under each row of patches
    row_weights: Floats  # (L, h, 2)
    columns: Ints  # (L, w, 2)
    column_weights: Floats  # (L, w, 2)
    lanes: Ints  # (q,) the query patches that are searched for
    block: int  # of these are compared at a time; the last block has what is left, padded to whole vectors
    finest: list[torch.Tensor]  # of each block (c, n): all levels of the finest grid
    coarser: list[Coarse]
    sq_norms: Floats  # (q,) of these patches, at scale
    doubts: Floats  # (q,) their part of what half a squared distance may be off by, at scale

    @classmethod
    def make(
        cls, query: list[Array], narrow: bool, shifts: list[torch.Tensor] | None = None, lanes: Ints | None = None
    ) -> Plan:
        """Prepare the levels [(c, h, w), ...] of a query, for some of its patches."""
        grids = [level.shape[1:] for level in query]
        height, width = grids[0]
        shifts = shifts or [shift_of(level) for level in query]
        native = [
            (as_tensor(level) - shift).float().reshape(len(level), -1).numpy()
            for level, shift in zip(query, shifts, strict=True)
        ]
        size = max(float(np.sqrt(np.mean(np.square(level, dtype=np.float64)))) for level in native)
        scale = 1.0 if size == 0 or 1e-10 < size < 1e10 else 2.0 ** -np.rint(np.log2(size))
        rows, row_weights = (np.stack(part) for part in zip(*(taps(grid[0], height) for grid in grids), strict=True))
        columns, weights = (np.stack(part) for part in zip(*(taps(grid[1], width) for grid in grids), strict=True))
        if lanes is None:
            all_lanes, lanes = True, np.arange(height * width)
            whole = VECTOR // np.gcd(VECTOR, width)  # rows of patches that fill vectors
            block = int(min(-(-BLOCK_PATCHES // (width * whole)) * whole, height)) * width
        else:
            all_lanes, block = False, BLOCK_PATCHES
        norms, finest, coarser, rounds = np.zeros((4, len(lanes)), np.float32), [], [], []
        for number, (level, grid) in enumerate(zip(native, grids, strict=True)):
            lift = grid != grids[0] and (not all_lanes or _lifts(len(level), grid, grids[0], narrow))
            if lift or grid == grids[0]:
                level = lifted(level, grid, grids[0])
                level = level if all_lanes else np.ascontiguousarray(level[:, lanes])
            none = np.zeros(len(level), np.float32)
            # At native resolution float32 costs little, and leaves less in doubt.
            rounds.append(narrow and (lift or grid == grids[0]))
            operand, sums = rounded(level, grid[1], none, scale, rounds[-1])
            if lift or grid == grids[0]:
                norms[:2] += sums[kernels.SQUARES]
                if rounds[-1]:
                    norms[2:] += sums[[kernels.SQUARES, kernels.RESIDUALS]]
                blocks = [_padded(operand[:, at : at + block]) for at in range(0, len(lanes), block)]
                if lift:
                    coarser.append(Coarse(number, blocks, operand[:, :0], []))
                else:
                    finest.append(blocks)
                continue
            maps = norms.reshape(4, height, width)
            kernels.add_norms(
                sums, grid[1], rows[number], row_weights[number], columns[number], weights[number], False, maps
            )
            spread = _spread(grid, rows[number], row_weights[number], columns[number], weights[number], block)
            coarser.append(Coarse(number, [], operand, spread))
        channels = sum(len(level) for level in native)
        return cls(
            rounds, scale, shifts, native, grids, rows, row_weights, columns, weights,
            lanes, block, [torch.cat(parts) for parts in zip(*finest, strict=True)], coarser,
            norms[0], doubts(norms, channels),
        )  # fmt: skip

    def centred(self, query: list[Array], lanes: Ints) -> Plan:
        """Prepare the query for some patches, with levels shifted to their median: rounding takes least of them then.

        Args:
            query: levels [(c, h, w), ...].
            lanes: (q,) patches.
        """
        shifts = []
        for level, grid, shift in zip(self.native, self.grids, self.shifts, strict=True):
            middle = np.median(lifted(level, grid, self.grids[0])[:, lanes], axis=1)
            shifts.append(shift + torch.from_numpy(middle)[:, None, None])
        return Plan.make(query, any(self.narrow), shifts, lanes)

    @property
    def channels(self) -> int:
        """Of all levels."""
        return sum(len(level) for level in self.native)

    def pairs(self) -> tuple[Ints, Floats]:
        """For each pair of columns of patches, what it takes of the coarser levels' columns, stacked.

        Returns:
            cells (pairs, L * TAPS) and weights (pairs, 2, L * TAPS) of the L coarser levels.
        """
        width = self.grids[0][1]
        pairs, levels = -(-width // PAIR), len(self.coarser)
        cells, weights = np.zeros((pairs, levels, TAPS), np.int64), np.zeros((pairs, PAIR, levels, TAPS), np.float32)
        base = 0
        for number, coarse in enumerate(self.coarser):
            across, at = self.grids[coarse.level][1], self.columns[coarse.level]
            first = at[::PAIR, 0]
            cells[:, number] = base + np.minimum(first[:, None] + np.arange(TAPS), across - 1)
            for x in range(width):
                for side in range(2):
                    share = self.column_weights[coarse.level, x, side]
                    weights[x // PAIR, x % PAIR, number, at[x, side] - first[x // PAIR]] += share
            base += across
        return cells.reshape(pairs, -1), weights.reshape(pairs, PAIR, -1)


def lifted(level: Floats, grid: tuple[int, int], finest: tuple[int, int]) -> Floats:
    """Upsample a level (c, cells) to (c, h * w)."""
    if grid == finest:
        return level
    maps = torch.from_numpy(level).view(1, len(level), *grid)
    upsampled: Floats = F.interpolate(maps, finest, mode="bilinear", align_corners=False).flatten(2)[0].numpy()
    return upsampled


def _lifts(channels: int, grid: tuple[int, int], finest: tuple[int, int], narrow: bool) -> bool:
    """Tell whether upsampling a query's level costs less than upsampling its products, for each cell of the gallery.

    The former's product may be in bfloat16, the latter's is in float32, and upsampling it takes a product with about
    three rows of the level.
    """
    patches = finest[0] * finest[1]
    return channels * patches / (BFLOAT16_SPEED if narrow else 1) < channels * grid[0] * grid[1] + 3 * grid[1] * patches


def _padded(part: torch.Tensor) -> torch.Tensor:
    return F.pad(part, (0, -part.shape[1] % VECTOR)).contiguous()


def _spread(
    grid: tuple[int, int], rows: Ints, row_weights: Floats, columns: Ints, weights: Floats, block: int
) -> list[tuple[int, torch.Tensor]]:
    """Write upsampling to blocks of patches as matrices: the first cell, and (cells, n) weights, of each block."""
    result = []
    patches = len(rows) * len(columns)
    for start in range(0, patches, block):
        y, x = np.divmod(np.arange(start, min(start + block, patches)), len(columns))
        first = int(rows[y[0], 0])
        matrix = np.zeros(((int(rows[y[-1], 1]) + 1 - first) * grid[1], -(-len(y) // VECTOR) * VECTOR), np.float32)
        for up in range(2):
            for left in range(2):
                at = (rows[y, up] - first) * grid[1] + columns[x, left]
                np.add.at(matrix, (at, np.arange(len(y))), row_weights[y, up] * weights[x, left])
        result.append((first * grid[1], torch.from_numpy(matrix)))
    return result


def load(level: Array, shift: torch.Tensor) -> tuple[Floats, Floats]:
    """Return a level (c, h, w) as (c, h * w) float32, and what is still to be taken from each channel."""
    values = as_tensor(level)
    if values.dtype == torch.float64:  # differences that float32 does not hold
        return (values - shift).float().reshape(len(level), -1).numpy(), np.zeros(len(level), np.float32)
    return values.float().reshape(len(level), -1).numpy(), shift.reshape(-1).numpy()


def rounded(level: Floats, width: int, shift: Floats, scale: float, narrow: bool) -> tuple[torch.Tensor, Floats]:
    """Return a level (c, cells) as the product takes it, and kernels.prepare's sums."""
    out = np.empty(level.shape, np.uint16 if narrow else np.float32)
    sums = np.empty((6, level.shape[1]), np.float32)
    kernels.prepare(level, width, shift, np.float32(scale), narrow, True, out, sums)
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(out), sums


def doubts(norms: Floats, channels: int) -> Floats:
    """One side's part of what half a squared distance may be off by.

    With a' for a as it is rounded, |<a, b> - <a', b'>| <= |a - a'| |b| + |a'| |b - b'|, and 2 x y <= x^2 / t + t y^2
    splits each product into a part of a and a part of b. Upsampling adds products up with weights that sum to 1, so
    that the upsampled squares bound them. The product itself is rounded to bfloat16 once more.

    Args:
        norms: of kernels.add_norms, (4, ...).
        channels: of all levels.
    """
    _, squares, narrow, residuals = norms
    exact = 2 * ROUNDING * np.sqrt(channels)
    if torch.get_float32_matmul_precision() != "highest":  # then torch may multiply float32 as bfloat16
        exact += 1.02 * BFLOAT16
    result = exact * squares + 1.02 * ((TYPICAL + BFLOAT16) / 2 * narrow + residuals / (2 * TYPICAL))
    return np.asarray(result, np.float32)


@lru_cache(maxsize=1)
def bfloat16_pays() -> bool:
    """Tell whether a core of this machine multiplies bfloat16 at least twice as fast as float32, by trying it once."""

    def fastest(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    # In one thread, as the search will: where others are busy, several wait for each other longer than they compute.
    return 2 * in_one_thread(fastest, torch.bfloat16) < in_one_thread(fastest, torch.float32)
