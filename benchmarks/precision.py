"""What bfloat16 costs in metrics: whole labelled sets by features of the network in float32 and in bfloat16.

    spade-faiss bench precision DATASET... [--runtime openvino] [--recipe wary] [--limit-test 200]

Each DATASET is one category, in any layout that `evaluate` reads. The same images are the normal set, and the same are
tested.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.datasets import Category, open_dataset
from spade_faiss.evaluate import EvaluationOptions, evaluate

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")


def spread_over(category: Category, limit: int | None) -> Category:
    """The category with every n-th of its test images, at most `limit`."""
    step = -(-len(category.test) // limit) if limit else 1
    return dataclasses.replace(category, test=category.test[::step])


def measure(category: Category, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one category by features of one precision."""
    recipe = sf.RECIPES[args.recipe]
    options = dataclasses.replace(recipe.features, precision=precision, runtime=args.runtime)
    extractor = sf.load_extractor(args.extractor, args.weights, options=options)
    with tempfile.TemporaryDirectory() as folder:
        with sf.Gallery.create(f"{folder}/g", extractor.spec, recipe=args.recipe) as gallery:
            gallery.add_images(category.normal, extractor)
        found = evaluate(sf.Detector(gallery, extractor), category, EvaluationOptions()).metrics
    figures = {name: found[name] for name in METRICS if found.get(name) is not None}
    return {
        "dataset": category.name, "precision": precision, "normal": len(category.normal), "test": len(category.test),
        **{name: round(float(value), 4) for name, value in figures.items()},
    }  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--runtime", default="openvino", choices=["torch", "openvino"])
    parser.add_argument("--recipe", default="wary", choices=sorted(sf.RECIPES))
    parser.add_argument("--limit-test", type=int, help="at most so many test images, every n-th")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("extractor", "runtime", "recipe", "limit_test")}
    rows = []
    for dataset in args.datasets:
        [category] = open_dataset(dataset)
        category = spread_over(category, args.limit_test)
        for precision in ("float32", "bfloat16"):
            rows.append(measure(category, precision, args))
            print(rows[-1], flush=True)
            save("precision", {**settings, "rows": rows}, part=True)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    changes = {name: [narrow[name] - exact[name] for exact, narrow in pairs if name in exact] for name in METRICS}
    summary = {
        name: {"mean": round(float(np.mean(found)), 4), "largest": round(float(np.abs(found).max()), 4)}
        for name, found in changes.items()
        if found
    }
    print(summary)
    save("precision", {**settings, "rows": rows, "changes": summary})


if __name__ == "__main__":
    main()
