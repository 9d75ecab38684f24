"""How much faster a search within a window is than the full one, and that it is exact.

    spade-faiss bench window [--channels 384] [--side 32] [-k 50 150] [--radius 0 1 2 4 8] [--repeat 3]

One level of random features, as of a vision transformer. The full search is that of the faster engine.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from common import save
from numpy.typing import NDArray

from spade_faiss.options import SearchOptions
from spade_faiss.patch_search.search import search_levels_finite

CHECKED = 40  # cells whose distances are computed in float64 beside


def seconds(query: NDArray[Any], level: NDArray[Any], options: SearchOptions, repeat: int) -> float:
    """Return the least time of several searches, after one that does not count."""
    taken = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        search_levels_finite([query], [level], options)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def largest_difference(query: NDArray[Any], level: NDArray[Any], radius: int, found: NDArray[Any]) -> float:
    """Compare some distances with float64; relative."""
    side, worst = query.shape[1], 0.0
    for row, column in np.random.default_rng(1).integers(0, side, (CHECKED, 2)):
        rows, columns = (slice(max(0, at - radius), at + radius + 1) for at in (row, column))
        others = level[:, :, rows, columns].astype(np.float64)
        exact = np.square(others - query[:, row, column].astype(np.float64)[:, None, None]).sum(axis=1).min()
        worst = max(worst, abs(float(found[row, column, 0]) - exact) / exact)
    return worst


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--side", type=int, default=32, help="cells")
    parser.add_argument("-k", type=int, nargs="+", default=[50, 150])
    parser.add_argument("--radius", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="cells")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    rng, shape = np.random.default_rng(0), (args.channels, args.side, args.side)
    rows, asked = [], {"channels": args.channels, "side": args.side}
    for k in args.k:
        query, level = (rng.standard_normal(size, np.float32).astype(np.float16) for size in (shape, (k, *shape)))
        full = {name: seconds(query, level, SearchOptions(engine=name), 1) for name in ("pyramid", "flat")}
        for radius in args.radius:
            options = SearchOptions(window=radius)
            taken = seconds(query, level, options, args.repeat)
            [(sq_distances, _)] = search_levels_finite([query], [level], options)
            row = {"k": k, "radius": radius, "seconds": round(taken, 4), "times": round(min(full.values()) / taken, 1)}
            row["largest_difference"] = largest_difference(query, level, radius, sq_distances)
            rows.append(row)
            save("window", {**asked, "rows": rows}, part=True)
            print(row, flush=True)
        rows.append({"k": k, "radius": None, **{f"seconds_{name}": round(value, 3) for name, value in full.items()}})
    save("window", {**asked, "rows": rows})


if __name__ == "__main__":
    main()
