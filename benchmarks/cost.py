"""What a query of each recipe costs beside PatchCore's: seconds by stage, and memory.

    spade-faiss bench cost NORMAL_DIR TEST_DIR [--images 30] [-k 50] [--only relative robust paper patchcore]

One process each, one after the other. Queries are whole, from a file to map and score, one at a time, after one that
does not count; `stream_seconds` is what an image takes where all are asked for at once, twice. PatchCore keeps 1 % of
all patches; it is the plain one of `bench quality`. `query_mib` is what queries add to the process: to keep all that
PatchCore fits from is its fit's own peak, `fit_mib`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import PeakMemory, end_with_the_parent, save
from quality_patchcore import PlainPatchCore, batched_views, patchcore_features

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images

FRESH = multiprocessing.get_context("spawn")  # torch computes with one thread in a process that was forked
METHODS = [*(name for name in sf.RECIPES if name != "rad"), "patchcore"]


def of_recipe(name: str, normal: Path, files: list[Path], k: int, extractor_name: str) -> dict[str, Any]:
    """Build a gallery with a recipe, and query it."""
    extractor = sf.load_extractor(extractor_name, options=sf.RECIPES[name].features)
    with tempfile.TemporaryDirectory() as folder:
        with PeakMemory() as fit:
            start = time.perf_counter()
            gallery = sf.Gallery.create(f"{folder}/g", extractor.spec, recipe=name)
            gallery.add_images(normal, extractor)
            fit_seconds = time.perf_counter() - start
        detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=k))
        detector.query(files[0])  # warms up, and measures the baseline where the recipe has one
        seconds, stages = [], []
        with PeakMemory() as memory:
            for path in files:
                start = time.perf_counter()
                stages.append(detector.query(path).seconds)
                seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        number = sum(1 for _ in detector.stream(files * 2))
        streamed = (time.perf_counter() - start) / number
    by_stage = {stage: round(statistics.median(one[stage] for one in stages), 4) for stage in stages[0]}
    return _row(name, fit_seconds, fit, seconds, memory) | {"stages": by_stage, "stream_seconds": round(streamed, 4)}


def of_patchcore(name: str, normal: Path, files: list[Path], k: int, extractor_name: str) -> dict[str, Any]:
    """Fit PatchCore, and query it."""
    extractor = sf.load_extractor(extractor_name, options=patchcore_features())
    model, view = PlainPatchCore(extractor), extractor.spec.view
    with PeakMemory() as fit:
        start = time.perf_counter()
        model.fit([view.apply(decode(one.path)) for one in some] for some in batched_views(find_images([normal]), 16))
        fit_seconds = time.perf_counter() - start
    seconds = []
    with PeakMemory() as memory:
        for number, path in enumerate([files[0], *files]):
            start = time.perf_counter()
            pixels = decode(path)
            model.score([view.apply(pixels)], [pixels.shape[:2]])
            if number:
                seconds.append(time.perf_counter() - start)
    return _row(name, fit_seconds, fit, seconds, memory) | {"bank": list(model.bank.shape)}


def _row(name: str, fit_seconds: float, fit: PeakMemory, seconds: list[float], query: PeakMemory) -> dict[str, Any]:
    return {
        "method": name, "fit_seconds": round(fit_seconds, 1), "fit_mib": round(fit.above),
        "query_seconds": round(statistics.median(seconds), 4), "query_seconds_max": round(max(seconds), 4),
        "query_mib": round(query.above),
    }  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--images", type=int, default=30, help="test images, evenly spread over the folder")
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    found = find_images([args.test])
    files = [found[round(i * (len(found) - 1) / max(1, args.images - 1))].path for i in range(args.images)]
    rows: list[dict[str, Any]] = []
    asked = {"normal_images": len(find_images([args.normal])), "queries": len(files), "k": args.k}
    for name in args.only:
        measure = of_patchcore if name == "patchcore" else of_recipe
        with ProcessPoolExecutor(1, FRESH, end_with_the_parent) as pool:
            rows.append(pool.submit(measure, name, args.normal, files, args.k, args.extractor).result())
        print(rows[-1], flush=True)
        save("cost", {**asked, "rows": rows}, part=True)
    save("cost", {**asked, "rows": rows})


if __name__ == "__main__":
    main()
