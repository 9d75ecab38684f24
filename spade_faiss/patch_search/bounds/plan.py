"""Directions that rule most patches out, and how many of them pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from ...arrays import ROUNDING
from .panels import LARGEST, STEPS
from .products import rows_beside
from .products_bytes import HAS_BYTES, OWN_STEPS
from .products_tiles import STEP, TILE_ROWS, has_tiles, lined_up
from .simd import BYTES, CHANNELS, HAS_QUADS, PAIRS, QUADS, ROWS, SINGLE, TILES

# Of directions that are tried: whole blocks of ROWS, and as many as steps of tiles hold beside what else is in them.
COUNTS = 6, 12, 18, 24, 30, 36, 48, 66
TILE_COUNTS = 27, 59, 91
LEFT_OUT = 0.25  # of the variance that directions leave, at most: as much lies in channels that are not projected
FEWER = 8  # times: patches of a part of the sample
TELLING = 0.85  # share of a squared distance that shows that a patch is too far
PARTS = 5  # of the neighbours, with directions of their own number
SPARE = 22  # more, that the subspace is found with
EXPLAINED = 0.9  # share of the variance that directions have to hold before it is known how far matches are

Blocks = tuple[NDArray[np.float32], NDArray[np.uint32], NDArray[np.bool_]]  # see Projection.blocks
NO_PAIRS = np.empty((0, 0, TILE_ROWS, CHANNELS // 2), np.uint32)
NO_SINGLES = np.empty((0, 0, CHANNELS, ROWS), np.float32)

# Nanoseconds on one core with AVX2. Only their ratios matter.
MULTIPLY = 0.024  # per channel of a pair of patches, in float32
MULTIPLY_PAIRS = 0.0145  # as int16
MULTIPLY_QUADS = 0.00725  # as int8
MULTIPLY_BYTES = 0.0066  # with sums of int16
MULTIPLY_TILES = 0.065  # per STEP words of a pair, as bfloat16
MULTIPLY_TILES_FAR = 0.25  # and for each beyond NEAR_STEPS, as the nearest cache holds no more
NEAR_STEPS = 8
PAIR_TILES = 0.14  # and whatever its words are: tiles go by way of memory
PAIR_QUADS = 0.05  # and whatever its words are: each sum is scaled
PAIR_BYTES = 0.09  # in place of PAIR: as integers, sums are compared with limits at once
BESIDE_QUADS = 4.0  # times as long to measure a patch, beside products of a processor that has them
BESIDE_TILES = 2.0  # times as long to measure a patch, where they are: the rest of such a processor is no faster
PROJECT = 0.03  # per channel and direction of a patch
PROJECT_TILES = 0.004  # by tiles
ROUNDED = 2.0**-8 * 0.7  # of the product of two patches' norms: what rounding to bfloat16 leaves open, usually
PAIR = 0.08  # per pair, whatever it is
MEASURE = 30.0  # per patch that is measured
MEASURE_CHANNEL = 0.07  # and per channel of it that has to be looked at


def measure_cost(spreads: NDArray[np.float64], channels: NDArray[np.int64]) -> float:
    """Estimate the nanoseconds that it takes to measure a patch: until parts of its channels rule it out.

    Args:
        spreads: how much patches differ in each part, the most first.
        channels: number of channels of each part.
    """
    needed = int(np.searchsorted(np.cumsum(spreads), TELLING * spreads.sum())) + 1
    return MEASURE + MEASURE_CHANNEL * float(channels[:needed].sum())


def parts_of(channels: Sequence[int]) -> list[tuple[int, int]]:
    """Cut the channels of levels, side by side, into parts of at most CHANNELS of one level: first and number."""
    parts, start = [], 0
    for number in channels:
        parts += [(start + at, min(CHANNELS, number - at)) for at in range(0, number, CHANNELS)]
        start += number
    return parts


@dataclass(frozen=True)
class Projection:
    """What patches are multiplied by: their coordinates in m directions and the length of the rest, or all channels.

    Let P have orthonormal rows, and r(x) = |x - P'Px|. Then <q, x> <= <Pq, Px> + r(q) r(x), so that half a squared
    distance without the query's own part, |x|^2 / 2 - <q, x>, is at least |x|^2 / 2 - <Pq, Px> - r(q) r(x).
    """

    channels: int
    directions: torch.Tensor | None  # (m, c) float32, orthonormal rows; None: all channels count
    kind: int  # of the products: SINGLE, PAIRS, TILES, QUADS or BYTES
    axes: torch.Tensor | None = None  # (AXES, c), orthonormal rows that tell most, if patches are sorted by these
    _blocks: dict[tuple[object, ...], Blocks] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_plain(self) -> bool:
        """Whether products are of all channels in float32: what rounding leaves open is least."""
        return self.directions is None and self.kind == SINGLE

    @property
    def width(self) -> int:
        """Numbers that a patch becomes."""
        return self.channels if self.directions is None else len(self.directions) + 1

    @property
    def words(self) -> int:
        """Words of four bytes that these become in a panel."""
        pairs = -(-self.width // 2)
        tiles = -(-(pairs + 2) // STEP) * STEP
        quads = -(-self.width // 4)
        return {SINGLE: self.width, PAIRS: pairs, TILES: tiles, QUADS: quads, BYTES: quads}[self.kind]

    @property
    def panel_words(self) -> int:
        """Words of a patch in a panel: half its squared norm is one more, but for tiles, which hold it in theirs."""
        return self.words + int(rows_beside(self.kind))

    @property
    def cost(self) -> float:
        """Nanoseconds that the product of a pair of patches takes."""
        if self.kind == TILES:
            steps = self.words // STEP
            far = max(0, steps - NEAR_STEPS)
            return PAIR + PAIR_TILES + steps * MULTIPLY_TILES + far * MULTIPLY_TILES_FAR
        if self.kind == QUADS:
            return PAIR + PAIR_QUADS + self.width * MULTIPLY_QUADS
        if self.kind == BYTES:
            return PAIR_BYTES + self.width * MULTIPLY_BYTES
        return PAIR + self.width * (MULTIPLY if self.kind == SINGLE else MULTIPLY_PAIRS)

    @cached_property
    def used(self) -> torch.Tensor:
        """The directions (m, c) as they are used: for tiles, in bfloat16, and so that they still make no patch longer.

        They need not be orthonormal, see `trimmed`.
        """
        if self.directions is None or self.kind != TILES:
            return torch.empty(0, self.channels) if self.directions is None else self.directions
        found, shorter = self.directions, 1.0
        while len(found):
            found = (self.directions * shorter).bfloat16().float()
            longest = float(torch.linalg.matrix_norm(found.double(), 2))
            if not longest > 1:
                break
            shorter *= (1 - 2.0**-16) / longest
        return found

    @property
    def rows(self) -> int:
        """Rows of directions in blocks."""
        return self._rows(self.kind == TILES)

    def _rows(self, in_tiles: bool) -> int:
        if self.directions is None:
            return 0
        block = TILE_ROWS if in_tiles else ROWS
        return -(-len(self.directions) // block) * block

    def blocks(self, parts: Sequence[tuple[int, int]], precise: bool = False) -> Blocks:
        """Return the directions as load_patches takes them, for some parts of the channels, first and number.

        Args:
            parts: of the channels.
            precise: not for tiles, though their products are on them: nothing is rounded before it is projected.

        Returns:
            (parts, blocks, CHANNELS, ROWS) float32, padded; for tiles (parts, blocks, TILE_ROWS, CHANNELS / 2) words of
            two bfloat16; and for which parts they are not 0. One of the first two is empty.
        """
        if self.directions is None:
            return NO_SINGLES, NO_PAIRS, np.zeros(len(parts), np.bool_)
        in_tiles = self.kind == TILES and not precise
        key = in_tiles, *parts
        if key not in self._blocks:
            padded = np.zeros((len(parts), self._rows(in_tiles), CHANNELS), np.float32)
            for target, (first, number) in zip(padded, parts, strict=True):
                target[: len(self.directions), :number] = self.used[:, first : first + number].numpy()
            singles, pairs = NO_SINGLES, NO_PAIRS
            if in_tiles:
                pairs = as_pairs(padded.reshape(len(parts), -1, TILE_ROWS, CHANNELS))
            else:
                singles = np.ascontiguousarray(padded.reshape(len(parts), -1, ROWS, CHANNELS).swapaxes(2, 3))
            self._blocks[key] = singles, pairs, np.asarray(padded.any(axis=(1, 2)))
        return self._blocks[key]

    @property
    def doubt(self) -> float:
        """What half a squared distance can be off by in float32, relative to the square of the sum of both norms.

        ROUNDING times the root of c bounds the error of one sum of c products. With directions, each of m coordinates
        has such an error; the lengths of the rests are raised by it in `joined`, so that they are never too short.
        """
        own: float = ROUNDING * (self.channels + 4) ** 0.5 / 2  # tiles have four products more
        return own if self.directions is None else 4 * own * float(len(self.directions) ** 0.5)

    @property
    def coarseness(self) -> float:
        """What it can be off by more, relative to the product of the largest norms.

        A coordinate as int16 is off by half of a step at most, of which the largest norm has LARGEST.
        """
        return 1.05 * float(self.width**0.5) / LARGEST if self.kind == PAIRS else 0.0

    def along(self, patches: torch.Tensor, part: slice) -> torch.Tensor:
        """Project some channels of patches (s, c, n); returns (s, m, n), or the patches."""
        return patches if self.directions is None else torch.matmul(self.used[:, part], patches)

    def joined(self, parts: list[torch.Tensor], sq_norms: torch.Tensor) -> torch.Tensor:
        """Join the projections of all channels, of patches with squared norms (s, 1, n); returns (s, width, n)."""
        if self.directions is None:
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        along = parts[0]
        for part in parts[1:]:
            along = along + part
        rest = (sq_norms - along.square().sum(dim=1, keepdim=True)).clamp_(min=0)
        return torch.cat([along, rest.add_(sq_norms, alpha=2 * self.doubt).sqrt_()], dim=1)


def as_pairs(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return what bfloat16 holds, (..., c), as words of two, (..., c / 2)."""
    bits = values.view(np.uint32)
    out = lined_up((*values.shape[:-1], values.shape[-1] // 2)).view(np.uint32)
    found: NDArray[np.uint32] = np.bitwise_or(bits[..., ::2] >> np.uint32(16), bits[..., 1::2], out=out)
    return found


def narrow() -> int:
    """Return the fastest kind of products."""
    return kinds()[0]


def kinds() -> Sequence[int]:
    """Return the kinds of products that are faster than those of float32, the fastest first."""
    if has_tiles():
        return (TILES,)
    if HAS_QUADS:
        return (QUADS, PAIRS)
    return (BYTES, PAIRS) if HAS_BYTES else (PAIRS,)


def counts() -> Sequence[int]:
    """Return the numbers of directions to try."""
    return TILE_COUNTS if narrow() == TILES else COUNTS


def provisional(sample: torch.Tensor, directions: torch.Tensor) -> Projection:
    """Choose how many of some directions to take while nothing has been found.

    Args:
        sample: (c, s) patches of the gallery.
        directions: (m, c), principal; none: nothing is known.
    """
    channels = len(sample)
    shares = (directions @ sample).square().sum(dim=1).cumsum(0) / sample.square().sum().clamp(min=1e-30)
    for number in counts():
        if number <= len(directions) and number + 1 < channels and shares[number - 1] >= EXPLAINED:
            return Projection(channels, directions[:number].contiguous(), narrow())
    return Projection(channels, None, narrow() if len(directions) > 0 else SINGLE)


def likely_reach(sample: torch.Tensor, query: torch.Tensor, patches: int) -> torch.Tensor:
    """Estimate how far patches of a query (c, t) are from the nearest of a gallery, (t,) squared distances.

    Among all of the gallery's patches the nearest is closer than in a sample (c, s), by how much depends on the
    features' dimension: by as much for every FEWER times as many as from a part of the sample to all of it.
    """
    sq_distances = torch.cdist(query.T, sample.T).square_()
    nearest = sq_distances.amin(dim=1).clamp_(min=1e-30)
    gain = nearest / sq_distances[:, ::FEWER].amin(dim=1).clamp_(min=1e-30)
    steps = np.log(patches / sample.shape[1]) / np.log(FEWER)
    found: torch.Tensor = nearest * gain.log().mean().mul(steps).exp()
    return found


def trimmed(
    directions: torch.Tensor, left: float, parts: Mapping[tuple[int, int], float]
) -> tuple[torch.Tensor, float]:
    """Set directions to 0 in parts of the channels in which patches hardly differ, beside what directions leave anyway.

    They need not be orthonormal: what <q, x> has beyond <Pq, Px> is q'(I - P'P)x, and is at most r(q) r(x) as long as P
    makes no patch longer.

    Args:
        directions: (m, c).
        left: what patches differ by beyond the directions, in the unit of the parts.
        parts: of the channels, first and number, and how much patches differ in each.

    Returns:
        the directions, and the share of the channels in which they are not 0.
    """
    spare, kept, channels = LEFT_OUT * left, directions.clone(), directions.shape[1]
    for (start, number), spread in sorted(parts.items(), key=lambda each: each[1]):
        spare -= spread
        if spare < 0:
            break
        kept[:, start : start + number] = 0
        channels -= number
    return kept, channels / directions.shape[1]


def fitted(
    sample: torch.Tensor,
    directions: torch.Tensor,
    query: torch.Tensor,
    reach: torch.Tensor,
    figures: tuple[int, float],
    parts: Mapping[tuple[int, int], float],
) -> tuple[list[Projection], float]:
    """Take as many directions as cost least by what they leave of a sample to be measured.

    The nearest images usually come first: among their patches, more are left than among those of the last.

    Args:
        sample: (c, s) patches of the gallery, in the order of neighbours.
        directions: (m, c), principal.
        query: (c, t) patches of the query.
        reach: (t,) squared distances within which patches count.
        figures: number of patches of the query, that each of the gallery's is compared with; nanoseconds that it takes
            to measure one.
        parts: of the channels that need not be projected, see `trimmed`.

    Returns:
        the projections of equal parts of the neighbours, and nanoseconds a pair.
    """
    channels, count = sample.shape
    patches, measure = figures
    if not len(directions) or not all(bool(side.isfinite().all()) for side in (sample, query, reach)):
        return [Projection(channels, None, SINGLE)], float("inf")
    edges = [count * part // PARTS for part in range(PARTS + 1)]
    own, others = query.square().sum(dim=0), sample.square().sum(dim=0)
    sq_norms = own[:, None] + others

    def costs(
        tried: Projection, products: torch.Tensor, sides: Sequence[torch.Tensor], extra: float = 0
    ) -> list[float]:
        limits = reach[:, None] + 2 * unsure(tried, sides, own.sqrt(), others.sqrt())
        left = (sq_norms - 2 * products <= limits).float().mean(dim=0).tolist()
        of_all = tried.cost + extra
        each = measure * (BESIDE_TILES if tried.kind == TILES else BESIDE_QUADS if QUADS in kinds() else 1)
        return [of_all + sum(left[start:end]) / max(1, end - start) * each for start, end in pairwise(edges)]

    exact = query.T @ sample
    tried = [Projection(channels, None, kind) for kind in (SINGLE, *kinds())]
    found = [costs(each, exact, (query, sample)) for each in tried]
    mine, theirs = directions @ query, directions @ sample
    rests = [own - mine.square().cumsum(0), others - theirs.square().cumsum(0)]
    lengths = [rest.clamp_(min=0).sqrt() for rest in rests]
    for number in counts():
        if number > len(directions) or number + 1 >= channels:
            break
        some, share = trimmed(directions[:number], float(rests[1][number - 1].sum()), parts)
        along = zip((mine, theirs), lengths, strict=True)
        sides = [torch.cat([of[:number], rest[number - 1 : number]]) for of, rest in along]
        products = sides[0].T @ sides[1]
        for kind in kinds():
            tried.append(Projection(channels, some, kind))
            projecting = tried[-1].rows * (PROJECT_TILES if kind == TILES else PROJECT)
            found.append(costs(tried[-1], products, sides, projecting * share * channels / patches))
    best = [min(range(len(tried)), key=lambda each: found[each][part]) for part in range(PARTS)]
    return [tried[each] for each in best], sum(found[each][part] for part, each in enumerate(best)) / PARTS


def unsure(
    tried: Projection, sides: Sequence[torch.Tensor], own: torch.Tensor, others: torch.Tensor
) -> torch.Tensor | float:
    """Return what rounding leaves open of products, (t, s) or of all.

    Args:
        tried: how patches are projected.
        sides: coordinates (width, t) of the query's, and (width, s) of the gallery's.
        own: (t,) norms of the query's patches.
        others: (s,) of the gallery's.
    """
    if tried.kind == TILES:
        return ROUNDED * own[:, None] * others
    if tried.kind in (QUADS, BYTES):
        steps = OWN_STEPS if tried.kind == BYTES else STEPS, STEPS
        lost, theirs = (lost_by_int8(side, number) for side, number in zip(sides, steps, strict=True))
        return lost[:, None] * others + own[:, None] * theirs
    return tried.coarseness * float(own.amax() * others.amax())


def lost_by_int8(coordinates: torch.Tensor, number: int) -> torch.Tensor:
    """Return the lengths (s,) of what rounding takes from patches (width, s), each in so many steps of its own."""
    steps = coordinates.abs().amax(dim=0).clamp(min=1e-30) / number
    lost: torch.Tensor = torch.linalg.vector_norm(coordinates - (coordinates / steps).round() * steps, dim=0)
    return lost


def principal(sample: torch.Tensor) -> torch.Tensor:
    """Return about the first principal directions of patches (c, s), (m, c), the most telling first; none of NaN."""
    channels, count = len(sample), min(counts()[-1] + SPARE, *sample.shape)
    if not bool(sample.square().sum().isfinite()):
        return torch.empty(0, channels)
    if channels <= 2 * count:
        basis = torch.eye(channels, dtype=torch.float64)
        small = sample.double()
    else:
        some = torch.linspace(0, sample.shape[1] - 1, count).long()
        draw = sample @ (sample.T @ sample[:, some])  # a round of subspace iteration
        basis = torch.linalg.qr(draw.double()).Q
        small = basis.T @ sample.double()
    _, vectors = torch.linalg.eigh(small @ small.T)  # ascending
    found: torch.Tensor = (basis @ vectors.flip(1)[:, : counts()[-1]]).T.float().contiguous()
    return found
