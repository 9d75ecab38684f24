"""Measure how a query's two searches grow with the number of normal images.

Retrieval compares one image feature with those of all N normal images. The patch search compares the patches of a query
with those of its K neighbours only, so its time does not depend on N. Features are synthetic: points around random
centres, because an index over plain noise has no structure to use.

    python examples/scaling_benchmark.py --images 1000 10000 100000 -k 50

The grid and the channels are small, so the seconds of the patch search are those of a small network.
`spade-faiss bench scaling` measures the real ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import spade_faiss as sf

DIMENSIONS = 128  # d of an image feature
LEVELS = ((16, 14, 14), (32, 7, 7))  # (c, h, w), finest first
CENTRES = 100  # clusters of image features
BATCH = 2_000  # images of one append: memory does not grow with N


def features(rng: np.random.Generator, centres: np.ndarray, n: int) -> sf.Features:
    """Draw the features of n images around the centres."""
    image = centres[rng.integers(len(centres), size=n)] + 0.3 * rng.standard_normal((n, DIMENSIONS), np.float32)
    levels = [rng.standard_normal((n, *shape), np.float32).astype(np.float16) for shape in LEVELS]
    return sf.Features(image.astype(np.float32), levels)


def grow(gallery: sf.Gallery, rng: np.random.Generator, centres: np.ndarray, n: int) -> float:
    """Append images until the gallery has n; returns the seconds of appending alone."""
    seconds = 0.0
    with gallery.writer() as writer:  # one commit at the end, however many batches
        for start in range(len(gallery), n, BATCH):
            some = features(rng, centres, min(BATCH, n - start))
            begin = time.perf_counter()
            writer.append([f"{number:09d}" for number in range(start, start + len(some))], some)
            seconds += time.perf_counter() - begin
        begin = time.perf_counter()
    return seconds + time.perf_counter() - begin  # with the commit


def measure(gallery: sf.Gallery, queries: sf.Features, k: int) -> tuple[float, float]:
    """Return the median seconds of a retrieval and of a patch search, after one query that warms up."""
    retrieval, patches = [], []
    for row in [0, *range(len(queries))]:
        start = time.perf_counter()
        ids, _ = gallery.search(queries.image[row : row + 1], k)
        found = time.perf_counter()
        neighbours = gallery.read(ids[0])
        read = time.perf_counter()
        sf.search_patches([level[row] for level in queries.levels], neighbours)
        retrieval.append(found - start)
        patches.append(time.perf_counter() - read)
    return float(np.median(retrieval[1:])), float(np.median(patches[1:]))


def main() -> None:
    """Parse the arguments, grow one gallery step by step, print a row for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 1_000, 2_000, 4_000], metavar="N")
    parser.add_argument("-k", type=int, default=10, help="neighbours of a query")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument(
        "--index", default="auto", help="auto, flat, ivf, ivf-sq, ivf-pq, hnsw or a FAISS factory string"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    centres = rng.standard_normal((CENTRES, DIMENSIONS), np.float32)
    queries = features(rng, centres, args.queries)
    spec = sf.ExtractorSpec("synthetic", level_shapes=LEVELS, image_dim=DIMENSIONS)
    print(f"{'images':>9} {'index':20} {'append s':>9} {'retrieval ms':>13} {'patch search ms':>16} {'MB':>8}")
    with tempfile.TemporaryDirectory() as folder, sf.Gallery.create(Path(folder) / "g", spec, args.index) as gallery:
        for n in sorted(args.images):
            seconds = grow(gallery, rng, centres, n)
            retrieval, patches = measure(gallery, queries, args.k)
            facts = gallery.info()
            print(
                f"{len(gallery):9d} {facts['index'].get('factory', 'none'):20} {seconds:9.2f} {retrieval * 1000:13.3f} "
                f"{patches * 1000:16.2f} {facts['bytes'] / 1e6:8.1f}"
            )


if __name__ == "__main__":
    main()
