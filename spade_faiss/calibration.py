"""Thresholds from normal images only, with a known rate of false alarms.

Each normal image is queried against the others. If a new normal image is exchangeable with these (made by the same
process, none of them copies of each other), then the chance that its score exceeds the conformal quantile, the score
of rank ceil((n + 1)(1 - alpha)) of n, is at most alpha (Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random
World", 2005; Angelopoulos & Bates, arXiv 2107.07511, section 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

from .baseline import Baseline
from .errors import CorruptGalleryError, OptionError
from .generation import TEXTS_TOGETHER, Generation
from .images import batched
from .options import QueryOptions, ScoreOptions, SearchOptions, filled, is_count
from .recipes import RECIPES
from .storage import storage_errors, write_whole

if TYPE_CHECKING:
    from .detector import Detector
    from .gallery import Gallery

FILE = "calibration.json"
LOCK = "calibration.lock"
FORMAT = "spade-faiss calibration"
FORMAT_VERSION = 2
DEFAULT_FALSE_ALARMS = 0.01
ROUNDING = 1e-9  # of a rank that is a whole number on paper

EIGHT_CONNECTED = np.ones((3, 3), int)


def images_needed(false_alarms: float) -> int:
    """Return the least number of normal images with which a false-alarm rate can be promised: ceil(1/alpha) - 1."""
    return math.ceil(1 / false_alarms - ROUNDING) - 1


def conformal_threshold(scores: NDArray[np.float64], false_alarms: float) -> float:
    """Return the score of rank ceil((n + 1)(1 - alpha)) of n: a new normal score exceeds it with chance at most alpha.

    Raises:
        OptionError: alpha is not in (0, 1), or n is too small for it, with the n that it takes.
    """
    if not ROUNDING <= false_alarms < 1:
        raise OptionError(f"false_alarms: expected a rate between 0 and 1, found {false_alarms}")
    n = len(scores)
    rank = max(1, math.ceil((n + 1) * (1 - false_alarms) - ROUNDING))
    if rank > n:
        raise OptionError(
            f"false_alarms {false_alarms:g}: expected at least {images_needed(false_alarms)} normal images "
            f"to calibrate with, found {n}; add normal images, or ask for a rate of at least {1 / (n + 1):.3g}"
        )
    return float(np.sort(scores)[rank - 1])


@dataclass(frozen=True)
class Region:
    """Connected pixels above the pixel threshold."""

    box: tuple[int, int, int, int]  # (left, top, right, bottom), half-open, pixels of the image
    area: int  # pixels
    peak: float  # largest pixel score


def find_regions(anomaly_map: NDArray[np.float32], threshold: float, min_region: int = 1) -> list[Region]:
    """Return the 8-connected regions of an (H, W) map above a threshold, of min_region pixels at least, worst first."""
    labels, count = ndimage.label(anomaly_map > threshold, EIGHT_CONNECTED)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        if areas[number] >= min_region:
            peak = float(anomaly_map[rows, columns][labels[rows, columns] == number].max())
            regions.append(Region((columns.start, rows.start, columns.stop, rows.stop), int(areas[number]), peak))
    return sorted(regions, key=lambda region: -region.peak)


@dataclass(frozen=True)
class Judgement:
    """What the thresholds say of a query.

    The paper's cascade: an image score at or under its threshold is normal; above it, the image is suspicious and the
    map decides: without a region above the pixel threshold it is normal after all.
    """

    verdict: str  # "normal" or "anomalous"
    p_value: float  # of the image score, among normal images
    score: float  # the image score in [0, 1], the threshold at 0.5
    regions: list[Region]  # worst first; of suspicious images only


@dataclass(frozen=True)
class Calibration:
    """Leave-one-out scores of normal images, and the thresholds that follow from them."""

    generation: int  # of the gallery: after add or remove the promise is that of another gallery
    settings: dict[str, Any]  # of the queries that it holds for
    false_alarms: float  # alpha
    group: str | None  # regular expression: images that it gives the same group were left out together
    image_scores: NDArray[np.float64]  # (n,)
    map_maxima: NDArray[np.float64]  # (n,)
    baseline: Baseline | None = None  # of normal images, where the settings ask for one

    @cached_property
    def image_threshold(self) -> float:
        """Image scores above it are suspicious."""
        return conformal_threshold(self.image_scores, self.false_alarms)

    @cached_property
    def pixel_threshold(self) -> float:
        """Pixel scores above it are anomalous."""
        return conformal_threshold(self.map_maxima, self.false_alarms)

    def p_value(self, image_score: float) -> float:
        """Return the share of normal images, the new one counted in, that score as high: (1 + #{>=}) / (n + 1)."""
        return float(1 + (self.image_scores >= image_score).sum()) / (1 + len(self.image_scores))

    def scaled(self, image_score: float) -> float:
        """Map an image score to [0, 1], monotone, the threshold to 0.5: score / (score + threshold)."""
        threshold = self.image_threshold
        if image_score == threshold:
            return 0.5
        return image_score / (image_score + threshold)

    def judge(
        self, image_score: float, peak: float, anomaly_map: NDArray[np.float32], min_region: int = 1
    ) -> Judgement:
        """Decide; see Judgement.

        Args:
            image_score: of the image.
            peak: maximum of the map at the size that calibration saw.
            anomaly_map: (H, W) at the size of the image.
            min_region: pixels; smaller regions do not count.
        """
        regions = []
        if image_score > self.image_threshold and peak > self.pixel_threshold:
            regions = find_regions(anomaly_map, self.pixel_threshold, min_region)
        return Judgement(
            "anomalous" if regions else "normal", self.p_value(image_score), self.scaled(image_score), regions
        )

    def write(self, folder: Path) -> None:
        """Write calibration.json into the folder of the gallery."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        values |= {name: getattr(self, name).tolist() for name in ("image_scores", "map_maxima")}
        values["baseline"] = self.baseline.to_json() if self.baseline else None
        values["xxh3"] = _checksum(values)
        # Not the writer's lock, which may be held for hours; two at once would write the same temporary file.
        with storage_errors(f"cannot write {folder / FILE}"), filelock.FileLock(folder / LOCK):
            write_whole(folder / FILE, json.dumps(values, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Calibration | None:
        """Read the calibration of a gallery; None where there is none.

        Raises:
            CorruptGalleryError: it was damaged or edited, or is of another format version.
        """
        path = folder / FILE
        try:
            values = json.loads(path.read_bytes())
            checksum = values.pop("xxh3", None) if isinstance(values, dict) else None
            whole = checksum is not None and checksum == _checksum(values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptGalleryError(f"{path}: cannot be read: {error}; calibrate again") from error
        if not whole:
            raise CorruptGalleryError(f"{path}: damaged or edited (checksum); calibrate again")
        if (values.pop("format", None), version := values.pop("format_version", None)) != (FORMAT, FORMAT_VERSION):
            raise CorruptGalleryError(
                f"{path}: expected format version {FORMAT_VERSION}, found {version}; calibrate again"
            )
        try:
            for name in ("image_scores", "map_maxima"):
                values[name] = np.array(values[name], np.float64)
                if values[name].ndim != 1 or not np.isfinite(values[name]).all():
                    raise ValueError(f"{name}: expected a list of numbers")
            rate, group = values["false_alarms"], values["group"]
            if not (isinstance(values["settings"], dict) and isinstance(rate, float) and 0 < rate < 1):
                raise ValueError("expected settings, and a rate of false alarms")
            if not (isinstance(values["generation"], int) and (group is None or isinstance(group, str))):
                raise ValueError("expected a generation, and a group that is text")
            values["baseline"] = Baseline.from_json(values["baseline"]) if values["baseline"] else None
            return cls(**values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptGalleryError(f"{path}: not as it is written: {error!r}; calibrate again") from error


def _checksum(values: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def calibrate(
    detector: Detector,
    false_alarms: float = DEFAULT_FALSE_ALARMS,
    *,
    sample: int | None = None,
    group: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Query normal images against the others.

    Args:
        detector: with the settings that the thresholds are to hold for.
        false_alarms: alpha, the promised rate.
        sample: how many images, drawn with the seed; None: all.
        group: a regular expression; images whose keys give the same match (or the same first group in it) are left out
            together: pictures of one part are so alike that leaving out one alone is too kind.
        seed: of the sample.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: too few images for the rate, with the number it takes; or no regular expression.
        NotEnoughImagesError: an image has no other to be compared with.
    """
    generation = detector.gallery.snapshot()  # once: another thread may write for as long as this takes
    n = len(draw(generation, sample, seed))
    conformal_threshold(np.zeros(n), false_alarms)  # before hours are spent
    _, scores = normal_scores(detector, generation, sample, group, seed, progress, "calibrate")
    return Calibration(
        generation.manifest.generation, detector.settings(), false_alarms, group, scores[:, 0], scores[:, 1],
        detector.baseline(),
    )  # fmt: skip


def draw(generation: Generation, sample: int | None, seed: int) -> NDArray[np.int64]:
    """Return the ids of a seeded sample of normal images, or of all, ascending.

    Raises:
        OptionError: no such sample or seed.
    """
    if not (sample is None or is_count(sample)) or not (is_count(seed) or seed == 0):
        raise OptionError(f"sample, seed: expected whole numbers >= 1 and >= 0, found {sample} and {seed}")
    ids = generation.ids()
    chosen: NDArray[np.int64] = np.random.default_rng(seed).choice(
        ids, min(sample or len(ids), len(ids)), replace=False
    )
    return np.sort(chosen)


def normal_scores(
    detector: Detector,
    generation: Generation,
    sample: int | None,
    group: str | None,
    seed: int,
    progress: bool,
    what: str,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Query normal images of one generation against the others; see calibrate.

    Returns:
        ids (n,), and (n, 2): image scores and maxima of maps.
    """
    chosen = draw(generation, sample, seed)
    groups = leave_out_groups(generation, chosen.tolist(), group)
    bar = tqdm(chosen.tolist(), unit="image", disable=None if progress else True, desc=what)
    found = detector.leave_one_out(bar, groups, generation)
    scores = np.array([(one.image_score, one.map_max) for one in found], np.float64)
    return chosen, scores.reshape(len(chosen), 2)


def leave_out_groups(generation: Generation, ids: Sequence[int], group: str | None) -> list[NDArray[np.int64]]:
    """Return, for each of some ids, the ids that are left out with it: its own, or all of its group.

    Raises:
        OptionError: the group is no regular expression.
    """
    if group is None:
        return [np.array([row]) for row in ids]
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise OptionError(f"group: expected a regular expression, found {group!r}: {error}") from error

    def name(key: str) -> str:
        match = pattern.search(key)
        return key if match is None else "\0" + (match[1] if pattern.groups else match[0])

    names = [name(key) for key in generation.keys(ids)]
    members: dict[str, list[int]] = {name: [] for name in names}
    for rows in batched(generation.ids().tolist(), TEXTS_TOGETHER):
        for row, key in zip(rows, generation.keys(rows), strict=True):
            if (found := members.get(name(key))) is not None:
                found.append(row)
    return [np.array(members[name]) for name in names]


def false_alarm_rate(scores: NDArray[np.float64], new: Iterable[float], false_alarms: float) -> float:
    """Return the share of new normal scores above the threshold from others: what the promise is checked with."""
    threshold = conformal_threshold(scores, false_alarms)
    return float(np.mean([score > threshold for score in new]))


def query_options(
    gallery: Gallery, search: SearchOptions | None, score: ScoreOptions | None, calibrated: bool = True
) -> tuple[SearchOptions, ScoreOptions]:
    """Fill in what is not given: as the gallery was calibrated, or else as its recipe says, or else as published.

    Raises:
        CorruptGalleryError: calibration.json was damaged or edited.
    """
    recipe = gallery.recipe or RECIPES["paper"]
    found = Calibration.read(gallery.path) if calibrated else None
    settings = found.settings if found else {}
    return _filled(search, settings, recipe.search), _filled(score, settings, recipe.score)


def _filled(given: QueryOptions | None, settings: dict[str, Any], recipe: QueryOptions) -> QueryOptions:
    if given is None:
        known = {field.name for field in fields(recipe)}
        return replace(recipe, **{name: value for name, value in settings.items() if name in known})
    return filled(filled(given, settings), vars(recipe))
