"""Directions that rule most patches out, and how many of them pay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import ROUNDING
from .bounds_panels import LARGEST
from .bounds_simd import ROWS

COUNTS = 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128  # of directions that are tried
ROUNDS = 3  # of subspace iteration: any orthonormal directions serve, so these need not be the best
EXPLAINED = 0.9  # share of the variance that directions have to hold before it is known how far matches are

# Nanoseconds on one core with AVX2. Only their ratios matter.
MULTIPLY = 0.024  # per channel of a pair of patches, in float32
MULTIPLY_PAIRS = 0.0145  # as int16
PAIR = 0.08  # per pair, whatever it is
MEASURE = 30.0  # per patch that is measured
MEASURE_CHANNEL = 0.2  # and per channel of it


def measure_cost(channels: int) -> float:
    """Estimate the nanoseconds that it takes to measure a patch."""
    return MEASURE + MEASURE_CHANNEL * channels


@dataclass(frozen=True)
class Projection:
    """What patches are multiplied by: their coordinates in m directions and the length of the rest, or all channels.

    Let P have orthonormal rows, and r(x) = |x - P'Px|. Then <q, x> <= <Pq, Px> + r(q) r(x), so that half a squared
    distance without the query's own part, |x|^2 / 2 - <q, x>, is at least |x|^2 / 2 - <Pq, Px> - r(q) r(x).
    """

    channels: int
    directions: torch.Tensor | None  # (m, c) float32, orthonormal rows; None: all channels count
    is_paired: bool  # whether products are of int16

    @property
    def is_plain(self) -> bool:
        """Whether products are of all channels in float32: what rounding leaves open is least."""
        return self.directions is None and not self.is_paired

    @property
    def width(self) -> int:
        """Numbers that a patch becomes."""
        return self.channels if self.directions is None else len(self.directions) + 1

    @property
    def rows(self) -> int:
        """Rows of directions in blocks."""
        return 0 if self.directions is None else -(-len(self.directions) // ROWS) * ROWS

    @cached_property
    def blocks(self) -> NDArray[np.float32]:
        """The directions as load_level takes them, (blocks, c, ROWS), the last block padded."""
        assert self.directions is not None
        padded = np.zeros((self.rows, self.channels), np.float32)
        padded[: len(self.directions)] = self.directions.numpy()
        return np.ascontiguousarray(padded.reshape(-1, ROWS, self.channels).transpose(0, 2, 1))

    @property
    def doubt(self) -> float:
        """What half a squared distance can be off by in float32, relative to the square of the sum of both norms.

        ROUNDING times the root of c bounds the error of one sum of c products. With directions, each of m coordinates
        has such an error; the lengths of the rests are raised by it in `joined`, so that they are never too short.
        """
        own: float = ROUNDING * self.channels**0.5 / 2
        return own if self.directions is None else 4 * own * float(len(self.directions) ** 0.5)

    @property
    def coarseness(self) -> float:
        """What it can be off by more, relative to the product of the largest norms.

        A coordinate as int16 is off by half of a step at most, of which the largest norm has LARGEST.
        """
        return 1.05 * float(self.width**0.5) / LARGEST if self.is_paired else 0.0

    def along(self, patches: torch.Tensor, part: slice) -> torch.Tensor:
        """Project some channels of patches (s, c, n); returns (s, m, n), or the patches."""
        return patches if self.directions is None else torch.matmul(self.directions[:, part], patches)

    def joined(self, parts: list[torch.Tensor], sq_norms: torch.Tensor) -> torch.Tensor:
        """Join the projections of all channels, of patches with squared norms (s, 1, n); returns (s, width, n)."""
        if self.directions is None:
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        along = parts[0]
        for part in parts[1:]:
            along = along + part
        rest = (sq_norms - along.square().sum(dim=1, keepdim=True)).clamp_(min=0)
        return torch.cat([along, rest.add_(sq_norms, alpha=2 * self.doubt).sqrt_()], dim=1)


def provisional(sample: torch.Tensor, directions: torch.Tensor) -> Projection:
    """Choose how many of some directions to take while nothing has been found.

    Args:
        sample: (c, s) patches of the gallery.
        directions: (m, c), principal; none: nothing is known.
    """
    channels = len(sample)
    shares = (directions @ sample).square().sum(dim=1).cumsum(0) / sample.square().sum().clamp(min=1e-30)
    for number in COUNTS:
        if number <= len(directions) and number + 1 < channels and shares[number - 1] >= EXPLAINED:
            return Projection(channels, directions[:number].contiguous(), True)
    return Projection(channels, None, len(directions) > 0)


def fitted(
    sample: torch.Tensor, directions: torch.Tensor, query: torch.Tensor, reach: torch.Tensor, patches: int
) -> tuple[Projection, float]:
    """Take as many directions as cost least by what they leave of a sample to be measured.

    Args:
        sample: (c, s) patches of the gallery.
        directions: (m, c), principal.
        query: (c, t) patches of the query.
        reach: (t,) squared distances within which patches count.
        patches: of the query, that each of the gallery's is compared with.

    Returns:
        the projection, and nanoseconds a pair.
    """
    channels, count = sample.shape
    plain = Projection(channels, None, False)
    if not len(directions) or not all(bool(side.isfinite().all()) for side in (sample, query, reach)):
        return plain, float("inf")
    mine, theirs = directions @ query, directions @ sample
    own, others = query.square().sum(dim=0)[:, None], sample.square().sum(dim=0)
    longest = float(own.amax().sqrt() * others.amax().sqrt())

    def cost(bounds: torch.Tensor, tried: Projection, projecting: float) -> float:
        left = float((bounds <= reach[:, None] + 2 * tried.coarseness * longest).float().mean())
        multiply = MULTIPLY_PAIRS if tried.is_paired else MULTIPLY
        return PAIR + tried.width * multiply + left * measure_cost(channels) + projecting

    chosen, along, start = plain, torch.zeros(len(reach), count), 0
    exact = torch.cdist(query.T, sample.T).square_()
    best = cost(exact, plain, 0)
    everything = Projection(channels, None, True)
    if (paired := cost(exact, everything, 0)) < best:
        best, chosen = paired, everything
    for number in COUNTS:
        if number > len(directions) or number + 1 >= channels:
            break
        part = slice(start, number)
        own = (own - mine[part].square().sum(dim=0)[:, None]).clamp_(min=0)
        others = (others - theirs[part].square().sum(dim=0)).clamp_(min=0)
        along = along + torch.cdist(mine[part].T, theirs[part].T).square_()
        tried = Projection(channels, directions[:number].contiguous(), True)
        here = cost(along + (own.sqrt() - others.sqrt()).square_(), tried, number * channels * MULTIPLY / patches)
        if here < best:
            best, chosen = here, tried
        start = number
    return chosen, best


def principal(sample: torch.Tensor) -> torch.Tensor:
    """Return about the first principal directions of patches (c, s), (m, c), the most telling first; none of NaN."""
    channels, count = len(sample), min(COUNTS[-1], *sample.shape)
    if not bool(sample.square().sum().isfinite()):
        return torch.empty(0, channels)
    if channels <= 2 * count:
        basis = torch.eye(channels, dtype=torch.float64)
        small = sample.double()
    else:
        draw = torch.randn(channels, count, generator=torch.Generator().manual_seed(0))
        for _ in range(ROUNDS):
            draw = torch.linalg.qr(sample @ (sample.T @ draw)).Q
        basis = torch.linalg.qr(draw.double()).Q
        small = basis.T @ sample.double()
    _, vectors = torch.linalg.eigh(small @ small.T)  # ascending
    found: torch.Tensor = (basis @ vectors.flip(1)[:, :count]).T.float().contiguous()
    return found
