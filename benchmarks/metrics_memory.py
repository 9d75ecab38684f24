"""Peak memory and seconds of the pixel metrics over many large maps, which are made one at a time.

python benchmarks/metrics_memory.py [--maps 2000] [--side 1024]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from common import PeakMemory, resident_mib, save
from numpy.typing import NDArray

from spade_faiss.metrics.pixel import BINS, PixelMetrics

CELLS = 32  # of the noise along a side; pixels between are interpolated, as a map's are


def synthetic(
    rng: np.random.Generator, side: int, interpolate: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a smooth map like one of squared distances, and its mask: 0 to 3 regions, in which scores are higher."""
    cells = rng.gamma(2, 3, (CELLS, CELLS)).astype(np.float32)
    mask = np.zeros((side, side), bool)
    for _ in range(rng.integers(0, 4)):
        height, width = rng.integers(side // 100 + 1, side // 6, 2)
        top, left = rng.integers(0, side - height), rng.integers(0, side - width)
        mask[top : top + height, left : left + width] = True
    anomaly_map = interpolate @ cells @ interpolate.T
    anomaly_map[mask] *= 2
    return anomaly_map, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=int, default=2000)
    parser.add_argument("--side", type=int, default=1024, help="px")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    at = np.linspace(0, CELLS - 1, args.side)
    interpolate = np.maximum(0, 1 - abs(at[:, None] - np.arange(CELLS))).astype(np.float32)
    before = resident_mib()
    seconds: list[float] = []
    with PeakMemory() as memory:
        metrics = PixelMetrics()
        for _ in range(args.maps):
            anomaly_map, mask = synthetic(rng, args.side, interpolate)
            start = time.perf_counter()
            metrics.add(anomaly_map, mask)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        result, curves = metrics.result(), metrics.curves()
        finish = time.perf_counter() - start
    save(
        "metrics_memory",
        {
            "maps": args.maps,
            "side": args.side,
            "regions": metrics.regions,
            "bins": BINS,
            "peak_mib": round(memory.peak),
            "peak_mib_above_the_imports": round(memory.peak - before),
            "seconds_a_map_median": round(statistics.median(seconds), 4),
            "seconds_a_map_max": round(max(seconds), 4),
            "seconds_adding": round(sum(seconds), 1),
            "seconds_result_and_curves": round(finish, 2),
            "curve_points": 0 if curves is None else len(curves.fpr),
            "values": result.values,
            "error_bounds": result.error_bounds,
        },
    )


if __name__ == "__main__":
    main()
