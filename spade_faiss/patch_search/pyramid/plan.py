"""What the pyramid engine prepares once per query, and how it loads and rounds a level."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ...arrays import ROUNDING, Array
from ...system.threads import in_one_thread
from ..compiled import VECTOR
from ..interpolation import taps
from ..upsampling import as_tensor, shift_of
from . import kernels
from .simd import PAIR, TAPS

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

LARGEST_SCALE = 2.0**20  # of small values: neighbours of up to 1e12 are within float32 at that, squared
BLOCK_PATCHES = 192  # query patches compared at a time, at least; their blended coarser products stay in cache
BFLOAT16_SPEED = 7  # how much faster products in bfloat16 are than in float32, where they pay
BFLOAT16 = 2.0**-8  # largest relative rounding error of a bfloat16
TYPICAL = (
    0.0017  # share of a vector's length lost to it; bounds hold for any value here, and are tightest at the true one
)


@dataclass(frozen=True)
class Upsampling:
    """Which cells of each level a patch is interpolated from, and with what weights. Level 0 is the finest."""

    grids: list[tuple[int, int]]
    rows: Ints  # (L, h, 2) rows of every level under each row of patches
    row_weights: Floats  # (L, h, 2)
    columns: Ints  # (L, w, 2) columns of every level under each column of patches
    column_weights: Floats  # (L, w, 2)

    @classmethod
    def of(cls, grids: list[tuple[int, int]]) -> Upsampling:
        """Upsample grids (h, w), the finest first, to the finest."""
        sides = []
        for axis, size in enumerate(grids[0]):
            cells, weights = zip(*(taps(grid[axis], size) for grid in grids), strict=True)
            sides += [np.stack(cells), np.stack(weights)]
        return cls(grids, *sides)

    def under(self, level: int, patches: Ints) -> tuple[Ints, Floats]:
        """Return the cells of a level under patches (m,), and their weights, both (4, m)."""
        y, x = np.divmod(patches, self.grids[0][1])
        rows, columns = self.rows[level, y].T, self.columns[level, x].T
        cells = (rows[:, None] * self.grids[level][1] + columns).reshape(4, -1)
        weights = self.row_weights[level, y].T[:, None] * self.column_weights[level, x].T
        return np.ascontiguousarray(cells), np.ascontiguousarray(weights.reshape(4, -1))

    def matrices(self, level: int, block: int) -> list[tuple[int, torch.Tensor]]:
        """Write the upsampling of a level to blocks of patches as matrices.

        Returns:
            for each block the first cell, and weights (cells, n) of the cells from there on, padded to whole vectors.
        """
        (height, width), across = self.grids[0], self.grids[level][1]
        rows, row_weights = self.rows[level], self.row_weights[level]
        columns, weights = self.columns[level], self.column_weights[level]
        result = []
        for start in range(0, height * width, block):
            y, x = np.divmod(np.arange(start, min(start + block, height * width)), width)
            first = int(rows[y[0], 0])
            matrix = np.zeros(((int(rows[y[-1], 1]) + 1 - first) * across, -(-len(y) // VECTOR) * VECTOR), np.float32)
            for up in range(2):
                for left in range(2):
                    at = (rows[y, up] - first) * across + columns[x, left]
                    np.add.at(matrix, (at, np.arange(len(y))), row_weights[y, up] * weights[x, left])
            result.append((first * across, torch.from_numpy(matrix)))
        return result

    def pairs(self, levels: list[int]) -> tuple[Ints, Floats]:
        """For each pair of columns of patches, the columns of some levels that they are interpolated from.

        Args:
            levels: numbers of the levels, whose columns are stacked.

        Returns:
            cells (pairs, L * TAPS) and weights (pairs, 2, L * TAPS) of these L levels.
        """
        width, n = self.grids[0][1], len(levels)
        pairs = -(-width // PAIR)
        cells, weights = np.zeros((pairs, n, TAPS), np.int64), np.zeros((pairs, PAIR, n, TAPS), np.float32)
        base = 0
        for number, level in enumerate(levels):
            across, at = self.grids[level][1], self.columns[level]
            first = at[::PAIR, 0]
            cells[:, number] = base + np.minimum(first[:, None] + np.arange(TAPS), across - 1)
            for x in range(width):
                for side in range(2):
                    share = self.column_weights[level, x, side]
                    weights[x // PAIR, x % PAIR, number, at[x, side] - first[x // PAIR]] += share
            base += across
        return cells.reshape(pairs, -1), weights.reshape(pairs, PAIR, -1)


@dataclass(frozen=True)
class Coarse:
    """The query's side of a level that is coarser than the finest.

    Either the query's level is upsampled before the product with the gallery's, or the product at native resolution is
    upsampled by one more product. The latter is less work for many channels if float32 is as fast as bfloat16.
    """

    level: int
    lifted: list[torch.Tensor]  # per block (c, n), upsampled; empty if the product is upsampled
    native: torch.Tensor  # (c, cells); used if `lifted` is empty
    spread: list[tuple[int, torch.Tensor]]  # Upsampling.matrices; empty unless the product is upsampled


@dataclass(frozen=True)
class Plan:
    """The query's side of the products. Level 0 is the finest."""

    upsampling: Upsampling
    shifts: list[torch.Tensor]  # (c, 1, 1) per level, taken from both sides
    native: list[Floats]  # (c, cells) float32 per level, shifted
    scale: float  # a power of two that the products are taken at, so that squares neither overflow nor vanish
    lanes: Ints  # (q,) the query patches that are searched for
    block: int  # query patches compared at a time; the last block has the rest, padded to whole vectors
    narrow: list[bool]  # per level: whether its product is in bfloat16
    finest: list[torch.Tensor]  # per block (c, n): all levels of the finest grid
    coarser: list[Coarse]
    sq_norms: Floats  # (q,) squared norms of these patches, at scale
    doubts: Floats  # (q,) their part of the error bound of half a squared distance, at scale

    @classmethod
    def make(
        cls, query: list[Array], narrow: bool, shifts: list[torch.Tensor] | None = None, lanes: Ints | None = None
    ) -> Plan:
        """Prepare the levels [(c, h, w), ...] of a query.

        Args:
            query: the levels.
            narrow: whether bfloat16 pays.
            shifts: taken from the levels; None: about their means.
            lanes: (q,) the patches to search for; None: all.
        """
        shifts = shifts or [shift_of(level) for level in query]
        native = [
            (as_tensor(level) - shift).float().reshape(len(level), -1).numpy()
            for level, shift in zip(query, shifts, strict=True)
        ]
        upsampling, scale = Upsampling.of([level.shape[1:] for level in query]), _scale(native)
        operands = _Operands(upsampling, scale, narrow, lanes)
        for number, level in enumerate(native):
            operands.add(number, level)
        return cls(
            upsampling=upsampling,
            shifts=shifts,
            native=native,
            scale=scale,
            lanes=operands.lanes,
            block=operands.block,
            narrow=operands.narrow,
            finest=[torch.cat(parts) for parts in zip(*operands.finest, strict=True)],
            coarser=operands.coarser,
            sq_norms=operands.norms[0],
            doubts=doubts(operands.norms, sum(len(level) for level in native)),
        )

    def centred(self, query: list[Array], lanes: Ints) -> Plan:
        """Prepare the query for some patches, with levels shifted to the patches' median: rounding errors are least.

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
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of every level."""
        return self.upsampling.grids

    @property
    def channels(self) -> int:
        """Channels of all levels together."""
        return sum(len(level) for level in self.native)


class _Operands:
    """The query's operands of the products, collected level by level; see Plan for the fields."""

    def __init__(self, upsampling: Upsampling, scale: float, narrow: bool, lanes: Ints | None) -> None:
        height, width = upsampling.grids[0]
        self._upsampling, self._scale, self._narrow, self._all = upsampling, scale, narrow, lanes is None
        self.lanes = np.arange(height * width) if lanes is None else lanes
        self.block = _block_of_rows(height, width) if lanes is None else BLOCK_PATCHES
        self.norms = np.zeros((4, len(self.lanes)), np.float32)  # see kernels.add_norms
        self.narrow: list[bool] = []
        self.finest: list[list[torch.Tensor]] = []
        self.coarser: list[Coarse] = []

    def add(self, number: int, level: Floats) -> None:
        """Add a level (c, cells) float32, shifted."""
        grid, finest = self._upsampling.grids[number], self._upsampling.grids[0]
        if grid == finest or not self._all or _lifts(len(level), grid, finest, self._narrow):
            self._add_upsampled(number, lifted(level, grid, finest))
        else:
            self._add_native(number, level)

    def _add_upsampled(self, number: int, level: Floats) -> None:
        """Add a level as (c, h * w) patches."""
        grid = self._upsampling.grids[number]
        level = level if self._all else np.ascontiguousarray(level[:, self.lanes])
        operand, sums = self._rounded(level, grid, self._narrow)
        self.norms[:2] += sums[kernels.SQUARES]
        if self._narrow:
            self.norms[2:] += sums[[kernels.SQUARES, kernels.RESIDUALS]]
        blocks = [_padded(operand[:, at : at + self.block]) for at in range(0, len(self.lanes), self.block)]
        if grid == self._upsampling.grids[0]:
            self.finest.append(blocks)
        else:
            self.coarser.append(Coarse(number, blocks, operand[:, :0], []))

    def _add_native(self, number: int, level: Floats) -> None:
        """Add a level whose products are upsampled. At native resolution float32 costs little, and doubts are less."""
        taken, grid = self._upsampling, self._upsampling.grids[number]
        operand, sums = self._rounded(level, grid, False)
        kernels.add_norms(
            sums, grid[1], taken.rows[number], taken.row_weights[number], taken.columns[number],
            taken.column_weights[number], False, self.norms.reshape(4, *taken.grids[0]),
        )  # fmt: skip
        self.coarser.append(Coarse(number, [], operand, taken.matrices(number, self.block)))

    def _rounded(self, level: Floats, grid: tuple[int, int], narrow: bool) -> tuple[torch.Tensor, Floats]:
        self.narrow.append(narrow)
        return rounded(level, grid[1], np.zeros(len(level), np.float32), self._scale, narrow)


def _scale(native: list[Floats]) -> float:
    """Return a power of two that brings levels (c, cells) of extreme size near 1, as far as neighbours allow it.

    These are scaled alike, and may be far larger.
    """
    size = max(float(np.sqrt(np.mean(np.square(level, dtype=np.float64)))) for level in native)
    return 1.0 if size == 0 or 1e-10 < size < 1e10 else float(min(2.0 ** -np.rint(np.log2(size)), LARGEST_SCALE))


def _block_of_rows(height: int, width: int) -> int:
    """Return the number of patches of a block of whole rows that fill vectors."""
    whole = VECTOR // np.gcd(VECTOR, width)
    return int(min(-(-BLOCK_PATCHES // (width * whole)) * whole, height)) * width


def lifted(level: Floats, grid: tuple[int, int], finest: tuple[int, int]) -> Floats:
    """Upsample a level (c, cells) to (c, h * w)."""
    if grid == finest:
        return level
    maps = torch.from_numpy(level).view(1, len(level), *grid)
    upsampled: Floats = F.interpolate(maps, finest, mode="bilinear", align_corners=False).flatten(2)[0].numpy()
    return upsampled


def _lifts(channels: int, grid: tuple[int, int], finest: tuple[int, int], narrow: bool) -> bool:
    """Return whether upsampling a query's level costs less than upsampling its products, for each cell of the gallery.

    The former's product may be in bfloat16. The latter's is in float32, and upsampling it takes a product with about
    three rows of the level.
    """
    patches = finest[0] * finest[1]
    return channels * patches / (BFLOAT16_SPEED if narrow else 1) < channels * grid[0] * grid[1] + 3 * grid[1] * patches


def _padded(part: torch.Tensor) -> torch.Tensor:
    """Pad the columns of (c, n) to whole vectors."""
    return F.pad(part, (0, -part.shape[1] % VECTOR)).contiguous()


def load(level: Array, shift: torch.Tensor) -> tuple[Floats, Floats]:
    """Return a level (c, h, w) as (c, h * w) float32, and the shift (c,) still to be subtracted from its channels."""
    values = as_tensor(level)
    if values.dtype == torch.float64:  # float32 might not hold the differences
        return (values - shift).float().reshape(len(level), -1).numpy(), np.zeros(len(level), np.float32)
    return values.float().reshape(len(level), -1).numpy(), shift.reshape(-1).numpy()


def rounded(level: Floats, width: int, shift: Floats, scale: float, narrow: bool) -> tuple[torch.Tensor, Floats]:
    """Return a level (c, cells) as the operand of a product, and the sums of kernels.prepare."""
    out = np.empty(level.shape, np.uint16 if narrow else np.float32)
    sums = np.empty((6, level.shape[1]), np.float32)
    kernels.prepare(level, width, shift, np.float32(scale), narrow, True, out, sums)
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(out), sums


def doubts(norms: Floats, channels: int) -> Floats:
    """Return one side's part of the error bound of half a squared distance.

    Let a' be a after rounding. Then |<a, b> - <a', b'>| <= |a - a'| |b| + |a'| |b - b'|, and 2 x y <= x^2 / t + t y^2
    splits each product into a part of a and a part of b. Upsampling sums products with weights that sum to 1, so the
    upsampled squares bound them. The product itself is rounded to bfloat16 once more.

    Args:
        norms: what kernels.add_norms gives, (4, ...).
        channels: number of channels of all levels.
    """
    _, squares, narrow, residuals = norms
    exact = 2 * ROUNDING * np.sqrt(channels)
    if torch.get_float32_matmul_precision() != "highest":  # torch may then multiply float32 as bfloat16
        exact += 1.02 * BFLOAT16
    result = exact * squares + 1.02 * ((TYPICAL + BFLOAT16) / 2 * narrow + residuals / (2 * TYPICAL))
    return np.asarray(result, np.float32)


@lru_cache(maxsize=1)
def bfloat16_pays() -> bool:
    """Return whether a core of this machine multiplies bfloat16 at least twice as fast as float32, measured once."""

    def fastest(dtype: torch.dtype, rows: int) -> float:
        a, b = torch.ones(rows, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    def ratio(rows: int) -> float:
        # In one thread, as in the search: on a busy machine several wait for each other longer than they compute.
        return in_one_thread(fastest, torch.float32, rows) / in_one_thread(fastest, torch.bfloat16, rows)

    # A few rows first: where no instruction multiplies bfloat16, it is ten times as slow, and many rows take a second.
    return ratio(8) > 0.25 and ratio(512) > 2
