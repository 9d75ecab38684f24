"""The neighbours' side of the search by bounds: their patches, projected, and kept while there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ...arrays import Array
from ...system.threads import in_single_threads
from ..pyramid.plan import Upsampling
from ..upsampling import as_tensor, shift_of
from . import panels
from .plan import Projection, measure_cost, parts_of, principal
from .prepared import Prepared, Sides, load_query, prepare
from .products_tiles import LINE, lined_up
from .simd import SINGLE, WIDTH
from .sources import Floats, Ints, Source, is_read_in_place, layouts_of, sample_level, shifted

LARGE = 2**20  # bytes of a neighbour's patches
SAMPLE = 512  # patches of the gallery that directions are fitted to
PLACES = 8  # of a neighbour's, different ones, that these are taken from
GLANCE = 128  # that show whether an earlier gallery's directions suit this one, too

Mix = tuple[Ints, Ints, Floats]  # how patches are made of cells: see panels.patch_at


@dataclass(frozen=True)
class Frame:
    """Where the products' side of patches begins, and what is known of patches there."""

    scale: float  # a power of two
    centre: Floats  # (c,) at scale
    spreads: NDArray[np.float64]  # how much patches differ in each part of the channels, see plan.parts_of

    @classmethod
    def of(cls, sample: torch.Tensor, like: Sequence[Array], channels: Sequence[int], threads: int = 1) -> Frame:
        """Return that of a sample (c, s) of the gallery, for levels of a query like these."""
        scale = _scale([*like, sample], threads)
        scaled = sample * scale
        centre = scaled.mean(dim=1)
        squares = scaled.sub_(centre[:, None]).square_().sum(dim=1).double().numpy()
        spreads = [squares[first : first + number].sum() for first, number in parts_of(channels)]
        return cls(scale, centre.numpy(), np.array(spreads))

    def moved(self, by: Floats) -> Frame:
        """Return that of the same patches plus `by` (c,)."""
        return replace(self, centre=self.centre + by * np.float32(self.scale))


class BoundsGallery:
    """The levels of all neighbours, and what makes patches of them."""

    def __init__(
        self, levels: Sequence[Array], like: Sequence[Array], kept_bytes: int = 0, frame: Frame | None = None,
        distinct: bool = False, threads: int = 1,
    ) -> None:  # fmt: skip
        """Take levels [(K, c, h, w), ...], the finest first.

        Args:
            levels: of the neighbours.
            like: [(c, ...), ...] levels of a query.
            kept_bytes: prepared neighbours are kept for another search if all of them take no more than this.
            frame: of patches like these, without a shift; None: that of these.
            distinct: whether matches will be. Then nothing is subtracted from what float32 holds as it is; else the
                mean of `like` is, before both sides become float32, as `pyramid` does.
            threads: that read a sample, if the neighbours are large.
        """
        self.levels = list(levels)
        self.grids: list[tuple[int, int]] = [level.shape[2:] for level in levels]
        self._threads = threads if max(level[0].nbytes for level in levels) > LARGE // 2 else 1
        if distinct and is_exact(*levels, *like):
            self.shifts = [torch.zeros((len(level), 1)) for level in like]
        else:
            self.shifts = [shift.reshape(-1, 1) for shift in in_single_threads(self._threads, shift_of, like)]
        self.shift: Floats = torch.cat(self.shifts).reshape(-1).numpy()
        self.k, self.n = len(levels[0]), self.grids[0][0] * self.grids[0][1]
        self.channels = [level.shape[1] for level in levels]
        self.depth = sum(self.channels)
        # Between patches, float32: at many lines of a cache, few of its sets would hold them all.
        self.length = self.depth + (LINE if self.depth % (LINE * LINE) == 0 else 0)
        self.layouts = layouts_of(self.grids, self.channels, None if self.is_mixed else self.length)
        self.plain = Projection(self.depth, None, SINGLE)
        self.projections: list[Projection] = []  # of equal parts of the neighbours; none: to be chosen
        self.scan = False  # whether values may not be finite
        self._kept_bytes = kept_bytes
        self._kept: dict[int, Prepared] = {}
        self.kept_at = np.zeros(self.k, np.int64)  # addresses of cells that are kept; 0: they are not
        self.frame = frame.moved(-self.shift) if frame else Frame.of(self.sample, like, self.channels, self._threads)
        self.scale, self.centre = self.frame.scale, self.frame.centre

    @property
    def is_mixed(self) -> bool:
        """Whether patches are interpolated."""
        return any(grid != self.grids[0] for grid in self.grids)

    @cached_property
    def upsampling(self) -> Upsampling:
        """What patches are interpolated from."""
        return Upsampling.of(self.grids)

    @cached_property
    def mix(self) -> Mix:
        """How patches are made of cells."""
        if not self.is_mixed:
            return np.empty((0, 2), np.int64), np.empty((0, 4, 0), np.int64), np.empty((0, 4, 0), np.float32)
        sizes = [c * h * w for c, (h, w) in zip(self.channels, self.grids, strict=True)]
        table = np.array([np.cumsum([0, *sizes[:-1]]), self.channels], np.int64).T.copy()
        taps, weights = zip(*(self.upsampling.under(at, np.arange(self.n)) for at in range(len(sizes))), strict=True)
        return table, np.stack(taps), np.stack(weights)

    def patches(self, levels: Sequence[Array], at: Ints | None = None) -> Floats:
        """Return the patches (q, c) of an image with levels [(c, h, w), ...], or of one level (c, q), shifted.

        Args:
            levels: of the image.
            at: (q,) numbers of the patches; all of them.
        """
        native = [
            shifted(as_tensor(level.reshape(len(level), -1))[None], shift)[0].T
            for level, shift in zip(levels, self.shifts, strict=True)
        ]
        if not self.is_mixed:
            chosen = native if at is None else [level[torch.from_numpy(at)] for level in native]
            return torch.cat(chosen, dim=1).contiguous().numpy()
        at = np.arange(self.n) if at is None else at
        out = np.empty((len(at), self.depth), np.float32)
        panels.patches_of(torch.cat([level.reshape(-1) for level in native]).numpy(), at, self.mix, out)
        return out

    def loaded(self, levels: Sequence[Array], projection: Projection, alone: bool) -> tuple[Floats, torch.Tensor]:
        """Return patches as `patches` does, of levels of one grid, and their coordinates.

        If `alone`, no other thread works for this search, and large patches are loaded by several.
        """
        flat = [level.reshape(1, len(level), -1) for level in levels]
        n, [layout] = flat[0].shape[2], layouts_of(self.grids, self.channels, self.depth)
        sides = Sides(n, self.upsampling, self.scale, self.centre)
        patches = np.empty((n, self.depth), np.float32)
        source = Source.of(flat, self.shift, layout, range(1))
        return patches, load_query(source, sides, projection, patches, self._threads if alone else 1)

    @property
    def has_all(self) -> bool:
        """Whether all neighbours are kept as they were prepared, their cells being their patches, unshifted."""
        return bool(self.kept_at.all()) and not self.is_mixed and not any(bool(shift.any()) for shift in self.shifts)

    def cells_of(self, places: Ints) -> Floats:
        """Return cells (n, c) of one level at positions (n,), counted through neighbour, row and column."""
        if not self.has_all:
            neighbours, at = np.divmod(places, self.n)
            level = self.levels[0]
            found: Floats = level.reshape(self.k, level.shape[1], -1)[neighbours, :, at]
            return found
        out = np.empty((len(places), self.depth), np.float32)
        panels.cells_of(self.kept_at, places, (self.n, self.length), out)
        return out

    @cached_property
    def sample(self) -> torch.Tensor:
        """Some patches from everywhere in the gallery, (c, s) float32, shifted."""
        return self._some(SAMPLE)

    @cached_property
    def glance(self) -> torch.Tensor:
        """A few patches from everywhere, at scale, about the centre."""
        return self._centred(self._some(GLANCE))

    def _some(self, size: int) -> torch.Tensor:
        """Return about so many patches, (c, s) float32, shifted; of other places in other neighbours."""
        number, step = min(self.n, -(-size // self.k)), -(-self.k // size)
        groups = [range(first, self.k, PLACES * step) for first in range(0, min(PLACES * step, self.k), step)]
        places = [spread(self.n, number, seed) for seed in range(len(groups))]
        rows = np.cumsum([0, *(number * len(group) for group in groups)])
        out = np.empty((rows[-1], self.depth), np.float32)

        def read(at: int) -> None:
            channels, first = self.channels[at], sum(self.channels[:at])
            shift, level = self.shift[first : first + channels], self.levels[at]
            for group, patches, start in zip(groups, places, rows[:-1], strict=True):
                under = patches[None], np.ones((1, number), np.float32)
                if self.grids[at] != self.grids[0]:
                    under = self.upsampling.under(at, patches)
                some = level[group.start :: group.step].reshape(len(group), channels, -1)
                sample_level(some, shift, under, first, out[start : start + number * len(group)])

        in_single_threads(self._threads, read, range(len(self.levels)))
        return torch.from_numpy(out).T

    @cached_property
    def parts(self) -> Ints:
        """Parts of the channels, (p, 2) first and number: those that differ most among patches first."""
        return np.array(parts_of(self.channels), np.int64)[np.argsort(-self.frame.spreads, kind="stable")]

    @property
    def spare_parts(self) -> dict[tuple[int, int], float]:
        """Parts of the finest grid's channels, and their spreads: they cost less if they are not projected."""
        finest = np.repeat([grid == self.grids[0] for grid in self.grids], self.channels)
        every = zip(parts_of(self.channels), self.frame.spreads.tolist(), strict=True)
        return {part: spread for part, spread in every if finest[part[0]]}

    @cached_property
    def measure_cost(self) -> float:
        """Nanoseconds that it takes to measure a patch: until the parts that differ most rule it out."""
        order = np.argsort(-self.frame.spreads, kind="stable")
        return measure_cost(self.frame.spreads[order], self.parts[:, 1])

    @cached_property
    def directions(self) -> torch.Tensor:
        """The first principal directions, (m, c); none if the sample is not finite."""
        return principal(self.centred_sample)

    @cached_property
    def centred_sample(self) -> torch.Tensor:
        """The sample at scale, about the centre."""
        return self._centred(self.sample)

    def _centred(self, patches: torch.Tensor) -> torch.Tensor:
        return (patches * self.scale).sub_(torch.from_numpy(self.centre)[:, None])

    def settle(self) -> None:
        """Take note that the projections are chosen."""

    def chunks(self, together: int, threads: int, first: int) -> list[range]:
        """Return which neighbours are compared at a time.

        Args:
            together: as many as a core's cache holds while they are prepared.
            threads: that compare.
            first: of the chunks, which may be prepared as a whole. By stripes, those after them need no more memory for
                more neighbours.
        """
        found = [range(self.k)[start : start + together] for start in range(0, self.k, together)]
        if not self._is_large or not is_read_in_place(self.levels) or len(found) <= first:
            return found
        return found[:first] + fewer_and_fewer(range(found[first].start, self.k), threads)

    def measured(self, number: int) -> None:
        """Take note of how many patches a search has measured."""

    def projection(self, neighbour: int) -> Projection:
        """Return what a neighbour is prepared by."""
        return self.projections[neighbour * len(self.projections) // self.k]

    def room(self, neighbours: int) -> Floats:
        """Return memory for the cells of some neighbours, (s, m); to ask for it again and again takes long."""
        return lined_up((neighbours, self._size_of_cells))

    def prepared(self, some: range, projection: Projection, room: Floats, keep: bool = False) -> Prepared:
        """Return neighbours ready to be compared: by this projection, or as they were prepared before.

        Those that are not kept lie in `room`, until others do.
        """
        found = self._kept.get(some.start)
        if found is None or (projection.is_plain and not found.projection.is_plain):
            keep = keep or self._size(projection) <= self._kept_bytes / self.k
            found = self._prepare(some, projection, self.room(len(some)) if keep else room[: len(some)])
            if keep:
                self._kept[some.start] = found
                self.kept_at[some.start : some.stop] = found.cells_at
        return found

    def ready(self, threads: int) -> list[tuple[range, Prepared]]:
        """Return all neighbours with what they were prepared by, if they are; else nothing.

        Args:
            threads: that may prepare what is left.
        """
        if not self.kept_at.all() or self.is_mixed:
            return []
        kept = sorted(self._kept.items())
        return [(range(start, start + len(one.largest)), one) for start, one in kept]

    def _size(self, projection: Projection) -> float:
        """Return the bytes of a neighbour that is prepared."""
        return 4.0 * (self._size_of_cells + projection.panel_words * -(-self.n // WIDTH) * WIDTH)

    @property
    def _size_of_cells(self) -> int:
        """Return how many float32 the cells of a neighbour are."""
        return sum(level[0].size for level in self.levels) if self.is_mixed else self.n * self.length

    def is_striped(self, some: range) -> bool:
        """Return whether some neighbours are better compared by stripes: they are larger than caches, and not kept."""
        return self._is_large and some.start not in self._kept

    @property
    def _is_large(self) -> bool:
        return 4 * self.n * self.length > LARGE and not self.is_mixed and not self._kept_bytes

    def forget(self) -> None:
        """Prepare neighbours again when they are needed."""
        self._kept.clear()
        self.kept_at[:] = 0

    def _prepare(self, some: range, projection: Projection, cells: Floats, sort: bool = False) -> Prepared:
        sources = [Source.of(self.levels, self.shift, layout, some) for layout in self.layouts]
        return prepare(sources, Sides(self.n, self.upsampling, self.scale, self.centre), projection, cells, sort)

    def source(self, some: range) -> Source:
        """Return where some neighbours lie, of levels of one grid."""
        return Source.of(self.levels, self.shift, self.layouts[0], some)


def fewer_and_fewer(some: range, threads: int) -> list[range]:
    """Cut a range into parts for so many threads: the last are short, so that none waits long for another."""
    found, start = [], some.start
    while start < some.stop:
        number = max(1, (some.stop - start) // (2 * threads))
        found.append(range(start, start + number))
        start += number
    return found


def is_exact(*sides: Array) -> bool:
    """Return whether float32 holds all values as they are, so that no shift has to spare their last digits."""
    return all(side.dtype in (np.float16, np.float32) for side in sides)


def spread(n: int, number: int, seed: int = 0) -> Ints:
    """Return at most so many of n positions, ascending: one of each of equal parts, of another column each."""
    number = min(n, number)
    edges = np.arange(number + 1) * n // number
    drawn: Ints = edges[:-1] + (np.random.default_rng(seed).random(number) * np.diff(edges)).astype(np.int64)
    return drawn


def _scale(sides: Sequence[Array | torch.Tensor], threads: int) -> float:
    """Return a power of two that brings patches of any size near 1."""

    def largest(side: Array | torch.Tensor) -> float:
        low, high = torch.aminmax(side if isinstance(side, torch.Tensor) else as_tensor(side))
        return float(torch.maximum(-low, high))

    size = max(in_single_threads(threads, largest, sides))
    return float(2.0 ** -np.clip(np.rint(np.log2(size)), -120, 120)) if 0 < size < np.inf else 1.0
