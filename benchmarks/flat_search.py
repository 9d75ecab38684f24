"""wide_resnet50_2-sized features through the API: bytes an image, and one query at K = 50 through the flat engine.

python benchmarks/flat_search.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import PeakMemory, save

import spade_faiss as sf

LEVELS = ((256, 56, 56), (512, 28, 28), (1024, 14, 14))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    spec = sf.ExtractorSpec("random, the size of wide_resnet50_2 at 224 px", LEVELS, 2048)

    def features(n: int) -> sf.Features:
        levels = [np.abs(rng.standard_normal((n, *shape), dtype=np.float32)).astype(np.float16) for shape in LEVELS]
        return sf.Features(rng.standard_normal((n, 2048), dtype=np.float32), levels)

    with tempfile.TemporaryDirectory() as folder, sf.Gallery.create(f"{folder}/g", spec) as gallery:
        start = time.perf_counter()
        with gallery.writer() as writer:
            for number in range(0, args.images, 10):
                writer.append([f"{i:06d}" for i in range(number, number + 10)], features(10))
        append_seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.h5"))
        query = features(1)
        levels = [level[0] for level in query.levels]
        sf.search_patches(levels, [level[:1] for level in gallery.read([0])])  # libraries loaded, threads started
        rounds = []
        for _ in range(args.rounds):
            with PeakMemory() as memory:
                start = time.perf_counter()
                ids, _ = gallery.search(query.image, args.k)
                neighbours = gallery.read(ids[0])
                read = time.perf_counter()
                sf.search_patches(levels, neighbours, engine="flat")
                done = time.perf_counter()
                del neighbours
            rounds.append((read - start, done - read, memory.above))
    a, b = torch.rand(3136, 1792), torch.rand(1792, 31360)
    start = time.perf_counter()
    a @ b
    gflops = 2 * 3136 * 1792 * 31360 / (time.perf_counter() - start) / 1e9
    save(
        "flat_search",
        {
            "images": args.images,
            "bytes_per_image": size // args.images,
            "append_images_per_s": round(args.images / append_seconds, 1),
            "k": args.k,
            "read_seconds": [round(r[0], 3) for r in rounds],
            "flat_search_seconds": [round(r[1], 2) for r in rounds],
            "peak_mib_above_idle": [round(r[2]) for r in rounds],
            "gemm_gflops_same_run": round(gflops),
        },
    )


if __name__ == "__main__":
    main()
