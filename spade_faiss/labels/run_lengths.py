"""Masks as run lengths, in the order and the packing of each label tool."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .regions import RegionMask

Runs = NDArray[np.int64]  # (n,) lengths of runs of 0 and 1 by turns, beginning with 0s (none of them, maybe)

# Label Studio packs bits: the count of values, the bits of a value, and the sizes that a run's length may have.
VALUE_BITS, LENGTH_BITS = 8, (3, 4, 8, 16)
LONGEST = 1 << LENGTH_BITS[-1]
CHANNELS = 4  # a brush mask is an RGBA picture
SQUARE = 512  # px that are turned at a time: they fit a processor's cache


def whole(mask: NDArray[np.bool_]) -> RegionMask:
    """Return an (H, W) mask as the region that it is of its own picture."""
    height, width = mask.shape
    return RegionMask(mask, 0, 0, (height, width))


def coco_counts(region: RegionMask) -> list[int]:
    """Return the runs of the whole image, column by column, as COCO's uncompressed "counts"."""
    height, width = region.size
    counts: list[int] = _runs(_columns(region.inside), region.left, region.top, (width, height)).tolist()
    return counts


def cvat_counts(region: RegionMask) -> list[int]:
    """Return the runs of the region's box, row by row, as CVAT's "rle"."""
    counts: list[int] = _runs(region.inside, 0, 0, region.inside.shape).tolist()
    return counts


def brush_rle(region: RegionMask) -> list[int]:
    """Return the whole image as Label Studio's brush masks are: bytes of a bit stream of runs of RGBA values.

    Its format is that of the package @thi.ng/rle-pack. Every run takes a length of 16 bits here, which any decoder
    reads: shorter ones would save little.
    """
    runs = CHANNELS * _runs(region.inside, region.top, region.left, region.size)
    values = np.where(np.arange(len(runs)) % 2, 255, 0)
    pieces = -(-runs // LONGEST)  # a length has 16 bits
    lengths = np.full(int(pieces.sum()), LONGEST)
    last = np.cumsum(pieces)[pieces > 0] - 1
    lengths[last] = (runs - (pieces - 1) * LONGEST)[pieces > 0]
    codes = (0b111 << 24) | ((lengths - 1) << VALUE_BITS) | np.repeat(values, pieces)  # a run, the last size
    head = [_bits(int(runs.sum()), 32), _bits(VALUE_BITS - 1, 5), *(_bits(size - 1, 4) for size in LENGTH_BITS)]
    body = np.unpackbits(codes.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)[:, 5:]
    packed: list[int] = np.packbits(np.concatenate([*head, body.ravel()])).tolist()
    return packed


def _bits(value: int, count: int) -> NDArray[np.uint8]:
    return np.array([value >> place & 1 for place in reversed(range(count))], np.uint8)


def _columns(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask's transpose, copied in squares: six times as fast for large ones as in one piece."""
    height, width = inside.shape
    turned = np.empty((width, height), np.bool_)
    for top in range(0, height, SQUARE):
        for left in range(0, width, SQUARE):
            square = inside[top : top + SQUARE, left : left + SQUARE]
            turned[left : left + SQUARE, top : top + SQUARE] = square.T
    return turned


def _runs(inside: NDArray[np.bool_], first: int, offset: int, size: tuple[int, int]) -> Runs:
    """Return the runs of a picture, line by line.

    Args:
        inside: (lines, n) a crop of it.
        first: line of the picture at which the crop begins.
        offset: place in a line at which it begins.
        size: lines of the picture, and the length of each.
    """
    lines = np.pad(inside, ((0, 0), (0, 1)))  # a 0 ends each line
    changes = np.flatnonzero(np.diff(lines.ravel(), prepend=False))
    line, place = np.divmod(changes, lines.shape[1])
    bounds = (line + first) * size[1] + place + offset
    starts, ends = bounds[::2], bounds[1::2]
    apart = starts[1:] != ends[:-1]  # else a run goes on in the next line
    starts, ends = np.concatenate([starts[:1], starts[1:][apart]]), np.concatenate([ends[:-1][apart], ends[-1:]])
    bounds = np.stack([starts, ends], axis=1).ravel()
    runs = np.diff(np.concatenate([[0], bounds, [size[0] * size[1]]]))
    return runs[:-1] if len(bounds) and not runs[-1] else runs  # none of 0 at the end
