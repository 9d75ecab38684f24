"""Patch search engines side by side on the same arrays: seconds, memory, distance from the oracle, where the time goes.

python benchmarks/patch_search.py                                  # every cell: most of an hour on 2 cores
python benchmarks/patch_search.py --shapes wide_resnet50_2 --k 50 --kappa 1
python benchmarks/patch_search.py --images DIR --shapes efficientnet_lite0   # real features too
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import RESULTS, PeakMemory, machine

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images
from spade_faiss.patch_search import cost_model
from spade_faiss.patch_search.pyramid import kernels as pyramid_kernels
from spade_faiss.patch_search.pyramid import search as pyramid

Levels = list[np.ndarray]
SHAPES = {
    "efficientnet_lite0": ((24, 56, 56), (40, 28, 28), (112, 14, 14)),
    "wide_resnet50_2": ((256, 56, 56), (512, 28, 28), (1024, 14, 14)),
    "wide_resnet50_2 448px": ((256, 112, 112), (512, 56, 56), (1024, 28, 28)),
    "transformer 384": ((384, 16, 16),) * 3,
    "transformer 768": ((768, 14, 14),) * 3,
}
REAL = "efficientnet_lite0"


def random_features(shapes: tuple[tuple[int, int, int], ...], k: int) -> tuple[Levels, Levels]:
    rng = np.random.default_rng(0)
    made = [np.abs(rng.standard_normal((k + 1, *shape), dtype=np.float32)).astype(np.float16) for shape in shapes]
    return [level[0] for level in made], [level[1:] for level in made]


def real_features(folder: Path, k: int, images: int) -> tuple[Levels, Levels]:
    """The first of some images, and its k nearest among the others."""
    extractor = sf.load_extractor(REAL)
    found = find_images([folder])
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(images, len(found))).astype(int)]
    parts = []
    for start in range(0, len(chosen), 16):
        views = [extractor.spec.view.apply(decode(source.path)) for source in chosen[start : start + 16]]
        parts.append(extractor.spec.cast(extractor.extract(views)))
    image = np.concatenate([part.image for part in parts])
    nearest = np.argsort(np.square(image[1:] - image[0]).sum(axis=1))[:k] + 1
    levels = [np.concatenate(level) for level in zip(*(part.levels for part in parts), strict=True)]
    return [level[0] for level in levels], [level[nearest] for level in levels]


def limits() -> dict[str, float]:
    """What the machine does at best, now: matrix products in GFLOP/s, copying memory in GB/s."""
    result = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.ones(3136, 1024, dtype=dtype), torch.ones(1024, 3136, dtype=dtype)
        result[f"gemm_{name}_gflops"] = 2 * 3136 * 1024 * 3136 / min(_timed(lambda a=a, b=b: a @ b, 5)) / 1e9
    source = torch.zeros(2**26)
    target = torch.zeros_like(source)
    result["copy_gb_per_s"] = 2 * source.nbytes / min(_timed(lambda: target.copy_(source), 5)) / 1e9
    return {name: round(value, 1) for name, value in result.items()}


def _timed(call: Callable[[], Any], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def oracle_difference(query: Levels, neighbours: Levels, found: np.ndarray, sample: int) -> float:
    """Largest relative difference of the found (h, w, kappa) distances from float64 at some query patches."""
    h, w, kappa = found.shape
    lanes = np.random.default_rng(1).choice(h * w, min(sample, h * w), replace=False)
    mine = np.concatenate([_upsampled(level, (h, w))[:, lanes] for level in query])
    best = np.full((len(lanes), kappa), np.inf)
    for number in range(len(neighbours[0])):
        theirs = np.concatenate([_upsampled(level[number], (h, w)) for level in neighbours])
        to_all = np.array([np.square(theirs - mine[:, lane, None]).sum(axis=0) for lane in range(len(lanes))])
        best = np.sort(np.concatenate([best, to_all], axis=1), axis=1)[:, :kappa]
    return float(np.max(np.abs(found.reshape(h * w, kappa)[lanes] - best) / np.maximum(best, 1e-30)))


def _upsampled(level: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    maps = torch.from_numpy(level.astype(np.float64))[None]
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0].flatten(1).numpy()


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds in each stage of the pyramid engine while a block runs, on one thread; operations of its products."""
    seconds: dict[str, float] = defaultdict(float)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - start
                if name == "products":
                    seconds["operations"] += 2.0 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]

        return timed

    with (
        mock.patch.object(pyramid, "load", counted("convert", pyramid.load)),
        mock.patch.object(pyramid, "rounded", counted("convert", pyramid.rounded)),
        mock.patch.object(torch, "mm", counted("products", torch.mm)),
        mock.patch.object(pyramid_kernels, "scan", counted("fused kernel", pyramid_kernels.scan)),
        mock.patch.object(pyramid.Worker, "measure", counted("measure", pyramid.Worker.measure)),
    ):
        yield seconds


def where_time_goes(query: Levels, neighbours: Levels, kappa: int) -> dict[str, Any]:
    """Stages on one thread, with the machine's limits on one thread beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine_limits = limits()
        with stages() as seconds:
            (total,) = _timed(lambda: sf.search_patches(query, neighbours, kappa, "pyramid", "cpu"), 1)
    finally:
        torch.set_num_threads(threads)
    pairs = len(neighbours[0]) * np.prod(query[0].shape[1:], dtype=float) ** 2
    narrow = pyramid.bfloat16_pays() and kappa <= pyramid.NARROW_KAPPA
    products = seconds.pop("operations") / seconds["products"] / 1e9
    peak = machine_limits["gemm_bfloat16_gflops" if narrow else "gemm_float32_gflops"]
    read = pairs * (2 if narrow else 4) / seconds["fused kernel"] / 1e9
    return {
        "total": round(total, 4),
        **{name: round(value, 4) for name, value in seconds.items()},
        "products_in": "bfloat16" if narrow else "float32",
        "products_gflops": round(products, 1),
        "products_share_of_gemm_peak": round(products / peak, 2),
        "fused_kernel_reads_gb_per_s": round(read, 1),
        "fused_kernel_share_of_copy": round(read / machine_limits["copy_gb_per_s"], 2),
        "convert_reads_gb_per_s": round(sum(level.nbytes for level in neighbours) / seconds["convert"] / 1e9, 2),
        **machine_limits,
    }


def give_back_memory() -> None:
    """Hand freed memory to the system, where glibc would keep it and hide what the next round takes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(cell: dict[str, Any], query: Levels, neighbours: Levels, args: argparse.Namespace) -> Iterator[dict]:
    """Yield the result of each engine for one cell; their rounds take turns, so that a slow spell meets all."""
    kappa, seconds, memory, differences = cell["kappa"], defaultdict(list), {}, {}
    for engine in args.engines:
        sf.search_patches(query, [level[:1] for level in neighbours], min(kappa, 2), engine, "cpu")  # warms up
    for _ in range(args.rounds):
        for engine in args.engines:
            give_back_memory()
            with PeakMemory() as peak:
                start = time.perf_counter()
                found, _ = sf.search_patches(query, neighbours, kappa, engine, "cpu")
                seconds[engine].append(time.perf_counter() - start)
            memory[engine] = max(peak.above, memory.get(engine, 0))
            if engine not in differences:
                differences[engine] = oracle_difference(query, neighbours, found, args.sample)
    now, patches = limits(), query[0].shape[1] * query[0].shape[2]
    operations = 2.0 * patches * patches * cell["k"] * sum(map(len, query))
    shapes = [level.shape for level in query]
    for engine in args.engines:
        median = statistics.median(seconds[engine])
        result = {
            **cell, "engine": engine,
            "seconds": round(median, 4), "fastest": round(min(seconds[engine]), 4),
            "slowest": round(max(seconds[engine]), 4), "rounds": args.rounds,
            "gflops_as_if_flat": round(operations / median / 1e9, 1), **now,
            "peak_mib_above_neighbours": round(memory[engine], 1),
            "largest_relative_difference": differences[engine],
            "auto": cost_model.faster(shapes, cell["k"], kappa),
        }  # fmt: skip
        if engine == "pyramid":
            result["one_thread"] = where_time_goes(query, neighbours, kappa)
        yield result


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds of every engine for every cell."""
    from matplotlib.figure import Figure  # the extra `bench`; bounds.py, which imports this module, does without

    names = list(dict.fromkeys((r["shapes"], r["features"], r["k"], r["kappa"]) for r in results))
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    engines = list(dict.fromkeys(r["engine"] for r in results))
    for place, engine in enumerate(engines):
        mine = {(r["shapes"], r["features"], r["k"], r["kappa"]): r for r in results if r["engine"] == engine}
        values = [mine[name]["seconds"] if name in mine else 0 for name in names]
        at = np.arange(len(names)) + (place - (len(engines) - 1) / 2) * 0.4
        axes.barh(at, values, 0.38, label=engine)
    axes.set_yticks(range(len(names)), [f"{s}, {f}, K = {k}, kappa = {kappa}" for s, f, k, kappa in names])
    axes.set(xscale="log", xlim=(min(r["seconds"] for r in results) / 4, None), xlabel="seconds a query (median)")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--k", nargs="+", type=int, default=[1, 5, 50])
    parser.add_argument("--kappa", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--engines", nargs="+", default=["flat", "pyramid"])
    parser.add_argument("--images", type=Path, help=f"a folder of normal images: {REAL} with real features too")
    parser.add_argument("--only-real", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=20, help="query patches compared with float64")
    parser.add_argument("--name", default="patch_search", help="of the files in benchmarks/results")
    args = parser.parse_args()

    description, results = machine() | {"threads": torch.get_num_threads()}, []
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{args.name}.jsonl").open("w") as file:
        for shapes, k, features in product(args.shapes, args.k, ("random", "real")):
            if features == "real":
                if args.images is None or shapes != REAL:
                    continue
                arrays = real_features(args.images, k, 240)
            elif args.only_real:
                continue
            else:
                arrays = random_features(SHAPES[shapes], k)
            for kappa in args.kappa:
                cell = {"shapes": shapes, "features": features, "k": k, "kappa": kappa}
                for result in measure(cell, *arrays, args):
                    results.append(result)
                    line = {"benchmark": "patch_search", "date": time.strftime("%Y-%m-%d"), **result}
                    file.write(json.dumps(line | {"machine": description}) + "\n")
                    file.flush()
                    print(
                        f"{shapes:22} {features:6} K = {k:2} kappa = {kappa} {result['engine']:8}"
                        f" {result['seconds']:8.3f} s ({result['fastest']:.3f} to {result['slowest']:.3f})"
                        f" {result['peak_mib_above_neighbours']:7.0f} MiB"
                        f" off by {result['largest_relative_difference']:.1e}",
                        flush=True,
                    )
    plot(results, RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
