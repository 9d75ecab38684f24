"""What does it save, and cost, to localise suspicious images only?

    python benchmarks/cascade.py NORMAL_DIR TEST_DIR

A gallery of NORMAL_DIR is calibrated; TEST_DIR has a folder `good` and one for each type of defect. Each image is
queried with localise "all" and "suspicious", one right after the other, the first of the two in turn. A verdict of the
cascade cannot change by that; what can be lost are defects that the map alone would show, in images that the first
stage calls normal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.images.sources import find_images


@dataclass
class Query:
    """One test image under both settings."""

    defective: bool
    verdict: str  # by localise "all"
    suspicious_verdict: str  # by localise "suspicious"
    searched: bool  # by localise "suspicious"
    map_flags: bool  # the map's peak, at the size of calibration, is above the pixel threshold
    seconds: float  # by localise "all"
    suspicious_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--false-alarms", type=float, default=0.01)
    parser.add_argument("--images", type=int, help="test images, evenly spread over good and over defective [all]")
    parser.add_argument("--recipe", default="robust", choices=list(sf.RECIPES))
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--k-score", type=int, default=1)
    args = parser.parse_args()

    extractor = sf.load_extractor(args.extractor, options=sf.RECIPES[args.recipe].features)
    with (
        tempfile.TemporaryDirectory() as folder,
        sf.Gallery.create(f"{folder}/g", extractor.spec, recipe=args.recipe) as gallery,
    ):
        gallery.add_images(args.normal, extractor, progress=True)
        search, score = sf.SearchOptions(k=args.k, k_score=args.k_score), sf.ScoreOptions(image_score="knn")
        found = sf.calibrate(sf.Detector(gallery, extractor, search, score), args.false_alarms, progress=True)
        found.write(gallery.path)
        every = sf.Detector(gallery, extractor)  # as calibrated
        suspicious = sf.Detector(gallery, extractor, sf.SearchOptions(localise="suspicious"))
        good, defective = _test_images(args.test, args.images)
        every.query((good + defective)[0])  # warms up
        queries = [
            _query(every, suspicious, path, path in set(defective), number)
            for number, path in enumerate(good + defective)
        ]
        normal_images = len(gallery)
    save(
        "cascade",
        {
            "normal_images": normal_images,
            "extractor": args.extractor,
            "recipe": args.recipe,
            "k": args.k,
            "k_score": args.k_score,
            "false_alarms": args.false_alarms,
            "normal": _summary([query for query in queries if not query.defective]),
            "defective": _summary([query for query in queries if query.defective]),
        },
    )


def _test_images(folder: Path, images: int | None) -> tuple[list[Path], list[Path]]:
    found = find_images([folder])
    good = [source.path for source in found if source.key.startswith("good/")]
    defective = [source.path for source in found if not source.key.startswith("good/")]
    if images is not None:
        share = max(1, round(images * len(good) / len(found)))
        good, defective = _spread(good, share), _spread(defective, max(1, images - share))
    return good, defective


def _spread(paths: list[Path], n: int) -> list[Path]:
    return [paths[i] for i in np.linspace(0, len(paths) - 1, min(n, len(paths))).astype(int)]


def _query(every: sf.Detector, suspicious: sf.Detector, path: Path, defective: bool, number: int) -> Query:
    found: dict[bool, tuple[sf.Detection, float]] = {}
    for partly in (False, True) if number % 2 else (True, False):
        start = time.perf_counter()
        detection = (suspicious if partly else every).query(path)
        found[partly] = detection, time.perf_counter() - start
    (whole, seconds), (part, part_seconds) = found[False], found[True]
    view, calibration = every.gallery.spec.view, every.calibration
    assert calibration is not None
    peak = every.pipeline().scorer.map_of(whole.sq_distances, view.resized).max()
    return Query(
        defective,
        str(whole.verdict),
        str(part.verdict),
        "match" in part.seconds,
        bool(peak > calibration.pixel_threshold),
        seconds,
        part_seconds,
    )


def _summary(queries: list[Query]) -> dict[str, Any]:
    n = len(queries)
    seconds, partly = [query.seconds for query in queries], [query.suspicious_seconds for query in queries]
    return {
        "images": n,
        "skipped_share": round(sum(not query.searched for query in queries) / n, 4),
        "seconds_median": {
            "all": round(statistics.median(seconds), 4),
            "suspicious": round(statistics.median(partly), 4),
        },
        "speed_up_of_medians": round(statistics.median(seconds) / statistics.median(partly), 2),
        "speed_up_of_totals": round(sum(seconds) / sum(partly), 2),
        "called_anomalous": sum(query.verdict == "anomalous" for query in queries),
        "verdicts_that_differ": sum(query.verdict != query.suspicious_verdict for query in queries),
        "anomalous_but_skipped": sum(query.verdict == "anomalous" and not query.searched for query in queries),
        "map_alone_flags": sum(query.map_flags for query in queries),
        "map_alone_flags_but_skipped": sum(query.map_flags and not query.searched for query in queries),
    }


if __name__ == "__main__":
    main()
