"""Does the promised false-alarm rate hold? Random splits of normal images into calibration and new ones.

    python benchmarks/conformal.py NORMAL_DIR... [--galleries 4]

Every image is scored once, against all others; a split then calibrates on half of the scores and counts false alarms
among the other half: of the image threshold, of the pixel threshold, and of the cascade of both. With --galleries the
same is counted of real galleries, each of half of the images and calibrated, for which the other half is new.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.detect.calibration import conformal_threshold
from spade_faiss.images.sources import ImageFile, find_images
from spade_faiss.recipes import DEFAULT_RECIPE

ALPHAS = (0.05, 0.01)


@contextmanager
def made(extractor: sf.Extractor, recipe: str, normal: Sequence[Path | ImageFile]) -> Iterator[sf.Gallery]:
    """Make a gallery that is gone afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        sf.Gallery.create(f"{folder}/g", extractor.spec, recipe=recipe) as gallery,
    ):
        gallery.add_images(normal, extractor)
        yield gallery


def of_a_gallery(extractor: sf.Extractor, args: argparse.Namespace, seed: int) -> list[list[float]]:
    """Return of each rate the false alarms among one half of the images, with a gallery of the other half."""
    images = find_images(args.normal)
    order = np.random.default_rng(seed).permutation(len(images))
    known, new = ([images[at] for at in half] for half in np.array_split(order, 2))
    with made(extractor, args.recipe, known) as gallery:
        search = sf.SearchOptions(k=min(args.k, len(gallery)))
        found = sf.calibrate(sf.Detector(gallery, extractor, search), max(ALPHAS), progress=True)
        found.write(gallery.path)
        queries = sf.Detector(gallery, extractor).stream(image.path for image in new)
        scores = np.array([(one.image_score, one.judgement.peak) for one in queries if one.judgement])
    rates = []
    for alpha in ALPHAS:
        at = [conformal_threshold(one, alpha) for one in (found.image_scores, found.map_maxima)]
        above = scores > np.array(at)
        rates.append([*above.mean(axis=0).tolist(), float(above.all(axis=1).mean())])
    return rates


def named(means: Iterable[float]) -> dict[str, float]:
    """Name false-alarm rates."""
    return dict(zip(("image", "pixel", "cascade"), (round(float(m), 5) for m in means), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("normal", type=Path, nargs="+")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, choices=list(sf.RECIPES))
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--galleries", type=int, default=0, help="as many halves are made a gallery and calibrated")
    args = parser.parse_args()

    extractor = sf.load_extractor(args.extractor, options=sf.RECIPES[args.recipe].features)
    with made(extractor, args.recipe, args.normal) as gallery:
        found = sf.calibrate(sf.Detector(gallery, extractor, sf.SearchOptions(k=args.k)), 0.01, progress=True)
    scores = np.stack([found.image_scores, found.map_maxima])
    n, rng = scores.shape[1], np.random.default_rng(0)
    result: dict[str, dict[str, float]] = {}
    for alpha in ALPHAS:
        rates = []
        for _ in range(args.splits):
            order = rng.permutation(n)
            known, new = scores[:, order[: n // 2]], scores[:, order[n // 2 :]]
            above = new > np.array([[conformal_threshold(row, alpha)] for row in known])
            rates.append([above[0].mean(), above[1].mean(), above.all(axis=0).mean()])
        means = np.mean(rates, axis=0)
        result[str(alpha)] = named(means)
    new = [of_a_gallery(extractor, args, number) for number in range(args.galleries)]
    of_new = (
        {str(alpha): named(means) for alpha, means in zip(ALPHAS, np.mean(new, axis=0), strict=True)} if new else {}
    )
    save(
        "conformal",
        {
            "normal_images": n,
            "recipe": args.recipe,
            "k": args.k,
            "splits": args.splits,
            "mean_false_alarm_rate": result,
            "galleries": args.galleries,
            "mean_false_alarm_rate_of_new_images": of_new,
        },
    )


if __name__ == "__main__":
    main()
