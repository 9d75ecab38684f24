"""The least bound of each group of patches by kernels in Triton: what plain torch writes to memory stays on the chip.

`Fused` multiplies and compares: a program takes some patches of the query and one neighbour, a few patches of each
group at a time; after each product, the least bound and the second least of each group are updated in registers.
`Reduced` leaves the product to torch's own library, which writes it, and reads it once.

The place of the least bound lies in its lowest bits, which spares registers. What that takes from a bound is taken off
in the end, so that a bound stays one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .tiles_torch import GROUPS, Least, by_parts, least_plain, products

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


@triton.jit(do_not_specialize=["patches", "cells", "neighbours", "bits"])
def _least(
    own, theirs, limits,
    first_out, second_out, at_out,
    patches, cells, channels, neighbours, bits,
    groups: tl.constexpr, lanes: tl.constexpr, members: tl.constexpr, depth: tl.constexpr, large: tl.constexpr,
):  # fmt: skip
    """Find the least of all groups of one neighbour for a block of patches of one query."""
    query = tl.program_id(2)
    neighbour = (query * neighbours + tl.program_id(1)).to(tl.int64)
    rows, columns, channel = (
        tl.program_id(0) * lanes + tl.arange(0, lanes), tl.arange(0, members * groups), tl.arange(0, depth)
    )  # fmt: skip
    # Patches beyond the last repeat it. Those of the query are not written, those of the neighbour are never near.
    mine = own + (query.to(tl.int64) * patches + tl.minimum(rows, patches - 1))[:, None] * channels + channel[None, :]
    yours = theirs + neighbour * cells * channels
    first = tl.full((lanes, groups), large, tl.float32)
    second = tl.full((lanes, groups), large, tl.float32)
    for start in range(0, cells, members * groups):
        cell = start + columns
        other = yours + tl.minimum(cell, cells - 1)[None, :] * channels + channel[:, None]
        products = tl.full((lanes, members * groups), 0.0, tl.float32)
        for done in range(0, channels, depth):
            left = channels - done
            a = tl.load(mine + done, mask=channel[None, :] < left, other=0.0)
            b = tl.load(other + done, mask=channel[:, None] < left, other=0.0)
            products = tl.dot(a, b, products)
        limit = tl.load(limits + neighbour * cells + cell, mask=cell < cells, other=large)
        bounds = tl.minimum(limit[None, :] - products, large)
        placed = tl.reshape(_placed(bounds, (cell // groups)[None, :], bits), (lanes, members, groups))
        one = tl.min(placed, 1)
        two = tl.min(tl.where(placed == one[:, None, :], large, placed), 1)  # places make them all unlike
        first, second = _nearer(first, second, one, two)
    target = ((query.to(tl.int64) * patches + rows)[:, None] * neighbours + tl.program_id(1)) * groups
    _write(first, second, target + tl.arange(0, groups)[None, :], (rows < patches)[:, None], bits,
           first_out, second_out, at_out)  # fmt: skip


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


def _outputs(own: torch.Tensor, theirs: torch.Tensor) -> tuple[Least, int]:
    """Return room for results, and the bits that a place takes."""
    shape = own.shape[0], own.shape[1], theirs.shape[1], GROUPS
    first, second = (torch.empty(shape, dtype=torch.float32, device=own.device) for _ in range(2))
    bits = max(1, (-(-theirs.shape[2] // GROUPS) - 1).bit_length())
    return Least(first, second, torch.empty(shape, dtype=torch.int32, device=own.device)), bits


@dataclass(frozen=True)
class Fused:
    """Product and comparison in one kernel, with blocks of a size; which is fastest depends on the card.

    Attributes:
        lanes: patches of the query of a program.
        members: of each group multiplied at a time.
        channels: multiplied at a time.
        warps: threads of a program, in warps.
        stages: loads ahead of the products.
    """

    lanes: int
    members: int
    channels: int
    warps: int
    stages: int

    def __call__(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Least:
        """Do as tiles.least."""
        (b, q, channels), (_, n, cells, _) = own.shape, theirs.shape
        found, bits = _outputs(own, theirs)
        if bits > PLACES:
            return least_plain(own, theirs, limits)
        _least[-(-q // self.lanes), n, b](
            own.contiguous(), theirs.contiguous(), limits.contiguous(), *found, q, cells, channels, n, bits,
            groups=GROUPS, lanes=self.lanes, members=self.members, depth=self.channels, large=LARGE,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class Reduced:
    """Products by torch, written to memory and compared by a kernel.

    Attributes:
        members: of each group compared at a time.
        warps: threads of a program, in warps.
    """

    members: int
    warps: int

    def __call__(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Least:
        """Do as tiles.least."""
        return by_parts(self._part, own, theirs, limits)

    def _part(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Least:
        (b, q, _), (_, n, cells, _) = own.shape, theirs.shape
        found, bits = _outputs(own, theirs)
        if bits > PLACES:
            return least_plain(own, theirs, limits)
        product = products(own, theirs.flatten(1, 2).mT)
        _reduce[q, n, b](
            product, limits.contiguous(), *found, q, cells, n, bits,
            groups=GROUPS, members=self.members, large=LARGE, num_warps=self.warps,
        )  # fmt: skip
        return found


WAYS = Fused(128, 4, 64, 8, 3), Fused(64, 4, 64, 4, 2), Reduced(64, 4)  # the second takes half the shared memory
