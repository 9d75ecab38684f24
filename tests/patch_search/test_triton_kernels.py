"""The kernels of a GPU: by Triton's interpreter they find what plain torch finds, and they compile without a card."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss.patch_search.gpu import candidates as candidates_torch
from spade_faiss.patch_search.gpu import patches as patches_torch
from spade_faiss.patch_search.gpu import refined as refined_torch
from spade_faiss.patch_search.gpu import tiles
from spade_faiss.patch_search.gpu.patches import Upsampler
from spade_faiss.patch_search.gpu.search import search_together
from spade_faiss.patch_search.gpu.tiles import fastest
from spade_faiss.patch_search.gpu.tiles_torch import GROUPS, Least, Plain, Way, Window, likeliest_plain, power_of
from tests.helpers.patches import make

DEVICES = ["cpu:0", pytest.param("cuda:0", marks=pytest.mark.cuda)]


def is_theirs(name: str) -> bool:
    """Return whether a module of Triton can be imported anew: what is compiled cannot."""
    return name.split(".")[0] == "triton" and not name.startswith("triton._C")


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, str]]:
    """The modules of kernels, and where they run: without a GPU by Triton's interpreter."""
    pytest.importorskip("triton")
    device: str = request.param
    if device == "cuda:0":
        from spade_faiss.patch_search.gpu import patches_triton, tiles_triton

        yield tiles_triton, patches_triton, device
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton reads the variable when its functions are made: they, and ours, are made anew for the interpreter.
    ours = [f"spade_faiss.patch_search.gpu.{name}" for name in ("tiles_triton", "patches_triton")]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_theirs(name) or name in ours}
    modules = [importlib.import_module(name) for name in ours]
    yield modules[0], modules[1], device
    for name in [name for name in sys.modules if is_theirs(name) or name in ours]:
        del sys.modules[name]
    sys.modules.update(before)


def ways_of(module: Any, channels: int, device: str) -> list[Way]:
    """The ways of a module that take so many channels; of those that the interpreter runs, one of a kind."""
    ways = [way for way in module.WAYS if channels % module.ALIGNED == 0 or not getattr(way, "by_blocks", False)]
    kinds = {(type(way), getattr(way, "by_blocks", False)): way for way in ways}
    return ways if device == "cuda:0" else list(kinds.values())


@pytest.mark.parametrize("shape", [(2, 5, 2, 64, 24), (1, 130, 1, 200, 100), (1, 70, 1, 330, 72)])
def test_the_kernels_find_what_plain_torch_finds(shape: tuple[int, ...], kernels: tuple[Any, Any, str]) -> None:
    (b, q, n, cells, channels), rng = shape, torch.Generator().manual_seed(0)
    module, _, device = kernels
    own, theirs = (
        torch.randn(side, generator=rng).half().to(device) for side in ((b, q, channels), (b, n, cells, channels))
    )
    limits = 30 * torch.rand(b, n, cells, generator=rng).to(device)
    limits[..., -3:] = torch.inf  # as of cells that are no patches
    expected, apart = Plain()(own, theirs, limits), Plain().apart(own, theirs, limits)
    for way in ways_of(module, channels, device):
        found, of_each = way(own, theirs, limits), way.apart(own, theirs, limits)
        pairs = [(found.first, expected.first), (found.second, expected.second)]
        for bounds, right in [*pairs, (of_each.lows, apart.lows), (of_each.rest, apart.rest)]:
            torch.testing.assert_close(bounds, right, rtol=1e-4, atol=1e-4)
            assert (bounds <= right + 1e-5).all()  # what a place takes from a bound is taken off
        assert (found.at == expected.at)[expected.first < torch.inf].float().mean() > 0.99
        assert (of_each.cells == apart.cells)[apart.lows < torch.inf].float().mean() > 0.99


@pytest.mark.parametrize(("grid", "rows", "columns"), [((9, 12), 1, 2), ((20, 17), 2, 30), ((5, 70), 0, 1)])
def test_the_kernels_look_at_a_window(
    grid: tuple[int, int], rows: int, columns: int, kernels: tuple[Any, Any, str]
) -> None:
    maker, cells = torch.Generator().manual_seed(0), grid[0] * grid[1]
    module, _, device = kernels
    own, theirs = (torch.randn(side, generator=maker).half().to(device) for side in ((1, cells, 16), (1, 2, cells, 16)))
    limits, window = 30 * torch.rand(1, 2, cells, generator=maker).to(device), Window(grid[1], rows, columns)
    expected = Plain()(own, theirs, limits, window)
    assert (expected.first == torch.inf).any()
    for way in ways_of(module, 16, device):
        found = way(own, theirs, limits, window)
        for bounds, right in ((found.first, expected.first), (found.second, expected.second)):
            torch.testing.assert_close(bounds, right, rtol=1e-4, atol=1e-4)
        assert (found.at == expected.at)[expected.first < torch.inf].float().mean() > 0.99


@pytest.mark.parametrize(("n", "count"), [(1, 64), (3, 20), (37, 5)])
def test_the_kernel_finds_the_likeliest_groups(n: int, count: int, kernels: tuple[Any, Any, str]) -> None:
    module, _, device = kernels
    maker = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, n, GROUPS, generator=maker).mul(4).round().to(device)  # many are equal
    first[0, 0, 0, :50] = torch.inf
    second = torch.rand(2, 3, n, GROUPS, generator=maker).to(device)
    at = torch.randint(0, 9, (2, 3, n, GROUPS), generator=maker, dtype=torch.int32).to(device)
    found, right = (call(Least(first, second, at), count) for call in (module.likeliest, likeliest_plain))
    torch.testing.assert_close(found.lows, right.lows, rtol=0, atol=0)
    torch.testing.assert_close(found.others, right.others, rtol=0, atol=0)
    assert all(len(set(row)) == count for row in found.groups.flatten(0, 1).tolist())
    for name, values in (("lows", first), ("seconds", second)):
        taken = values.flatten(2).gather(2, found.groups)
        torch.testing.assert_close(getattr(found, name), taken, rtol=0, atol=0)
    cells = at.flatten(2).gather(2, found.groups).long() * GROUPS + found.groups % GROUPS
    torch.testing.assert_close(found.cells, cells, rtol=0, atol=0)


def test_blocks_are_copied_of_whole_lines_only(kernels: tuple[Any, Any, str]) -> None:
    module, _, device = kernels
    [way, *_] = [way for way in module.WAYS if getattr(way, "by_blocks", False)]
    own, theirs, limits = (
        torch.ones(shape, dtype=torch.float16, device=device) for shape in ((1, 5, 9), (1, 1, 64, 9), (1, 1, 64))
    )
    with pytest.raises(ValueError, match=r"blocks: expected .* 8 channels, found 9"):
        way(own, theirs, limits.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernels_load_and_upsample_as_plain_torch(dtype: torch.dtype, kernels: tuple[Any, Any, str]) -> None:
    query, neighbours = make([(70, 7, 9), (5, 4, 5), (3, 2, 2), (2, 1, 1)], 2)
    device = torch.device(kernels[2])
    own, others = ([torch.from_numpy(level).to(device, dtype)[None] for level in side]
                   for side in ([level[None] for level in query], neighbours))  # fmt: skip
    plain, by_kernels = Upsampler(own, others), Upsampler(own, others)
    plain.kernels, by_kernels.kernels = None, kernels[1]
    (mine, theirs), scale = plain.load(own, others)
    found, own_scale = by_kernels.load(own, others)
    assert own_scale == scale
    for right, level in zip([*mine, *theirs], [*found[0], *found[1]], strict=True):
        torch.testing.assert_close(level, right, rtol=0, atol=0)
    if dtype == torch.float32:  # loaded, both are
        return
    expected, operand = plain.operand(theirs), by_kernels.operand(theirs)
    torch.testing.assert_close(operand.values, expected.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(operand.halves, expected.halves)
    torch.testing.assert_close(operand.doubts, expected.doubts, rtol=1e-2, atol=0)
    own_at, at = (tuple(torch.from_numpy(part).to(device) for part in ids) for ids in (
        (np.zeros(63, np.int64), np.arange(63)), (np.arange(63) % 2, np.arange(63)[::-1].copy())))  # fmt: skip
    torch.testing.assert_close(
        by_kernels.sq_distances(mine, theirs, own_at, at),
        plain.sq_distances(mine, theirs, own_at, at),
        rtol=1e-5,
        atol=0,
    )
    assert not by_kernels.sq_distances(theirs, theirs, at, at).any()  # copies


@pytest.mark.parametrize("distinct", [False, True])
def test_a_search_by_the_kernels_finds_the_same(
    distinct: bool, kernels: tuple[Any, Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(5, 5, 7), (7, 3, 4)][: 1 if distinct else 2]
    pairs = [make(shapes, 2, np.float16, seed=seed) for seed in range(2)]
    queries = [query for query, _ in pairs]
    galleries = [np.stack(level) for level in zip(*(own for _, own in pairs), strict=True)]
    expected = search_together(queries, galleries, 2, "cpu", distinct)
    tiles_triton, patches_triton, device = kernels
    monkeypatch.setattr(refined_torch, "LANES", 8)  # the interpreter takes its time
    monkeypatch.setattr(patches_torch, "_kernels", lambda _: patches_triton)
    by_pointers = next(way for way in tiles_triton.WAYS if not way.by_blocks)  # any number of channels
    monkeypatch.setattr(candidates_torch, "least", by_pointers)
    monkeypatch.setattr(candidates_torch, "apart", by_pointers.apart)
    found = search_together(queries, galleries, 2, device, distinct)
    for one, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], right[0], rtol=1e-5)
        np.testing.assert_array_equal(one[1], right[1])


def test_values_that_are_no_numbers_are_refused(kernels: tuple[Any, Any, str]) -> None:
    device = torch.device(kernels[2])
    level = torch.ones(1, 2, 3, 4, 4, device=device)
    for spoiled in (torch.nan, torch.inf, -torch.inf):
        level[0, 1, 2, 3, 0] = spoiled
        size = kernels[1].size(level, torch.zeros(1, 3, device=device))
        assert power_of(size).isnan()


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("kernel", ["_least", "_reduce", "_likeliest", "_load", "_operand", "_distances"])
def test_a_kernel_compiles_for_a_card(kernel: str, is_special: bool) -> None:
    """Without one: the interpreter runs what no compiler takes."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    module = importlib.import_module(
        f"spade_faiss.patch_search.gpu.{'tiles' if kernel in ('_least', '_reduce', '_likeliest') else 'patches'}_triton"
    )
    kinds = {"own": "*fp16", "theirs": "*fp16", "level": "*fp16" if kernel == "_load" else "*fp32", "at_out": "*i32",
             "out": "*fp32" if kernel == "_load" else "*fp16", "rows": "*i64", "columns": "*i64"}  # fmt: skip
    if kernel == "_distances":
        kinds |= dict.fromkeys(("own_images", "own_cells", "images", "cells"), "*i64")
        kinds |= {"mine": "*fp32", "theirs": "*fp32", "sums": "*fp64"}
    if kernel == "_least" and is_special:
        kinds |= {"own": "tensordesc<fp16[64,64]>", "theirs": "tensordesc<fp16[256,64]>"}
    if kernel == "_likeliest":
        kinds |= {"at": "*i32", "groups_out": "*i64", "cells_out": "*i64"}
    kinds["ends"] = "tensordesc<fp16[64,64]>" if is_special else "*fp16"
    pointers = {
        "first",
        "second",
        "lows_out",
        "seconds_out",
        "others_out",
        "limits",
        "first_out",
        "second_out",
        "product",
        "shifts",
        "scale",
        "high",
        "wide",
        "sums",
    }
    blocks = {"units": 128, "some": 8, "last": 2**63 - 1,
              "groups": 64, "lanes": 64, "members": 4, "depth": 64, "large": 3e38, "side": 64,
              **dict.fromkeys(("is_size", "by_blocks", "is_apart", "is_window"), is_special),
              "block": 32, "largest": 65504.0, "is_finest": is_special}  # fmt: skip
    function = getattr(module, kernel)
    constants = {name: blocks[name] for name in function.arg_names if name in blocks}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name in pointers else "i32")
        for name in function.arg_names
    }
    source = compiler.ASTSource(function, signature, constants)
    assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_the_fastest_way_is_taken_and_one_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"slow": 2.0, "fast": 1.0}
    monkeypatch.setattr(tiles, "_milliseconds", lambda way, *_: times[way])
    ways: dict[str, Any] = {name: name for name in ("slow", "broken", "fast")}
    assert fastest(ways, torch.ones(1)) == "fast"
    del ways["fast"]
    with pytest.warns(UserWarning, match="did not compile, and plain torch serves.*broken"):
        assert fastest(ways, torch.ones(1)) == "slow"
    with pytest.raises(KeyError):  # nothing else is left
        fastest({"broken": ways["broken"]}, torch.ones(1))
