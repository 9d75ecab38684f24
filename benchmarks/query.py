"""Seconds of each stage of a query, the least that it could take, and what float16 storage changes in the maps.

    python benchmarks/query.py NORMAL_DIR TEST_DIR

The least: bytes that a stage has to read over the bandwidth of the memory, or float32 operations over what a product of
two matrices reaches, whichever takes longer; both are measured. Of the match these are all products at the levels' own
grids: a search that rules patches out takes fewer, and one in bfloat16 has a higher peak.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save
from torch.utils.flop_counter import FlopCounterMode

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images

PRODUCT = 2048  # rows and columns of the matrices that show the peak
READ_BYTES = 2**28  # that show the bandwidth
TIMES = 5


def fastest(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of some calls."""
    found = []
    for _ in range(TIMES):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def peaks() -> dict[str, float]:
    """Return what this machine's memory and cores reach, with torch's number of threads."""
    matrix, values = torch.rand(PRODUCT, PRODUCT), torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return {
        "operations_per_s": 2 * PRODUCT**3 / fastest(lambda: matrix @ matrix),
        "bytes_per_s": READ_BYTES / fastest(values.sum),
    }


def work(gallery: sf.Gallery, detection: sf.Detection, source: Path) -> dict[str, tuple[float, float]]:
    """Return the bytes that each stage has to read, levels as float16, and its float32 operations."""
    spec, k, images = gallery.spec, len(detection.neighbours.keys), len(gallery)
    torch_extractor = sf.load_extractor(spec.name, options=sf.FeatureOptions(runtime="torch"))
    pixels = decode(source)
    with FlopCounterMode(display=False) as counted:
        features = torch_extractor.extract([spec.view.apply(pixels)])
    values = sum(level[0].size for level in features.levels)
    products = sum(2.0 * level[0].size * k * level[0][0].size for level in features.levels)
    return {
        "decode": (pixels.nbytes, 0.0),
        "extract": (0.0, float(counted.get_total_flops())),
        "retrieve": (4.0 * images * features.image.shape[1], 2.0 * images * features.image.shape[1]),
        "read": (2.0 * k * values, 0.0),
        "match": (2.0 * k * values, products),
        "score": (4.0 * detection.anomaly_map.size, 0.0),
    }


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
    least: dict[str, float] = {}
    reached = peaks()
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
            if dtype == "float32":
                continue
            for stage, (read, operations) in work(gallery, detection, Path(sources[0].path)).items():
                least[stage] = max(read / reached["bytes_per_s"], operations / reached["operations_per_s"])
    pairs = list(zip(maps["float16"], maps["float32"], strict=True))
    save(
        "query",
        {
            "normal_images": len(find_images([args.normal])),
            "test_images": len(sources),
            "extractor": args.extractor,
            "k": args.k,
            "seconds_median": {stage: round(statistics.median(values), 5) for stage, values in seconds.items()},
            "least_seconds": {stage: round(value, 6) for stage, value in least.items()},
            "peaks": {name: round(value / 1e9, 1) for name, value in reached.items()},  # GB/s, GFLOP/s
            "seconds_max": {stage: round(max(values), 5) for stage, values in seconds.items()},
            "float16_against_float32": {
                "largest_relative_difference": float(max(np.max(abs(a - b) / b) for a, b in pairs)),
                "largest_difference_over_map_max": float(max(np.max(abs(a - b)) / b.max() for a, b in pairs)),
            },
        },
    )


if __name__ == "__main__":
    main()
