"""What each part of the recipes `relative` and `sharp` contributes, clean and with 5 % defects among the normal images.

    spade-faiss bench relative DATASET... [--shots 100] [--draws 3] [--limit-test 24] [--family '^piped_=papers']

Each image is matched once, with its 16 nearest neighbours by level; the variants differ in what they make of that. The
table has means over draws of normal images, then within families, then over families.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from common import RESULTS, save
from numpy.typing import NDArray
from quality import limited
from quality_stats import families_of, family_rule

import spade_faiss as sf
from spade_faiss.datasets import draw, open_dataset
from spade_faiss.datasets.category import Category, Sample
from spade_faiss.detect.level_matches import POWERS, LevelMatches, LevelStats, relative, resized
from spade_faiss.detect.scoring import anomaly_map, top_score
from spade_faiss.images.decode import decode
from spade_faiss.metrics.image import image_metrics
from spade_faiss.metrics.pixel import PixelMetrics
from spade_faiss.patch_search.distinct import search_distinct
from spade_faiss.patch_search.spacing import spacing

K = 50
NEAREST = 16  # neighbours that are kept
NORMAL = 12  # normal images that give the scale
SIDE = 128  # px, of maps and masks
RECIPE = sf.RECIPES["relative"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Variant:
    """A way to make a map and a score of what was matched."""

    name: str
    kappa: int = 8
    first: int = 0  # neighbours nearer than that do not count
    others: int | None = 3  # that the spacing is a mean of; None: no spacing
    high: float = 0.95  # quantile that a spacing is kept below
    levels: tuple[int, ...] = (0, 1, 2)
    fuse: str = "relative"
    score: Callable[[Array], float] = top_score
    sigma: float = 4.0


VARIANTS = [
    Variant("relative"),
    Variant("sharp", kappa=3, fuse="harmonic_squares", sigma=2.8),
    Variant("sharp, harmonic mean", kappa=3, fuse="harmonic", sigma=2.8),
    Variant("sharp, kappa 5", kappa=5, fuse="harmonic_squares", sigma=2.8),
    Variant("sharp, kappa 5, harmonic mean", kappa=5, fuse="harmonic", sigma=2.8),
    Variant("kappa 5", kappa=5),
    Variant("harmonic mean of levels", fuse="harmonic"),
    Variant("sigma 2.8", sigma=2.8),
    Variant("kappa 1: no guard against defects", kappa=1),
    Variant("kappa 3", kappa=3),
    Variant("kappa 16", kappa=16),
    Variant("neighbours 4 to 8", first=3),
    Variant("no spacing", others=None),
    Variant("kappa 1, no spacing", kappa=1, others=None),
    Variant("spacing of 8", others=8),
    Variant("upper bound: the greatest distance", high=1),
    Variant("upper bound 0.85", high=0.85),
    Variant("arithmetic mean of levels", fuse="arithmetic"),
    Variant("maximum of levels", fuse="maximum"),
    Variant("without stride 32", levels=(0, 1)),
    Variant("without stride 8", levels=(1, 2)),
    Variant("image score: the map's maximum", score=lambda found: float(found.max())),
    Variant("image score: the map's mean", score=lambda found: float(found.mean())),
    Variant("sigma 2", sigma=2.0),
    Variant("sigma 6", sigma=6.0),
]

Matches = list[tuple[Array, dict[int, Array]]]  # by level: (h, w, NEAREST) distances, spacing by its number of others


class Bank:
    """Features of a set's images, each extracted once."""

    def __init__(self, extractor: sf.Extractor) -> None:
        self.extractor, self._known = extractor, dict[Any, sf.Features]()

    def of(self, paths: list[Any]) -> list[sf.Features]:
        """Return the features of image files."""
        new = [path for path in paths if path not in self._known]
        for start in range(0, len(new), self.extractor.batch_size):
            some = new[start : start + self.extractor.batch_size]
            found = self.extractor.extract([self.extractor.spec.view.apply(decode(path)) for path in some])
            self._known |= {path: found[[number]] for number, path in enumerate(some)}
        return [self._known[path] for path in paths]


def matched(query: sf.Features, normal: list[sf.Features]) -> Matches:
    """Match an image with the K most similar of others."""
    far = [float(np.square(one.image[0] - query.image[0]).sum()) for one in normal]
    near = [normal[at] for at in np.argsort(far, kind="stable")[:K]]
    found: Matches = []
    for number, level in enumerate(query.levels):
        others = np.concatenate([one.levels[number] for one in near])
        grid, kappa = level.shape[2:], min(NEAREST, len(near))
        sq_distances, places = search_distinct(level[0].reshape(level.shape[1], -1), others, kappa)
        first = np.stack(np.unravel_index(places[:, 0], (len(near), *grid)), axis=-1).reshape(*grid, 3)
        apart = {count: spacing(others, first.astype(np.int32), count) for count in (3, 8)}
        found.append((sq_distances.reshape(*grid, kappa), apart))
    return found


def as_levels(variant: Variant, found: Matches) -> list[LevelMatches]:
    """Take what a variant looks at."""
    return [
        LevelMatches(
            found[number][0][..., variant.first : variant.kappa],
            np.zeros((*found[number][0].shape[:2], 1, 3), np.int32),
            found[number][1][variant.others] if variant.others else None,
        )
        for number in variant.levels
    ]


def map_of(variant: Variant, found: Matches, stats: list[LevelStats]) -> Array:
    """Return the (h, w) map of a variant."""
    levels = as_levels(variant, found)
    if variant.fuse in POWERS:
        return relative(levels, stats, POWERS[variant.fuse])[0]
    grid = levels[0].sq_distances.shape[:2]
    scores = [resized(one.scores(level), grid) for one, level in zip(stats, levels, strict=True)]
    return np.mean(scores, axis=0) if variant.fuse == "arithmetic" else np.max(scores, axis=0)


def small_mask(category: Category, sample: Sample) -> Array:
    """Return a test image's mask at SIDE x SIDE px, the nearest pixels."""
    mask = category.mask_of(sample, decode(sample.path).shape[:2])
    rows, columns = ((2 * np.arange(SIDE) + 1) * side // (2 * SIDE) for side in mask.shape)
    return mask[np.ix_(rows, columns)]


def figures(category: Category, bank: Bank) -> Iterator[tuple[str, float, float | None]]:
    """Yield each variant's name, image AUROC and pixel AP on a set."""
    normal = bank.of([image.path for image in category.normal])
    chosen = np.random.default_rng(0).permutation(len(normal))[:NORMAL]
    scale = [matched(normal[at], normal[:at] + normal[at + 1 :]) for at in chosen]
    tests = [matched(one, normal) for one in bank.of([sample.path for sample in category.test])]
    view = bank.extractor.spec.view
    masks = {sample.key: small_mask(category, sample) for sample in category.test} if category.masks else {}
    for variant in VARIANTS:
        by_level = zip(*(as_levels(variant, found) for found in scale), strict=True)
        stats = [LevelStats.of(list(level), high=variant.high) for level in by_level]
        scores, pixel = [], PixelMetrics() if category.masks else None
        for sample, found in zip(category.test, tests, strict=True):
            grid = map_of(variant, found, stats)[..., None]
            scores.append(variant.score(anomaly_map(grid, view.resized, view, variant.sigma)))
            if pixel:
                scores_of = anomaly_map(grid, (SIDE, SIDE), view, variant.sigma)
                pixel.add(scores_of, masks[sample.key], str(sample.path))
        auroc = image_metrics(scores, [int(sample.anomalous) for sample in category.test]).values["image_AUROC"]
        yield variant.name, float(auroc or 0), pixel.result().values["pixel_AP"] if pixel else None


def over_families(rows: list[dict[str, Any]], families: dict[str, str], what: str) -> float:
    """Return the mean within families, then over families, in percent."""
    means = []
    for family in sorted(set(families.values())):
        values = [row[what] for row in rows if families[row["set"]] == family and row[what] is not None]
        means += [np.mean(values)] if values else []
    return round(100 * float(np.mean(means)), 1)


def arguments(description: str | None, shots: int, draws: int, limit_test: int) -> argparse.Namespace:
    """Parse the command line of a benchmark of variants, whose defaults these are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="+", help="labelled sets; masks are optional")
    parser.add_argument("--shots", type=int, default=shots, help="normal images, at most")
    parser.add_argument("--draws", type=int, default=draws, help="draws of the normal images, with seeds from 0 on")
    parser.add_argument("--limit-test", type=int, default=limit_test, help="test images of a set, at most")
    parser.add_argument("--family", type=family_rule, action="append", default=[], metavar="REGEX=NAME")
    return parser.parse_args()


def draws_of(category: Category, args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Category]]:
    """Yield draws of a set's normal images, clean and with defects, each with the facts of its rows."""
    for seed, contaminate in itertools.product(range(args.draws), (None, 0.05)):
        drawn = draw(category, min(args.shots, len(category.normal)), contaminate, seed)
        facts = {"set": category.name, "contaminate": contaminate or 0, "seed": seed}
        yield facts, replace(drawn, test=limited(drawn, args.limit_test, 0))


def rows_of(facts: dict[str, Any], found: Iterator[tuple[str, float, float | None]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each variant's name, image AUROC and pixel AP on a draw."""
    for name, auroc, ap in found:
        yield facts | {"variant": name, "image_AUROC": auroc, "pixel_AP": ap}


def table(rows: list[dict[str, Any]], rules: list[Any]) -> list[str]:
    """Return lines of Markdown: the variants' means over families."""
    families = families_of([row["set"] for row in rows], rules)
    lines = [
        "| variant | image AUROC | pixel AP | with 5 % defects: image AUROC | pixel AP |",
        "| --- | --: | --: | --: | --: |",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = [
            over_families([row for row in own if row["contaminate"] == share], families, what)
            for share in (0, 0.05)
            for what in ("image_AUROC", "pixel_AP")
        ]
        lines.append(f"| {variant} | {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    """Measure every variant on every set, and write the table."""
    args = arguments(__doc__, shots=100, draws=1, limit_test=24)
    asked = {"shots": args.shots, "draws": args.draws, "limit_test": args.limit_test}
    rows: list[dict[str, Any]] = []
    extractor = sf.load_extractor("efficientnet_lite0", options=RECIPE.features)
    for category in [one for path in args.dataset for one in open_dataset(path)]:
        bank = Bank(extractor)
        for facts, drawn in draws_of(category, args):
            rows += rows_of(facts, figures(drawn, bank))
            print(rows[-len(VARIANTS)], flush=True)
            save("relative", asked | {"rows": rows}, part=True)
    lines = table(rows, args.family)
    save("relative", asked | {"rows": rows})
    (RESULTS / "relative.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
