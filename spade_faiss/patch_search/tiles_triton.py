"""The least bound of each group of patches by one kernel in Triton: products stay on the chip.

A program takes some patches of the query and all groups of one neighbour, patch by patch of each group: after each
product, the least bound, its place and the second least are updated in registers. Only these are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .tiles_torch import GROUPS, Least


@triton.jit  # type: ignore[untyped-decorator]
def _least(
    own: Any, theirs: Any, limits: Any, first_out: Any, second_out: Any, at_out: Any,
    patches: Any, cells: Any, channels: Any, neighbours: Any,
    lane_block: tl.constexpr, group_block: tl.constexpr, channel_block: tl.constexpr,
) -> None:  # fmt: skip
    """Find the least of all groups of one neighbour for a block of patches of one query; see tiles_torch.least."""
    query = tl.program_id(2)
    neighbour = query * neighbours + tl.program_id(1)
    lanes = tl.program_id(0) * lane_block + tl.arange(0, lane_block)
    groups, depth = tl.arange(0, group_block), tl.arange(0, channel_block)
    # Patches beyond the last repeat it, and are not written.
    mine = own + (query.to(tl.int64) * patches + tl.minimum(lanes, patches - 1))[:, None] * channels + depth[None, :]
    yours = theirs + neighbour.to(tl.int64) * cells * channels
    first = tl.full((lane_block, group_block), float("inf"), tl.float32)
    second = tl.full((lane_block, group_block), float("inf"), tl.float32)
    at = tl.full((lane_block, group_block), 0, tl.int32)
    for member in range(cells // group_block):
        other = yours + (member * group_block + groups)[None, :] * channels + depth[:, None]
        products = tl.full((lane_block, group_block), 0.0, tl.float32)
        for start in range(0, channels, channel_block):
            left = channels - start
            a = tl.load(mine + start, mask=depth[None, :] < left, other=0.0)
            b = tl.load(other + start, mask=depth[:, None] < left, other=0.0)
            products = tl.dot(a, b, products)
        bounds = tl.load(limits + neighbour.to(tl.int64) * cells + member * group_block + groups)[None, :] - products
        less = bounds < first
        second = tl.where(less, first, tl.minimum(second, bounds))
        at = tl.where(less, member, at)
        first = tl.where(less, bounds, first)
    target = ((query.to(tl.int64) * patches + lanes)[:, None] * neighbours + tl.program_id(1)) * group_block + groups[
        None, :
    ]
    inside = (lanes < patches)[:, None]
    tl.store(first_out + target, first, mask=inside)
    tl.store(second_out + target, second, mask=inside)
    tl.store(at_out + target, at, mask=inside)


@dataclass(frozen=True)
class Fused:
    """The kernel with blocks of a size; which is fastest depends on the card.

    Attributes:
        lanes: patches of the query of a program.
        channels: multiplied at a time.
        warps: threads of a program, in warps.
        stages: loads ahead of the products.
    """

    lanes: int
    channels: int
    warps: int
    stages: int

    def __call__(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Least:
        """Do as tiles.least, for whole groups."""
        (b, q, channels), (_, n, cells, _) = own.shape, theirs.shape
        shape = b, q, n, GROUPS
        first, second = (torch.empty(shape, dtype=torch.float32, device=own.device) for _ in range(2))
        at = torch.empty(shape, dtype=torch.int32, device=own.device)
        _least[-(-q // self.lanes), n, b](
            own.contiguous(), theirs.contiguous(), limits.contiguous(), first, second, at, q, cells, channels, n,
            lane_block=self.lanes, group_block=GROUPS, channel_block=self.channels,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip
        return Least(first, second, at)


SIZES = Fused(128, 64, 8, 3), Fused(128, 128, 8, 2), Fused(64, 64, 4, 4)
