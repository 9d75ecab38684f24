"""Neighbours that are compared stripe by stripe, each of few enough patches to stay in a core's cache until it is.

A neighbour of a transformer is larger than that: prepared as a whole, it would be written to memory and read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import jit
from .gallery import BoundsGallery
from .loading import load_patches, source_of
from .panels import add_rests, pack, pack_pairs, pack_quads, pack_tiles
from .plan import Projection
from .products import rows_beside
from .products_bytes import pack_bytes
from .products_tiles import lined_up
from .simd import BYTES, PAIRS, QUADS, TILES, WIDTH
from .sources import Source

STRIPE_BYTES = 2**20  # of patches

Stripes = tuple[Any, ...]  # see load_stripe


def _room(cells: int, coordinates: int, panels: int) -> tuple[Any, ...]:
    """Return memory for a stripe; that of panels as float32, int16, uint32 and uint8."""
    words = lined_up((panels,))
    views = (words.view(dtype) for dtype in (np.int16, np.uint32, np.uint8))
    return lined_up((cells,)), lined_up((coordinates,)), words, *views


class Striper:
    """One thread's memory for stripes of a gallery's neighbours."""

    def __init__(self, gallery: BoundsGallery) -> None:
        """Take the gallery; nothing is allocated yet."""
        self._gallery, self._projection = gallery, gallery.plain
        self.patches = max(WIDTH, STRIPE_BYTES // (4 * gallery.length) // WIDTH * WIDTH)
        self._room: tuple[Any, ...] | None = None
        self._source: Source | None = None

    def stripes(self, some: range, projection: Projection) -> Stripes:
        """Return neighbours as load_stripe takes them."""
        gallery, size = self._gallery, self.patches
        rows = gallery.depth if projection.directions is None else projection.rows + 1
        if self._room is None or projection is not self._projection:
            panels = size // WIDTH * projection.panel_words * WIDTH
            self._room, self._projection = _room(size * gallery.length, rows * size, panels), projection
        source = self._source = gallery.source(some)  # what lies at its addresses has to stay until it is compared
        figures = size, rows, projection.width, np.float32(2 * projection.doubt)
        return (
            source.kind, source.at, source.layout.parts, (source.shift, gallery.centre), np.float32(gallery.scale),
            projection.blocks(source.layout.spans), figures, self._room,
        )  # fmt: skip


@jit
def load_stripe(stripes: Any, number: int, span: Any, n: int, kind: int, words: int) -> Any:
    """Load some patches of a neighbour.

    Args:
        stripes: an array of the levels' dtype, addresses (s, parts), parts, terms, scale and directions, see
            load_levels; patches of a stripe, rows of coordinates, numbers that a patch becomes, and what a length's
            square may be short of, see add_rests; and memory for cells, coordinates, and panels as float32, int16,
            uint32 and uint8, the last five set.
        number: of the neighbour.
        span: the first patch, and the end.
        n: patches of a neighbour.
        kind: of products.
        words: of a patch.

    Returns:
        (3,) float32, see prepared.Prepared.
    """
    dtype, at, parts, terms, scale, directions, figures, room = stripes
    _, rows, width, doubt = figures
    cells, flat, singles, shorts, bits, units = room
    count = span[1] - span[0]
    panels, blocks = -(-count // WIDTH), max(directions[0].shape[1], directions[1].shape[1])
    coordinates = flat[: rows * count].reshape(1, rows, count)
    sq_norms, errors = np.empty((1, count), np.float32), np.empty((1, count), np.float32)
    source = source_of(at, number, n)
    load_patches(dtype, source, span, parts, terms, scale, directions, cells, coordinates[0], sq_norms[0], errors[0])
    if blocks > 0:
        add_rests(coordinates, sq_norms, errors, width - 1, doubt)
    largest = np.zeros((1, 3), np.float32)
    largest[0, 0] = np.sqrt(sq_norms.max())
    if not largest[0, 0] < np.inf:
        largest[0, 0] = 0
    size, rows = panels * words * WIDTH, panels * (words + 1) * WIDTH
    if kind == TILES:
        pack_tiles(coordinates, width, sq_norms, errors, largest, bits[:size].reshape(1, panels, words, WIDTH))
        return largest[0]
    if kind in (QUADS, BYTES):
        more = rows_beside(kind)
        size += more * panels * WIDTH
        out = singles[:size].reshape(1, panels, words + more, WIDTH)
        bytes_of = units[: 4 * size].reshape(1, panels, words + more, 4 * WIDTH)
        if kind == QUADS:
            pack_quads(coordinates, width, sq_norms, largest, out, bytes_of)
        else:
            pack_bytes(coordinates, width, sq_norms, largest, out, bytes_of)
        return largest[0]
    out = singles[:rows].reshape(1, panels, words + 1, WIDTH)
    if kind == PAIRS:
        halves = shorts[: 2 * rows].reshape(1, panels, words + 1, 2 * WIDTH)
        pack_pairs(coordinates, width, sq_norms, largest, out, halves)
    else:
        pack(coordinates, width, sq_norms, largest, out)
    return largest[0]
