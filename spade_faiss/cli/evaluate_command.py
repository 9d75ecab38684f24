"""The command `evaluate`: image and pixel metrics of labelled sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import numpy as np

from ..errors import NotEnoughImagesError, OptionError
from ..gallery.gallery import Gallery
from ..gallery.reader import GalleryReader
from ..images.sources import ImageFile
from ..metrics.pixel import INTEGRATION_LIMIT
from ..report.colour_scale import colour_scale
from ..report.output_files import clear_earlier_evaluation, clear_earlier_run, refuse_among_images, refuse_foreign
from ..report.report import Report
from ..report.run_facts import RunFacts
from ..store.source_images import SourceImages
from . import options as args
from .dataset_options import DrawFlags, LabelledFlags, gallery_paths, open_labelled
from .flags import PATH, flag, takes
from .messages import exit_status, name_skipped, note, one_line
from .search_flags import SearchFlags

if TYPE_CHECKING:
    from ..datasets.category import Category
    from ..datasets.check import Checked
    from ..datasets.draws import Draws
    from ..detect.detector import Detector
    from ..evaluate import Evaluation, EvaluationOptions
    from ..extractors.registry import Extractor
    from ..repeats import Draw, Repeats


Opened = Callable[[Path], GalleryReader]  # opens a gallery, or a cluster


@dataclass(frozen=True)
class MetricFlags:
    """How metrics are computed."""

    metrics_size: Annotated[
        int | None,
        flag(
            "--metrics-size",
            type=int,
            help="Resize maps and masks to a square of this size, in px.  [default: the image's size]",
        ),
    ]
    integration_limit: Annotated[
        float,
        flag(
            "--integration-limit",
            type=float,
            default=INTEGRATION_LIMIT,
            show_default=True,
            help="Integrate AUPRO up to this false-positive rate.",
        ),
    ]
    skip_bad_masks: Annotated[
        bool,
        flag("--skip-bad-masks", is_flag=True, help="Leave images whose mask does not fit out of the pixel metrics."),
    ]
    skip_bad_images: Annotated[
        bool,
        flag("--skip-bad-images", is_flag=True, help="Leave test images that cannot be read out of all metrics."),
    ]
    ignore_label: Annotated[
        int | None,
        flag(
            "--ignore-label",
            type=click.IntRange(min=0),
            help="Leave pixels whose mask has this value, such as 255, out of the pixel metrics.",
        ),
    ]
    maps: Annotated[
        str | None,
        flag(
            "--maps",
            type=click.Choice(["tiff"]),
            help="Write float maps to OUTPUT/anomaly_maps, as MVTec's evaluation script reads them.",
        ),
    ]

    def options(self, output: Path | None) -> EvaluationOptions:
        """Check these options, and return the library's.

        Raises:
            click.UsageError: --maps without --output.
            OptionError: a value outside its range.
        """
        from ..evaluate import EvaluationOptions

        if self.maps and output is None:
            raise click.UsageError("--maps: expected --output, the folder to write to, as well")
        maps = output / "anomaly_maps" if output and self.maps else None
        return EvaluationOptions(
            self.integration_limit,
            self.metrics_size,
            self.skip_bad_masks,
            maps,
            skip_bad_images=self.skip_bad_images,
            ignore_label=self.ignore_label,
        )


@dataclass(frozen=True)
class EvaluateFlags:
    """Options of `evaluate`."""

    labelled: LabelledFlags
    draw: DrawFlags
    search: SearchFlags
    metrics: MetricFlags
    output: Annotated[
        Path | None,
        flag("--output", type=PATH, help="Write metrics.json, results.csv, curves and report.html to this folder."),
    ]
    report: args.ReportFlags
    network: args.NetworkFlags
    as_json: args.AsJson
    quiet: args.Quiet


@click.command()
@args.gallery
@click.argument("dataset", type=PATH, required=False)
@takes(EvaluateFlags)
def evaluate(gallery: Path, dataset: Path | None, flags: EvaluateFlags) -> None:
    """Query the test images of DATASET, or of any folders, and print image and pixel metrics.

    Pass `build` and `evaluate` the same options. For several categories put {category} into GALLERY:
    galleries/{category}.gallery. `evaluate` warns about test images that are also in the gallery (same SHA-256).
    All test images and masks are read before the first query.

    With --shots or --contaminate each draw is compared with a temporary gallery of its own, made as GALLERY is.
    """
    evaluate_with(gallery, dataset, flags, lambda path: Gallery.open(path, flags.network.device))


def evaluate_with(gallery: Path, dataset: Path | None, flags: EvaluateFlags, opened: Opened) -> None:
    """Do as `evaluate` says, with galleries or clusters."""
    from ..evaluate import check_categories

    options, draws = flags.metrics.options(flags.output), flags.draw.draws(flags.labelled.seed)
    categories = open_labelled(dataset, flags.labelled, drawing=bool(draws))
    if flags.output is not None:
        refuse_foreign(flags.output)
        for category in categories:
            images = [*category.normal, *(ImageFile(sample.path, sample.key) for sample in category.test)]
            refuse_among_images(flags.output, [dataset] if dataset else [], images)
    paths = gallery_paths(gallery, categories)
    bits = []  # of each gallery; a missing one is reported before hours are spent on the others
    for path in paths:
        with opened(path) as one:
            bits.append(one.spec.bits)
    if draws:
        from ..datasets.draws import draw
        from ..detect.calibration import conformal_threshold

        for category in categories:  # as is a draw that cannot be made, or not calibrated
            normal = draw(category, draws.shots, draws.contaminate, draws.seed).normal
            if flags.draw.false_alarms is not None:
                try:
                    conformal_threshold(np.zeros(len(normal)), flags.draw.false_alarms)
                except OptionError as error:
                    raise OptionError(f"{category.name}: {error}") from error
    checks = check_categories(categories, options, not flags.quiet, bits)  # as are bad images
    if flags.output is not None:
        clear_earlier_evaluation(flags.output)
        clear_earlier_run(flags.output)
    plans = [_Plan(*one, flags, options, opened) for one in zip(paths, categories, checks, strict=True)]
    run = _evaluate_draws(plans, draws) if draws else _evaluate_galleries(plans)
    skipped = list({item.path: item for one in run for item in (*one.skipped_images, *one.skipped_masks)}.values())
    name_skipped(skipped)
    exit_status(skipped)


@dataclass(frozen=True)
class _Plan:
    """A category to evaluate, and how."""

    path: Path  # of its gallery
    category: Category
    checked: Checked
    flags: EvaluateFlags
    options: EvaluationOptions
    opened: Opened

    @property
    def settings(self) -> dict[str, object]:
        """What metrics.json has beside the detector's settings."""
        labelled = self.flags.labelled
        names = "integration_limit", "metrics_size", "ignore_label"
        return {name: getattr(self.options, name) for name in names} | {"seed": labelled.seed, "every": labelled.every}

    def folder(self, several: bool) -> Path | None:
        """Return the folder for the report; None: there is none."""
        if self.flags.output is None:
            return None
        return self.flags.output / self.category.name if several else self.flags.output

    def evaluate(self, detector: Detector, folder: Path | None) -> Evaluation:
        """Evaluate the category with a detector, and write the report."""
        from ..evaluate import evaluate

        report = self.flags.report
        with _report(None if report.no_report else folder, detector, self.category, report) as page:
            return evaluate(detector, self.category, self.options, not self.flags.quiet, page, self.checked)


def _evaluate_galleries(plans: Sequence[_Plan]) -> list[Evaluation]:
    """Evaluate each category with its gallery, and print the metrics."""
    from ..evaluate import write_results

    evaluations: list[Evaluation] = []
    settings: list[dict[str, object]] = []
    for plan in plans:
        flags = plan.flags
        with plan.opened(plan.path) as opened:
            detector = args.detector_of(opened, flags.search, flags.network, plan.category.normal, quiet=flags.quiet)
            evaluations.append(plan.evaluate(detector, plan.folder(len(plans) > 1)))
            settings.append({**detector.settings(), **plan.settings})
        if flags.output:  # after each, so that a run that is stopped keeps what it has
            write_results(flags.output, evaluations, settings)
    if plans[0].flags.as_json:
        click.echo(json.dumps([one.to_json() for one in evaluations]))
    else:
        _print_table(evaluations)
    return evaluations


def _evaluate_draws(plans: Sequence[_Plan], draws: Draws) -> list[Evaluation]:
    """Evaluate each draw of each category with a temporary gallery, and print means and deviations."""
    from ..repeats import write_repeats

    drawn = {"shots": draws.shots, "contaminate": draws.contaminate, "repeat": draws.repeat, "seed": draws.seed}
    drawn |= {"false_alarms": plans[0].flags.draw.false_alarms}
    repeats: list[Repeats] = []
    settings: list[dict[str, object]] = []
    for plan in plans:
        found, own = _draws_of(plan, draws, len(plans) > 1)
        repeats.append(found)
        settings.append({**own, **plan.settings, **drawn})
        if plan.flags.output:  # after each, so that a run that is stopped keeps what it has
            write_repeats(plan.flags.output, repeats, settings)
    if plans[0].flags.as_json:
        click.echo(json.dumps([one.to_json() for one in repeats]))
    else:
        _print_deviations(repeats)
    return [evaluation for one in repeats for _, evaluation in one.draws]


def _draws_of(plan: _Plan, draws: Draws, several: bool) -> tuple[Repeats, dict[str, object]]:
    """Evaluate the draws of a category; returns the detector's settings too."""
    from ..repeats import Repeats, each_draw

    flags, name = plan.flags, plan.category.name
    repeats, settings = Repeats(name), dict[str, object]()
    found, maps = plan.folder(several), plan.options.maps
    with Gallery.open(plan.path, flags.network.device) as opened:
        extractor = flags.network.extractor_of(opened)
        for draw, own in each_draw(opened, plan.category, draws, extractor, plan.checked, not flags.quiet):
            if not flags.quiet:
                anomalous = len(draw.contamination)
                normal = len(draw.category.normal) - anomalous
                note(f"{name}, seed {draw.seed}: a gallery of {normal} normal and {anomalous} anomalous images")
            seed = f"seed-{draw.seed}"
            detector = _detector_over(own, extractor, draw, plan)
            options = replace(plan.options, maps=maps / seed if maps else None)
            one = replace(plan, category=draw.category, checked=draw.checked, options=options)
            repeats.draws.append((draw, one.evaluate(detector, found / seed if found else None)))
            settings = detector.settings()
    return repeats, settings


def _detector_over(own: Gallery, extractor: Extractor, draw: Draw, plan: _Plan) -> Detector:
    """Make the detector of a draw; errors name the draw instead of its gallery, which is gone in a moment."""
    from ..detect.calibrate import calibrate
    from ..detect.detector import Detector

    flags, normal = plan.flags, draw.category.normal
    search = flags.search.search_options(flags.network.device), flags.search.score_options()
    try:
        detector = Detector(own, extractor, *search, calibrated=False, normal=normal)
        if flags.draw.false_alarms is None:
            return detector
        calibrate(detector, flags.draw.false_alarms, progress=not flags.quiet).write(own.path)
        return Detector(own, extractor, *search, normal=normal)
    except (NotEnoughImagesError, OptionError) as error:
        where = f"{plan.category.name}, drawn with seed {draw.seed}"
        text = str(error)
        raise type(error)(
            text.replace(str(own.path), where) if str(own.path) in text else f"{where}: {text}"
        ) from error


def _report(
    folder: Path | None, detector: Detector, category: Category, flags: args.ReportFlags
) -> AbstractContextManager[Report | None]:
    if folder is None:
        return nullcontext()
    scale, title = colour_scale(detector), f"Evaluation of {category.name}"
    originals = SourceImages(detector.gallery.snapshot(), files=category.normal)
    return Report(folder / "report.html", RunFacts.of(detector), scale, title, originals, flags.report_images)


def _print_table(evaluations: Sequence[Evaluation]) -> None:
    """Print a line of metrics for each category and their means; on stderr, why a metric is missing."""
    from ..evaluate import METRICS, means

    rows = [(one.category, one.metrics) for one in evaluations] + [("Mean", means(evaluations))]
    _print_rows([(name, {metric: _figure(metrics[metric]) for metric in METRICS}) for name, metrics in rows])
    _print_reasons(evaluations)


def _print_deviations(repeats: Sequence[Repeats]) -> None:
    """Print a line of mean ± standard deviation for each category, and for the mean over them."""
    from ..evaluate import METRICS
    from ..repeats import over_categories

    rows = [(one.category, one.metrics, one.std) for one in repeats] + [("Mean", *over_categories(repeats))]
    shown = [(name, {m: _figure(metrics[m], std[m]) for m in METRICS}) for name, metrics, std in rows]
    _print_rows(shown)
    _print_reasons(repeats)


def _figure(value: float | None, std: float | None = None) -> str:
    return "-" if value is None else f"{value:.4f}" + ("" if std is None else f"±{std:.4f}")


def _print_rows(rows: Sequence[tuple[str, dict[str, str]]]) -> None:
    names = list(rows[0][1])
    rows = [(one_line(name), figures) for name, figures in rows]
    first = max(len("category"), *(len(name) for name, _ in rows))
    width = max(12, *(len(figure) for _, figures in rows for figure in figures.values()))
    click.echo(f"{'category':{first}} " + " ".join(f"{name:>{width}}" for name in names))
    for row, figures in rows:
        click.echo(f"{row:{first}} " + " ".join(f"{figures[name]:>{width}}" for name in names))


def _print_reasons(found: Sequence[Evaluation] | Sequence[Repeats]) -> None:
    for one in found:
        for metric, reason in one.reasons.items():
            click.echo(f"spade-faiss: note: {one.category}: no {metric}: {reason}", err=True)
