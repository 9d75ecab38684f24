"""Commands that compare images with a gallery: calibrate, audit, query, evaluate, demo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..detect.calibration import DEFAULT_FALSE_ALARMS
from ..detect.query_files import query_files
from ..extractors.spec import DEFAULT_EXTRACTOR
from ..gallery.gallery import Gallery
from ..images.sources import ImageFile, find_images
from ..ingest.pipeline import Skipped
from ..metrics.pixel import INTEGRATION_LIMIT
from ..options import DEFAULT_K
from ..report.colour_scale import colour_scale
from ..report.report import Report
from ..report.result_folder import ResultFolder, as_json
from ..report.run_facts import RunFacts
from ..store.source_images import SourceImages
from . import options as args
from .dataset_options import gallery_paths, labelled, open_labelled

if TYPE_CHECKING:
    from ..datasets.category import Category
    from ..detect.detector import Detector


@click.command()
@args.gallery
@args.search
@click.option(
    "--false-alarms", type=float, default=DEFAULT_FALSE_ALARMS, show_default=True, help="The rate to promise."
)
@args.normals
@args.originals
@args.network
@args.quiet
def calibrate(gallery: Path, weights: Path | None, **given: Any) -> None:
    """Find the thresholds of GALLERY from its own images: each is compared with the others."""
    from ..detect.calibrate import calibrate as find_thresholds

    with Gallery.open(gallery, given["device"]) as opened:
        detector = args.detector_of(opened, weights, given, calibrated=False, normal=given["normal"])
        found = find_thresholds(
            detector, given["false_alarms"], sample=given["sample"], group=given["group"], seed=given["seed"],
            progress=not given["quiet"],
        )  # fmt: skip
        found.write(gallery)
        click.echo(
            f"{len(found.image_scores)} images: image score above {found.image_threshold:.6g} is suspicious, "
            f"pixel score above {found.pixel_threshold:.6g} anomalous; false alarms at most {found.false_alarms:g}"
        )


@click.command()
@args.gallery
@args.search
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True, help="Show so many.")
@args.normals
@args.output("Write results.jsonl, report.html, maps/, matches/ and overlays/ of those shown here.")
@args.originals
@args.report
@args.network
@args.as_json_lines
@args.quiet
def audit(gallery: Path, weights: Path | None, **given: Any) -> None:
    """Show the images of GALLERY that are least like the others: defects among the normal images hide defects."""
    from ..detect.audit import find_suspects, suspect_images

    with Gallery.open(gallery, given["device"]) as opened:
        detector = args.detector_of(opened, weights, given, calibrated=False, normal=given["normal"])
        suspects = find_suspects(
            detector, sample=given["sample"], group=given["group"], seed=given["seed"], progress=not given["quiet"]
        )[: given["top"]]
        if not given["as_lines"]:
            click.echo(f"{'oddity':>8} {'image score':>12} {'map max':>12}  image")
        for one in suspects:
            line = f"{one.outlier_score:8.2f} {one.image_score:12.6g} {one.map_max:12.6g}  {one.key}"
            click.echo(json.dumps(one.to_json(), ensure_ascii=False) if given["as_lines"] else line)
        with _result_folder(detector, given, f"Audit of {gallery.name}") as folder:
            if folder is None:
                return
            for one, pixels, detection in suspect_images(
                detector, suspects, SourceImages(opened.snapshot(), given["normal"]), given["group"]
            ):
                folder.write(ImageFile(Path(one.key), one.key), pixels, detection)
            folder.close([])


@click.command()
@args.gallery
@args.sources
@args.search
@click.option("--min-region", type=int, help="Px; smaller regions do not count.")
@click.option("--localise", type=click.Choice(["all", "suspicious"]), help="All images, or suspicious ones only.")
@args.output("Write results.jsonl, report.html, maps/, matches/ and overlays/ here.")
@args.originals
@args.report
@args.network
@args.strict
@args.as_json_lines
@args.quiet
def query(gallery: Path, sources: tuple[Path, ...], weights: Path | None, **given: Any) -> None:
    """Look for anomalies in the images in SOURCE..., files and folders."""
    files = find_images(sources)
    with Gallery.open(gallery, given["device"]) as opened:
        detector = args.detector_of(opened, weights, given, normal=given["normal"])
        if detector.search.k is None and detector.k < DEFAULT_K and not given["quiet"]:
            click.echo(f"spade-faiss: note: K = {detector.k}, all images of the gallery", err=True)
        skipped: list[Skipped] = []
        with _result_folder(detector, given, f"Query against {gallery.name}") as folder:
            if not given["as_lines"]:
                click.echo(f"{'image score':>12} {'map max':>12}  {'verdict':9}  image")
            taken = None if given["strict"] else skipped
            for source, pixels, detection in query_files(detector, files, taken, not given["quiet"]):
                if folder:
                    folder.write(source, pixels, detection)
                if given["as_lines"]:
                    click.echo(json.dumps(as_json(source, detection), ensure_ascii=False))
                else:
                    scores = f"{detection.image_score:12.6g} {detection.map_max:12.6g}"
                    click.echo(f"{scores}  {detection.verdict or '-':9}  {source.key}")
            if folder:
                folder.close(skipped)
        args.name_skipped(skipped)
        args.exit_status(skipped)


@contextmanager
def _result_folder(detector: Detector, given: dict[str, Any], title: str) -> Iterator[ResultFolder | None]:
    """Open the folder of --output with its report, where they were asked for."""
    output: Path | None = given["output"]
    if output is None:
        yield None
        return
    scale, gallery = colour_scale(detector), detector.gallery
    with ExitStack() as stack:
        report = None
        if not given["no_report"]:
            originals, path = SourceImages(gallery.snapshot(), given["normal"]), output / "report.html"
            report = Report(path, RunFacts.of(detector), scale, title, originals, given["report_images"])
            stack.enter_context(report)
        yield stack.enter_context(ResultFolder(output, scale, report))


@click.command()
@args.gallery
@click.argument("dataset", type=click.Path(path_type=Path), required=False)
@labelled
@args.search
@click.option("--metrics-size", type=int, help="Resize maps and masks to this square.  [default: the image's size]")
@click.option("--integration-limit", type=float, default=INTEGRATION_LIMIT, show_default=True, help="Of AUPRO.")
@click.option("--skip-bad-masks", is_flag=True, help="Leave images out of the pixel metrics whose mask does not fit.")
@click.option(
    "--maps", type=click.Choice(["tiff"]), help="Write float maps to OUTPUT/anomaly_maps, as MVTec's script reads."
)
@args.output("Write metrics.json, results.csv, curves, report.html here.")
@args.report
@args.network
@args.as_json_lines
@args.quiet
def evaluate(gallery: Path, dataset: Path | None, weights: Path | None, output: Path | None, **given: Any) -> None:
    """Query the test images of DATASET, or of any folders, and print image and pixel metrics.

    With several categories GALLERY has {category} in it: galleries/{category}.gallery
    """
    from ..evaluate import METRICS, EvaluationOptions, means, write_results
    from ..evaluate import evaluate as evaluate_category

    if given["maps"] and output is None:
        raise click.UsageError("--maps: expected --output, the folder to write to, as well")
    options = EvaluationOptions(
        given["integration_limit"], given["metrics_size"], given["skip_bad_masks"],
        output / "anomaly_maps" if output and given["maps"] else None,
    )  # fmt: skip
    categories = open_labelled(dataset, given)
    paths = gallery_paths(gallery, categories)
    for path in paths:
        Gallery.open(path).close()  # one that is missing is missed before hours are spent on the others
    evaluations = []
    for path, category in zip(paths, categories, strict=True):
        with Gallery.open(path, given["device"]) as opened:
            # Its calibration gives the report's verdicts.
            detector = args.detector_of(opened, weights, given, normal=category.normal)
            folder = None if output is None else output / category.name if len(categories) > 1 else output
            reported = folder if not given["no_report"] else None
            with _category_report(reported, detector, category, given["report_images"]) as report:
                found = evaluate_category(detector, category, options, progress=not given["quiet"], report=report)
                evaluations.append(found)
        settings = {**detector.settings(), "integration_limit": options.integration_limit}
        settings |= {name: given[name] for name in ("metrics_size", "seed", "every")}
        if output:  # after each, so that a run that is stopped keeps what it has
            write_results(output, evaluations, settings)
    if given["as_lines"]:
        click.echo(json.dumps([one.to_json() for one in evaluations]))
    else:
        width = max(len("category"), *(len(one.category) for one in evaluations))
        click.echo(f"{'category':{width}} " + " ".join(f"{name:>12}" for name in METRICS))
        for name, metrics in [(one.category, one.metrics) for one in evaluations] + [("Mean", means(evaluations))]:
            figures = ("-" if metrics[metric] is None else f"{metrics[metric]:.4f}" for metric in METRICS)
            click.echo(f"{name:{width}} " + " ".join(f"{figure:>12}" for figure in figures))
        for one in evaluations:
            for metric, reason in one.reasons.items():
                click.echo(f"spade-faiss: note: {one.category}: no {metric}: {reason}", err=True)
    skipped = [item for one in evaluations for item in one.skipped_masks]
    args.name_skipped(skipped)
    args.exit_status(skipped)


def _category_report(
    folder: Path | None, detector: Detector, category: Category, cards: int
) -> AbstractContextManager[Report | None]:
    """Begin the report of a category, where one was asked for."""
    if folder is None:
        return nullcontext()
    originals = SourceImages(detector.gallery.snapshot(), files=category.normal)
    facts, title = RunFacts.of(detector), f"Evaluation of {category.name}"
    return Report(folder / "report.html", facts, colour_scale(detector), title, originals, cards)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("spade-demo"), show_default=True)
@click.option("--extractor", default=DEFAULT_EXTRACTOR, show_default=True)
@args.quiet
def demo(output: Path, extractor: str, quiet: bool) -> None:
    """Build a gallery from the sample images, query the defective ones, write a report."""
    from .demo import run_demo

    for line in run_demo(output, extractor, progress=not quiet):
        click.echo(line)
