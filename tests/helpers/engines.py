"""Every patch search engine on every device, as the suites that all of them must pass ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from spade_faiss.patch_search.bounds import plan as bounds_plan
from spade_faiss.patch_search.bounds import search as bounds
from spade_faiss.patch_search.pyramid import search as pyramid
from spade_faiss.patch_search.search import search_patches
from spade_faiss.patch_search.upsampling import as_tensor

ENGINES = ["flat", "pyramid", "bounds"]  # a new engine inherits the suites by its name here

Search = Callable[..., tuple[Any, Any]]

PYRAMIDS = {
    "one-level": [(6, 5, 8)],
    "one-patch": [(3, 1, 1)],
    "halved": [(4, 8, 6), (5, 4, 3)],
    "indivisible": [(3, 7, 11), (4, 5, 4), (5, 3, 2), (2, 1, 1)],
    "flat-rows": [(2, 1, 9), (3, 1, 4), (2, 1, 5)],  # a level may be larger than the one before it, not than the first
    "same-size": [(2, 5, 3), (3, 5, 3)],
}


def backends(gpu: Mapping[str, Sequence[pytest.MarkDecorator]]) -> Iterator[Any]:
    """Each engine on each device, as (engine, device, variant of its arithmetic).

    `gpu` has the marks of the engines that run on a GPU. A suite writes them itself: pytest --gpu looks for them in
    the text of a test module.
    """
    variants = {
        "flat": ["", "blas"],
        "pyramid": ["float32", "bfloat16", "torch", "tensors"],
        "bounds": ["", "directed"],
    }
    for engine in ENGINES:
        for variant in variants[engine]:
            yield pytest.param((engine, "cpu", variant), id="-".join(filter(None, (engine, "cpu", variant))))
        for variant in ("", "tensors") if engine in gpu else ():
            name = "-".join(filter(None, (engine, "cuda", variant)))
            yield pytest.param((engine, "cuda", variant), id=name, marks=gpu[engine])


def as_tensors(levels: Sequence[Any], device: str) -> list[torch.Tensor]:
    """Tensors of what torch has no dtype for as well."""
    dtypes = [np.dtype(np.float64 if level.dtype == np.longdouble else level.dtype) for level in levels]
    native = [level.astype(dtype.newbyteorder("=")) for level, dtype in zip(levels, dtypes, strict=True)]
    return [as_tensor(level).to(device) for level in native]


@contextmanager
def searching(engine: str, device: str, variant: str) -> Iterator[Search]:
    """`search_patches` bound to one of the back ends."""

    def bound(query_levels: Sequence[Any], neighbour_levels: Sequence[Any], **options: Any) -> tuple[Any, Any]:
        options = {"engine": engine, "device": device, **options}
        arrays = all(isinstance(level, np.ndarray) for level in (*query_levels, *neighbour_levels))
        if variant == "tensors" and arrays:
            tensors = as_tensors(query_levels, device), as_tensors(neighbour_levels, device)
            sq_distances, matches = search_patches(*tensors, **options)
            return sq_distances.cpu().numpy(), matches.cpu().numpy()
        return search_patches(query_levels, neighbour_levels, **options)

    with pytest.MonkeyPatch.context() as patch:
        if variant == "blas":  # what FAISS does at the size of real features, with other rounding
            patch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)
        elif device == "cpu" and variant in ("torch", "tensors"):  # what runs on a GPU; torch has the CPU by this name
            patch.setattr("spade_faiss.patch_search.search.torch_device", lambda _: "cpu:0")
        elif variant == "directed":  # what it does where directions pay
            patch.setattr(bounds, "WORTH", -1)
            patch.setattr(bounds, "FIRST", 1)
            patch.setattr(bounds_plan, "counts", lambda: (1, 2, 4))
            patch.setattr(bounds_plan, "EXPLAINED", 0)
            patch.setattr(bounds_plan, "MEASURE", 0)
            patch.setattr(bounds_plan, "MEASURE_CHANNEL", 0)
        elif variant in ("float32", "bfloat16"):  # what a machine does that multiplies bfloat16 no faster, or faster
            patch.setattr(pyramid, "bfloat16_pays", lambda: variant == "bfloat16")
        yield bound
