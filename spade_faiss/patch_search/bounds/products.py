"""Products of one block of the query with panels, of whatever kind they are."""

from __future__ import annotations

from typing import Any

from ..compiled import jit
from .products_bytes import BYTE_ROWS, multiply_bytes, multiply_bytes_within
from .products_tiles import multiply_tiles, multiply_tiles_within
from .simd import (
    BYTES,
    PAIRS,
    QUAD_ROWS,
    QUADS,
    TILES,
    WIDTH,
    multiply,
    multiply_pairs,
    multiply_pairs_within,
    multiply_quads,
    multiply_quads_within,
    multiply_within,
)


@jit
def rows_beside(kind: int) -> Any:
    """Return how many rows of a panel are after its words: half squared norms, which tiles have in theirs, and more."""
    if kind == TILES:
        return 0
    if kind == QUADS:
        return QUAD_ROWS
    return BYTE_ROWS if kind == BYTES else 1


@jit
def panel_bytes_of(kind: int, words: int) -> Any:
    """Return the bytes of a panel of patches of so many words."""
    return 4 * (words + rows_beside(kind)) * WIDTH


@jit
def multiply_of(kind: int, addresses: Any, terms: Any, words: Any, stride: Any, n: Any) -> None:
    """Multiply as simd.multiply: all values are written, and minima of each row."""
    if kind == TILES:
        multiply_tiles(addresses, words, stride, n)
    elif kind == PAIRS:
        multiply_pairs(addresses, terms, words, stride, n)
    elif kind == QUADS:
        multiply_quads(addresses, terms, words, stride, n)
    elif kind == BYTES:
        multiply_bytes(addresses, terms, words, stride, n)
    else:
        multiply(addresses, terms, words, stride, n)


@jit
def multiply_of_within(kind: int, addresses: Any, terms: Any, words: Any, stride: Any, n: Any) -> None:
    """Multiply as simd.multiply_within: panels are marked that may have values within their rows' limits."""
    if kind == TILES:
        multiply_tiles_within(addresses, words, stride, n)
    elif kind == PAIRS:
        multiply_pairs_within(addresses, terms, words, stride, n)
    elif kind == QUADS:
        multiply_quads_within(addresses, terms, words, stride, n)
    elif kind == BYTES:
        multiply_bytes_within(addresses, terms, words, stride, n)
    else:
        multiply_within(addresses, terms, words, stride, n)
