"""The neighbours' side of the search by bounds: their patches, projected, and kept while there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import Array
from . import bounds_panels as panels
from . import pyramid_kernels
from .bounds_loading import READS_HALVES, load_level
from .bounds_plan import Projection, measure_cost, parts_of, principal
from .bounds_simd import ROWS, WIDTH
from .bounds_tiles import TILE_ROWS, lined_up
from .pyramid_plan import Upsampling, lifted
from .upsampling import as_tensor, shift_of

SAMPLE = 512  # patches of the gallery that directions are fitted to

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mix = tuple[Ints, Ints, Floats]  # how patches are made of cells: see bounds_panels.patch_at


@dataclass(frozen=True)
class Prepared:
    """Some neighbours, ready to be compared."""

    projection: Projection
    cells: Floats  # (s, m), see bounds_panels
    cells_at: Ints  # (s,) their addresses
    panels_at: Ints  # (s,) addresses of panels, (panels, words + 1, WIDTH) float32 each
    largest: Floats  # (s,) largest norm of each, at scale; 0: not finite
    held: tuple[Any, ...] = ()  # what lies at the addresses

    @classmethod
    def of(cls, projection: Projection, cells: Floats, panels: Floats, largest: Floats) -> Prepared:
        """Return neighbours whose cells and panels, (s, ...), lie side by side."""
        cells_at, panels_at = (each.ctypes.data + np.arange(len(each)) * each.strides[0] for each in (cells, panels))
        return cls(projection, cells, cells_at, panels_at, largest, (panels,))


@dataclass(frozen=True)
class Frame:
    """Where the products' side of patches begins, and what is known of patches there."""

    scale: float  # a power of two
    centre: Floats  # (c,) at scale
    spreads: NDArray[np.float64]  # how much patches differ in each part of the channels, see bounds_plan.parts_of

    @classmethod
    def of(cls, sample: torch.Tensor, like: Sequence[Array], channels: Sequence[int]) -> Frame:
        """Return that of a sample (c, s) of the gallery, for levels of a query like these."""
        scale = _scale(*(as_tensor(level).float() for level in like), sample)
        scaled = sample * scale
        centre = scaled.mean(dim=1)
        squares = (scaled - centre[:, None]).double().square().sum(dim=1).numpy()
        spreads = [squares[first : first + number].sum() for first, number in parts_of(channels)]
        return cls(scale, centre.numpy(), np.array(spreads))


class BoundsGallery:
    """The levels of all neighbours, and what makes patches of them."""

    def __init__(
        self, levels: Sequence[Array], like: Sequence[Array], kept_bytes: int = 0, frame: Frame | None = None,
        distinct: bool = False,
    ) -> None:  # fmt: skip
        """Take levels [(K, c, h, w), ...], the finest first.

        Args:
            levels: of the neighbours.
            like: [(c, ...), ...] levels of a query.
            kept_bytes: prepared neighbours are kept for another search if all of them take no more than this.
            frame: of patches like these; None: that of these.
            distinct: whether matches will be. Then nothing is subtracted from what float32 holds as it is; else the
                mean of `like` is, before both sides become float32, as `pyramid` does.
        """
        self.levels = list(levels)
        self.grids: list[tuple[int, int]] = [level.shape[2:] for level in levels]
        self.shifts = [shift_of(level.reshape(len(level), 1, -1)).reshape(-1, 1) for level in like]
        if distinct and is_exact(*levels, *like):
            self.shifts = [torch.zeros_like(shift) for shift in self.shifts]
        self.k, self.n = len(levels[0]), self.grids[0][0] * self.grids[0][1]
        self.channels = [level.shape[1] for level in levels]
        self.depth = sum(self.channels)
        self.plain = Projection(self.depth, None, panels.SINGLE)
        self.projections: list[Projection] = []  # of equal parts of the neighbours; none: to be chosen
        self._kept_bytes = kept_bytes
        self._kept: dict[int, Prepared] = {}
        self.kept_at = np.zeros(self.k, np.int64)  # addresses of cells that are kept; 0: they are not
        self.frame = frame or Frame.of(self.sample, like, self.channels)
        self.scale, self.centre = self.frame.scale, self.frame.centre

    @property
    def is_mixed(self) -> bool:
        """Whether patches are interpolated."""
        return any(grid != self.grids[0] for grid in self.grids)

    @cached_property
    def upsampling(self) -> Upsampling:
        """What patches are interpolated from."""
        return Upsampling.of(self.grids)

    @cached_property
    def mix(self) -> Mix:
        """How patches are made of cells."""
        if not self.is_mixed:
            return np.empty((0, 2), np.int64), np.empty((0, 4, 0), np.int64), np.empty((0, 4, 0), np.float32)
        sizes = [c * h * w for c, (h, w) in zip(self.channels, self.grids, strict=True)]
        table = np.array([np.cumsum([0, *sizes[:-1]]), self.channels], np.int64).T.copy()
        taps, weights = zip(*(self.upsampling.under(at, np.arange(self.n)) for at in range(len(sizes))), strict=True)
        return table, np.stack(taps), np.stack(weights)

    def patches(self, levels: Sequence[Array], at: Ints | None = None) -> Floats:
        """Return the patches (q, c) of an image with levels [(c, h, w), ...], or of one level (c, q), shifted.

        Args:
            levels: of the image.
            at: (q,) numbers of the patches; all of them.
        """
        native = [
            _shifted(as_tensor(level.reshape(len(level), -1))[None], shift)[0].T
            for level, shift in zip(levels, self.shifts, strict=True)
        ]
        if not self.is_mixed:
            chosen = native if at is None else [level[torch.from_numpy(at)] for level in native]
            return torch.cat(chosen, dim=1).contiguous().numpy()
        at = np.arange(self.n) if at is None else at
        out = np.empty((len(at), self.depth), np.float32)
        panels.patches_of(torch.cat([level.reshape(-1) for level in native]).numpy(), at, self.mix, out)
        return out

    @property
    def has_all(self) -> bool:
        """Whether all neighbours are kept as they were prepared, their cells being their patches, unshifted."""
        return bool(self.kept_at.all()) and not self.is_mixed and not any(bool(shift.any()) for shift in self.shifts)

    def cells_of(self, places: Ints) -> Floats:
        """Return cells (n, c) of one level at positions (n,), counted through neighbour, row and column."""
        if not self.has_all:
            neighbours, at = np.divmod(places, self.n)
            level = self.levels[0]
            found: Floats = level.reshape(self.k, level.shape[1], -1)[neighbours, :, at]
            return found
        out = np.empty((len(places), self.depth), np.float32)
        panels.cells_of(self.kept_at, places, self.n, out)
        return out

    @cached_property
    def sample(self) -> torch.Tensor:
        """Some patches from everywhere in the gallery, (c, s) float32, shifted."""
        number = min(self.n, -(-SAMPLE // self.k))
        patches = spread(self.n, number)
        parts = []
        for at, (level, shift) in enumerate(zip(self.levels, self.shifts, strict=True)):
            some = level[:: -(-self.k // SAMPLE)]
            some = some.reshape(len(some), len(shift), -1)
            if self.grids[at] == self.grids[0]:
                parts.append(_shifted(_columns(some, patches), shift))
                continue
            taps, weights = self.upsampling.under(at, patches)
            corners = torch.stack([_shifted(_columns(some, cells), shift) for cells in taps], dim=2)
            parts.append((corners * torch.from_numpy(weights)).sum(dim=2))
        return torch.cat([part.transpose(0, 1).reshape(part.shape[1], -1) for part in parts])

    @cached_property
    def parts(self) -> Ints:
        """Parts of the channels, (p, 2) first and number: those that differ most among patches first."""
        return np.array(parts_of(self.channels), np.int64)[np.argsort(-self.frame.spreads, kind="stable")]

    @property
    def spare_parts(self) -> dict[tuple[int, int], float]:
        """Parts of the finest grid's channels, and their spreads: they cost less if they are not projected."""
        finest = np.repeat([grid == self.grids[0] for grid in self.grids], self.channels)
        every = zip(parts_of(self.channels), self.frame.spreads.tolist(), strict=True)
        return {part: spread for part, spread in every if finest[part[0]]}

    @cached_property
    def measure_cost(self) -> float:
        """Nanoseconds that it takes to measure a patch: until the parts that differ most rule it out."""
        order = np.argsort(-self.frame.spreads, kind="stable")
        return measure_cost(self.frame.spreads[order], self.parts[:, 1])

    @cached_property
    def directions(self) -> torch.Tensor:
        """The first principal directions, (m, c); none if the sample is not finite."""
        return principal(self.centred_sample)

    @cached_property
    def centred_sample(self) -> torch.Tensor:
        """The sample at scale, about the centre."""
        return self.sample * self.scale - torch.from_numpy(self.centre)[:, None]

    def settle(self) -> None:
        """Take note that the projections are chosen."""

    def chunks(self, together: int, threads: int) -> list[range]:
        """Return which neighbours are compared at a time.

        Args:
            together: as many as a core's cache holds while they are prepared.
            threads: that compare.
        """
        return [range(self.k)[start : start + together] for start in range(0, self.k, together)]

    def measured(self, number: int) -> None:
        """Take note of how many patches a search has measured."""

    def projection(self, neighbour: int) -> Projection:
        """Return what a neighbour is prepared by."""
        return self.projections[neighbour * len(self.projections) // self.k]

    def room(self, neighbours: int) -> Floats:
        """Return memory for the cells of some neighbours, (s, m); to ask for it again and again takes long."""
        return np.empty((neighbours, sum(level[0].size for level in self.levels)), np.float32)

    def prepared(self, some: range, projection: Projection, room: Floats, keep: bool = False) -> Prepared:
        """Return neighbours ready to be compared: by this projection, or as they were prepared before.

        Those that are not kept lie in `room`, until others do.
        """
        found = self._kept.get(some.start)
        if found is None or (projection.is_plain and not found.projection.is_plain):
            keep = keep or self._size(projection) <= self._kept_bytes / self.k
            found = self._prepare(some, projection, self.room(len(some)) if keep else room[: len(some)])
            if keep:
                self._kept[some.start] = found
                self.kept_at[some.start : some.stop] = found.cells_at
        return found

    def _size(self, projection: Projection) -> float:
        """Return the bytes of a neighbour that is prepared."""
        cells: int = sum(level[0].size for level in self.levels)
        return 4.0 * (cells + (projection.words + 1) * -(-self.n // WIDTH) * WIDTH)

    def forget(self) -> None:
        """Prepare neighbours again when they are needed."""
        self._kept.clear()
        self.kept_at[:] = 0

    def _prepare(self, some: range, projection: Projection, cells: Floats) -> Prepared:
        directions, m = projection.directions, projection.width
        rows = m if directions is None else projection.rows + 1
        found = (np.empty if directions is None else np.zeros)((len(some), rows, self.n), np.float32)  # coordinates
        sq_norms, squares = np.zeros((2, len(some), self.n), np.float32)
        operands, start, first = [], 0, 0
        for at, shift in enumerate(self.shifts):
            part = slice(first, first + len(shift))
            target = (start, len(shift)) if self.is_mixed else (first, self.depth)
            if self.grids[at] == self.grids[0]:
                row = first if directions is None else 0
                self._load(at, some, projection, (cells, target), (found, row, sq_norms))
                operands += [torch.from_numpy(found[:, part])] if directions is None else []
            else:
                values = _shifted(as_tensor(self.levels[at][some.start : some.stop]).flatten(2), shift)
                panels.turn(values.numpy(), cells, target)
                self._move(at, values.numpy(), self.centre[part], sq_norms, squares)
                operands.append(self._raised(at, projection.along(values, part)))
            start, first = start + self.levels[at][0].size, first + len(shift)
        bound = (sq_norms + squares).max(axis=1)
        largest = np.where(np.isfinite(bound), np.sqrt(bound), 0).astype(np.float32)
        if not self.is_mixed:
            if directions is not None:
                panels.add_rests(found, sq_norms, m - 1, np.float32(2 * projection.doubt))
        else:
            if directions is not None:
                operands.append(torch.from_numpy(found[:, : len(directions)]))
            found = projection.joined(operands, torch.from_numpy(sq_norms)[:, None]).contiguous().numpy()
        return Prepared.of(projection, cells, packed(projection, found, sq_norms, largest), largest)

    def _load(
        self, at: int, some: range, projection: Projection, to: tuple[Floats, tuple[int, int]],
        out: tuple[Floats, int, Floats],
    ) -> None:  # fmt: skip
        """Load a level of the finest grid, see load_level: `to` its cells and target, `out` the last arguments."""
        first = sum(self.channels[:at])
        directions, used = projection.blocks(first, self.channels[at])
        shift, centre = self.shifts[at].reshape(-1).numpy(), self.centre[first : first + self.channels[at]]
        level = np.ascontiguousarray(self.levels[at][some.start : some.stop])
        if level.dtype == np.float16 and READS_HALVES:
            level = level.view(np.uint16)
        elif level.dtype != np.float32:
            level = _shifted(as_tensor(level.reshape(len(level), len(shift), -1)), self.shifts[at]).numpy()
            shift = np.zeros_like(shift)
        load_level(
            np.empty(0, level.dtype), (level.ctypes.data, self.n), (shift, centre), np.float32(self.scale),
            directions, used, to[0], to[1], out[0], out[1], out[2],
        )  # fmt: skip

    def _move(self, at: int, values: Floats, centre: Floats, sq_norms: Floats, squares: Floats) -> None:
        """Move and scale a coarser level in place, and add the squared norms of what is interpolated from it.

        `squares` gets what these are short of an upper bound.
        """
        up, (height, width) = self.upsampling, self.grids[0]
        sums, norms = np.empty((6, values.shape[2]), np.float32), np.zeros((4, height, width), np.float32)
        for number, level in enumerate(values):
            panels.move(level[None], np.float32(self.scale), centre, np.zeros((1, level.shape[1]), np.float32))
            nothing = np.zeros(len(level), np.float32)
            pyramid_kernels.prepare(level, self.grids[at][1], nothing, np.float32(1), False, True, level, sums)
            norms[:] = 0
            pyramid_kernels.add_norms(
                sums, self.grids[at][1], up.rows[at], up.row_weights[at], up.columns[at], up.column_weights[at], False,
                norms,
            )  # fmt: skip
            sq_norms[number] += norms[0].reshape(-1)
            squares[number] += np.maximum(norms[1] - norms[0], 0).reshape(-1)

    def _raised(self, at: int, along: torch.Tensor) -> torch.Tensor:
        """Interpolate (s, m, cells) of a level to the finest grid."""
        if self.grids[at] == self.grids[0]:
            return along
        flat = np.ascontiguousarray(along.reshape(-1, along.shape[2]).numpy())
        return torch.from_numpy(lifted(flat, self.grids[at], self.grids[0])).reshape(len(along), -1, self.n)


def is_exact(*sides: Array) -> bool:
    """Return whether float32 holds all values as they are, so that no shift has to spare their last digits."""
    return all(side.dtype in (np.float16, np.float32) for side in sides)


def spread(n: int, number: int) -> Ints:
    """Return at most so many of n positions, ascending: one of each of equal parts, of another column each."""
    number = min(n, number)
    edges = np.arange(number + 1) * n // number
    drawn: Ints = edges[:-1] + (np.random.default_rng(0).random(number) * np.diff(edges)).astype(np.int64)
    return drawn


def packed(projection: Projection, operand: Floats, sq_norms: Floats, largest: Floats) -> Floats:
    """Cut projected patches, the first rows of (s, >= width, n), into panels of words."""
    (s, _, n), width = operand.shape, projection.width
    out = lined_up((s, -(-n // WIDTH), projection.words + 1, WIDTH))
    if projection.kind == panels.PAIRS:
        panels.pack_pairs(operand, width, sq_norms, largest, out, out.view(np.int16))
    elif projection.kind == panels.TILES:
        panels.pack_tiles(operand, width, sq_norms, largest, out, out.view(np.uint32))
    else:
        panels.pack(operand, width, sq_norms, largest, out)
    return out


def packed_query(projection: Projection, operand: torch.Tensor, longest: float) -> Floats:
    """Return the query's side of the products, (width, q), in blocks of words, the last block padded.

    Returns:
        (blocks, words, ROWS), or for tiles (blocks, TILE_ROWS, words).
    """
    width, q = operand.shape
    if projection.kind == panels.TILES:
        tiles = lined_up((-(-q // TILE_ROWS), TILE_ROWS, projection.words), 0)
        panels.pack_query_tiles(operand.contiguous().numpy(), tiles.view(np.uint32))
        return tiles
    each = 2 if projection.kind == panels.PAIRS else 1
    padded = np.zeros((projection.words * each, -(-q // ROWS) * ROWS), np.float32)
    padded[:width, :q] = operand.numpy()
    blocks = padded.reshape(projection.words, each, -1, ROWS).transpose(2, 0, 3, 1)  # (blocks, words, ROWS, each)
    if projection.kind == panels.PAIRS:
        blocks = np.rint(blocks * (panels.LARGEST / longest if longest > 0 else 0)).astype(np.int16)
    return np.ascontiguousarray(blocks).view(np.float32)[..., 0]


def _shifted(level: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return levels (s, c, n) as float32 of their own, less the shift (c, 1)."""
    if level.dtype != torch.float64:  # in place, and in the type of the product's: half the time
        return level.to(torch.float32, copy=True).sub_(shift)
    return (level - shift).float()


def _columns(levels: Array, cells: Ints) -> torch.Tensor:
    """Return some cells of levels (s, c, n), (s, c, m)."""
    return as_tensor(np.take(levels, cells, axis=2))


def _scale(*sides: torch.Tensor) -> float:
    """Return a power of two that brings patches of any size near 1."""
    size = max(float(side.abs().amax()) for side in sides)
    return float(2.0 ** -np.clip(np.rint(np.log2(size)), -120, 120)) if 0 < size < np.inf else 1.0
