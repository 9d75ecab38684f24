"""The least bounds of groups of patches by kernels in Triton: what plain torch writes to memory stays on the chip.

`Fused` multiplies and compares: a program takes some patches of the query and one neighbour, a few patches of each
group at a time; after each product, the least bound and the second least of each group are updated in registers. What
it multiplies comes by pointers, or by Hopper's copies of whole blocks (`by_blocks`), for which no thread waits.
`Reduced` leaves the product to torch's own library, which writes it, and reads it once.

The place of the least bound lies in its lowest bits, which spares registers. What that takes from a bound is taken off
in the end, so that a bound stays one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .tiles_torch import ALIGNED, GROUPS, OF_ONE, Apart, Least, Likeliest, Plain, Way, Window, by_parts, products

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # of an older Triton
    TensorDescriptor = None

PLACES = 10  # bits for a place: 2^10 * GROUPS patches of a neighbour, a grid of 256 x 256
LARGE = 3e38  # stands for infinity, whose bits cannot hold a place


@triton.jit
def _nearer(first, second, one, two):
    """Join the least and the second least of two lots."""
    return tl.minimum(first, one), tl.minimum(tl.maximum(first, one), tl.minimum(second, two))


@triton.jit
def _placed(bounds, places, bits):
    """Put places into the lowest bits."""
    return ((bounds.to(tl.int32, bitcast=True) >> bits << bits) | places).to(tl.float32, bitcast=True)


@triton.jit
def _bound(placed, bits):
    """Return what a bound was at least, before a place was put into it."""
    lost = tl.exp2((bits - 22).to(tl.float32))
    return tl.where(placed < 2e38, placed - tl.abs(placed) * lost - 1e-30, float("inf"))


@triton.jit
def _write(
    first, second, target, mask, bits,
    first_out, second_out, at_out,
):  # fmt: skip
    """Write the least bounds, their places, and the second least."""
    tl.store(first_out + target, _bound(first, bits), mask=mask)
    tl.store(second_out + target, _bound(second, bits), mask=mask)
    tl.store(at_out + target, first.to(tl.int32, bitcast=True) & ((1 << bits) - 1), mask=mask)


@triton.jit
def _least_of(placed, groups: tl.constexpr, bits, large: tl.constexpr):
    """Return of each row the least, its patch, and the row without it."""
    group = tl.arange(0, groups)[None, :]
    least = tl.min(placed, 1)
    own = tl.min(tl.where(placed == least[:, None], group, groups), 1)
    at = least.to(tl.int32, bitcast=True) & ((1 << bits) - 1)
    return least, at * groups + own, tl.where(group == own[:, None], large, placed)


@triton.jit
def _write_apart(
    first, second, target, mask, bits,
    lows_out, rest_out, cells_out, groups: tl.constexpr, large: tl.constexpr,
):  # fmt: skip
    """Write the least bounds of two groups, their patches, and the least of all others."""
    least, cell, left = _least_of(first, groups, bits, large)
    tl.store(lows_out + 2 * target, _bound(least, bits), mask=mask)
    tl.store(cells_out + 2 * target, cell, mask=mask)
    least, cell, left = _least_of(left, groups, bits, large)
    tl.store(lows_out + 2 * target + 1, _bound(least, bits), mask=mask)
    tl.store(cells_out + 2 * target + 1, cell, mask=mask)
    tl.store(rest_out + target, _bound(tl.minimum(tl.min(second, 1), tl.min(left, 1)), bits), mask=mask)


@triton.jit
def _products(
    own, theirs, row, start, rows, cells,
    channels, lanes: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, by_blocks: tl.constexpr,
):  # fmt: skip
    """Multiply patches from a row on with those from a start on; by pointers, `rows` with `cells`."""
    products = tl.full((lanes, columns), 0.0, tl.float32)
    if by_blocks:
        for done in range(0, channels, depth):
            products = tl.dot(own.load([row, done]), theirs.load([start, done]).T, products)
    else:
        channel = tl.arange(0, depth)
        mine, yours = own + rows[:, None] * channels + channel, theirs + cells[None, :] * channels + channel[:, None]
        for done in range(0, channels, depth):
            left = channels - done
            a = tl.load(mine + done, mask=channel[None, :] < left, other=0.0)
            b = tl.load(yours + done, mask=channel[:, None] < left, other=0.0)
            products = tl.dot(a, b, products)
    return products


@triton.jit
def _compared(
    products, limits, lane, cell, cells, first, second, bits, across, far_down, far_right,
    lanes: tl.constexpr, members: tl.constexpr, groups: tl.constexpr, large: tl.constexpr, is_window: tl.constexpr,
):  # fmt: skip
    """Join the least and the second least of each group with those of some products."""
    limit = tl.load(limits + cell, mask=cell < cells, other=large)
    bounds = tl.minimum(limit[None, :] - products, large)
    if is_window:
        down = tl.abs((lane // across)[:, None] - (cell // across)[None, :])
        right = tl.abs((lane % across)[:, None] - (cell % across)[None, :])
        bounds = tl.where((down <= far_down) & (right <= far_right), bounds, large)
    placed = _placed(bounds, (cell // groups)[None, :], bits)
    if members == 1:
        one, two = placed, tl.full((lanes, groups), large, tl.float32)
    else:
        each = tl.reshape(placed, (lanes, members, groups))
        one = tl.min(each, 1)
        two = tl.min(tl.where(each == one[:, None, :], large, each), 1)  # places make them all unlike
    return _nearer(first, second, one, two)


@triton.jit(do_not_specialize=["patches", "neighbours", "bits", "across", "far_down", "far_right"])
def _least(
    own, theirs, ends, limits,
    first_out, second_out, at_out,
    patches, cells, channels, neighbours, bits, across, far_down, far_right,
    groups: tl.constexpr, lanes: tl.constexpr, members: tl.constexpr, depth: tl.constexpr, large: tl.constexpr,
    by_blocks: tl.constexpr, is_apart: tl.constexpr, is_window: tl.constexpr,
):  # fmt: skip
    """Find the least of all groups of one neighbour for a block of patches of one query; or of the neighbour alone.

    A few patches of each group are multiplied at a time, and in the end (`ends`, as `theirs`) one of each. Patches
    beyond the last repeat it, or are anything: those of the query are not written, those of the neighbour never near.
    In a window of `far_down` rows and `far_right` columns on either side, rows out of reach are not looked at.
    """
    query = tl.program_id(2)
    columns: tl.constexpr = members * groups
    neighbour = query * neighbours + tl.program_id(1)
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    row, start = query * patches + tl.program_id(0) * lanes, neighbour * cells
    rows, start_at = query.to(tl.int64) * patches + tl.minimum(lane, patches - 1), neighbour.to(tl.int64) * cells
    first = tl.full((lanes, groups), large, tl.float32)
    second = tl.full((lanes, groups), large, tl.float32)
    begin, end = 0, cells
    if is_window:
        begin = tl.maximum(tl.program_id(0) * lanes // across - far_down, 0) * across // groups * groups
        end = tl.minimum(
            (tl.minimum((tl.program_id(0) + 1) * lanes, patches) - 1) // across + far_down + 1, cells // across
        )
        end *= across
    whole = begin + (end - begin) // columns * columns
    for at in range(begin, whole, columns):
        cell = at + tl.arange(0, columns)
        products = _products(
            own, theirs, row, start + at, rows, start_at + cell, channels, lanes, columns, depth, by_blocks
        )  # fmt: skip
        first, second = _compared(
            products, limits + start_at, lane, cell, cells, first, second, bits, across, far_down, far_right,
            lanes, members, groups, large, is_window,
        )  # fmt: skip
    for at in range(whole, end, groups):
        cell = at + tl.arange(0, groups)
        known = start_at + tl.minimum(cell, cells - 1)
        products = _products(own, ends, row, start + at, rows, known, channels, lanes, groups, depth, by_blocks)
        first, second = _compared(
            products, limits + start_at, lane, cell, cells, first, second, bits, across, far_down, far_right,
            lanes, 1, groups, large, is_window,
        )  # fmt: skip
    target, mask = (query.to(tl.int64) * patches + lane) * neighbours + tl.program_id(1), lane < patches
    if is_apart:
        _write_apart(first, second, target, mask, bits, first_out, second_out, at_out, groups, large)
    else:
        each = target[:, None] * groups + tl.arange(0, groups)[None, :]
        _write(first, second, each, mask[:, None], bits, first_out, second_out, at_out)


@triton.jit(do_not_specialize=["patches", "neighbours", "bits"])
def _reduce(
    product, limits, first_out, second_out, at_out,
    patches, cells, neighbours, bits,
    groups: tl.constexpr, members: tl.constexpr, large: tl.constexpr,
):  # fmt: skip
    """Find the least of all groups of one neighbour for one patch of one query, of products that were written."""
    query = tl.program_id(2)
    neighbour = (query * neighbours + tl.program_id(1)).to(tl.int64)
    row = query.to(tl.int64) * patches + tl.program_id(0)
    group = tl.arange(0, groups)
    cell = tl.arange(0, members)[:, None] * groups + group[None, :]
    first = tl.full((groups,), large, tl.float32)
    second = tl.full((groups,), large, tl.float32)
    for start in range(0, cells, members * groups):
        inside = start + cell < cells
        limit = tl.load(limits + neighbour * cells + start + cell, mask=inside, other=large)
        part = tl.load(product + (row * neighbours + tl.program_id(1)) * cells + start + cell, mask=inside, other=0.0)
        placed = _placed(tl.minimum(limit - part, large), (start + cell) // groups, bits)
        one = tl.min(placed, 0)
        two = tl.min(tl.where(placed == one[None, :], large, placed), 0)
        first, second = _nearer(first, second, one, two)
    target = (row * neighbours + tl.program_id(1)) * groups + group
    _write(first, second, target, group >= 0, bits, first_out, second_out, at_out)


@triton.jit
def _keys(values, at):
    """Return int64 that are in the order of float32 values, then of places."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | at.to(tl.int64)


@triton.jit
def _value(key):
    """Return the value of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["neighbours", "count"])
def _likeliest(
    first, second, at, lows_out, seconds_out, groups_out, cells_out, others_out,
    neighbours, count, groups: tl.constexpr, units: tl.constexpr, some: tl.constexpr, last: tl.constexpr,
):  # fmt: skip
    """Find the groups with the least bounds for one patch of one query, one after the other.

    Of each neighbour the least is known; when it was taken, the next one of that neighbour is looked for.
    """
    row = tl.program_id(0).to(tl.int64)
    unit, group, start = tl.arange(0, units), tl.arange(0, groups), row * neighbours * groups
    left = tl.full((units,), last, tl.int64)
    for begin in range(0, groups, some):
        place = unit[:, None] * groups + begin + tl.arange(0, some)[None, :]
        values = tl.load(first + start + place, mask=(unit < neighbours)[:, None], other=0.0)
        left = tl.minimum(left, tl.min(tl.where((unit < neighbours)[:, None], _keys(values, place), last), 1))
    for number in range(0, count):
        key = tl.min(left, 0)
        place = key & 0x7FFFFFFF
        neighbour = place // groups
        target, source = row * count + number, start + place
        tl.store(lows_out + target, _value(key))
        tl.store(seconds_out + target, tl.load(second + source))
        tl.store(groups_out + target, place)
        tl.store(cells_out + target, tl.load(at + source).to(tl.int64) * groups + place % groups)
        those = neighbour * groups + group
        keys = _keys(tl.load(first + start + those), those)
        left = tl.where(unit == neighbour, tl.min(tl.where(keys > key, keys, last), 0), left)
    key = tl.min(left, 0)
    tl.store(others_out + row, tl.where(key == last, float("inf"), _value(key)))


def likeliest(found: Least, count: int) -> Likeliest:
    """Return so many groups with the least bounds; see tiles.likeliest."""
    b, q, n, groups = found.first.shape
    lows = torch.empty(b, q, count, dtype=torch.float32, device=found.first.device)
    both = torch.empty(2, b, q, count, dtype=torch.int64, device=lows.device)
    result = Likeliest(lows, torch.empty_like(lows), both[0], both[1], torch.empty_like(lows[..., 0]))
    units = max(32, 1 << (n - 1).bit_length())
    _likeliest[(b * q,)](
        *(each.contiguous() for each in found), *result, n, count,
        groups=groups, units=units, some=8, last=2**63 - 1, num_warps=max(1, min(8, units // 64)),
    )  # fmt: skip
    return result


def _bits(theirs: torch.Tensor) -> int:
    """Return the bits that a place takes."""
    return max(1, (-(-theirs.shape[2] // GROUPS) - 1).bit_length())


def _outputs(own: torch.Tensor, theirs: torch.Tensor) -> Least:
    """Return room for results."""
    shape = own.shape[0], own.shape[1], theirs.shape[1], GROUPS
    first, second = (torch.empty(shape, dtype=torch.float32, device=own.device) for _ in range(2))
    return Least(first, second, torch.empty(shape, dtype=torch.int32, device=own.device))


@dataclass(frozen=True)
class Fused(Way):
    """Product and comparison in one kernel, with blocks of a size; which is fastest depends on the card.

    Attributes:
        lanes: patches of the query in a block.
        members: of each group in a block.
        channels: multiplied at a time.
        warps: threads of a program, in warps.
        stages: loads ahead of the products.
        by_blocks: whether blocks are copied whole, which a multiple of ALIGNED channels allows.
    """

    lanes: int
    members: int
    channels: int
    warps: int
    stages: int
    by_blocks: bool = False

    def __call__(
        self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None = None
    ) -> Least:
        """Find the least bounds of each group."""
        if _bits(theirs) > PLACES:
            return PLAIN(own, theirs, limits, window)
        found = _outputs(own, theirs)
        self._start(found, own, theirs, limits, window)
        return found

    def apart(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Apart:
        """Find the least bounds of each neighbour."""
        if _bits(theirs) > PLACES:
            return PLAIN.apart(own, theirs, limits)
        shape = own.shape[0], own.shape[1], theirs.shape[1]
        lows = torch.empty(*shape, OF_ONE, dtype=torch.float32, device=own.device)
        found = Apart(lows, torch.empty_like(lows[..., 0]), torch.empty_like(lows, dtype=torch.int32))
        self._start(found, own, theirs, limits)
        return found

    def _start(
        self,
        found: Least | Apart,
        own: torch.Tensor,
        theirs: torch.Tensor,
        limits: torch.Tensor,
        window: Window | None = None,
    ) -> None:
        """Start the kernel, which writes what it finds."""
        (b, q, channels), (_, n, cells, _) = own.shape, theirs.shape
        sides = [own.contiguous(), theirs.contiguous(), theirs.contiguous()]
        if self.by_blocks:
            if TensorDescriptor is None or channels % ALIGNED or theirs.numel() // channels >= 2**31:
                raise ValueError(f"blocks: expected Triton to copy them, and {ALIGNED} channels, found {channels}")
            blocks = self.lanes, self.members * GROUPS, GROUPS
            sides = [
                TensorDescriptor.from_tensor(side.view(-1, channels), [block, self.channels])
                for side, block in zip(sides, blocks, strict=True)
            ]
        _least[-(-q // self.lanes), n, b](
            *sides, limits.contiguous(), *found, q, cells, channels, n, _bits(theirs), *(window or (1, 0, 0)),
            groups=GROUPS, lanes=self.lanes, members=self.members, depth=self.channels, large=LARGE,
            by_blocks=self.by_blocks, is_apart=isinstance(found, Apart), is_window=window is not None,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip


@dataclass(frozen=True)
class Reduced(Way):
    """Products by torch, written to memory and compared by a kernel.

    Attributes:
        members: of each group compared at a time.
        warps: threads of a program, in warps.
    """

    members: int
    warps: int

    def __call__(
        self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None = None
    ) -> Least:
        """Find the least bounds of each group."""
        if window or _bits(theirs) > PLACES:
            return PLAIN(own, theirs, limits, window)
        return by_parts(self._part, own, theirs, limits)

    def _part(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Least:
        (b, q, _), (_, n, cells, _) = own.shape, theirs.shape
        found = _outputs(own, theirs)
        product = products(own, theirs.flatten(1, 2).mT)
        _reduce[q, n, b](
            product, limits.contiguous(), *found, q, cells, n, _bits(theirs),
            groups=GROUPS, members=self.members, large=LARGE, num_warps=self.warps,
        )  # fmt: skip
        return found


PLAIN = Plain()
WAYS = (
    Fused(128, 4, 64, 8, 4, by_blocks=True), Fused(64, 4, 64, 4, 2, by_blocks=True),
    Fused(128, 4, 64, 8, 3), Fused(64, 2, 64, 4, 3), Reduced(64, 4),
)  # fmt: skip
