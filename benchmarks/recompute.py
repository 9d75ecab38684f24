"""What does a gallery save, and a query pay, when patches are recomputed from the image files?

    python benchmarks/recompute.py NORMAL_DIR TEST_DIR

Two galleries of NORMAL_DIR, patches stored and recomputed, answer the same queries of TEST_DIR, twice over: cold, with
a new detector, and warm, when it has the neighbours' levels of all of them in its cache. The two take turns query by
query, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.images import find_images
from spade_faiss.options import MIB, Patches

WAYS: tuple[Patches, Patches] = ("stored", "recompute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--recipe", choices=list(sf.RECIPES), default="paper")
    parser.add_argument("--queries", type=int, default=10, help="test images, evenly spread over the folder")
    parser.add_argument("-k", type=int, default=50)
    args = parser.parse_args()

    found = find_images([args.test])
    paths = [found[i].path for i in np.linspace(0, len(found) - 1, min(args.queries, len(found))).astype(int)]
    recipe = sf.RECIPES[args.recipe]
    extractor = sf.load_extractor(args.extractor, args.weights, recipe.features)
    with tempfile.TemporaryDirectory() as folder:
        galleries = {way: _build(Path(folder, way), args.normal, extractor, args.recipe, way) for way in WAYS}
        search = sf.SearchOptions(k=args.k, cache_bytes=args.k * len(paths) * extractor.spec.bytes_per_image + MIB)
        for gallery in galleries.values():
            sf.Detector(gallery, extractor, sf.SearchOptions(k=1)).query(paths[0])  # libraries loaded, threads started
        detectors = {way: sf.Detector(gallery, extractor, search) for way, gallery in galleries.items()}
        for detector in detectors.values():
            detector.baseline()  # once a detector, not a query
        cold, warm = (_queries(detectors, paths) for _ in range(2))
        save(
            "recompute",
            {
                "normal_images": len(galleries["stored"]),
                "queries": len(paths),
                "extractor": args.extractor,
                "recipe": args.recipe,
                "k": args.k,
                "shard_bytes_per_image": {way: _shard_bytes(gallery) for way, gallery in galleries.items()},
                "seconds_a_query": {way: {"cold": _seconds(cold[way]), "warm": _seconds(warm[way])} for way in WAYS},
                "recompute_against_stored": {
                    "cold": _differences(cold["recompute"], cold["stored"]),
                    "warm": _differences(warm["recompute"], warm["stored"]),
                },
            },
        )


def _build(path: Path, normal: Path, extractor: sf.Extractor, recipe: str, way: Patches) -> sf.Gallery:
    gallery = sf.Gallery.create(path, extractor.spec, recipe=recipe, patches=way)
    gallery.add_images(normal, extractor, progress=True)
    return gallery


def _shard_bytes(gallery: sf.Gallery) -> int:
    return sum(file.stat().st_size for file in gallery.path.glob("shards/*.h5")) // len(gallery)


def _queries(detectors: dict[Patches, sf.Detector], paths: Sequence[Path]) -> dict[Patches, list[Any]]:
    """Query each image with both, the first of the two in turn; returns (seconds, detection) of each."""
    found: dict[Patches, list[Any]] = {way: [] for way in WAYS}
    for number, path in enumerate(paths):
        for way in WAYS[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            detection = detectors[way].query(path)
            found[way].append((time.perf_counter() - start, detection))
    return found


def _seconds(queries: list[Any]) -> dict[str, float]:
    reads = [detection.seconds["read"] for _, detection in queries]
    return {
        "total_median": round(statistics.median(seconds for seconds, _ in queries), 4),
        "read_median": round(statistics.median(reads), 4),
        "read_max": round(max(reads), 4),
    }


def _differences(recomputed: list[Any], stored: list[Any]) -> dict[str, float]:
    pairs = [(one.anomaly_map, other.anomaly_map) for (_, one), (_, other) in zip(recomputed, stored, strict=True)]
    return {
        "largest_relative_difference_of_a_map": float(max(np.max(abs(a - b) / b) for a, b in pairs)),
        "maps_that_differ": sum(bool((a != b).any()) for a, b in pairs),
    }


if __name__ == "__main__":
    main()
