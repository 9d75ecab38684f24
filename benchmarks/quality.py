"""How good are the recipes beside PatchCore, with few normal images, with many, and with defects among them?

    spade-faiss bench quality DATASET... [--shots 30 100 all] [--contaminate 0.05] [--family '^piped_=pipes']

Every recipe, `wary` with a calibration too, and PatchCore (plain; anomalib's own as well where the extra `peers` is
installed) on the same images and the same network. The test images of a set are the same for all: those that no draw
has in its gallery. Each result is a line of quality.jsonl as soon as it is there, and a rerun continues; quality.json
has figures with intervals of 1 000 resamples of the test images, by set and by family, and quality.png shows the
families.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import quality_stats as stats
from common import RESULTS, machine, save
from quality_patchcore import (
    AnomalibPatchCore,
    PatchCore,
    PlainPatchCore,
    batched_views,
    has_anomalib,
    patchcore_features,
)

import spade_faiss as sf
from spade_faiss.arrays import Array
from spade_faiss.datasets import Category, Sample, draw, open_dataset
from spade_faiss.detect.measure_doubts import FEWEST
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import ImageFile
from spade_faiss.metrics.image import image_metrics
from spade_faiss.metrics.pixel import PixelMetrics

CALIBRATED = {"wary_calibrated": "wary"}  # recipes whose calibration says which images are left out, with one
PEERS = {"patchcore": PlainPatchCore, "patchcore_anomalib": AnomalibPatchCore}
ANY_RATE = 0.5  # of false alarms: scores do not depend on it
KEYS = ("set", *stats.RUN)  # what a line is found again by

Scored = Iterator[tuple[Sample, float, Array]]  # with image score and map


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is drawn from a set."""

    shots: int | str  # or "all"
    contaminate: float  # 0: clean
    category: Category


def cells_of(category: Category, args: argparse.Namespace) -> list[Cell]:
    """Draw from a category; all draws are tested with the images that none of them has in its gallery."""
    found = []
    for shots in args.shots:
        number = None if shots == "all" else shots
        if number is not None and number >= len(category.normal):
            print(
                f"{category.name}: {shots} shots: left out, as it has {len(category.normal)} normal images", flush=True
            )
            continue
        for share in dict.fromkeys((0.0, args.contaminate)):
            try:
                found.append(Cell(shots, share, draw(category, number, share or None, args.seed)))
            except sf.OptionError as error:
                print(f"{category.name}: {shots} shots: left out: {error}", flush=True)
    tested = [{sample.key for sample in cell.category.test} for cell in found]
    common = [sample for sample in category.test if all(sample.key in keys for keys in tested)]
    test = limited(dataclasses.replace(category, test=common), args.limit_test, args.seed)
    return [dataclasses.replace(cell, category=dataclasses.replace(cell.category, test=test)) for cell in found]


def limited(category: Category, limit: int | None, seed: int) -> list[Sample]:
    """Draw up to `limit` test images with a fixed seed, half of them normal as far as there are so many."""
    if limit is None or len(category.test) <= limit:
        return category.test
    good = [sample for sample in category.test if not sample.anomalous]
    bad = [sample for sample in category.test if sample.anomalous]
    normal = min(len(good), max(limit // 2, limit - len(bad)))
    keys = set()
    for samples, number in ((good, normal), (bad, limit - normal)):
        images = [ImageFile(sample.path, sample.key) for sample in samples]
        part = dataclasses.replace(category, name=f"{category.name} test", normal=images)
        keys |= {image.key for image in (draw(part, number, seed=seed).normal if number else [])}
    return [sample for sample in category.test if sample.key in keys]


@contextmanager
def temporary_gallery(category: Category, extractor: sf.Extractor, recipe: str) -> Iterator[sf.Gallery]:
    """Make a gallery of a category's normal images that is gone afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        sf.Gallery.create(f"{folder}/gallery", extractor.spec, recipe=recipe) as gallery,
    ):
        gallery.add_images(category.normal, extractor, strict=True)
        yield gallery


def by_recipe(category: Category, extractor: sf.Extractor, recipe: str, calibrated: bool = False) -> Scored:
    """Query the test images with a recipe."""
    with temporary_gallery(category, extractor, recipe) as gallery:
        if calibrated and len(category.normal) >= FEWEST:  # else scores are the same
            sf.calibrate(sf.Detector(gallery, extractor), ANY_RATE).write(gallery.path)
        detector = sf.Detector(gallery, extractor)
        found = detector.stream(sample.path for sample in category.test)
        for sample, detection in zip(category.test, found, strict=True):
            yield sample, detection.image_score, detection.anomaly_map


def by_patchcore(category: Category, extractor: sf.Extractor, model: PatchCore) -> Scored:
    """Score the test images with a PatchCore."""
    view, size = extractor.spec.view, extractor.batch_size
    assert view is not None
    paths = (image.path for image in category.normal)
    model.fit([view.apply(decode(path)) for path in some] for some in batched_views(paths, size))
    for samples in batched_views(category.test, size):
        images = [decode(sample.path) for sample in samples]
        found = model.score([view.apply(one) for one in images], [one.shape[:2] for one in images])
        for sample, (score, scores) in zip(samples, found, strict=True):
            yield sample, score, scores


class Methods:
    """The recipes and PatchCore, with the networks that they need, each loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load the networks; a recipe that the extractor does not fit is named and left out."""
        self._args = args
        self._extractors: dict[str, sf.Extractor] = {}
        for name, recipe in sf.RECIPES.items():
            try:
                self._extractors[name] = self._load(recipe.features)
            except sf.OptionError as error:
                print(f"recipe {name}: left out, as {args.extractor} does not fit it: {error}", flush=True)
        self._extractors |= {
            name: self._extractors[recipe] for name, recipe in CALIBRATED.items() if recipe in self._extractors
        }
        for name in PEERS:
            if name != "patchcore_anomalib" or has_anomalib():
                self._extractors[name] = self._load(patchcore_features())
            else:
                print(f"{name}: left out; pip install 'spade-faiss[peers]'", flush=True)
        self.names = [name for name in self._extractors if not args.only or name in args.only]

    def _load(self, features: sf.FeatureOptions) -> sf.Extractor:
        size = self._args.image_size
        sizes = {} if size is None else {"image_size": size, "crop": None}
        options = dataclasses.replace(features, device=self._args.device, **sizes)
        return sf.load_extractor(self._args.extractor, self._args.weights, options)

    def run(self, name: str, category: Category) -> Scored:
        """Score the test images of a category."""
        extractor = self._extractors[name]
        if name not in PEERS:
            return by_recipe(category, extractor, CALIBRATED.get(name, name), name in CALIBRATED)
        device = getattr(extractor, "device", "cpu")
        return by_patchcore(category, extractor, PEERS[name](extractor, device, self._args.seed))


def judged(category: Category, found: Iterable[tuple[Sample, float, Array]]) -> dict[str, Any]:
    """Compute the metrics of a category's test images, and keep their scores."""
    pixel = PixelMetrics() if category.masks else None
    scores, labels = [], []
    for sample, score, scores_of_pixels in found:
        scores.append(float(f"{score:.6g}"))
        labels.append(int(sample.anomalous))
        if pixel:
            pixel.add(scores_of_pixels, category.mask_of(sample, scores_of_pixels.shape), str(sample.path))
    values = image_metrics(scores, labels).values | (pixel.result().values if pixel else {})
    figures = {name: None if (v := values.get(name)) is None else round(v, 4) for name in stats.METRICS}
    return {
        **figures,
        "test_normal": labels.count(0),
        "test_anomalous": labels.count(1),
        "scores": scores,
        "labels": labels,
    }


def measure(
    category: Category, methods: Methods, args: argparse.Namespace, known: stats.Rows, path: Path
) -> stats.Rows:
    """Run every method on every draw of a set, and append a line for each to a file; those known are taken."""
    rows = []
    for cell in cells_of(category, args):
        for method in methods.names:
            run = {"set": category.name, "extractor": args.extractor, "method": method, "shots": cell.shots}
            run |= {"contaminate": cell.contaminate, "seed": args.seed, "limit_test": args.limit_test}
            run |= {"image_size": args.image_size}
            row = next((one for one in known if all(one[name] == run[name] for name in KEYS)), None)
            if row is None:
                start = time.perf_counter()
                found = judged(cell.category, methods.run(method, cell.category))
                row = {**run, "trained": len(cell.category.normal), **found}
                row |= {"seconds": round(time.perf_counter() - start, 1), "machine": machine()}
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            print(
                *(f"{name}={row[name]}" for name in ("set", "shots", "contaminate", "method", *stats.METRICS)),
                flush=True,
            )
            rows.append(row)
    return rows


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="+", help="labelled sets; masks are optional")
    parser.add_argument("--shots", type=shots_of, nargs="+", default=[30, 100, "all"], help="numbers of normal images")
    parser.add_argument("--contaminate", type=float, default=0.05, help="share of defects among them; 0: clean only")
    parser.add_argument("--limit-test", type=int, help="test images of a set, at most: a fixed draw, half of it normal")
    parser.add_argument("--family", type=family_of, action="append", default=[], metavar="REGEX=NAME")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image-size", type=int, help="px; default: as the recipes say")
    parser.add_argument("--only", nargs="+", help="methods; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=1000)
    return parser.parse_args()


def shots_of(text: str) -> int | str:
    """Read a number of shots, or `all`."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected numbers >= 1 or all, found {text!r}")
    return text if text == "all" else int(text)


def family_of(text: str) -> Any:
    """Read REGEX=NAME."""
    try:
        return stats.family_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    args = arguments()
    categories = [category for dataset in args.dataset for category in open_dataset(dataset)]
    names = [category.name for category in categories]
    if len(set(names)) < len(names):
        raise SystemExit(f"expected sets of different names, found {', '.join(names)}")
    methods, path = Methods(args), RESULTS / "quality.jsonl"
    known = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    rows = [row for category in categories for row in measure(category, methods, args, known, path)]
    if not rows:
        raise SystemExit("nothing was measured: no set has as many normal images as --shots asks for")
    shown, families = stats.summary(rows, stats.families_of(names, args.family), args.resamples)
    save("quality", {"resamples": args.resamples, "sets": shown, "families": families})
    try:
        from quality_plot import plot
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is not installed; pip install 'spade-faiss[bench]', and run it again")
    else:
        plot(families, RESULTS / "quality.png")


if __name__ == "__main__":
    main()
