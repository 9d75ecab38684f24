"""Directions that rule most patches out, and how many of them pay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arrays import ROUNDING

COUNTS = 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128  # of directions that are tried
ROUNDS = 3  # of subspace iteration: any orthonormal directions serve, so these need not be the best

# Nanoseconds on one core with AVX2 at 40 multiplications each. Only their ratios matter.
MULTIPLY = 0.025  # per channel of a pair of patches
MEASURE = 50.0  # per patch that is measured
MEASURE_CHANNEL = 0.3  # and per channel of it
GAIN = 0.8  # directions are taken if they cost less than this share of all channels


@dataclass(frozen=True)
class Projection:
    """What patches are multiplied by: their coordinates in m directions and the length of the rest, or all channels.

    Let P have orthonormal rows, and r(x) = |x - P'Px|. Then <q, x> <= <Pq, Px> + r(q) r(x), so that half a squared
    distance without the query's own part, |x|^2 / 2 - <q, x>, is at least |x|^2 / 2 - <Pq, Px> - r(q) r(x).
    """

    channels: int
    directions: torch.Tensor | None  # (m, c) float32, orthonormal rows; None: all channels count

    @property
    def width(self) -> int:
        """Numbers that a patch becomes."""
        return self.channels if self.directions is None else len(self.directions) + 1

    @property
    def doubt(self) -> float:
        """What half a squared distance can be off by, relative to the square of the sum of both norms.

        ROUNDING times the root of c bounds the error of one sum of c products. With directions, each of m coordinates
        has such an error; the lengths of the rests are raised by it in `of`, so that they are never too short.
        """
        own: float = ROUNDING * self.channels**0.5 / 2
        return own if self.directions is None else 4 * own * float(len(self.directions) ** 0.5)

    def of(self, patches: torch.Tensor, sq_norms: torch.Tensor) -> torch.Tensor:
        """Project patches (s, c, n) with squared norms (s, 1, n); returns (s, m + 1, n), or the patches."""
        if self.directions is None:
            return patches
        along = torch.matmul(self.directions, patches)
        rest = (sq_norms - along.square().sum(dim=1, keepdim=True)).clamp_(min=0)
        return torch.cat([along, rest.add_(sq_norms, alpha=2 * self.doubt).sqrt_()], dim=1)


def fitted(sample: torch.Tensor, query: torch.Tensor, reach: torch.Tensor, patches: int) -> Projection:
    """Fit directions to a sample, and take as many as cost least by what they leave of it to be measured.

    Args:
        sample: (c, s) patches of the gallery.
        query: (c, t) patches of the query.
        reach: (t,) squared distances within which patches count.
        patches: of the query, that each of the gallery's is compared with.
    """
    channels, count = sample.shape
    everything = Projection(channels, None)
    most = [number for number in COUNTS if number + 1 < GAIN * channels]
    if not most or not all(bool(side.isfinite().all()) for side in (sample, query, reach)):
        return everything
    directions = _principal(sample, min(most[-1], count))
    mine, theirs = directions @ query, directions @ sample
    own, others = query.square().sum(dim=0)[:, None], sample.square().sum(dim=0)
    best, chosen, along, start = GAIN * channels * MULTIPLY, everything, torch.zeros(len(reach), count), 0
    for number in most:
        part = slice(start, number)
        own = (own - mine[part].square().sum(dim=0)[:, None]).clamp_(min=0)
        others = (others - theirs[part].square().sum(dim=0)).clamp_(min=0)
        along = along + torch.cdist(mine[part].T, theirs[part].T).square_()
        left = float((along + (own.sqrt() - others.sqrt()).square_() <= reach[:, None]).float().mean())
        cost = (number + 1) * MULTIPLY + left * (MEASURE + MEASURE_CHANNEL * channels)
        cost += number * channels * MULTIPLY / patches  # to project
        if cost < best:
            best, chosen = cost, Projection(channels, directions[:number].contiguous())
        start = number
    return chosen


def _principal(sample: torch.Tensor, count: int) -> torch.Tensor:
    """Return about the first principal directions of patches (c, s), (count, c), the most telling first."""
    channels = len(sample)
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
    principal: torch.Tensor = (basis @ vectors.flip(1)[:, :count]).T.float().contiguous()
    return principal
