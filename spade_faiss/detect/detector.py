"""The Detector: a gallery, an extractor and settings that fit together, and what is kept between queries."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..arrays import Ids
from ..errors import CorruptGalleryError, NotEnoughImagesError, OptionError
from ..extractors.registry import Extractor
from ..gallery.reader import GalleryReader
from ..images.inputs import ImageLike
from ..options import ScoreOptions, SearchOptions
from ..pyramids.recomputed import Places, places, pyramids_of
from ..store.copies import Copies
from ..store.snapshot import Snapshot
from ..store.trusted import FILE as TRUSTED
from ..store.trusted import Trusted, read_trusted_file
from ..system.forks import remember
from . import measure_baseline, measure_doubts
from .baseline import Baseline
from .caches import Caches
from .calibration import FILE as CALIBRATION
from .calibration import METHOD, Calibration
from .detection import Detection
from .kept_baseline import identity_of, images_of
from .known_baseline import KnownBaseline
from .leave_out import most_left_out
from .pipeline import Pipeline
from .query import AnyImage
from .settings import UNNAMED, Settings


class Detector:
    """Compares images with a gallery of normal ones. Threads may share one, and so may processes, forked or spawned.

    It judges by the calibration, and goes by the trusted images, that the gallery had when it was made. If the gallery
    moves on to another commit, it warns that the calibration is of an earlier one; without a calibration, it measures
    the scale of normal images again.

    >>> detector = sf.Detector(gallery, toy, sf.SearchOptions(k=5))
    >>> detector.query("test/000.png").neighbours.sq_distances.shape
    (5,)
    """

    def __init__(
        self,
        gallery: GalleryReader,
        extractor: Extractor,
        search: SearchOptions | None = None,
        score: ScoreOptions | None = None,
        calibrated: bool = True,
        normal: Places = (),
        trusting: bool = True,
    ) -> None:
        """Check that everything fits together.

        Args:
            gallery: of normal images.
            extractor: the one that made it.
            search: retrieval and patch search; None: the gallery's calibration decides, else its recipe.
            score: distances to scores; None: likewise.
            calibrated: judge by the gallery's calibration, if it has one for the same settings.
            normal: more places where the image files may be, if the gallery recomputes patches: folders that it was
                built from, or the files.
            trusting: let the gallery's trusted images excuse their like by themselves, see Gallery.trust; False:
                treat them as all others.

        Raises:
            SpecMismatchError: the extractor is not the one that made the gallery, or has other settings.
            NotEnoughImagesError: the gallery is empty, or has fewer images than the k or k_score that was given.
            CorruptGalleryError: calibration.json or trusted.json was damaged or edited.
            DeviceError: another engine than "flat" is to run on a GPU that torch does not see.
            OptionError: localise "suspicious" with an image score from the map, or without a calibration for these
                settings; tile_places "same" in a gallery without tiles; options of matching that do not go together.
        """
        gallery.spec.require(extractor.spec, str(gallery.path))
        self.gallery = gallery
        self.extractor = extractor
        self._normal = places(normal)
        self._given = search, score
        self._calibrated, self._trusting = calibrated, trusting
        self.trusted = self._stored_trust() if trusting else {}
        found = self._stored_calibration() if calibrated else None
        self._settings = Settings.of(search, score, found.settings if found else None, gallery.recipe)
        self.search, self.score = self._settings.search, self._settings.score
        self._check_number_of_images(len(gallery))
        self._settings.check(str(gallery.path), [(h, w) for _, h, w in gallery.spec.level_shapes])
        self._check_kappa(search)
        if self.search.tile_places == "same" and gallery.spec.tile is None:
            raise OptionError(f"tile_places: 'same' goes with a gallery of tiles, found {gallery.path} without")
        self._told_of: int | None = None  # generation
        self.calibration = self._fitting(found)
        self._known = KnownBaseline(self.calibration.baseline if self.calibration else None)
        self._keeps_baseline = False
        self._check_localise()
        self._caches = Caches.of(self.search)
        self._lock = threading.Lock()
        remember(self)

    def __repr__(self) -> str:
        judged = "not calibrated" if self.calibration is None else f"false alarms {self.calibration.false_alarms:g}"
        return f"Detector({self.gallery!r}, k={self.k}, kappa={self.search.kappa}, {judged})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made of: unpickled, it looks at the last commit; the extractor has to be picklable."""
        return type(self), (self.gallery, self.extractor, *self._given, self._calibrated, self._normal, self._trusting)

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    def _stored_calibration(self) -> Calibration | None:
        return Calibration.read_file(self.gallery.file(CALIBRATION))

    def _stored_trust(self) -> Trusted:
        return read_trusted_file(self.gallery.file(TRUSTED))

    def _check_number_of_images(self, n: int) -> None:
        if not n:
            raise NotEnoughImagesError(f"{self.gallery.path}: expected normal images, found none; add some")
        for name, given in (("k", self.search.k), ("k_score", self.search.k_score)):
            if n < (given or 1):
                raise NotEnoughImagesError(
                    f"{name}: expected at most the number of normal images in {self.gallery.path}, {n}, "
                    f"found {given or self.default_k}"
                )

    def _check_kappa(self, given: SearchOptions | None) -> None:
        k, kappa = (given.k, given.kappa) if given else (None, None)
        if self.search.distinct and k is not None and kappa is not None and kappa > k:
            raise OptionError(
                f"kappa: expected at most {k}, the number of neighbours, each of which gives one match (distinct), "
                f"found {kappa}"
            )

    def _check_localise(self) -> None:
        if self.search.localise != "suspicious":
            return
        if self.score.image_score != "knn":
            raise OptionError(
                "localise='suspicious': expected an image score that needs no map, "
                f"found {self.score.image_score!r}; take image_score='knn', or localise='all'"
            )
        if self.calibration is None:
            raise OptionError(
                f"localise='suspicious': needs the thresholds of {self.gallery.path}, found none for these settings; "
                "calibrate the gallery, or take localise='all'"
            )

    def _fitting(self, found: Calibration | None) -> Calibration | None:
        """Return a calibration if it is one for these settings; warn if not, or if the gallery has changed since."""
        if found is None:
            return None
        if found.settings != (own := self.settings()):
            names = [name for name in {**own, **found.settings} if own.get(name) != found.settings.get(name)]
            theirs, ours = (", ".join(self._shown(of, name) for name in names) for of in (found.settings, own))
            self._tell(f"no verdicts: {self.gallery.path} was calibrated for {theirs}, not {ours}; calibrate again")
            return None
        if why := self._outdated(found, self.gallery.snapshot()):
            self._tell(why)
        if found.baseline and not found.baseline.fits(self.gallery.spec.level_shapes):
            raise CorruptGalleryError(f"{self.gallery.path}: calibration of another pyramid; calibrate again")
        if self._is_wrong(found):
            self._tell(f"{self.gallery.path}: an earlier release calibrated it, and was wrong here; calibrate again")
        if ties := found.ties:  # an earlier release did not refuse them
            self._tell(f"verdicts tell nothing: {self.gallery.path}: {ties}; calibrate again")
        return found

    def _shown(self, settings: dict[str, Any], name: str) -> str:
        """Return a setting for a message; a number of neighbours that was not given is the default one."""
        value = (UNNAMED | settings).get(name)
        if value is None and name in ("k", "k_score"):
            value = settings.get("k") or min(self.default_k, len(self.gallery))
        return f"{name} {value}"

    def _is_wrong(self, found: Calibration) -> bool:
        """Whether an earlier release made thresholds that are wrong; see METHOD."""
        by_group = found.group is not None and self.score.positions == "damped"
        is_small = bool(self.search.leave_out) and len(self.gallery) <= self.k
        return found.method < METHOD and (by_group or is_small)

    def _outdated(self, calibration: Calibration, snapshot: Snapshot) -> str | None:
        """Return why the rate is not promised any more, once for each commit that follows another; None: it is."""
        generation = snapshot.manifest.generation
        is_told, self._told_of = generation == self._told_of, generation
        why = None if is_told else calibration.outdated(generation, self.trusted.values())
        return why and f"{self.gallery.path}: false alarms are not promised any more: {why}; calibrate again"

    def _tell(self, text: str) -> None:
        """Say what a user should know of the calibration: a warning, unless a subclass has another place for it."""
        warnings.warn(text, stacklevel=4)

    def uncalibrated(self) -> Detector:
        """Return a detector with these settings, however they came to be, that no calibration judges.

        >>> detector.uncalibrated().settings() == detector.settings()
        True
        """
        search = replace(self.search, localise="all")  # without thresholds nothing is suspicious
        given = self.gallery, self.extractor, search, self.score
        return type(self)(*given, calibrated=False, normal=self._normal, trusting=self._trusting)

    def share_caches(self, other: Detector) -> None:
        """Keep levels of normal images together with another detector, as one over an earlier commit.

        >>> later = sf.Detector(gallery, toy)
        >>> later.share_caches(detector)
        >>> later.cache_counts == detector.cache_counts
        True
        """
        self._caches = other._caches

    @property
    def cache_counts(self) -> tuple[int, int]:
        """How many times the levels of a normal image were in memory when needed, and how many times read."""
        host, device = self._caches.host, self._caches.device
        return host.hits + (device.hits if device else 0), host.misses + (device.misses if device else 0)

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on, as JSON values: thresholds hold for these only.

        >>> detector.settings()["kappa"], detector.settings()["image_score"]
        (1, 'knn')
        """
        return self._settings.to_json()

    @property
    def needs_baseline(self) -> bool:
        """Whether scores are on the scale of normal images."""
        return self._settings.need_baseline

    @property
    def k(self) -> int:
        """Number of neighbours whose patches are searched."""
        return self._settings.k_of(len(self.gallery))

    @property
    def default_k(self) -> int:
        """Number of neighbours where none is given, in a gallery that has so many."""
        return self._settings.default_k

    @property
    def to_compare(self) -> int:
        """How many queries of normal images against the others their scale takes, at most; see baseline.

        >>> detector.to_compare  # the published settings have no need of one
        0
        """
        if not self.needs_baseline:
            return 0
        snapshot, search = self.gallery.snapshot(), self.search
        leave_out = most_left_out(search.leave_out, search.kappa or 1, self.k)
        copies, n = Copies(snapshot), len(snapshot)
        doubts = measure_doubts.sample_of(copies, n) * n // len(copies.images()) if leave_out else 0
        return min(measure_baseline.SAMPLE, n) + doubts

    def baseline(self) -> Baseline | None:
        """Return the scale of normal images: the calibration's, or measured at the first need; None: not needed.

        Measuring it takes 64 queries (measure_baseline.SAMPLE), and up to 256 more (measure_doubts.SAMPLE) if
        neighbours are left out.

        >>> detector.baseline() is None  # the published settings have no need of one
        True
        """
        return self._baseline_of(self.gallery.snapshot(), True)

    def keep_baseline(self) -> bool:
        """Share the scale of normal images with other processes of this user, by a file in the user's cache folder.

        Returns:
            whether it is known, so that nothing has to be measured.

        >>> detector.keep_baseline()  # the published settings have no need of one
        True
        """
        self._keeps_baseline = True
        if not self.needs_baseline:
            return True
        snapshot = self.gallery.snapshot()
        with self._lock:
            self._known.turn_to(snapshot.manifest)
            self._known.take(partial(self._identity, snapshot))
            return self._known.has_doubts

    def require_whole(self, snapshot: Snapshot) -> None:
        """Check that no normal images of a snapshot are out of reach, as those of a lost member of a cluster are.

        >>> detector.require_whole(gallery.snapshot())
        """

    def _identity(self, snapshot: Snapshot) -> dict[str, Any]:
        images, k = self._images_of(snapshot), self._settings.k_of(len(snapshot))
        return identity_of(snapshot.manifest, self.gallery.path, images, self.settings(), k, self.trusted)

    def _images_of(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return what says which images are normal; see kept_baseline.images_of."""
        return images_of(snapshot, snapshot.manifest, snapshot.ids())

    def _baseline_of(self, snapshot: Snapshot, doubts: bool) -> Baseline | None:
        if not self.needs_baseline:
            return None
        identity = partial(self._identity, snapshot) if self._keeps_baseline else None
        with self._lock:
            self._known.turn_to(snapshot.manifest)
            return self._known.measured(lambda: self._pipeline(snapshot), doubts, identity)

    def _pipeline(self, snapshot: Snapshot, settings: Settings | None = None) -> Pipeline:
        """Begin a run over a snapshot; settings: other than the detector's own."""
        pyramids = pyramids_of(snapshot, self.extractor, self._normal, self.search.verify_reads)
        return Pipeline(snapshot, self.extractor, settings or self._settings, pyramids, self._caches, self.trusted)

    def pipeline(self, snapshot: Snapshot | None = None, k: int | None = None, doubts: bool = True) -> Pipeline:
        """Return a run over one snapshot of the gallery, for several calls that must agree; None: the open one.

        Args:
            snapshot: of the gallery; None: the one that it has open.
            k: number of neighbours that are searched, on the detector's scale of normal images; its thresholds do not
                hold for another number, and there are no verdicts. None: the detector's own.
            doubts: go by how much the normal images doubt each other, and find it out if it is not known.

        >>> run = detector.pipeline()
        >>> [found.image_score > 0 for found in run.leave_one_out([0, 1])]
        [True, True]
        """
        snapshot = snapshot or self.gallery.snapshot()
        snapshot.manifest.spec.require(self.extractor.spec, str(self.gallery.path))  # another one may lie there now
        self._check_number_of_images(len(snapshot))
        if self.calibration and (why := self._outdated(self.calibration, snapshot)):
            self._tell(why)
        baseline = self._baseline_of(snapshot, doubts)
        if k is None or k == self._settings.k_of(len(snapshot)):
            run = self._pipeline(snapshot).scored_by(baseline, self.calibration)
        else:
            run = self._pipeline(snapshot, self._settings.searching(k, len(snapshot))).scored_by(baseline)
        return run if doubts else measure_doubts.without_doubts(run)

    def query(self, image: ImageLike) -> Detection:
        """Look for anomalies in one image.

        Args:
            image: a path, a file's bytes, a file that is open in binary mode, a PIL image, an (H, W, 3) RGB or (H, W)
                uint8 array, or a (3, H, W), (H, W, 3) or (H, W) uint8 torch tensor. Float tensors are refused, as
                their range is not known.

        Raises:
            ImageError: the image cannot be read, or it is something else.
            CorruptGalleryError: the gallery's files are damaged.
            SourceError: an image file that the gallery recomputes patches from is gone or has changed.

        >>> detector.query("normal/000.png").image_score < detector.query("test/000.png").image_score
        True
        """
        return self.query_batch([image])[0]

    def query_batch(self, images: Sequence[ImageLike]) -> list[Detection]:
        """Look for anomalies in several images, as stream does, and return all that is found, in their order.

        Within a batch, the query comes next that has the most neighbours in memory.

        >>> [found.path for found in detector.query_batch(["normal/000.png", "test/000.png"])]
        ['normal/000.png', 'test/000.png']
        """
        return self.pipeline().batch(images)

    def stream(self, images: Iterable[AnyImage]) -> Iterator[Detection]:
        """Do as query_batch, but hand on each detection as it is made: memory does not grow with their number.

        While one query is searched, a thread reads the neighbours of the next; where a GPU takes part, another one
        decodes and extracts the next batch. Images are taken from an iterator in the caller's thread, up to two batches
        ahead of what is handed on. What cannot be read is raised at its turn, after the detections before it.

        >>> from pathlib import Path
        >>> sum(1 for found in detector.stream(sorted(Path("normal").iterdir())))
        12
        """
        yield from self.pipeline().stream(images)

    def leave_one_out(self, ids: Iterable[int], without: Iterable[Ids] | None = None) -> Iterator[Detection]:
        """Query stored normal images, each against the others (k of them, or all), at the size of the resized image.

        Args:
            ids: the images.
            without: for each, the ids that it is not compared with, and neither with their copies; None: itself.

        Raises:
            NotEnoughImagesError: there is no other image, or all are copies of one.
            OptionError: an id that is not in the gallery.

        >>> [found] = detector.leave_one_out([0])
        >>> "000.png" in found.neighbours.keys
        False
        """
        pipeline = self.pipeline()
        yield from pipeline.leave_one_out(pipeline.snapshot.present(list(ids)).tolist(), without)
