"""Levels loaded on a GPU, upsampled and measured by kernels in Triton: one pass over memory, where torch takes ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles_torch import LARGEST

CELLS, CHANNELS, WARPS = 8, 128, 4  # of a program that upsamples
PAIRS = 8  # of a program that measures distances
SIDE = 64  # of a block that is turned over

Taps = tuple[torch.Tensor, torch.Tensor]  # (side, 2) cells and weights; see interpolation.taps


@triton.jit(do_not_specialize=["k"])
def _load(
    level, shifts, scale, out,
    k, cells, channels, side: tl.constexpr, is_size: tl.constexpr,
):  # fmt: skip
    """Shift a block of a level and write it with its channels last, to scale; or write the largest of it alone."""
    image = tl.program_id(2).to(tl.int64)
    cell, channel = tl.program_id(0) * side + tl.arange(0, side), tl.program_id(1) * side + tl.arange(0, side)
    inside = (channel < channels)[:, None] & (cell < cells)[None, :]
    shift = tl.load(shifts + image // k * channels + channel, mask=channel < channels, other=0.0)
    values = tl.load(level + (image * channels + channel[:, None]) * cells + cell[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32) - shift[:, None]
    if is_size:
        block = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        sizes = tl.where(values == values, tl.abs(values), float("inf"))  # a maximum may pass over NaN
        tl.store(out + block, tl.max(tl.where(inside, sizes, 0.0)))
    else:
        values = tl.trans(values * tl.load(scale))
        tl.store(out + (image * cells + cell[:, None]) * channels + channel[None, :], values, mask=tl.trans(inside))


@triton.jit
def _tap(y, x, rows, high, columns, wide, width, corner: tl.constexpr):
    """Return where one of the four cells is that patches are interpolated from, and its weight."""
    at = tl.load(rows + 2 * y + corner // 2) * width + tl.load(columns + 2 * x + corner % 2)
    return at, tl.load(high + 2 * y + corner // 2) * tl.load(wide + 2 * x + corner % 2)


@triton.jit
def _taps(cell, rows, high, columns, wide, width, across, is_finest: tl.constexpr):
    """Return all four of them; of the finest level, the cell itself."""
    first, a = cell.to(tl.int64), tl.full(cell.shape, 1.0, tl.float32)
    second, third, fourth, b, c, d = first, first, first, a, a, a
    if not is_finest:
        y, x = cell // across, cell % across
        first, a = _tap(y, x, rows, high, columns, wide, width, 0)
        second, b = _tap(y, x, rows, high, columns, wide, width, 1)
        third, c = _tap(y, x, rows, high, columns, wide, width, 2)
        fourth, d = _tap(y, x, rows, high, columns, wide, width, 3)
    return first, second, third, fourth, a, b, c, d


@triton.jit
def _values(start, at, channel, is_channel, channels):
    """Return some channels of cells."""
    return tl.load(start + at[:, None] * channels + channel[None, :], mask=is_channel, other=0.0)


@triton.jit
def _interpolated(
    start, first, second, third, fourth,
    a, b, c, d, channel, is_channel, channels, is_finest: tl.constexpr,
):  # fmt: skip
    """Return some channels of patches, and the interpolated squares of what they are made of."""
    values = _values(start, first, channel, is_channel, channels)
    squares = values * values
    if not is_finest:
        tap = values
        values, squares = a[:, None] * tap, a[:, None] * squares
        tap = _values(start, second, channel, is_channel, channels)
        values += b[:, None] * tap
        squares += b[:, None] * (tap * tap)
        tap = _values(start, third, channel, is_channel, channels)
        values += c[:, None] * tap
        squares += c[:, None] * (tap * tap)
        tap = _values(start, fourth, channel, is_channel, channels)
        values += d[:, None] * tap
        squares += d[:, None] * (tap * tap)
    return values, squares


@triton.jit(do_not_specialize=["height", "width", "across", "number"])
def _operand(
    level, rows, high, columns, wide,
    out, sums, height, width, across, cells,
    channels, before, total, number,
    block: tl.constexpr, depth: tl.constexpr, largest: tl.constexpr, is_finest: tl.constexpr,
):  # fmt: skip
    """Upsample a level to some patches, round them, and sum the squares of what comes in, goes out and is lost."""
    image = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * block + tl.arange(0, block)
    first, second, third, fourth, a, b, c, d = _taps(
        tl.minimum(cell, cells - 1), rows, high, columns, wide, width, across, is_finest
    )  # fmt: skip
    start = level + image * height * width * channels
    norms = tl.zeros((block, depth), tl.float32)
    losses = tl.zeros((block, depth), tl.float32)
    squares = tl.zeros((block, depth), tl.float32)
    for done in range(0, channels, depth):
        channel = done + tl.arange(0, depth)
        is_channel = (channel < channels)[None, :]
        values, those = _interpolated(
            start, first, second, third, fourth, a, b, c, d, channel, is_channel, channels, is_finest
        )  # fmt: skip
        rounded = tl.minimum(tl.maximum(values, -largest), largest).to(tl.float16)
        target = out + (image * cells + cell[:, None]) * total + before + channel[None, :]
        tl.store(target, rounded, mask=(cell < cells)[:, None] & is_channel)
        gone = values - rounded.to(tl.float32)
        norms += values * values
        losses += gone * gone
        squares += those
    norm, lost, square = tl.sum(norms, 1), tl.sum(losses, 1), tl.sum(squares, 1)
    images = tl.num_programs(1)
    target = sums + (number * 3 * images + image) * cells + cell
    tl.store(target, norm, mask=cell < cells)
    tl.store(target + images.to(tl.int64) * cells, lost, mask=cell < cells)
    tl.store(target + 2 * images.to(tl.int64) * cells, square, mask=cell < cells)


@triton.jit(do_not_specialize=["own_size", "size", "width", "across", "number", "pairs"])
def _distances(
    mine, theirs, own_images, own_cells,
    images, cells, rows, high, columns, wide,
    sums, own_size, size, width, across,
    channels, number, pairs, block: tl.constexpr, depth: tl.constexpr, is_finest: tl.constexpr,
):  # fmt: skip
    """Sum the squared differences of some pairs of patches in one level."""
    pair = tl.program_id(0) * block + tl.arange(0, block)
    known = tl.minimum(pair, pairs - 1)
    image = tl.load(images + known)
    total = tl.zeros((block, depth), tl.float64)
    if tl.max(image) >= 0:  # else there is no pair to measure
        own = mine + (tl.load(own_images + known) * own_size * channels)[:, None]
        other = theirs + (tl.maximum(image, 0) * size * channels)[:, None]
        own_cell, cell = tl.load(own_cells + known), tl.maximum(tl.load(cells + known), 0)
        i, j, k, m, r, s, t, u = _taps(own_cell, rows, high, columns, wide, width, across, is_finest)
        first, second, third, fourth, a, b, c, d = _taps(cell, rows, high, columns, wide, width, across, is_finest)
        for done in range(0, channels, depth):
            channel = done + tl.arange(0, depth)
            is_channel = (channel < channels)[None, :]
            # The same steps on both sides, so that a copy is at 0.
            one, _ = _interpolated(own, i, j, k, m, r, s, t, u, channel, is_channel, channels, is_finest)
            two, _ = _interpolated(
                other, first, second, third, fourth, a, b, c, d, channel, is_channel, channels, is_finest
            )  # fmt: skip
            difference = (one - two).to(tl.float64)
            total += difference * difference
    tl.store(sums + number.to(tl.int64) * pairs + pair, tl.sum(total, 1), mask=pair < pairs)


def _depth(channels: int) -> int:
    """Return how many channels a program takes at a time."""
    return min(CHANNELS, max(16, 1 << (channels - 1).bit_length()))


def _loading(level: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, is_size: bool) -> None:
    (b, k, c), cells = level.shape[:3], level.shape[3] * level.shape[4]
    _load[-(-cells // SIDE), -(-c // SIDE), b * k](
        level, shift, scale, out, k, cells, c, side=SIDE, is_size=is_size, num_warps=WARPS
    )


def size(level: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return the largest of a level (b, k, c, h, w), float16 or float32, less its shift (b, c): a () float32 tensor."""
    (b, k, c), cells = level.shape[:3], level.shape[3] * level.shape[4]
    out = torch.empty(b * k * -(-c // SIDE) * -(-cells // SIDE), device=level.device)
    _loading(level, shift, out, out, True)
    return out.amax()


def load(level: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a level (b, k, c, h, w) less its shift (b, c), times the () scale, as (b, k, h, w, c) float32."""
    b, k, c, height, width = level.shape
    out = torch.empty(b, k, height, width, c, device=level.device)
    _loading(level, shift, scale, out, False)
    return out


def rounded_patches(levels: list[torch.Tensor], taps: list[tuple[Taps, Taps]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Upsample loaded levels [(b, k, h, w, c), ...] to the grid of the first and round them to float16.

    Args:
        levels: the finest first.
        taps: of the rows and of the columns of each level.

    Returns:
        patches (b, k, cells, channels) float16, and three sums (3, b, k, cells) float32 for each: the squared norm, the
        squares of what was lost, the interpolated squares of what the patch is made of.
    """
    (b, k, down, across, _), total = levels[0].shape, sum(level.shape[-1] for level in levels)
    out = torch.empty(b, k, down * across, total, dtype=torch.float16, device=levels[0].device)
    sums = torch.empty(len(levels), 3, b, k, down * across, device=out.device)
    before = 0
    for number, (level, ((rows, high), (columns, wide))) in enumerate(zip(levels, taps, strict=True)):
        height, width, channels = level.shape[2:]
        _operand[-(-down * across // CELLS), b * k](
            level.contiguous(), rows, high, columns, wide, out, sums, height, width, across, down * across,
            channels, before, total, number, block=CELLS, depth=_depth(channels), largest=LARGEST,
            is_finest=(height, width) == (down, across), num_warps=WARPS,
        )  # fmt: skip
        before += channels
    return out, sums.sum(0)


def sq_distances(
    mine: list[torch.Tensor], theirs: list[torch.Tensor], taps: list[tuple[Taps, Taps]],
    own_at: tuple[torch.Tensor, torch.Tensor], at: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Return squared distances of pairs of patches, float64, of loaded levels [(b, k, h, w, c), ...].

    Args:
        mine: levels of the queries, the finest first.
        theirs: of the neighbours.
        taps: of the rows and of the columns of each level.
        own_at: (pairs,) int64 images, counted through b and k, and cells of the finest grid.
        at: the same of the neighbours' patches; where the image is -1, anything is returned.
    """
    sums = torch.empty(len(mine), len(at[0]), dtype=torch.float64, device=mine[0].device)
    grid, ids = theirs[0].shape[2:4], [each.contiguous() for each in (*own_at, *at)]
    for number, (own, others, ((rows, high), (columns, wide))) in enumerate(zip(mine, theirs, taps, strict=True)):
        height, width, channels = others.shape[2:]
        _distances[(-(-len(at[0]) // PAIRS),)](
            own.contiguous(), others.contiguous(), *ids, rows, high, columns, wide, sums,
            own.shape[2] * own.shape[3], height * width, width, grid[1], channels, number, len(at[0]),
            block=PAIRS, depth=_depth(channels), is_finest=(height, width) == grid, num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(0)
