"""Neighbours made ready to be compared: their patches' cells, and coordinates cut into panels of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...system.threads import in_single_threads
from ..pyramid import kernels as pyramid_kernels
from ..pyramid.plan import Upsampling, lifted
from . import panels
from .boxes import Sorted
from .loading import load_levels, load_patches
from .plan import Projection
from .products_bytes import BYTE_TERMS, pack_bytes, pack_query_bytes
from .products_tiles import TILE_ROWS, lined_up
from .simd import BYTES, PAIRS, QUAD_TERMS, QUADS, ROWS, TILES, WIDTH
from .sources import Floats, Ints, Source


@dataclass(frozen=True)
class Prepared:
    """Some neighbours, ready to be compared."""

    projection: Projection
    cells: Floats  # (s, m), see panels
    cells_at: Ints  # (s,) their addresses
    panels_at: Ints  # (s,) addresses of panels, (panels, panel_words, WIDTH) float32 each, see Projection
    largest: Floats  # (s, 3) largest norm of each, at scale; 0: not finite; and for QUADS, see panels.pack_quads
    sorted_at: Ints  # (s, 2) addresses of boxes and of the order of the patches, see boxes.Sorted; 0: it is their own
    held: tuple[Any, ...] = ()  # what lies at the addresses

    @classmethod
    def none(cls, projection: Projection, number: int) -> Prepared:
        """Return so many neighbours that are not prepared."""
        nothing = np.zeros(number, np.int64)
        sizes, orders = np.zeros((number, 3), np.float32), np.zeros((number, 2), np.int64)
        return cls(projection, np.empty((1, 0), np.float32), nothing, nothing, sizes, orders)

    @classmethod
    def joined(cls, some: Sequence[Prepared]) -> Prepared:
        """Return neighbours that were prepared one by one, or some by some, by one projection."""
        cells_at, panels_at = (np.concatenate([getattr(one, at) for one in some]) for at in ("cells_at", "panels_at"))
        largest, sorted_at = (np.concatenate([getattr(one, at) for one in some]) for at in ("largest", "sorted_at"))
        return cls(some[0].projection, some[0].cells, cells_at, panels_at, largest, sorted_at, tuple(some))

    @classmethod
    def of(
        cls, projection: Projection, cells: Floats, panels: Floats, largest: Floats, orders: Sequence[Sorted | None]
    ) -> Prepared:
        """Return neighbours whose cells and panels, (s, ...), lie side by side."""
        cells_at, panels_at = (each.ctypes.data + np.arange(len(each)) * each.strides[0] for each in (cells, panels))
        sorted_at = np.zeros((len(cells), 2), np.int64)
        for at, one in enumerate(orders):
            if one is not None:
                sorted_at[at] = one.boxes.ctypes.data, one.order.ctypes.data
        held = [each for one in orders if one is not None for each in (one.boxes, one.order)]
        return cls(projection, cells, cells_at, panels_at, largest, sorted_at, (panels, *held))

    @property
    def is_sorted(self) -> bool:
        """Whether patches that are alike are side by side in panels."""
        return bool(self.sorted_at.all())


@dataclass(frozen=True)
class Sides:
    """What the patches of all neighbours have in common."""

    n: int  # patches of a neighbour
    upsampling: Upsampling
    scale: float
    centre: Floats  # (c,) at scale


def prepare(
    sources: Sequence[Source], sides: Sides, projection: Projection, cells: Floats, sort: bool = False
) -> Prepared:
    """Prepare some neighbours.

    Args:
        sources: where their levels lie, those of the finest grid first.
        sides: of the patches.
        projection: of theirs.
        cells: (s, m), set.
        sort: whether patches that are alike lie side by side in panels, where that is worth it.
    """
    number, is_plain = len(cells), projection.directions is None
    m = len(sides.centre) if is_plain else projection.width - 1
    found = np.empty((number, m if is_plain else projection.rows + 1, sides.n), np.float32)  # coordinates
    sq_norms, more, sq_errors = np.zeros((3, number, sides.n), np.float32)
    for source in sources:
        layout, grid, is_finest = source.layout, source.layout.grid, source is sources[0]
        rows, size = layout.channels.stop - layout.channels.start if is_plain else found.shape[1], grid[0] * grid[1]
        own = found if is_finest else np.empty((number, rows, size), np.float32)
        norms, errors = np.empty((2, number, size), np.float32)
        load_levels(
            source.kind, (source.at, size), layout.parts, (source.shift, sides.centre[layout.channels]),
            np.float32(sides.scale), projection.blocks(layout.spans), cells, own, norms, errors,
        )  # fmt: skip
        if is_finest:
            sq_norms += norms
            sq_errors += errors * errors
            continue
        _add_norms(source, sides, cells, norms, (sq_norms, more))
        if not is_plain:
            own[:, m], rows = errors, m + 1
        raised = lifted(own[:, :rows].reshape(-1, size), grid, sources[0].layout.grid).reshape(number, rows, -1)
        if is_plain:
            found[:, layout.channels] = raised
        else:  # no interpolated error is longer than the mean of the cells'
            found[:, :m] += raised[:, :m]
            sq_errors += raised[:, m] * raised[:, m]
    errors = np.sqrt(sq_errors)
    bound = (sq_norms + more).max(axis=1)
    largest = np.zeros((number, 3), np.float32)
    largest[:, 0] = np.where(np.isfinite(bound), np.sqrt(bound), 0)
    if not is_plain:
        panels.add_rests(found, sq_norms, errors, m, np.float32(2 * projection.doubt))
    orders = [Sorted.of(one, projection, bool(sizes[0] > 0)) for one, sizes in zip(found, largest, strict=True) if sort]
    for at, order in enumerate(orders):
        if order is not None:
            found[at], sq_norms[at], errors[at] = (
                each.take(order.order, axis=-1, mode="clip") for each in (found[at], sq_norms[at], errors[at])
            )
    return Prepared.of(projection, cells, packed(projection, found, (sq_norms, errors), largest), largest, orders)


def _add_norms(source: Source, sides: Sides, cells: Floats, norms: Floats, out: tuple[Floats, Floats]) -> None:
    """Add squared norms of what is interpolated from cells of a coarser level with these; and how far from a bound.

    Args:
        source: of the level.
        sides: of the patches.
        cells: (s, m), the level's among them.
        norms: (s, cells) squared, at scale.
        out: (s, n) each: squared norms, and what they are short of an upper bound.
    """
    (at,), grid, up = source.layout.numbers, source.layout.grid, sides.upsampling
    start, length = (int(each) for each in source.layout.parts[0, 2:])
    sums, found = np.empty((6, grid[0] * grid[1]), np.float32), np.empty((4, sides.n), np.float32)
    for number, own in enumerate(cells):
        panels.sum_neighbouring(own, (start, length), grid[1], np.float32(sides.scale), norms[number], sums)
        found[:] = 0
        pyramid_kernels.add_norms(
            sums, grid[1], up.rows[at], up.row_weights[at], up.columns[at], up.column_weights[at], False,
            found.reshape(4, len(up.rows[at]), -1),
        )  # fmt: skip
        out[0][number] += found[0]
        out[1][number] += np.maximum(found[1] - found[0], 0)


def packed(projection: Projection, operand: Floats, norms: tuple[Floats, Floats], largest: Floats) -> Floats:
    """Cut projected patches, the first rows of (s, >= width, n), into panels of words.

    `norms` are their squared norms (s, n), and lengths of what rounding took before they were projected.
    """
    (s, _, n), width, (sq_norms, errors) = operand.shape, projection.width, norms
    out = lined_up((s, -(-n // WIDTH), projection.panel_words, WIDTH))
    if projection.kind == PAIRS:
        panels.pack_pairs(operand, width, sq_norms, largest, out, out.view(np.int16))
    elif projection.kind == TILES:
        panels.pack_tiles(operand, width, sq_norms, errors, largest, out.view(np.uint32))
    elif projection.kind == QUADS:
        panels.pack_quads(operand, width, sq_norms, largest, out, out.view(np.uint8))
    elif projection.kind == BYTES:
        pack_bytes(operand, width, sq_norms, largest, out, out.view(np.uint8))
    else:
        panels.pack(operand, width, sq_norms, largest, out)
    return out


def load_query(source: Source, sides: Sides, projection: Projection, patches: Floats, threads: int = 1) -> torch.Tensor:
    """Project patches of levels of one grid that are to be compared with those of neighbours.

    Args:
        source: where their levels lie, of one image.
        sides: of the patches.
        projection: of theirs.
        patches: (n, c), set, shifted.
        threads: that share the work.

    Returns:
        coordinates (width, q), see Projection.
    """
    directions, rows = projection.blocks(source.layout.spans, precise=True), projection.channels
    if projection.directions is not None:
        rows = directions[0].shape[1] * ROWS + 1
    sq_norms, errors = np.empty((2, 1, sides.n), np.float32)

    def load(span: tuple[int, int]) -> Floats:
        some, out = slice(*span), np.empty((rows, span[1] - span[0]), np.float32)
        load_patches(
            source.kind, (source.at[0], np.int64(sides.n), source.at[0, 0]), span, source.layout.parts,
            (source.shift, sides.centre), np.float32(sides.scale), directions, patches[some].reshape(-1), out,
            sq_norms[0, some], errors[0, some],
        )  # fmt: skip
        return out

    edges = [min(sides.n, -(-sides.n * part // (threads * WIDTH)) * WIDTH) for part in range(threads + 1)]
    spans = [(start, end) for start, end in pairwise(edges) if start < end]
    found = np.concatenate(in_single_threads(threads, load, spans), axis=1)[None]
    if projection.directions is not None:
        panels.add_rests(found, sq_norms, errors, projection.width - 1, np.float32(2 * projection.doubt))
    return torch.from_numpy(found[0, : projection.width])


def packed_query(projection: Projection, operand: torch.Tensor, longest: float) -> Floats:
    """Return the query's side of the products, (width, q), in blocks of words, the last block padded.

    Returns:
        (blocks, words, ROWS), or for tiles (blocks, TILE_ROWS, words); for QUADS there are QUAD_TERMS words more,
        and for BYTES see products_bytes.pack_query_bytes.
    """
    width, q = operand.shape
    if projection.kind == TILES:
        tiles = lined_up((-(-q // TILE_ROWS), TILE_ROWS, projection.words), 0)
        panels.pack_query_tiles(operand.contiguous().numpy(), tiles.view(np.uint32))
        return tiles
    if projection.kind == QUADS:
        units = np.zeros((-(-q // ROWS), projection.words + QUAD_TERMS, ROWS), np.float32)
        panels.pack_query_quads(operand.contiguous().numpy(), units, units.view(np.int8))
        return units
    if projection.kind == BYTES:
        twice = np.zeros((-(-q // ROWS), 2 * projection.words + BYTE_TERMS, ROWS), np.float32)
        pack_query_bytes(operand.contiguous().numpy(), twice, twice.view(np.int8))
        return twice
    each = 2 if projection.kind == PAIRS else 1
    padded = np.zeros((projection.words * each, -(-q // ROWS) * ROWS), np.float32)
    padded[:width, :q] = operand.numpy()
    blocks = padded.reshape(projection.words, each, -1, ROWS).transpose(2, 0, 3, 1)  # (blocks, words, ROWS, each)
    if projection.kind == PAIRS:
        blocks = np.rint(blocks * (panels.LARGEST / longest if longest > 0 else 0)).astype(np.int16)
    return np.ascontiguousarray(blocks).view(np.float32)[..., 0]
