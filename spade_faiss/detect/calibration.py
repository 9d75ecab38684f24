"""Thresholds from normal images only, with a known rate of false alarms.

Each normal image is queried against the others. If a new normal image is exchangeable with these (made by the same
process), then the chance that its score exceeds the conformal quantile, the score
of rank ceil((n + 1)(1 - alpha)) of n, is at most alpha (Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random
World", 2005; Angelopoulos & Bates, arXiv 2107.07511, section 1). Copies of an image tell nothing new: they are left
out together, and have one score.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptGalleryError, GalleryNotFoundError, OptionError
from ..object_store.address import refuse_address
from ..options import plain
from ..system.atomic_files import storage_errors, write_whole
from ..system.sealed_json import read_format, sealed
from .baseline import ALIKE, HUGE, TINY, Baseline
from .regions import Labels, Region, find_regions

FILE = "calibration.json"
LOCK = "calibration.lock"
FORMAT = "spade-faiss calibration"
FORMAT_VERSION = 2
METHOD = 2  # 1: wrong for groups of robust, and for wary with no more images than neighbours
DEFAULT_FALSE_ALARMS = 0.01
ROUNDING = 1e-9  # of a rank that is a whole number on paper


def images_needed(false_alarms: float) -> int:
    """Return the least number of normal images with which a false-alarm rate can be promised: ceil(1/alpha) - 1."""
    return math.ceil(1 / false_alarms - ROUNDING) - 1


def conformal_threshold(
    scores: NDArray[np.float64], false_alarms: float, copies: int = 0, sampled: bool = False
) -> float:
    """Return the score of rank ceil((n + 1)(1 - alpha)) of n: a new normal score exceeds it with chance at most alpha.

    Args:
        scores: (n,), of images that all differ.
        false_alarms: alpha.
        copies: images that were left out as copies of these, for the error.
        sampled: whether the gallery has more images than these, likewise.

    Raises:
        OptionError: alpha is not in (0, 1), or n is too small for it, with the n that it takes.
    """
    if not isinstance(false_alarms, (int, float)) or not ROUNDING <= false_alarms < 1:
        raise OptionError(f"false_alarms: expected a rate between 0 and 1, found {false_alarms!r}")
    n = len(scores)
    rank = max(1, math.ceil((n + 1) * (1 - false_alarms) - ROUNDING))
    if rank > n:
        found = f"{n} ({n + copies} images, {copies} of them copies of others)" if copies else str(n)
        more = "take a larger sample" if sampled else "add normal images"
        raise OptionError(
            f"false_alarms {false_alarms:g}: expected at least {images_needed(false_alarms)} normal images "
            f"to calibrate with, found {found}; {more}, or ask for a rate of at least {_least_rate(n):.3g}"
        )
    return float(np.sort(scores)[rank - 1])


def _least_rate(n: int) -> float:
    """Return the least rate that n images can promise, rounded up to three digits."""
    ten = 10.0 ** (2 - math.floor(math.log10(1 / (n + 1))))
    return math.ceil(ten / (n + 1) - ROUNDING) / ten


@dataclass(frozen=True)
class Judgement:
    """What the thresholds say of a query.

    The paper's cascade: an image score at or under its threshold is normal; above it, the image is suspicious and the
    map decides: without a region above the pixel threshold it is normal after all.

    Attributes:
        verdict: "normal" or "anomalous".
        p_value: of the image score, among normal images.
        score: the image score in [0, 1], the threshold at 0.5.
        regions: highest peak first; of suspicious images only.
        labels: which region each pixel is in; None: there are none.
        peak: maximum of the map at the size that calibration saw, which the pixel threshold is compared with.

    >>> sf.calibrate(detector, false_alarms=0.2).write(gallery.path)
    >>> judgement = sf.Detector(gallery, toy).query("normal/000.png").judgement
    >>> judgement.verdict, judgement.p_value, judgement.regions
    ('normal', 1.0, [])
    """

    verdict: str
    p_value: float
    score: float
    regions: list[Region]
    labels: Labels | None = field(default=None, repr=False, compare=False)
    peak: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Leave-one-out scores of normal images, and the thresholds that follow from them.

    Attributes:
        generation: of the gallery: after add or remove the promise is that of another gallery.
        settings: of the queries that it holds for.
        false_alarms: alpha, the promised rate.
        group: regular expression: images that it gives the same group were left out together.
        image_scores: (n,) float64, of normal images.
        map_maxima: (n,) float64, of their maps.
        baseline: of normal images, where the settings ask for one.
        trusted: digests of the images that excused their like, see Gallery.trust.
        method: how the scores were measured; a release that measures them otherwise has the next number.

    >>> calibration = sf.calibrate(detector, false_alarms=0.2)
    >>> calibration.false_alarms, calibration.image_scores.shape, calibration.generation == gallery.generation
    (0.2, (12,), True)
    """

    generation: int
    settings: dict[str, Any]
    false_alarms: float
    group: str | None
    image_scores: NDArray[np.float64]
    map_maxima: NDArray[np.float64]
    baseline: Baseline | None = None
    trusted: tuple[str, ...] = ()
    method: int = METHOD

    @cached_property
    def image_threshold(self) -> float:
        """Image scores above it are suspicious."""
        return conformal_threshold(self.image_scores, self.false_alarms)

    @cached_property
    def pixel_threshold(self) -> float:
        """Pixel scores above it are anomalous."""
        return conformal_threshold(self.map_maxima, self.false_alarms)

    @property
    def ties(self) -> str | None:
        """How ties have driven a threshold, or the scale of the scores, to 0 or the ceiling; None: they have not.

        >>> sf.calibrate(detector, false_alarms=0.2).ties is None
        True
        """
        found = self._tied(self.image_scores, self.image_threshold), self._tied(self.map_maxima, self.pixel_threshold)
        for name, tied in zip(("image scores", "maxima of maps"), found, strict=True):
            if tied:
                return f"expected {name} that differ, found {tied} of {len(self.image_scores)} {ALIKE}"
        return self.baseline.ties if self._has_scale and self.baseline else None

    @property
    def _has_scale(self) -> bool:
        """Whether image scores are multiples of those of normal images."""
        return self.settings.get("image_score") == "map"

    def _tied(self, scores: NDArray[np.float64], threshold: float) -> str | None:
        if threshold <= TINY:
            return f"0 for {int((scores <= TINY).sum())}"
        if self._has_scale and threshold >= HUGE:
            return f"the ceiling, {HUGE:g}, for {int((scores >= HUGE).sum())}"
        return None

    def outdated(self, generation: int, trusted: Collection[str]) -> str | None:
        """Return why the rate is not promised any more; None: it is.

        Args:
            generation: of the gallery.
            trusted: digests of the images that excuse their like. More of them make no more false alarms.

        >>> calibration = sf.calibrate(detector, false_alarms=0.2)
        >>> calibration.outdated(gallery.generation, ()), calibration.outdated(99, ())
        (None, 'it has changed since it was calibrated (generation 2, now 99)')
        """
        if generation != self.generation:
            return f"it has changed since it was calibrated (generation {self.generation}, now {generation})"
        if missing := len(set(self.trusted).difference(trusted)):
            return f"{missing} of the {len(self.trusted)} images that were trusted then are not trusted now"
        return None

    def p_value(self, image_score: float) -> float:
        """Return the share of normal images, the new one counted in, that score as high: (1 + #{>=}) / (n + 1).

        >>> calibration = sf.calibrate(detector, false_alarms=0.2)
        >>> calibration.p_value(float("inf")) == 1 / 13, calibration.p_value(0)
        (True, 1.0)
        """
        return float(1 + (self.image_scores >= image_score).sum()) / (1 + len(self.image_scores))

    def scaled(self, image_score: float) -> float:
        """Map an image score to [0, 1], monotone, the threshold to 0.5: score / (score + threshold).

        >>> calibration = sf.calibrate(detector, false_alarms=0.2)
        >>> calibration.scaled(calibration.image_threshold)
        0.5
        """
        threshold = self.image_threshold
        if image_score == threshold:
            return 0.5
        return image_score / (image_score + threshold)

    def promising(self, false_alarms: float) -> Calibration:
        """Return it with the thresholds of another false-alarm rate, from the same scores.

        Raises:
            OptionError: as calibrate: too few images for the rate, or scores that tie.

        >>> calibration = sf.calibrate(detector, false_alarms=0.2)
        >>> calibration.promising(0.1).image_threshold > calibration.image_threshold
        True
        """
        found = replace(self, false_alarms=plain(false_alarms))
        conformal_threshold(found.image_scores, found.false_alarms)
        if found.ties:
            raise OptionError(f"false_alarms {false_alarms:g}: {found.ties}; ask for another rate")
        return found

    def judge(
        self, image_score: float, peak: float, anomaly_map: NDArray[np.float32], min_region: int = 1
    ) -> Judgement:
        """Decide; see Judgement.

        Args:
            image_score: the image's score.
            peak: maximum of the map at the size that calibration saw.
            anomaly_map: (H, W) pixel scores at the image's size.
            min_region: pixels; smaller regions do not count.

        >>> calibration = sf.calibrate(detector, false_alarms=0.2)
        >>> calibration.judge(0.0, 0.0, np.zeros((40, 48), np.float32)).verdict
        'normal'
        """
        regions, labels = list[Region](), None
        if image_score > self.image_threshold and peak > self.pixel_threshold:
            regions, labels = find_regions(anomaly_map, self.pixel_threshold, min_region)
        verdict = "anomalous" if regions else "normal"
        return Judgement(verdict, self.p_value(image_score), self.scaled(image_score), regions, labels, peak)

    def write(self, folder: str | Path) -> None:
        """Write calibration.json into the folder of the gallery; every Detector over it then gives verdicts.

        Raises:
            GalleryNotFoundError: there is no such folder.
            GalleryError: the file cannot be written.

        >>> sf.calibrate(detector, false_alarms=0.2).write(gallery.path)
        >>> sf.Detector(gallery, toy).query("normal/000.png").verdict
        'normal'
        """
        values = {**self.to_json(), "format": FORMAT, "format_version": FORMAT_VERSION}
        refuse_address(folder)
        folder = Path(folder)
        if not folder.is_dir():  # the lock would make it
            raise GalleryNotFoundError(f"{folder}: expected the folder of a gallery, found none")
        # Not the writer's lock, which may be held for hours; two at once would write the same temporary file.
        with storage_errors(f"cannot write {folder / FILE}"), filelock.FileLock(folder / LOCK):
            write_whole(folder / FILE, sealed(values))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values.

        >>> calibration = sf.calibrate(detector, false_alarms=0.2)
        >>> sf.Calibration.from_json(calibration.to_json()).image_threshold == calibration.image_threshold
        True
        """
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values |= {name: getattr(self, name).tolist() for name in ("image_scores", "map_maxima")}
        values["trusted"] = list(self.trusted)
        values["baseline"] = self.baseline.to_json() if self.baseline else None
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        """Read what to_json wrote.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: the values are not what was written.

        >>> sf.Calibration.from_json({"generation": 1})
        Traceback (most recent call last):
        KeyError: 'image_scores'
        """
        values = {"trusted": [], "method": 1, **values}  # which earlier releases did not name
        for name in ("image_scores", "map_maxima"):
            values[name] = np.array(values[name], np.float64)
            if values[name].ndim != 1 or not np.isfinite(values[name]).all():
                raise ValueError(f"{name}: expected a list of numbers")
        rate, group = values["false_alarms"], values["group"]
        if not (isinstance(values["settings"], dict) and isinstance(rate, float) and 0 < rate < 1):
            raise ValueError("expected settings, and a rate of false alarms")
        if not (isinstance(values["generation"], int) and (group is None or isinstance(group, str))):
            raise ValueError("expected a generation, and a group that is text")
        trusted, method = values["trusted"], values["method"]
        if not (isinstance(trusted, list) and all(isinstance(one, str) for one in trusted) and isinstance(method, int)):
            raise ValueError("expected a list of digests, and a number of the method")
        values["trusted"] = tuple(trusted)
        values["baseline"] = Baseline.from_json(values["baseline"]) if values["baseline"] else None
        return cls(**values)

    @classmethod
    def read(cls, folder: str | Path) -> Calibration | None:
        """Read the calibration of a gallery; None if it has none.

        Raises:
            CorruptGalleryError: it was damaged or edited, or is of another format version.

        >>> sf.Calibration.read(gallery.path) is None  # not calibrated yet
        True
        """
        return cls.read_file(Path(folder) / FILE)

    @classmethod
    def read_file(cls, path: Path) -> Calibration | None:
        """Read a calibration from a file of any name; see read.

        >>> sf.calibrate(detector, false_alarms=0.2).write(gallery.path)
        >>> sf.Calibration.read_file(gallery.file("calibration.json")).false_alarms
        0.2
        """
        values = read_format(path, FORMAT, FORMAT_VERSION, "calibrate again")
        if values is None:
            return None
        try:
            return cls.from_json(values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptGalleryError(f"{path}: not as it is written: {error!r}; calibrate again") from error
