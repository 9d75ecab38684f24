"""The demo: the sample images, a gallery of the normal ones, and a report of what was found in the others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .detection import Detection
from .detector import Detector
from .errors import ImageError
from .features import load_extractor
from .gallery import Gallery
from .images import Source, decode
from .ingest import Skipped
from .manifest import FILE
from .options import SearchOptions
from .originals import Originals
from .report import Report
from .results import ResultFolder, colour_scale, query_sources
from .storage import storage_errors

K = 10  # of 40 sample images: enough to cover their variety, few enough that likeness still tells


def sample_folder() -> Path:
    """Return the folder of the sample set: beside the package in a checkout, inside it when installed from a wheel."""
    here = Path(__file__).parent
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
    if (path / FILE).exists():  # of an earlier run, possibly of other images or another extractor
        with storage_errors(f"cannot replace {path}"):
            shutil.rmtree(path)
    start, extractor = time.perf_counter(), load_extractor(extractor_name)
    found: list[str] = []  # whether each map peaks on the defect: yes, no, - where there is none
    skipped: list[Skipped] = []
    with Gallery.create(path, extractor.spec) as gallery:
        built = gallery.add_images(normal, extractor, progress=progress)
        yield f"{built.added} normal images, {extractor.spec.name}, in {built.seconds:.1f} s -> {path}"
        detector = Detector(gallery, extractor, SearchOptions(k=K))
        scale = colour_scale(detector)
        with (
            Report(page, detector, scale, "spade-faiss demo", Originals(gallery, [normal])) as report,
            ResultFolder(output, scale, report) as folder,
        ):
            yield (
                f"{'test image':26} {'image score':>11} {'map max':>8}  {'peak on the defect':18}  nearest normal image"
            )
            for source, pixels, detection in query_sources(detector, [test], skipped, progress=progress):
                mask = _mask_of(source)
                folder.write(source, pixels, detection, mask, source.key.partition("/")[0])
                found.append(_peaks_on(mask, detection))
                yield (
                    f"{source.key:26} {detection.image_score:11.4g} {detection.map_max:8.4g}  {found[-1]:18}  "
                    f"{detection.neighbours.keys[0]}"
                )
            folder.close(skipped)
    yield (
        f"{found.count('yes')} of {len(found) - found.count('-')} maps of defective images peak on the defect; "
        f"{time.perf_counter() - start:.0f} s in all"
    )
    yield f"open {page} in a browser; {output / 'results.jsonl'} has the figures, {output / 'maps'} the maps"


def _mask_of(source: Source) -> NDArray[np.bool_] | None:
    mask = sample_folder() / "ground_truth" / Path(source.key).with_name(Path(source.key).stem + "_mask.png")
    return decode(mask)[..., 0] > 0 if mask.exists() else None


def _peaks_on(mask: NDArray[np.bool_] | None, detection: Detection) -> str:
    if mask is None:
        return "-"
    return "yes" if mask.ravel()[detection.anomaly_map.argmax()] else "no"
