"""Products of patches by tiles on a torch device, and the least of each: what a GPU is fast at.

Operands are float16, which the matrix units multiply as fast as bfloat16 and which rounds eight times less. Products
are summed in float32. What rounding does is measured (`Operand.doubts`), so that a product bounds a distance, and the
distances that decide are measured in float32.

The patches of a neighbour are dealt out to GROUPS groups, one after the other, so that those that lie beside each other
in the image, and are alike, come into different groups. Of each group the least bound, its patch and the second least
bound are kept: no pair of patches is ever written to memory by the fused kernel (`tiles_triton`), and each once by
plain torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ...errors import first_line
from ..pyramid.plan import BFLOAT16

GROUPS = 64  # of the patches of a neighbour
ALIGNED = 8  # channels: lines of blocks that a kernel copies whole begin at multiples of 16 bytes
OF_ONE = 2  # candidates of each neighbour, where matches are distinct
LARGEST = 65504.0  # the largest float16
TYPICAL = 2.0**-12  # share of a patch's length lost to float16; bounds hold for any value here
SLACK = 1.02  # for the rounding of the bounds themselves
PAIRS = 2**27  # whose products are written to memory at a time: 512 MiB


class Least(NamedTuple):
    """Of each group of gallery patches the least bounds: (b, q, n, GROUPS) for b queries, q patches, n neighbours."""

    first: torch.Tensor  # float32, the least
    second: torch.Tensor  # float32, the second least
    at: torch.Tensor  # int32, where in its group the least is: the patch of the neighbour is at * GROUPS + group


class Apart(NamedTuple):
    """Of each neighbour the least bounds of two groups, and of what is left: for b queries, q patches, n neighbours."""

    lows: torch.Tensor  # (b, q, n, OF_ONE) float32, ascending
    rest: torch.Tensor  # (b, q, n) float32, the least of all others
    cells: torch.Tensor  # (b, q, n, OF_ONE) int32, patches of the neighbour; beyond its last: none


class Likeliest(NamedTuple):
    """The groups with the least bounds, the least first: for b queries, q patches, u groups.

    Attributes:
        lows: (b, q, u) float32.
        seconds: (b, q, u) float32, the second least bounds of these groups.
        groups: (b, q, u) int64, their numbers, counted through the neighbours.
        cells: (b, q, u) int64, the patch of the neighbour; beyond its last: none.
        others: (b, q) float32, the least bound of the other groups.
    """

    lows: torch.Tensor
    seconds: torch.Tensor
    groups: torch.Tensor
    cells: torch.Tensor
    others: torch.Tensor


def likeliest_plain(found: Least, count: int) -> Likeliest:
    """Return the likeliest of some groups by what torch has; see tiles.likeliest."""
    lows, seconds, at = (each.flatten(2) for each in found)
    lows, groups = lows.topk(count + (count < lows.shape[2]), largest=False)
    others = lows[..., count] if lows.shape[2] > count else torch.full_like(lows[..., 0], torch.inf)
    lows, groups = lows[..., :count], groups[..., :count]
    cells = at.gather(2, groups).long() * GROUPS + groups % GROUPS
    return Likeliest(lows, seconds.gather(2, groups), groups, cells, others)


class Window(NamedTuple):
    """What may be compared: patches of a grid that both sides have, near each other's position."""

    across: int  # columns of the grid
    rows: int  # on either side
    columns: int

    def has(self, lanes: Any, cells: Any) -> Any:
        """Return which pairs of patches are compared, by their numbers: arrays, or tensors."""
        down = abs(lanes // self.across - cells // self.across)
        return (down <= self.rows) & (abs(lanes % self.across - cells % self.across) <= self.columns)


class Way(ABC):
    """A way to compare patches: see tiles.least and tiles.apart for what it takes."""

    @abstractmethod
    def __call__(
        self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None = None
    ) -> Least:
        """Find the least bounds of each group."""

    def apart(self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor) -> Apart:
        """Find the least bounds of each neighbour."""
        return apart(self(own, theirs, limits))


@dataclass(frozen=True)
class Plain(Way):
    """What torch has: every bound is written to memory once."""

    def __call__(
        self, own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None = None
    ) -> Least:
        """Find the least bounds of each group."""
        spare = padded_cells(theirs.shape[2]) - theirs.shape[2]
        if spare:
            theirs, limits = F.pad(theirs, (0, 0, 0, spare)), F.pad(limits, (0, spare), value=torch.inf)
        return by_parts(partial(_least_plain, window=window), own, theirs, limits)


@dataclass(frozen=True)
class Operand:
    """Patches as one side of a product. A distance, squared and halved, is |a|^2 / 2 + |b|^2 / 2 - <a, b>.

    The product of the operands is off by at most the sum of the doubts of both sides.
    """

    values: torch.Tensor  # (..., n, c) float16
    halves: torch.Tensor  # (..., n) float32, half the squared norms
    doubts: torch.Tensor  # (..., n) float32

    @classmethod
    def of(cls, patches: torch.Tensor, squares: torch.Tensor, margin: float) -> Operand:
        """Round patches to float16.

        Let a' be a after rounding. Then |<a, b> - <a', b'>| <= |a - a'| |b| + |a'| |b - b'|, and 2 x y <= x^2 / t +
        t y^2 splits each product into a part of a and a part of b.

        Args:
            patches: (..., n, c) float32, near scale_of.
            squares: (..., n) float32, at least their squared norms; see Upsampler.squares.
            margin: what sums and interpolation may add to the error, as a share of the squares; see `margin`.
        """
        values = patches.clamp(-LARGEST, LARGEST).half()  # what is larger is all doubt
        residuals = (patches - values).square().sum(-1)
        return cls.rounded(values, patches.square().sum(-1), residuals, squares, margin)

    @classmethod
    def rounded(
        cls, values: torch.Tensor, norms: torch.Tensor, residuals: torch.Tensor, squares: torch.Tensor, margin: float
    ) -> Operand:
        """Make an operand of rounded patches (..., n, c), their squared norms and those of what was lost, (..., n)."""
        doubts = SLACK / 2 * (residuals / TYPICAL + TYPICAL * squares) + margin * squares
        return cls(values, norms / 2, doubts)


def margin(channels: int, side: int) -> float:
    """Return what sums of so many channels may be off by, for each side, as a share of its squares.

    A matrix unit cuts its sums off to 24 bits: at most 2^-22 of |a| |b| for each summand. Interpolation on a grid of
    some side adds its own weights' rounding, and norms a few roundings more.
    """
    result = (channels + 4 * side + 64) * 2.0**-23
    if torch.get_float32_matmul_precision() != "highest":  # torch may then multiply float32 as bfloat16
        result += 1.02 * BFLOAT16
    return result


def scale_of(*sides: torch.Tensor) -> torch.Tensor:
    """Return a power of two that brings the largest value near 64, as a () float32 tensor on the sides' device."""
    return power_of(torch.stack([side.abs().amax() for side in sides]).amax())


def power_of(size: torch.Tensor) -> torch.Tensor:
    """Return scale_of values whose largest is a () tensor; if it is not finite, NaN, which spoils all that it meets."""
    exponent = torch.frexp(size).exponent.clamp(-90, 90)
    power = (127 + 6 - exponent.to(torch.int32)) << 23  # the bits of 2 ** (6 - exponent)
    return torch.where(size > 0, power.view(torch.float32), 1.0) + size * 0


def slow(error: Exception) -> str:
    """Say in one line that kernels did not compile."""
    return f"kernels for the GPU did not compile, and plain torch serves, which is slower: {first_line(error)}"


def padded_cells(cells: int) -> int:
    """Return how many columns the cells of a neighbour take: whole groups."""
    return -(-cells // GROUPS) * GROUPS


def by_parts(
    way: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Least],
    own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor,
) -> Least:  # fmt: skip
    """Compare with so many neighbours at a time that their products fit."""
    n, step = theirs.shape[1], max(1, PAIRS // (own.shape[0] * own.shape[1] * theirs.shape[2]))
    if n <= step:
        return way(own, theirs, limits)
    parts = [way(own, theirs[:, at : at + step], limits[:, at : at + step]) for at in range(0, n, step)]
    return Least(*(torch.cat(each, dim=2) for each in zip(*parts, strict=True)))


def apart(found: Least) -> Apart:
    """Return of each neighbour what Apart has, by the least of its groups."""
    lows, groups = found.first.topk(OF_ONE + 1, largest=False)
    groups = groups[..., :OF_ONE]
    rest = torch.minimum(found.second.amin(-1), lows[..., -1])
    return Apart(lows[..., :OF_ONE], rest, (found.at.gather(-1, groups) * GROUPS + groups).to(torch.int32))


def _least_plain(own: torch.Tensor, theirs: torch.Tensor, limits: torch.Tensor, window: Window | None) -> Least:
    """Do as Plain, for whole groups."""
    (b, q, c), (_, n, cells, _) = own.shape, theirs.shape
    bounds = products(own, theirs.reshape(b, n * cells, c).mT).view(b, q, n, cells)
    torch.sub(limits[:, None], bounds, out=bounds)
    if window:
        lanes, patches = (torch.arange(size, device=own.device) for size in (q, cells))
        bounds.masked_fill_(~window.has(lanes[:, None, None], patches), torch.inf)
    bounds = bounds.view(b, q, n, -1, GROUPS)
    first, at = bounds.min(dim=3)
    bounds.scatter_(3, at[:, :, :, None], torch.inf)
    return Least(first, bounds.amin(dim=3), at.to(torch.int32))


def products(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Multiply float16 (b, q, c) and (b, c, m), summed in float32 and kept so."""
    if own.device.type == "cuda" and _sums_wide(own.device):
        return torch.bmm(own, theirs, out_dtype=torch.float32)
    return torch.bmm(own.float(), theirs.float())  # neither float32 nor TF32 rounds what is float16 already


@lru_cache(maxsize=8)
def _sums_wide(device: torch.device) -> bool:
    """Return whether torch gives float32 products of float16: since 2.8, on most devices."""
    one = torch.ones(1, 8, 8, dtype=torch.float16, device=device)
    try:
        torch.bmm(one, one, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True
