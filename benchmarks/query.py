"""Seconds of each stage of a query, and what float16 storage changes in the maps.

python benchmarks/query.py NORMAL_DIR TEST_DIR
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.images.sources import find_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=100, help="test images, evenly spread over the folder")
    parser.add_argument("-k", type=int, default=50)
    args = parser.parse_args()

    found = find_images([args.test])
    sources = [found[i] for i in np.linspace(0, len(found) - 1, min(args.images, len(found))).astype(int)]
    maps: dict[str, list[np.ndarray]] = {}
    seconds: dict[str, list[float]] = {}
    for dtype in ("float32", "float16"):
        extractor = sf.load_extractor(args.extractor, options=sf.FeatureOptions(dtype=dtype))
        with tempfile.TemporaryDirectory() as folder, sf.Gallery.create(f"{folder}/g", extractor.spec) as gallery:
            gallery.add_images(args.normal, extractor)
            detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=args.k))
            detector.query(sources[0].path)  # warms up
            maps[dtype] = []
            for detection in detector.stream(source.path for source in sources):
                maps[dtype].append(detection.anomaly_map)
                if dtype == "float16":
                    for stage, value in {**detection.seconds, "total": sum(detection.seconds.values())}.items():
                        seconds.setdefault(stage, []).append(value)
    pairs = list(zip(maps["float16"], maps["float32"], strict=True))
    save(
        "query",
        {
            "normal_images": len(find_images([args.normal])),
            "test_images": len(sources),
            "extractor": args.extractor,
            "k": args.k,
            "seconds_median": {stage: round(statistics.median(values), 5) for stage, values in seconds.items()},
            "seconds_max": {stage: round(max(values), 5) for stage, values in seconds.items()},
            "float16_against_float32": {
                "largest_relative_difference": float(max(np.max(abs(a - b) / b) for a, b in pairs)),
                "largest_difference_over_map_max": float(max(np.max(abs(a - b)) / b.max() for a, b in pairs)),
            },
        },
    )


if __name__ == "__main__":
    main()
