"""The search by bounds beside flat and pyramid: seconds, what bounds leave to be measured, distance from float64.

    spade-faiss bench bounds [--images DIR] [--vit-weights FILE --vit-images DIR] [--only CELL ...] [--rounds 5]

Engines take turns on the same arrays in one process. `robust`, `level 0` to `level 2`: levels of the embedded network
for images of DIR, a query and its nearest, together as the recipe `robust` searches them and apart. `low rank`: of
wide_resnet50_2's size, 24 directions and a hundredth of noise. `random`: the same size, the worst case. `vit`: four
blocks of a DINOv2-small at 448 px, with weights from FILE, of DIR's images and, for K = 150, their mirror images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import save
from patch_search import Levels, oracle_difference, random_features

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images
from spade_faiss.patch_search.bounds import workers as bounds_workers

WIDE = ((256, 56, 56), (512, 28, 28), (1024, 14, 14))
RANK, NOISE = 24, 0.1  # directions that nearly all of the variance lies in; standard deviation of the rest
ENGINES = ["flat", "pyramid", "bounds", "auto"]
VIT = "timm:vit_small_patch14_dinov2"


def low_rank(k: int) -> tuple[Levels, Levels]:
    """Levels of few directions, the same in all of them, smooth over the image as real ones are."""
    rng, query, others = np.random.default_rng(0), [], []
    coarse = torch.from_numpy(rng.standard_normal((k + 1, RANK, *WIDE[-1][1:]), dtype=np.float32))
    for c, h, w in WIDE:
        basis = rng.standard_normal((RANK, c), dtype=np.float32) / np.sqrt(RANK)
        smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear").numpy()
        level = np.einsum("krhw,rc->kchw", smooth, basis, optimize=True).astype(np.float16, order="C")
        for one in level:  # not all noise at once
            one += (NOISE * rng.standard_normal(one.shape, dtype=np.float32)).astype(np.float16)
        query.append(level[0])
        others.append(level[1:])
    return query, others


def real(extractor: Any, folder: Path, k: int, scales: bool) -> tuple[Levels, Levels]:
    """The first of a folder's images and the k nearest of the others; mirrored ones join where there are too few."""
    sources = find_images([folder])
    turns: list[Callable[[Any], Any]] = [lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1], lambda a: a[::-1, ::-1]]
    chosen = [(source, turn) for turn in turns for source in sources][: max(k + 1, len(sources))]
    parts = []
    for start in range(0, len(chosen), 8):
        views = [
            np.ascontiguousarray(turn(extractor.spec.view.apply(decode(source.path))))
            for source, turn in chosen[start : start + 8]
        ]
        parts.append(extractor.spec.cast(extractor.extract(views)))
    image = np.concatenate([part.image for part in parts])
    nearest = np.argsort(np.square(image[1:] - image[0]).sum(axis=1))[:k] + 1
    levels = [np.concatenate(level) for level in zip(*(part.levels for part in parts), strict=True)]
    if scales:  # by spread, as the recipe does
        spread = [np.sqrt(level.astype(np.float32).var(axis=(0, 2, 3)).sum()) for level in levels]
        levels = [(level / one).astype(np.float32) for level, one in zip(levels, spread, strict=True)]
    return [level[0] for level in levels], [level[nearest] for level in levels]


def cells(args: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[], tuple[Levels, Levels]]]]:
    """Yield what is searched: name, K, and how it is made."""
    if args.images:
        extractor = sf.load_extractor("efficientnet_lite0", options=sf.RECIPES["robust"].features)
        yield "robust", args.k, partial(real, extractor, args.images, args.k, True)
        for number in range(3):

            def alone(number: int = number) -> tuple[Levels, Levels]:
                query, others = real(extractor, args.images, args.k, False)
                return query[number : number + 1], others[number : number + 1]

            yield f"level {number}", args.k, alone
    yield "low rank", args.k, partial(low_rank, args.k)
    yield "random", args.k, partial(random_features, WIDE, args.k)
    if args.vit_weights and args.vit_images:
        options = sf.FeatureOptions(image_size=448, blocks=(0.25, 0.5, 0.75, 1), normalisation="imagenet")
        extractor = sf.load_extractor(VIT, weights=args.vit_weights, options=options)
        for k in (args.k, 3 * args.k):
            yield "vit", k, partial(real, extractor, args.vit_images, k, False)


@contextmanager
def counted() -> Iterator[list[tuple[int, int]]]:
    """Numbers of patches measured and of coordinates, by chunks of neighbours, while a block runs."""
    compare, found = bounds_workers.Worker.compare, []

    def noted(self: Any, some: range) -> int:
        measured = compare(self, some)
        found.append((measured, self.search.gallery.projection(some.start).width))
        return measured

    with mock.patch.object(bounds_workers.Worker, "compare", noted):
        yield found


def measure(name: str, k: int, query: Levels, others: Levels, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Search with every engine in turn."""
    seconds, found, left = defaultdict(list), {}, []
    for engine in args.engines:
        sf.search_patches(query, [level[:2] for level in others], 1, engine, "cpu")  # compiles
    for _ in range(args.rounds):
        for engine in args.engines:
            start = time.perf_counter()
            with counted() as chunks:
                found[engine] = sf.search_patches(query, others, args.kappa, engine, "cpu")[0]
            seconds[engine].append(time.perf_counter() - start)
            left = chunks if engine == "bounds" else left
    pairs = k * np.prod(query[0].shape[1:], dtype=float) ** 2
    rows = []
    for engine, times in seconds.items():
        row = {
            "features": name, "k": k, "kappa": args.kappa, "channels": sum(map(len, query)),
            "grid": query[0].shape[1:], "engine": engine,
            "seconds": round(statistics.median(times), 4), "fastest": round(min(times), 4),
            "times_flat": round(min(seconds["flat"]) / min(times), 2) if "flat" in seconds else None,
            "largest_relative_difference": oracle_difference(query, others, found[engine], args.sample),
        }  # fmt: skip
        if engine == "bounds" and left:
            row |= {
                "measured_share": float(sum(one for one, _ in left) / pairs),
                "coordinates": sorted({width for _, width in left}),
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="normal images for the embedded network")
    parser.add_argument("--vit-weights", type=Path, help=f"weights of {VIT}")
    parser.add_argument("--vit-images", type=Path, help="normal images for it")
    parser.add_argument("--only", nargs="+", help="names of cells")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("-k", type=int, default=50)
    parser.add_argument("--kappa", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=20, help="query patches compared with float64")
    args = parser.parse_args()
    rows, asked = [], {"threads": torch.get_num_threads(), "rounds": args.rounds}
    for name, k, make in cells(args):
        if args.only and name not in args.only:
            continue
        query, others = make()
        rows += measure(name, k, query, others, args)
        save("bounds", {**asked, "rows": rows}, part=True)
        del query, others
    save("bounds", {**asked, "rows": rows})


if __name__ == "__main__":
    main()
