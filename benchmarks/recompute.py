"""What does a gallery save, and a query pay, when patches are recomputed from the image files?

    python benchmarks/recompute.py NORMAL_DIR TEST_DIR

Two galleries of NORMAL_DIR, patches stored and recomputed, answer the same queries of TEST_DIR three times: cold, with
no level in memory, so that every query gets all its K neighbours anew; first, by a detector that keeps those of the
queries before; warm, by the same once more. The two take turns query by query, so that whatever else the machine does
falls on both.
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
from spade_faiss.images.sources import find_images
from spade_faiss.options import Patches

WAYS: tuple[Patches, Patches] = ("stored", "recompute")
TINY = np.finfo(np.float32).tiny


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
        room = args.k * len(paths) * extractor.spec.bytes_per_image
        forgetful, keeping = (_detectors(galleries, extractor, args.k, cache_bytes) for cache_bytes in (0, room))
        passes = {
            "cold": _queries(forgetful, paths),
            "first": _queries(keeping, paths),
            "warm": _queries(keeping, paths),
        }
        save(
            "recompute",
            {
                "normal_images": len(galleries["stored"]),
                "queries": len(paths),
                "extractor": args.extractor,
                "recipe": args.recipe,
                "k": args.k,
                "shard_bytes_per_image": {way: _shard_bytes(gallery) for way, gallery in galleries.items()},
                "seconds_a_query": {
                    way: {name: _seconds(queries[way]) for name, queries in passes.items()} for way in WAYS
                },
                "recompute_against_stored": {
                    name: _differences(queries["recompute"], queries["stored"]) for name, queries in passes.items()
                },
            },
        )


def _build(path: Path, normal: Path, extractor: sf.Extractor, recipe: str, way: Patches) -> sf.Gallery:
    gallery = sf.Gallery.create(path, extractor.spec, recipe=recipe, patches=way)
    gallery.add_images(normal, extractor, progress=True)
    return gallery


def _detectors(
    galleries: dict[Patches, sf.Gallery], extractor: sf.Extractor, k: int, cache_bytes: int
) -> dict[Patches, sf.Detector]:
    found = {}
    for way, gallery in galleries.items():
        found[way] = sf.Detector(gallery, extractor, sf.SearchOptions(k=k, cache_bytes=cache_bytes))
        warm_up = sf.Detector(gallery, extractor, sf.SearchOptions(k=k, cache_bytes=0))
        warm_up.query(np.zeros((64, 64, 3), np.uint8))  # libraries loaded, threads started
        found[way]._known = warm_up._known  # measured once, and not in this one's cache
    return found


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
    differences = [np.where(a == b, 0, abs(a - b) / np.maximum(b, TINY)).max() for a, b in pairs]  # 0 outside a crop
    return {
        "largest_relative_difference_of_a_map": float(max(differences)),
        "largest_difference_over_map_max": float(max(np.max(abs(a - b)) / b.max() for a, b in pairs)),
        "maps_that_differ": sum(bool(difference) for difference in differences),
    }


if __name__ == "__main__":
    main()
