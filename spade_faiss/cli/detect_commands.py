"""Commands that compare images with a gallery: calibrate, audit, query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import click

from ..detect.calibration import DEFAULT_FALSE_ALARMS, Calibration
from ..detect.query_files import query_files, query_one_by_one
from ..detect.stage_times import StageTimes
from ..errors import ImageError
from ..gallery.gallery import Gallery
from ..gallery.reader import GalleryReader
from ..images.annotations import notes as annotation_notes
from ..images.annotations import with_photos
from ..images.sources import ImageFile, Listing, list_sources
from ..ingest.pipeline import Skipped
from ..options import FeatureOptions, Localise, ScoreOptions, SearchOptions
from ..report.colour_scale import colour_scale
from ..report.output_files import refuse_among_images
from ..report.report import Report
from ..report.result_folder import ResultFolder, as_json
from ..report.run_facts import RunFacts
from ..report.run_record import RunRecord
from ..store.source_images import SourceImages
from . import options as args
from .cache_options import CacheFlags
from .flags import PATH, changed, flag, takes
from .messages import as_line, exit_status, name_notes, name_skipped, note, one_line
from .search_flags import SearchFlags

if TYPE_CHECKING:
    from ..detect.detector import Detector


@dataclass(frozen=True)
class CalibrateFlags:
    """Options of `calibrate`."""

    search: SearchFlags
    false_alarms: Annotated[
        float,
        flag(
            "--false-alarms",
            type=float,
            default=DEFAULT_FALSE_ALARMS,
            show_default=True,
            help="False-alarm rate to promise.",
        ),
    ]
    sample: args.SampleFlags
    normal: args.Normal
    network: args.NetworkFlags
    quiet: args.Quiet


@click.command()
@args.gallery
@takes(CalibrateFlags)
def calibrate(gallery: Path, flags: CalibrateFlags) -> None:
    """Find the thresholds of GALLERY from its own images: each is compared with the others."""
    with Gallery.open(gallery, flags.network.device) as opened:
        calibrate_opened(opened, flags, lambda found: found.write(gallery))


def calibrate_opened(opened: GalleryReader, flags: CalibrateFlags, write: Callable[[Calibration], None]) -> None:
    """Find the thresholds of a gallery or a cluster, write them and print them."""
    from ..detect.calibrate import calibrate as find_thresholds
    from ..store.copies import Copies

    sample = flags.sample
    args.check_normal(opened, flags.normal, False, flags.quiet)
    detector = args.detector_of(opened, flags.search, flags.network, flags.normal, calibrated=False)
    found = find_thresholds(
        detector, flags.false_alarms, sample=sample.sample, group=sample.group, seed=sample.seed,
        progress=not flags.quiet,
    )  # fmt: skip
    write(found)
    images = len(Copies(opened.snapshot()).images())  # fewer than tiles
    if copies := min(sample.sample or images, images) - len(found.image_scores):
        are = "image is a copy of another" if copies == 1 else "images are copies of others"
        click.echo(f"spade-faiss: note: {copies} {are}; they are left out together, and count once", err=True)
    click.echo(
        f"{len(found.image_scores)} images: image score above {found.image_threshold:.6g} is suspicious, "
        f"pixel score above {found.pixel_threshold:.6g} anomalous; false alarms at most {found.false_alarms:g}"
    )


@dataclass(frozen=True)
class AuditFlags:
    """Options of `audit`."""

    search: SearchFlags
    top: Annotated[
        int,
        flag("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Number of images to show."),
    ]
    sample: args.SampleFlags
    output: Annotated[
        Path | None,
        flag(
            "--output",
            type=PATH,
            help="Write results.jsonl, report.html, maps/, matches/ and overlays/ of the images shown to this folder.",
        ),
    ]
    normal: args.Normal
    report: args.ReportFlags
    network: args.NetworkFlags
    cache: CacheFlags
    as_json: args.AsJson
    quiet: args.Quiet


@click.command()
@args.gallery_to_read
@takes(AuditFlags)
def audit(gallery: Path, flags: AuditFlags) -> None:
    """Show the images of GALLERY that are least like the others: defects among the normal images hide defects."""
    from ..detect.audit import find_suspects, suspect_images

    sample = flags.sample
    if flags.output is not None:
        args.check_output(flags.output)
    with flags.cache.open(gallery, flags.network.device) as opened:
        shows = flags.output is not None and not flags.report.no_report
        args.check_normal(opened, flags.normal, shows, flags.quiet)
        detector = args.detector_of(opened, flags.search, flags.network, flags.normal, calibrated=False)
        suspects = find_suspects(
            detector, sample=sample.sample, group=sample.group, seed=sample.seed, progress=not flags.quiet
        )
        if copied := sum(one.copies > 0 for one in suspects):
            click.echo(f"spade-faiss: note: {copied} images have copies; they are left out together", err=True)
        suspects = suspects[: flags.top]
        if not flags.as_json:
            click.echo(f"{'oddity':>8} {'image score':>12} {'map max':>12}  image")
        for one in suspects:
            if flags.as_json:
                click.echo(as_line(one.to_json()))
            else:
                click.echo(f"{one.outlier_score:8.2f} {one.image_score:12.6g} {one.map_max:12.6g}  {one_line(one.key)}")
        if flags.output is None:
            return
        originals = SourceImages(opened.snapshot(), flags.normal)
        with _results(detector, flags.output, flags.normal, flags.report, f"Audit of {gallery.name}") as folder:
            for one, pixels, detection in suspect_images(detector, suspects, originals, sample.group):
                folder.write(ImageFile(Path(one.key), one.key), pixels, detection)
            folder.close([])


@dataclass(frozen=True)
class QuerySearchFlags(SearchFlags):
    """How a query is searched and scored, and what counts as a region."""

    min_region: Annotated[
        int | None, flag("--min-region", type=int, help="Size of the smallest region that counts, in px.")
    ]
    localise: Annotated[
        Localise | None,
        flag(
            "--localise",
            type=click.Choice(get_args(Localise)),
            help="Localise anomalies in all images, or in suspicious ones only.",
        ),
    ]

    def search_options(self, device: str) -> SearchOptions:
        """Return the options of retrieval and patch search."""
        return changed(super().search_options(device), localise=self.localise)

    def score_options(self) -> ScoreOptions:
        """Return the options of scoring."""
        return changed(super().score_options(), min_region=self.min_region)


@dataclass(frozen=True)
class QueryFlags:
    """Options of `query`."""

    search: QuerySearchFlags
    output: Annotated[
        Path | None,
        flag(
            "--output",
            type=PATH,
            help="Write results.jsonl, report.html, maps/, matches/ and overlays/ to this folder.",
        ),
    ]
    normal: args.Normal
    report: args.ReportFlags
    network: args.NetworkFlags
    cache: CacheFlags
    strict: args.Strict
    profile: Annotated[
        bool,
        flag(
            "--profile",
            is_flag=True,
            help="Query the images one at a time, with nothing read ahead, and show on stderr where the time went.",
        ),
    ]
    as_json: args.AsJson
    quiet: args.Quiet


@click.command()
@args.gallery_to_read
@args.sources
@takes(QueryFlags)
def query(gallery: Path, sources: tuple[Path, ...], flags: QueryFlags) -> None:
    """Look for anomalies in the images in SOURCE..., files and folders."""
    files = listed(sources, flags)  # a mistake in a path is reported before the network is loaded
    with flags.cache.open(gallery, flags.network.device) as opened:
        exit_status(query_opened(opened, files, flags))


def query_opened(opened: GalleryReader, files: Listing, flags: QueryFlags) -> list[Skipped]:
    """Query a gallery or a cluster, and print and write what is found; returns the images that were skipped."""
    args.check_normal(opened, flags.normal, flags.output is not None and not flags.report.no_report, flags.quiet)
    detector = args.detector_of(opened, flags.search, flags.network, flags.normal, quiet=flags.quiet)
    if detector.search.k is None and detector.k < detector.default_k and not flags.quiet:
        note(f"K = {detector.k}, all images of the gallery")
    skipped = [Skipped(one.path, one.reason) for one in files.unlisted]
    notes: list[str] = []
    missing: set[str] = set()
    times = StageTimes()
    with ExitStack() as stack:
        folder = None
        if flags.output is not None:
            title = f"Query against {opened.path.name}"
            results = _results(detector, flags.output, flags.normal, flags.report, title)
            folder = stack.enter_context(results)
        if not flags.as_json:
            click.echo(f"{'image score':>12} {'map max':>12}  {'verdict':9}  image")
        taken = None if flags.strict else skipped
        if flags.profile:
            found = times.of(query_one_by_one(detector, files, taken, notes, folder is not None))
        else:
            found = query_files(detector, files, taken, not flags.quiet, notes, folder is not None)
        for file, pixels, detection in found:
            missing |= set(detection.missing)
            if folder:
                skipped += folder.write_or_skip(file, pixels, detection, flags.strict)
            if flags.as_json:
                click.echo(as_line(as_json(file, detection)))
            else:
                scores = f"{detection.image_score:12.6g} {detection.map_max:12.6g}"
                click.echo(f"{scores}  {detection.verdict or '-':9}  {one_line(file.key)}")
        if folder:
            folder.close(skipped)
    name_skipped(skipped)
    if not flags.quiet:
        name_notes(notes)
    if flags.profile:
        click.echo("\n".join(times.lines() or ["no image was queried: there are no times"]), err=True)
    if missing:
        note(f"members that were missing in some queries: {', '.join(sorted(missing))}")
    return skipped


def listed(sources: Sequence[Path], flags: QueryFlags) -> Listing:
    """List the images to query; says what is passed over and what looks like masks.

    Raises:
        OptionError: an option of the query outside its range, which is told before any note.
        ImageError: as list_sources; with --strict, what cannot be listed.
        OutputError: --output would lie among these images.
    """
    flags.search.search_options(flags.network.device)
    flags.search.score_options()
    FeatureOptions(batch_size=flags.network.batch_size)
    files = with_photos(list_sources(sources))
    for one in files.unlisted if flags.strict else ():
        raise ImageError(one.reason)
    if flags.output is not None:
        args.check_output(flags.output)
        refuse_among_images(flags.output, sources, files)
    if not flags.quiet:
        for text in [*files.notes, *annotation_notes(files, skipped=False)]:
            note(text)
        if files.passed_over:
            note(files.passed_over)
    return files


@contextmanager
def _results(
    detector: Detector, output: Path, normal: Sequence[Path], flags: args.ReportFlags, title: str
) -> Iterator[ResultFolder]:
    """Open the folder of --output, with its report unless --no-report was given."""
    scale = colour_scale(detector)
    with ExitStack() as stack:
        report = None
        if not flags.no_report:
            originals = SourceImages(detector.gallery.snapshot(), normal)
            report = Report(output / "report.html", RunFacts.of(detector), scale, title, originals, flags.report_images)
            stack.enter_context(report)
        yield stack.enter_context(ResultFolder(output, scale, report, RunRecord.of(detector)))
