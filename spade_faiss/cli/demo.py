"""The command `demo`: a gallery of the normal sample images, and a report of what is found in the others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import numpy as np
from numpy.typing import NDArray

from ..detect.calibrate import calibrate
from ..detect.detection import Detection
from ..detect.detector import Detector
from ..detect.query_files import query_files
from ..errors import ImageError
from ..extractors.registry import load_extractor
from ..extractors.spec import DEFAULT_EXTRACTOR
from ..gallery.gallery import Gallery
from ..images.decode import decode
from ..images.sources import ImageFile, find_images
from ..ingest.pipeline import Skipped
from ..options import SearchOptions
from ..recipes import DEFAULT_RECIPE, RECIPES
from ..report.colour_scale import colour_scale
from ..report.report import Report
from ..report.result_folder import ResultFolder
from ..report.run_facts import RunFacts
from ..report.run_record import RunRecord
from ..store.manifest import FILE
from ..store.source_images import SourceImages
from ..system.atomic_files import storage_errors
from . import options as args
from .flags import PATH, flag, takes

FALSE_ALARMS = 0.05  # the lowest rate that 40 images can promise is 0.025
K = 10  # of 40 sample images: enough to cover their variety, few enough that the nearest ones are alike


@dataclass(frozen=True)
class DemoFlags:
    """Options of `demo`."""

    output: Annotated[
        Path,
        flag(
            "--output",
            type=PATH,
            default=Path("spade-demo"),
            show_default=True,
            help="Write everything to this folder.",
        ),
    ]
    extractor: Annotated[
        str,
        flag(
            "--extractor",
            default=DEFAULT_EXTRACTOR,
            show_default=True,
            help="Extract features with this network, as for `build`.",
        ),
    ]
    quiet: args.Quiet


@click.command()
@takes(DemoFlags)
def demo(flags: DemoFlags) -> None:
    """Build a gallery from the sample images, query 9 defective and 3 good ones, write a report."""
    for line in run_demo(flags.output, flags.extractor, progress=not flags.quiet):
        click.echo(line)


def sample_folder() -> Path:
    """Return the folder of the sample set: beside the package in a checkout, inside it when installed from a wheel."""
    here = Path(__file__).parents[1]
    for folder in (here / "samples", here.parent / "data" / "samples"):
        if (folder / "train" / "good").is_dir():
            return folder
    raise ImageError(
        f"{here / 'samples'}: expected the sample images of the demo, found none; install spade-faiss again"
    )


def run_demo(output: Path, extractor_name: str, progress: bool) -> Iterator[str]:
    """Run the demo into a folder; yields the lines of its table as they are known."""
    normal, test = sample_folder() / "train" / "good", sample_folder() / "test"
    path, page = output / "samples.gallery", output / "index.html"
    args.check_output(output)
    if (path / FILE).exists():  # from an earlier run, possibly of other images or another extractor
        with storage_errors(f"cannot replace {path}"):
            shutil.rmtree(path)
    recipe = RECIPES[DEFAULT_RECIPE]
    start, extractor = time.perf_counter(), load_extractor(extractor_name, options=recipe.features)
    with Gallery.create(path, extractor.spec, recipe=recipe.name) as gallery:
        built = gallery.add_images(normal, extractor, progress=progress)
        yield f"{built.added} normal images, {extractor.spec.name}, in {built.seconds:.1f} s -> {path}"
        calibration = calibrate(Detector(gallery, extractor, SearchOptions(k=K)), FALSE_ALARMS, progress=progress)
        calibration.write(path)
        yield f"calibrated on them: a new normal image is called anomalous with a chance of {FALSE_ALARMS:.0%} at most"
        found = yield from _query(Detector(gallery, extractor), normal, test, output, progress)
    yield (
        f"{found.count('yes')} of {len(found) - found.count('-')} maps of defective images peak on the defect; "
        f"{time.perf_counter() - start:.0f} s in all"
    )
    yield f"open {page} in a browser; {output / 'results.jsonl'} has the figures, {output / 'maps'} the maps"


def _query(
    detector: Detector, normal: Path, test: Path, output: Path, progress: bool
) -> Generator[str, None, list[str]]:
    """Query the test images into a report; yields the table's lines.

    Returns:
        for each image whether its map peaks on the defect: yes, no, or - for an image without one.
    """
    found: list[str] = []
    skipped: list[Skipped] = []
    scale, originals = colour_scale(detector), SourceImages(detector.gallery.snapshot(), [normal])
    with (
        Report(output / "index.html", RunFacts.of(detector), scale, "spade-faiss demo", originals) as report,
        ResultFolder(output, scale, report, RunRecord.of(detector)) as folder,
    ):
        yield (
            f"{'test image':26} {'score':>6}  {'p-value':>7}  {'verdict':9}  {'peak on the defect':18}  "
            "nearest normal image"
        )
        for file, pixels, detection in query_files(detector, find_images([test]), skipped, progress):
            mask = _mask_of(file)
            folder.write(file, pixels, detection, mask, file.key.partition("/")[0])
            found.append(_peaks_on(mask, detection))
            yield (
                f"{file.key:26} {detection.image_score:6.2f}  {_p_value(detection):>7}  "
                f"{detection.verdict:9}  {found[-1]:18}  {detection.neighbours.keys[0]}"
            )
        folder.close(skipped)
    return found


def _mask_of(file: ImageFile) -> NDArray[np.bool_] | None:
    mask = sample_folder() / "ground_truth" / Path(file.key).with_name(Path(file.key).stem + "_mask.png")
    return decode(mask)[..., 0] > 0 if mask.exists() else None


def _p_value(detection: Detection) -> str:
    return f"{detection.judgement.p_value:.3f}" if detection.judgement else "-"


def _peaks_on(mask: NDArray[np.bool_] | None, detection: Detection) -> str:
    if mask is None:
        return "-"
    return "yes" if mask.ravel()[detection.anomaly_map.argmax()] else "no"
