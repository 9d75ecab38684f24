"""The command line: parse, call, print.

Results go to stdout, progress and notes to stderr. Exit status: 0 done, 1 it could not be done, 2 wrong usage,
3 done but some inputs were skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__
from . import cli_options as args
from .calibration import DEFAULT_FALSE_ALARMS
from .errors import ImageError, OptionError, SpadeError
from .features import DEFAULT_EXTRACTOR, Extractor, load_extractor
from .gallery import Gallery
from .images import find_images
from .ingest import IngestReport, Skipped, estimate
from .metrics import INTEGRATION_LIMIT
from .options import DEFAULT_K, MIB, FeatureOptions, IndexOptions, ScoreOptions, SearchOptions
from .results import ResultFolder, as_json, colour_scale, query_sources, write_skipped

EXIT_SKIPPED = 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="spade-faiss")
def cli() -> None:
    """Find defects by comparing images with normal ones only, however many there are."""


@cli.command()
@args.gallery
@args.sources
@click.option(
    "--extractor", default=DEFAULT_EXTRACTOR, show_default=True, help="Or wide_resnet50_2, a ResNet, timm:NAME, toy."
)
@click.option("--image-size", type=args.Size(), help="Images are resized to this.  [default: the extractor's]")
@click.option("--crop", type=args.Size(), help="The centre of the resized image is used.  [default: all of it]")
@click.option("--levels", help="Pyramid levels, finest first, by commas.  [default: the extractor's]")
@click.option("--neighbourhood", type=int, default=1, show_default=True, help="Average each level over P x P, odd.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--index", default="auto", show_default=True, help="auto, flat, ivf or a FAISS factory string.")
@click.option("--nlist", type=int, help="IVF: number of lists.  [default: from the number of images]")
@click.option("--nprobe", type=int, help="IVF: lists visited by a search.  [default: from nlist]")
@click.option("--train-images", type=int, help="IVF: size of the training sample.  [default: from nlist]")
@args.network
@args.replace
@args.strict
@args.quiet
def build(gallery: Path, sources: tuple[Path, ...], extractor: str, weights: Path | None, **given: Any) -> None:
    """Make GALLERY from the normal images in SOURCE..., files and folders.

    Run again, it goes on from where it was stopped.
    """
    levels = tuple(part.strip() for part in given["levels"].split(",")) if given["levels"] else None
    names = ("image_size", "crop", "neighbourhood", "dtype", "batch_size", "device")
    options = FeatureOptions(levels=levels, **{name: given[name] for name in names})
    images = find_images(sources)
    loaded = load_extractor(extractor, weights, options)
    new = not (gallery / "gallery.json").exists()
    if new:
        index = IndexOptions(given["index"], given["nlist"], given["nprobe"], given["train_images"])
        opened = Gallery.create(gallery, loaded.spec, index)
    else:
        opened = Gallery.open(gallery)
        opened.spec.require(loaded.spec, str(gallery))
    try:
        with opened:
            if not given["quiet"]:
                need = estimate(images, loaded, gallery)
                click.echo(f"this will need: {need}", err=True)
                if need.disk_bytes > need.free_bytes:
                    click.echo("spade-faiss: note: that is more than is free on that disk", err=True)
            _add(opened, sources, loaded, given)
    finally:
        if new and not len(opened):
            shutil.rmtree(gallery)  # nothing could be taken: leave nothing behind


@cli.command()
@args.gallery
@args.sources
@args.network
@args.replace
@args.strict
@args.quiet
def add(gallery: Path, sources: tuple[Path, ...], weights: Path | None, **given: Any) -> None:
    """Add the normal images in SOURCE... to GALLERY."""
    with Gallery.open(gallery) as opened:
        _add(opened, sources, _extractor_of(opened, weights, given), given)


@cli.command()
@args.gallery
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def remove(gallery: Path, keys: tuple[str, ...]) -> None:
    """Remove images from GALLERY by key; `compact` then gives back their space."""
    with Gallery.open(gallery) as opened:
        opened.remove(keys)
        click.echo(f"{len(set(keys))} removed; {len(opened)} images in {gallery}")


@cli.command()
@args.gallery
def compact(gallery: Path) -> None:
    """Rewrite the shards of GALLERY that hold removed images or are small."""
    with Gallery.open(gallery) as opened:
        saved = opened.compact()
        click.echo(f"{saved / MIB:.1f} MiB saved; {len(opened)} images in {opened.info()['shards']} shards")


@cli.command()
@args.gallery
@args.search
@click.option(
    "--false-alarms", type=float, default=DEFAULT_FALSE_ALARMS, show_default=True, help="The rate to promise."
)
@click.option("--sample", type=int, help="Calibrate with so many images.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option("--group", help="Regular expression on keys: images of one group are left out together.")
@args.network
@args.quiet
def calibrate(gallery: Path, weights: Path | None, **given: Any) -> None:
    """Find the thresholds of GALLERY from its own images: each is compared with the others."""
    from .calibration import calibrate as find_thresholds
    from .detector import Detector

    with Gallery.open(gallery, given["device"]) as opened:
        search, score = args.search_options(given), args.score_options(given)
        detector = Detector(opened, _extractor_of(opened, weights, given), search, score, calibrated=False)
        found = find_thresholds(
            detector, given["false_alarms"], sample=given["sample"], group=given["group"], seed=given["seed"],
            progress=not given["quiet"],
        )  # fmt: skip
        found.write(gallery)
        click.echo(
            f"{len(found.image_scores)} images: image score above {found.image_threshold:.6g} is suspicious, "
            f"pixel score above {found.pixel_threshold:.6g} anomalous; false alarms at most {found.false_alarms:g}"
        )


@cli.command()
@args.gallery
@args.sources
@args.search
@click.option(
    "--min-region", type=int, default=ScoreOptions.min_region, show_default=True, help="Px; smaller do not count."
)
@click.option("--localise", default=SearchOptions.localise, show_default=True, help="all, or suspicious images only.")
@click.option("--output", type=click.Path(path_type=Path), help="Write results.jsonl, maps/ and overlays/ here.")
@args.network
@args.strict
@args.as_json_lines
@args.quiet
def query(gallery: Path, sources: tuple[Path, ...], weights: Path | None, output: Path | None, **given: Any) -> None:
    """Look for anomalies in the images in SOURCE..., files and folders."""
    from .detector import Detector

    options, score = args.search_options(given), args.score_options(given)
    find_images(sources)
    with Gallery.open(gallery, given["device"]) as opened:
        detector = Detector(opened, _extractor_of(opened, weights, given), options, score)
        if given["k"] is None and detector.k < DEFAULT_K and not given["quiet"]:
            click.echo(f"spade-faiss: note: K = {detector.k}, all images of the gallery", err=True)
        skipped: list[Skipped] = []
        folder = ResultFolder(output, colour_scale(detector)) if output else None
        if not given["as_lines"]:
            click.echo(f"{'image score':>12} {'map max':>12}  {'verdict':9}  image")
        for source, pixels, detection in query_sources(detector, sources, skipped, given["strict"], not given["quiet"]):
            if folder:
                folder.write(source, pixels, detection)
            if given["as_lines"]:
                click.echo(json.dumps(as_json(source, detection), ensure_ascii=False))
            else:
                scores = f"{detection.image_score:12.6g} {detection.map_max:12.6g}"
                click.echo(f"{scores}  {detection.verdict or '-':9}  {source.key}")
        if folder:
            folder.close(skipped)
        _name_skipped(skipped)
        _exit(skipped)


@cli.command()
@args.gallery
@click.argument("dataset", type=click.Path(path_type=Path))
@args.search
@click.option("--layout", help="Of the data set, where its folders do not tell.")
@click.option("--category", multiple=True, help="Evaluate only this one; may be given again.  [default: all]")
@click.option("--metrics-size", type=int, help="Resize maps and masks to this square.  [default: the image's size]")
@click.option("--integration-limit", type=float, default=INTEGRATION_LIMIT, show_default=True, help="Of AUPRO.")
@click.option("--skip-bad-masks", is_flag=True, help="Leave images out of the pixel metrics whose mask does not fit.")
@click.option(
    "--maps", type=click.Choice(["tiff"]), help="Write float maps to OUTPUT/anomaly_maps, as MVTec's script reads."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write metrics.json and results.csv here.")
@args.network
@args.as_json_lines
@args.quiet
def evaluate(gallery: Path, dataset: Path, weights: Path | None, output: Path | None, **given: Any) -> None:
    """Query the test images of DATASET and print image and pixel metrics.

    With several categories GALLERY has {category} in it: galleries/{category}.gallery
    """
    from .datasets import open_dataset
    from .detector import Detector
    from .evaluate import METRICS, EvaluationOptions, choose, means, write_results
    from .evaluate import evaluate as evaluate_category

    categories = choose(open_dataset(dataset, given["layout"]), given["category"])
    if len(categories) > 1 and "{category}" not in str(gallery):
        names = ", ".join(category.name for category in categories)
        raise OptionError(
            f"{gallery}: expected {{category}} in the path, for one gallery each of {names}; or --category"
        )
    if given["maps"] and output is None:
        raise OptionError("--maps: expected --output, the folder to write to, as well")
    options = EvaluationOptions(
        given["integration_limit"], given["metrics_size"], given["skip_bad_masks"],
        output / "anomaly_maps" if output and given["maps"] else None,
    )  # fmt: skip
    evaluations = []
    for category in categories:
        path = Path(str(gallery).replace("{category}", category.name))
        with Gallery.open(path, given["device"]) as opened:
            extractor = _extractor_of(opened, weights, given)
            detector = Detector(
                opened, extractor, args.search_options(given), args.score_options(given), calibrated=False
            )
            evaluations.append(evaluate_category(detector, category, options, progress=not given["quiet"]))
    if output:
        write_results(output, evaluations, {**detector.settings(), "integration_limit": options.integration_limit})
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
    _name_skipped(skipped)
    _exit(skipped)


@cli.command()
@args.gallery
@args.as_json_lines
def info(gallery: Path, as_lines: bool) -> None:
    """Tell what GALLERY holds."""
    with Gallery.open(gallery) as opened:
        facts = opened.info()
    if as_lines:
        click.echo(json.dumps(facts))
        return
    spec = facts["extractor"]
    size = "own features" if spec["resized"] is None else f"{_by(spec['resized'])} px, crop {_by(spec['crop'])}"
    levels = ", ".join("x".join(map(str, shape)) for shape in spec["level_shapes"])
    for name, value in (
        ("gallery", f"{facts['path']}, generation {facts['generation']}, made by {facts['created_by']}"),
        ("images", f"{facts['images']} ({facts['removed']} removed and not yet compacted)"),
        (
            "on disk",
            f"{facts['bytes'] / MIB:.1f} MiB in {facts['shards']} shards, {facts['bytes_per_image']} bytes an image",
        ),
        ("extractor", f"{spec['name']}, {size}, neighbourhood {spec['neighbourhood']}"),
        ("levels", f"{levels} {spec['dtype']}; image feature {spec['image_dim']}"),
        ("weights", f"{spec['weights'] or 'as published'}, SHA-256 {spec['weights_sha256'][:16] or '-'}"),
        ("index", f"{facts['index']['kind']}, {facts['index']['file'] or 'not written yet'}"),
    ):
        click.echo(f"{name:10} {value}")


@cli.command()
@args.gallery
@click.option("--repair", is_flag=True, help="Build the image index anew where it is damaged.")
@args.as_json_lines
def verify(gallery: Path, repair: bool, as_lines: bool) -> None:
    """Read all of GALLERY and check it against what was written."""
    with Gallery.open(gallery) as opened:
        problems = opened.verify()
        if repair and any(problem.file.startswith("index/") for problem in problems):
            opened.rebuild_index()
            problems = opened.verify()
            click.echo("image index built anew", err=True)
        if as_lines:
            found = [{"file": problem.file, "key": problem.key, "what": problem.what} for problem in problems]
            click.echo(json.dumps({"images": len(opened), "problems": found}))
        else:
            for problem in problems:
                click.echo(
                    f"{problem.file}: {problem.what}" if problem.key is None else f"{problem.key}: {problem.what}"
                )
            click.echo(f"{len(opened)} images checked, {len(problems)} problems")
    if problems:
        sys.exit(1)


@cli.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("spade-demo"), show_default=True)
@click.option("--extractor", default=DEFAULT_EXTRACTOR, show_default=True)
@args.quiet
def demo(output: Path, extractor: str, quiet: bool) -> None:
    """Build a gallery from the sample images, query the defective ones, write a page of overlays."""
    from .demo import run_demo

    for line in run_demo(output, extractor, progress=not quiet):
        click.echo(line)


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _extractor_of(gallery: Gallery, weights: Path | None, given: dict[str, Any]) -> Extractor:
    return load_extractor(gallery.spec.name, weights, gallery.spec.options(given["batch_size"], given["device"]))


def _add(gallery: Gallery, sources: Sequence[Path], extractor: Extractor, given: dict[str, Any]) -> None:
    report: IngestReport = gallery.add_images(
        sources, extractor, replace=given["replace"], strict=given["strict"], progress=not given["quiet"]
    )
    taken = f"{report.added} added ({report.replaced} replaced), {report.unchanged} unchanged"
    rate = report.added / max(report.seconds, 1e-9)
    click.echo(f"{taken}, {len(report.skipped)} skipped; {len(gallery)} images in {gallery.path}; {rate:.1f} images/s")
    write_skipped(gallery.path / "skipped.jsonl", report.skipped)
    _name_skipped(report.skipped)
    if not len(gallery):
        raise ImageError(f"{gallery.path}: expected at least one image that can be read, found none")
    _exit(report.skipped)


def _name_skipped(skipped: Sequence[Skipped]) -> None:
    for item in skipped:
        click.echo(f"spade-faiss: skipped: {item.reason}", err=True)


def _exit(skipped: Sequence[Skipped]) -> None:
    if skipped:
        sys.exit(EXIT_SKIPPED)


def main() -> None:
    """Run the command line; what goes wrong becomes one line on stderr."""
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow cannot read gets a line of its own
    warnings.showwarning = lambda message, *_, **__: click.echo(f"spade-faiss: note: {message}", err=True)
    try:
        cli.main(prog_name="spade-faiss", standalone_mode=True)
    except SpadeError as error:
        click.echo(f"spade-faiss: error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
