"""Estimates which engine is faster, from its operations and rates fitted to benchmarks/patch_search.py.

Those of a GPU are in system/gpu_costs.py, where benchmarks/gpu.py has measured one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..system import gpu_costs

# Nanoseconds on one core with AVX-512 at about 200 GFLOP/s. Only their ratios matter: threads divide all of them.
MULTIPLY = 0.01  # per channel of a pair of patches
FLAT_PAIR = 3.2  # per pair: keeping the nearest of FAISS's products; fitted where flat and pyramid are close
FLAT_FILL = 4.5  # per channel of an upsampled gallery patch
FLAT_COPY = 3.0  # per channel of a gallery patch that needs no upsampling
FLAT_MEASURE = 2.0  # per channel of a match: measuring it
PYRAMID_PAIR = 0.5  # per pair: interpolating and comparing
PYRAMID_LOAD = 3.0  # per stored value: converting and rounding it
PYRAMID_MATCH = 1_400.0  # per match: keeping it as a candidate and finding it again
PYRAMID_MEASURE = 3.0  # per channel of a match: interpolating and measuring it
PYRAMID_NEIGHBOUR = 250_000.0
PYRAMID_QUERY = 1_500_000.0
BOUNDS_UNIT = 0.8  # of these nanoseconds in one of bounds.plan's; fitted where both engines are close, on several grids
BOUNDS_UNIT_TILES = 0.65  # the same, where tile registers multiply
BOUNDS_LEAST = 1e7  # for levels of one grid: below it, the search by bounds is not tried
# For levels of several grids, per channel: to find out that bounds leave too much then takes a tenth of it at the most.
BOUNDS_CHANNEL = 3e5
BOUNDS_CHANNEL_NARROW = 4.5e5  # where pyramid alone multiplies bfloat16: it takes two thirds of the time


def flat_cost(shapes: Sequence[tuple[int, int, int]], k: int, kappa: int) -> float:
    """Estimate the flat engine's nanoseconds for levels of shapes (c, h, w), the finest first."""
    patches, channels = shapes[0][1] * shapes[0][2], sum(shape[0] for shape in shapes)
    compare = patches * patches * k * (FLAT_PAIR + MULTIPLY * channels)
    fill = sum(c * (FLAT_COPY if (h, w) == shapes[0][1:] else FLAT_FILL) for c, h, w in shapes)
    return compare + k * patches * fill + patches * kappa * channels * FLAT_MEASURE


def pyramid_cost(shapes: Sequence[tuple[int, int, int]], k: int, kappa: int) -> float:
    """Estimate the pyramid engine's nanoseconds, with products in float32."""
    patches, channels = shapes[0][1] * shapes[0][2], sum(shape[0] for shape in shapes)
    products, values = 0.0, 0
    for c, h, w in shapes:
        values += c * h * w
        lifted, native = c * patches, c * h * w + 3 * w * patches
        products += h * w * (lifted if (h, w) == shapes[0][1:] else min(lifted, native)) * MULTIPLY
    compare = patches * patches * PYRAMID_PAIR + products + values * PYRAMID_LOAD + PYRAMID_NEIGHBOUR
    return PYRAMID_QUERY + k * compare + patches * kappa * (PYRAMID_MATCH + channels * PYRAMID_MEASURE)


def faster(shapes: Sequence[tuple[int, int, int]], k: int, kappa: int) -> str:
    """Return which of flat and pyramid is expected to be faster on a CPU."""
    return "pyramid" if pyramid_cost(shapes, k, kappa) < flat_cost(shapes, k, kappa) else "flat"


def bounds_budget(
    shapes: Sequence[tuple[int, int, int]], k: int, kappa: int, is_narrow: bool = False, has_tiles: bool = False
) -> float:
    """Return how long the search by bounds may take to be the fastest, in bounds.plan's nanoseconds; 0: not tried.

    `is_narrow` says whether `pyramid` multiplies bfloat16, and `has_tiles` whether the search by bounds does.

    How much bounds leave depends on the features: the engine finds that out, and hands over. An answer must not depend
    on whether it did, so it stands in for `pyramid` alone, whose distances it finds bit for bit.
    """
    other, is_mixed = pyramid_cost(shapes, k, kappa), len({shape[1:] for shape in shapes}) > 1
    a_channel = BOUNDS_CHANNEL_NARROW if is_narrow and not has_tiles else BOUNDS_CHANNEL
    unit = BOUNDS_UNIT_TILES if has_tiles else BOUNDS_UNIT
    least = a_channel * sum(shape[0] for shape in shapes) if is_mixed else BOUNDS_LEAST
    return other / unit if least < other < flat_cost(shapes, k, kappa) else 0.0


def gpu_cost(shapes: Sequence[tuple[int, int, int]], k: int) -> float:
    """Estimate the nanoseconds of a search on the GPU that was measured, neighbours' upload included.

    Args:
        shapes: levels (c, h, w), the finest first.
        k: number of neighbours.
    """
    costs, patches, channels = gpu_costs.MEASURED, shapes[0][1] * shapes[0][2], sum(shape[0] for shape in shapes)
    values = sum(c * h * w for c, h, w in shapes)
    products = patches * patches * (costs.pair + channels * costs.multiply)
    return costs.query + k * (products + patches * channels * costs.value + values * costs.upload)


def gpu_pays(shapes: Sequence[tuple[int, int, int]], k: int, kappa: int, threads: int) -> bool:
    """Return whether a search is expected to be faster on the GPU that was measured than with so many threads here."""
    return gpu_cost(shapes, k) < min(flat_cost(shapes, k, kappa), pyramid_cost(shapes, k, kappa)) / threads
