"""What each choice of a recipe does to the metrics: paper, robust, and each with one setting changed.

    python benchmarks/recipes.py DATASET... [--images 200]

Labelled sets, with masks. Of large test sets a seeded sample is taken, a third of it normal. Writes
benchmarks/results/recipes.json and recipes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, save

import spade_faiss as sf
from spade_faiss.datasets.category import Category
from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.evaluate import evaluate
from spade_faiss.options import FeatureOptions, ScoreOptions, SearchOptions

PAPER, ROBUST = sf.RECIPES["paper"], sf.RECIPES["robust"]
PUBLISHED = SearchOptions(level_weights="equal"), ScoreOptions(image_score="knn", positions="equal")

# Features, and the queries over them: (what, search, score); what is not given is the recipe's.
SETTINGS: list[tuple[str, FeatureOptions, list[tuple[str, SearchOptions, ScoreOptions]]]] = [
    (
        "paper",
        PAPER.features,
        [
            ("paper", *PUBLISHED),
            ("paper, image score by the nearest image", SearchOptions(level_weights="equal", k_score=1), PUBLISHED[1]),
            ("paper, image score map_max", PUBLISHED[0], ScoreOptions(image_score="map_max", positions="equal")),
            ("paper, queries as robust", SearchOptions(), ScoreOptions()),
        ],
    ),
    (
        "robust",
        ROBUST.features,
        [
            ("robust", SearchOptions(), ScoreOptions()),
            ("robust, levels as they are", SearchOptions(level_weights="equal"), ScoreOptions()),
            ("robust, positions not damped", SearchOptions(), ScoreOptions(positions="equal")),
            ("robust, image score map_max", SearchOptions(), ScoreOptions(image_score="map_max")),
            ("robust, image score knn", SearchOptions(), ScoreOptions(image_score="knn")),
            ("robust, K = 5", SearchOptions(k=5), ScoreOptions()),
            ("robust, K = 20", SearchOptions(k=20), ScoreOptions()),
            ("robust, kappa = 3", SearchOptions(kappa=3), ScoreOptions()),
            ("robust, sigma 2", SearchOptions(), ScoreOptions(sigma=2)),
            ("robust, sigma 8", SearchOptions(), ScoreOptions(sigma=8)),
        ],
    ),
    (
        "224 px",
        dataclasses.replace(ROBUST.features, image_size=224),
        [("robust at 224 px", SearchOptions(), ScoreOptions())],
    ),
    (
        "published levels",
        dataclasses.replace(ROBUST.features, image_size=224, strides=(4, 8, 16)),
        [("robust at 224 px, strides 4, 8, 16", SearchOptions(), ScoreOptions())],
    ),
    (
        "pooled",
        dataclasses.replace(ROBUST.features, neighbourhood=3),
        [("robust, neighbourhood 3", SearchOptions(), ScoreOptions())],
    ),
]


def sampled(category: Category, images: int) -> Category:
    """Draw test images, a third of them normal, with a fixed seed."""
    if len(category.test) <= images:
        return category
    rng = np.random.default_rng(0)
    normal, anomalous = ([sample for sample in category.test if sample.anomalous == flag] for flag in (False, True))
    few = min(len(normal), images // 3)
    test = [normal[i] for i in sorted(rng.choice(len(normal), few, replace=False))]
    test += [anomalous[i] for i in sorted(rng.choice(len(anomalous), min(len(anomalous), images - few), replace=False))]
    return dataclasses.replace(category, test=test)


def rows_of(category: Category, extractor_name: str, wanted: str) -> list[dict[str, Any]]:
    """Evaluate every setting on one category."""
    rows = []
    for _, features, queries in SETTINGS:
        chosen = [query for query in queries if wanted in query[0]]
        if not chosen:
            continue
        extractor = sf.load_extractor(extractor_name, options=features)
        with (
            tempfile.TemporaryDirectory() as folder,
            sf.Gallery.create(f"{folder}/g", extractor.spec, recipe="robust") as gallery,
        ):
            gallery.add_images(category.normal, extractor)
            for what, search, score in chosen:
                found = evaluate(sf.Detector(gallery, extractor, search, score), category)
                figures = {name: value and round(value, 4) for name, value in found.metrics.items()}
                each = found.seconds / len(category.test)
                rows.append({"set": category.name, "setting": what, **figures, "seconds_an_image": round(each, 3)})
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return image and pixel AUROC and AUPRO as Markdown, a row a setting, columns for each set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    of = {(row["set"], row["setting"]): row for row in rows}
    names = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
    lines = [
        "| setting | " + " | ".join(f"{one} {name}" for one in sets for name in names) + " |",
        "| --- |" + " --- |" * len(sets) * len(names),
    ]
    for what in dict.fromkeys(row["setting"] for row in rows):
        values = [of[one, what][name] if (one, what) in of else None for one in sets for name in names]
        lines.append(f"| {what} | " + " | ".join("-" if v is None else f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=200, help="test images of a category, at the most")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--only", default="", help="settings with this in their names")
    args = parser.parse_args()
    rows, asked = [], {"extractor": args.extractor, "images_at_most": args.images}
    for dataset in args.dataset:
        for category in open_dataset(dataset):
            rows += rows_of(sampled(category, args.images), args.extractor, args.only)
            save("recipes", {**asked, "rows": rows}, part=True)
    save("recipes", {**asked, "rows": rows})
    (RESULTS / "recipes.md").write_text(table(rows))


if __name__ == "__main__":
    main()
