"""The command `evaluate`: image and pixel metrics of labelled sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from ..gallery.gallery import Gallery
from ..metrics.pixel import INTEGRATION_LIMIT
from ..report.colour_scale import colour_scale
from ..report.report import Report
from ..report.run_facts import RunFacts
from ..store.source_images import SourceImages
from . import options as args
from .dataset_options import LabelledFlags, gallery_paths, open_labelled
from .flags import PATH, flag, takes
from .messages import exit_status, name_skipped

if TYPE_CHECKING:
    from ..datasets.category import Category
    from ..detect.detector import Detector
    from ..evaluate import Evaluation, EvaluationOptions


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
    search: args.SearchFlags
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
    """
    from ..evaluate import check_categories, write_results
    from ..evaluate import evaluate as evaluate_category

    options = flags.metrics.options(flags.output)
    categories = open_labelled(dataset, flags.labelled)
    paths = gallery_paths(gallery, categories)
    for path in paths:
        Gallery.open(path).close()  # a missing one is reported before hours are spent on the others
    checks = check_categories(categories, options, progress=not flags.quiet)  # as are bad images
    evaluations: list[Evaluation] = []
    for path, category, checked in zip(paths, categories, checks, strict=True):
        folder = flags.output
        if folder is not None and len(categories) > 1:
            folder /= category.name
        with Gallery.open(path, flags.network.device) as opened:
            detector = args.detector_of(opened, flags.search, flags.network, category.normal, quiet=flags.quiet)
            with _report(None if flags.report.no_report else folder, detector, category, flags.report) as report:
                found = evaluate_category(detector, category, options, not flags.quiet, report, checked)
            evaluations.append(found)
        if flags.output:  # after each, so that a run that is stopped keeps what it has
            settings = {**detector.settings(), "integration_limit": options.integration_limit}
            settings |= {"metrics_size": options.metrics_size, "ignore_label": options.ignore_label}
            settings |= {"seed": flags.labelled.seed, "every": flags.labelled.every}
            write_results(flags.output, evaluations, settings)
    if flags.as_json:
        click.echo(json.dumps([one.to_json() for one in evaluations]))
    else:
        _print_table(evaluations)
    skipped = [item for one in evaluations for item in (*one.skipped_images, *one.skipped_masks)]
    name_skipped(skipped)
    exit_status(skipped)


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

    width = max(len("category"), *(len(one.category) for one in evaluations))
    click.echo(f"{'category':{width}} " + " ".join(f"{name:>12}" for name in METRICS))
    for name, metrics in [(one.category, one.metrics) for one in evaluations] + [("Mean", means(evaluations))]:
        figures = ("-" if metrics[metric] is None else f"{metrics[metric]:.4f}" for metric in METRICS)
        click.echo(f"{name:{width}} " + " ".join(f"{figure:>12}" for figure in figures))
    for one in evaluations:
        for metric, reason in one.reasons.items():
            click.echo(f"spade-faiss: note: {one.category}: no {metric}: {reason}", err=True)
