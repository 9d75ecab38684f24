"""Pixel metrics, in bounded memory: how well the pixels of maps tell anomalous from normal.

A threshold t calls every score >= t anomalous. Equal scores pass together, so each metric is computed over the
distinct thresholds, as in scikit-learn, and does not depend on the order of the images:

- AUROC: area under TPR over FPR by trapezoids; equal to the average-rank (Mann-Whitney) formula.
- AP: sum over thresholds of (recall gained) x precision, no interpolation; `average_precision_score`.
- F1Max: the largest 2 TP / (2 TP + FP + FN) at any threshold.
- AUPRO: area under PRO over FPR up to a limit on FPR, divided by that limit (Bergmann et al., "The MVTec Anomaly
  Detection Dataset", IJCV 2021, and `pro_curve_util.py` of MVTec's evaluation code). PRO is the mean over all regions
  of the share of the region's pixels that pass; FPR is over the normal pixels of all images. Trapezoids from (0, 0),
  linear interpolation at the limit.

With one class only, every metric is None with the reason: AUROC and AUPRO are undefined, and AP and F1Max are 0, or
1 whatever the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import FeatureError, OptionError
from ..options import is_share
from .ranking import (
    Counts,
    Keys,
    Metrics,
    Reals,
    area_bound,
    area_under,
    cumulated,
    ranking_bounds,
    ranking_metrics,
    undefined,
    why_undefined,
)

BINS = 2**22  # default of PixelMetrics, 28 bytes each
INTEGRATION_LIMIT = 0.3  # FPR up to which AUPRO integrates
CURVE_POINTS = 2000
PIXEL_METRICS = ("pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO")

PAGE_BITS = 16  # a page is 2**16 consecutive float32 numbers: 1/128 of an octave
PAGES = 2 ** (32 - PAGE_BITS)
NONE, SEVERAL = 0, 1  # no value in a bin, several values; other numbers are the key of its only value (these are NaN's)


@dataclass(frozen=True)
class Curves:
    """FPR, TPR and PRO at the same falling thresholds, each (points,) float64 from 0 to 1, ascending."""

    fpr: Reals
    tpr: Reals
    pro: Reals


class PixelMetrics:
    """Pixel metrics of any number of maps in bounded memory (117 MB at the default number of bins).

    Maps are counted in histograms over the bit patterns of float32, which sort as the numbers do. If every distinct
    value has its own bin, the result is exact. Bins are allotted by pages of 2**16 neighbouring patterns, to pages that
    hold scores only. When the pages no longer fit, all bins are doubled in width. So a narrow range around a large
    offset keeps every bit, with or without zeros (pixels that no network saw) beside it: no bins are joined before 64
    pages are in use. Scores all over four octaves get 1 million bins per octave; if all of float32 is in use, 2**13.
    `Metrics.error_bounds` bounds the error of a result; bins of a single value add nothing to it.

    The state depends on what was added, not on the order.
    """

    def __init__(self, bins: int = BINS) -> None:
        """Make an empty accumulator.

        Args:
            bins: a power of two, at least 2**16: one per page.

        Raises:
            OptionError: another number.
        """
        if bins < PAGES or bins & (bins - 1):
            raise OptionError(f"bins: expected a power of two >= {PAGES}, found {bins}")
        self.images = 0
        self.regions = 0  # 8-connected, over all masks
        self._bins = bins
        self._bits = PAGE_BITS  # a page has 2**bits bins
        self._pages = np.empty(0, np.int64)  # page of each slot, in the order of their first scores
        self._slot = np.full(PAGES, -1, np.int64)  # slot of each page; -1: it holds no score
        # The system provides memory when a bin is first used.
        self._normal = np.zeros(bins, np.int64)  # pixels
        self._anomalous = np.zeros(bins, np.int64)  # pixels
        self._share = np.zeros(bins, np.float64)  # sum over anomalous pixels of 1 / area of their region
        self._sums = (self._normal, self._anomalous, self._share)
        self._value = np.zeros(bins, np.uint32)  # key of the only value in the bin, NONE or SEVERAL

    def add(
        self,
        anomaly_map: NDArray[np.floating],
        mask: NDArray[np.bool_],
        name: str = "",
        ignored: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count the pixels of one image.

        Args:
            anomaly_map: (H, W) finite, higher is more anomalous; compared as float32.
            mask: (H, W) bool, True where anomalous; all False for a normal image.
            name: what errors call the image; "": its number, from 0.
            ignored: (H, W) bool, True where a pixel counts as neither; None: all pixels count.

        Raises:
            FeatureError: the map is not (H, W), has NaN or infinity, or the mask or `ignored` is not bool of that
                shape. Nothing is counted then.
        """
        name = name or f"map {self.images}"
        anomaly_map, mask = np.asarray(anomaly_map), np.asarray(mask)
        if anomaly_map.ndim != 2 or anomaly_map.size == 0:
            raise FeatureError(f"{name}: expected a map (H, W), found {anomaly_map.shape}")
        for array in (mask, ignored):
            if array is not None and (array.shape != anomaly_map.shape or array.dtype != np.bool_):
                found = f"{array.shape} {array.dtype}"
                raise FeatureError(f"{name}: expected a mask {anomaly_map.shape} of bool, found {found}")
        with np.errstate(over="ignore"):
            scores = anomaly_map.astype(np.float32, copy=False)
        finite = np.isfinite(scores)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise FeatureError(
                f"{name}: expected finite float32 scores, found {anomaly_map[row, column]} at ({row}, {column})"
            )
        shares, regions = _region_shares(mask if ignored is None else mask & ~ignored)
        if ignored is not None:
            scores, mask = scores[~ignored], mask[~ignored]
        if scores.size:
            self._count(scores, mask, shares)
        self.regions += regions
        self.images += 1

    def result(self, integration_limit: float = INTEGRATION_LIMIT) -> Metrics:
        """Compute pixel_AUROC, pixel_AP, pixel_F1Max and pixel_AUPRO of all maps added so far.

        Args:
            integration_limit: the FPR up to which PRO is integrated, in (0, 1].

        Raises:
            OptionError: the limit is outside its range.
        """
        check_limit(integration_limit)
        normal, anomalous, share, several = self._steps()
        reason = why_undefined("pixel", int(normal.sum()), int(anomalous.sum()))
        if reason:
            return undefined(PIXEL_METRICS, reason)
        fpr, pro = cumulated(normal), cumulated(share)
        values = (*ranking_metrics(normal, anomalous), area_under(fpr, pro, integration_limit))
        bounds = (*ranking_bounds(normal, anomalous, several), area_bound(fpr, pro, several, integration_limit))
        return Metrics(
            dict(zip(PIXEL_METRICS, values, strict=True)), error_bounds=dict(zip(PIXEL_METRICS, bounds, strict=True))
        )

    def curves(self, points: int = CURVE_POINTS) -> Curves | None:
        """Return the ROC and PRO curves for a plot, or None if the metrics are None.

        If there are more than `points` points, some are kept: gaps in the sum of FPR, TPR and PRO are at most
        6 / points, so straight lines lie within that distance of the curve. Jumps keep both ends.
        """
        normal, anomalous, share, _ = self._steps()
        if why_undefined("pixel", int(normal.sum()), int(anomalous.sum())):
            return None
        curves = np.stack([cumulated(column) for column in (normal, anomalous, share)])
        if curves.shape[1] > points:
            way = curves.sum(axis=0)
            marks = np.linspace(0, way[-1], points // 2)
            before, after = np.searchsorted(way, marks, "right") - 1, np.searchsorted(way, marks, "left")
            curves = curves[:, np.unique([before, after])]
        return Curves(*curves)

    def _count(self, scores: NDArray[np.float32], mask: NDArray[np.bool_], shares: Reals) -> None:
        """Count pixels; `shares` has 1 / area of its region for each anomalous one."""
        keys = _keys(scores)
        bins = self._locate(keys)
        self._note(bins, keys)
        np.add.at(self._normal, bins[~mask], 1)
        if len(shares):
            np.add.at(self._anomalous, bins[mask], 1)
            np.add.at(self._share, bins[mask], shares)

    def _locate(self, keys: Keys) -> Counts:
        """Return the bin of each key; allot bins to new pages first."""
        pages = keys >> PAGE_BITS
        slots: Counts = self._slot[pages]
        if slots.min() < 0:
            self._allot(np.unique(pages[slots < 0]))
            slots = self._slot[pages]
        slots <<= self._bits
        slots += (keys & (2**PAGE_BITS - 1)) >> (PAGE_BITS - self._bits)
        return slots

    def _note(self, bins: Counts, keys: Keys) -> None:
        """Record in `_value` the keys that were counted in these bins."""
        held = self._value[bins]
        new = (held != keys) & (held != SEVERAL)
        bins, keys, empty = bins[new], keys[new], held[new] == NONE
        self._value[bins[empty]] = keys[empty]  # several keys of a bin: one stays
        self._value[bins[self._value[bins] != keys]] = SEVERAL

    def _allot(self, pages: NDArray[np.integer]) -> None:
        """Allot bins to the pages that have none yet."""
        new = pages[self._slot[pages] < 0]
        total = len(self._pages) + len(new)
        while total << self._bits > self._bins:
            self._coarsen()
        self._slot[new] = np.arange(len(self._pages), total)
        self._pages = np.concatenate([self._pages, new.astype(np.int64)])

    def _coarsen(self) -> None:
        """Double the width of every bin."""
        used = len(self._pages) << self._bits
        for array in self._sums:
            array[: used // 2] = array[:used:2] + array[1:used:2]  # a sum over an axis of two takes ten times as long
            array[used // 2 : used] = 0
        self._value[: used // 2] = _one_value(self._value[:used:2], self._value[1:used:2])
        self._value[used // 2 : used] = NONE
        self._bits -= 1

    def _steps(self) -> tuple[Counts, Counts, Reals, NDArray[np.bool_]]:
        """Return what each threshold adds, highest first: normal, anomalous, 1 / area, whether several values."""
        order = np.argsort(-self._pages)
        by_page = self._value[: len(self._pages) << self._bits].reshape(len(self._pages), 2**self._bits)
        place = np.flatnonzero(by_page[order, ::-1])
        used = (order[place >> self._bits] << self._bits) + 2**self._bits - 1 - (place & (2**self._bits - 1))
        return self._normal[used], self._anomalous[used], self._share[used], self._value[used] == SEVERAL


def check_limit(integration_limit: float) -> None:
    """Raise an OptionError unless AUPRO can be integrated up to that FPR."""
    if not is_share(integration_limit):
        raise OptionError(f"integration_limit: expected an FPR in (0, 1], found {integration_limit!r}")


def _keys(scores: NDArray[np.float32]) -> Keys:
    """Map float32 to integers in the same order: flip all bits of negative numbers, the sign bit of others."""
    bits: Keys = (scores + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0, its equal
    bits ^= np.where(bits >> 31, np.uint32(2**32 - 1), np.uint32(2**31))
    return bits


def _one_value(a: Keys, b: Keys) -> Keys:
    """Return `_value` of the unions of two bins each; their keys differ."""
    return np.where((a == NONE) | (b == NONE), np.maximum(a, b), np.uint32(SEVERAL))


def _region_shares(mask: NDArray[np.bool_]) -> tuple[Reals, int]:
    """Return 1 / area of its 8-connected region for each True pixel, row by row, and the number of regions."""
    if not mask.any():
        return np.empty(0), 0
    from scipy import ndimage  # here, as in detect/baseline.py

    numbered, regions = ndimage.label(mask, np.ones((3, 3)))
    number = numbered[mask]
    return 1 / np.bincount(number)[number], regions
