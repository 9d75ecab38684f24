"""Does the promised false-alarm rate hold? Random splits of normal images into calibration and new ones.

    python benchmarks/conformal.py NORMAL_DIR...

Every image is scored once, against all others; a split then calibrates on half of the scores and counts false alarms
among the other half: of the image threshold, of the pixel threshold, and of the cascade of both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.detect.calibration import conformal_threshold
from spade_faiss.recipes import DEFAULT_RECIPE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("normal", type=Path, nargs="+")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, choices=list(sf.RECIPES))
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--splits", type=int, default=200)
    args = parser.parse_args()

    extractor = sf.load_extractor(args.extractor, options=sf.RECIPES[args.recipe].features)
    with (
        tempfile.TemporaryDirectory() as folder,
        sf.Gallery.create(f"{folder}/g", extractor.spec, recipe=args.recipe) as gallery,
    ):
        gallery.add_images(args.normal, extractor)
        found = sf.calibrate(sf.Detector(gallery, extractor, sf.SearchOptions(k=args.k)), 0.01, progress=True)
    scores = np.stack([found.image_scores, found.map_maxima])
    n, rng = scores.shape[1], np.random.default_rng(0)
    result: dict[str, dict[str, float]] = {}
    for alpha in (0.05, 0.01):
        rates = []
        for _ in range(args.splits):
            order = rng.permutation(n)
            known, new = scores[:, order[: n // 2]], scores[:, order[n // 2 :]]
            above = new > np.array([[conformal_threshold(row, alpha)] for row in known])
            rates.append([above[0].mean(), above[1].mean(), above.all(axis=0).mean()])
        means = np.mean(rates, axis=0)
        result[str(alpha)] = dict(zip(("image", "pixel", "cascade"), (round(float(m), 5) for m in means), strict=True))
    save(
        "conformal",
        {
            "normal_images": n,
            "recipe": args.recipe,
            "k": args.k,
            "splits": args.splits,
            "mean_false_alarm_rate": result,
        },
    )


if __name__ == "__main__":
    main()
