"""What a GPU runs, on CPU tensors: its bounds hold, nothing waits for the device, any cut of work finds the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import spade_faiss as sf
from spade_faiss.patch_search.gpu import candidates as candidates_torch
from spade_faiss.patch_search.gpu import patches as patches_torch
from spade_faiss.patch_search.gpu import recorded as recorded_torch
from spade_faiss.patch_search.gpu import refined as refined_torch
from spade_faiss.patch_search.gpu import search as pyramid_torch
from spade_faiss.patch_search.gpu import settled as settled_torch
from spade_faiss.patch_search.gpu import tiles_torch
from spade_faiss.patch_search.gpu.candidates import Search
from spade_faiss.patch_search.gpu.memory import search_bytes
from spade_faiss.patch_search.gpu.search import search_together, search_torch
from spade_faiss.patch_search.gpu.tiles import least
from spade_faiss.patch_search.gpu.tiles_torch import GROUPS, Operand, margin, scale_of
from spade_faiss.system import gpu_costs, recorded
from spade_faiss.system.recorded import Recorder
from tests import reference
from tests.helpers.patches import make, make_ties

SHAPES = [(5, 9, 8), (7, 4, 5), (3, 2, 2)]
WAITS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "equal"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"),
}
DEVICES = ["cpu:0", pytest.param("cuda:0", marks=pytest.mark.cuda)]


class NoWait(TorchFunctionMode):
    """Refuses what needs a value, or a shape, that only the device knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1:2] if func.__name__ in ("__getitem__", "__setitem__") else ()
        flat = [each for index in indices for each in (index if isinstance(index, tuple) else (index,))]
        if func.__name__ in WAITS or any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in flat):
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def made(shapes: Any, k: int, kappa: int, distinct: bool = False, device: str = "cpu") -> Search:
    """One query's search, of random levels."""
    return Search.of(*sides_of(shapes, k, device), kappa, distinct)


def sides_of(shapes: Any, k: int, device: str = "cpu") -> tuple[list[Any], list[Any]]:
    query, neighbours = make(shapes, k)
    sides = [level[None, None] for level in query], [level[None] for level in neighbours]
    own, others = ([torch.from_numpy(level).to(device) for level in side] for side in sides)
    return own, others


@pytest.mark.parametrize("distinct", [False, True])
def test_nothing_waits_for_the_device(distinct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_torch, "BYTES", 2 * 18 * 72 * 15)
    monkeypatch.setattr(tiles_torch, "PAIRS", 72 * 128)
    monkeypatch.setattr(patches_torch, "VALUES", 9000)
    sides = sides_of(SHAPES[: 1 if distinct else 3], 5)
    with NoWait():
        Search.of(*sides, 2, distinct).choose()
    for waiting in (lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: float(x.sum()), lambda x: x.cpu(), torch.any):
        with NoWait(), pytest.raises(AssertionError, match="waits for the device"):
            bool(waiting(torch.ones(3)))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("distinct", [False, True])
def test_nothing_waits_on_a_gpu(distinct: bool) -> None:
    search = made(SHAPES[: 1 if distinct else 3], 5, 2, distinct, device="cuda:0")
    search.choose()  # what is compiled or measured at the first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        search.choose()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_recorded_searches_find_the_same(on_device: bool, distinct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and by threads at once."""
    recorder: Recorder[Any] = Recorder(8)
    monkeypatch.setattr(recorded_torch, "_recorder", recorder)
    shapes = SHAPES[: 1 if distinct else 3]
    pairs = [make(shapes, 4, np.float16, seed=seed, scale=10.0 ** (seed % 3)) for seed in range(12)]
    pairs[7] = make_ties(shapes, 4)  # in doubt
    pairs[7] = tuple([level.astype(np.float16) for level in side] for side in pairs[7])  # type: ignore[assignment]
    if on_device:
        pairs = [(query, [torch.from_numpy(level).cuda() for level in own]) for query, own in pairs]  # type: ignore[misc]

    def searched(pair: Any) -> Any:
        [found] = search_together([pair[0]], [level[None] for level in pair[1]], 3, "cuda:0", distinct)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(recorded, "AFTER", 10**9)
        expected = [searched(pair) for pair in pairs]
    assert recorder.recorded() == 0
    monkeypatch.setattr(recorded_torch, "_recorder", recorder := Recorder(8))
    found = [searched(pair) for pair in pairs]
    assert recorder.recorded() == 1
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(searched, pairs * 5))
    for one, right in zip(found + again, expected * 6, strict=True):
        np.testing.assert_array_equal(one[0], right[0])
        np.testing.assert_array_equal(one[1], right[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 3e9])
@pytest.mark.parametrize("spread", [1, 1000])
@pytest.mark.parametrize("channels", [3, 700])
def test_a_bound_is_never_above_the_distance(channels: int, spread: float, scale: float, device: str) -> None:
    """For every pair, however unlike the values are: float16 holds few of them, or none of the small ones."""
    rng = np.random.default_rng(0)
    a, b = (scale * rng.normal(size=(n, channels)) * spread ** rng.random((n, channels)) for n in (40, 150))
    b[:20] = a[:20] * (1 + 1e-4 * rng.normal(size=(20, channels)))  # near copies
    a, b = a.astype(np.float32), b.astype(np.float32)
    own, theirs = (torch.from_numpy(side).to(device)[None] for side in (a, b))
    factor = scale_of(own, theirs)
    operands = [
        Operand.of(side * factor, (side * factor).square().sum(-1), margin(channels, 0)) for side in (own, theirs)
    ]
    limits = (operands[1].halves - operands[1].doubts)[:, None]
    found = least(operands[0].values, operands[1].values[:, None], limits)
    true = ((a[:, None].astype(np.float64) - b) ** 2).sum(axis=2) * float(factor) ** 2
    norms = (a.astype(np.float64) ** 2).sum(axis=1) * float(factor) ** 2
    slack = operands[0].doubts[0].cpu().numpy().astype(np.float64)
    for group in range(GROUPS):
        members = (true[:, group::GROUPS] - norms[:, None]) / 2  # of a group, less what all have in common
        if members.shape[1] == 0:
            continue
        first, second = (part[0, :, 0, group].cpu().numpy() for part in (found.first, found.second))
        assert (first - slack <= members.min(axis=1)).all()
        others = (
            np.delete(members, 0, axis=1)
            if members.shape[1] == 1
            else np.array(
                [np.delete(row, at) for row, at in zip(members, found.at[0, :, 0, group].tolist(), strict=True)]
            )
        )
        assert others.size == 0 or (second - slack <= others.min(axis=1)).all()
    # and they are worth something: most distances of unlike patches are known to a hundredth
    if spread == 1:
        assert (operands[0].doubts / operands[0].halves).median() < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distinct", [False, True])
def test_several_queries_together_are_each_alone(distinct: bool, device: str) -> None:
    shapes = SHAPES[: 1 if distinct else 3]
    pairs = [make(shapes, 4, np.float16, seed=seed, scale=10.0**seed) for seed in range(3)]
    queries = [query for query, _ in pairs]
    galleries = [torch.from_numpy(np.stack(level)).to(device) for level in zip(*(own for _, own in pairs), strict=True)]
    together = search_together(queries, galleries, 3, device, distinct)
    for number, (found, (query, own)) in enumerate(zip(together, pairs, strict=True)):
        [alone] = search_together([query], [level[None] for level in own], 3, device, distinct)
        np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)  # the scale is common, and rounds otherwise
        assert (found[1] == alone[1]).mean() > 0.99, number


@pytest.mark.parametrize("distinct", [False, True])
def test_any_cut_of_the_work_finds_the_same(distinct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = make(SHAPES[: 1 if distinct else 3], 6, np.float16)
    for level in (*query, *neighbours):
        level[..., :2, :] = 1  # some are in doubt
    galleries = [level[None] for level in neighbours]
    [expected] = search_together([query], galleries, 4, "cpu", distinct)
    monkeypatch.setattr(refined_torch, "LANES", 4)  # each pair is measured by itself below
    for pairs, values, part in ((1, 2**26, 2**30), (2**27, 1, 2**30), (2**27, 2**26, 1), (40_000, 3000, 3000)):
        monkeypatch.setattr(tiles_torch, "PAIRS", pairs)
        monkeypatch.setattr(candidates_torch, "GROUPED", pairs)
        monkeypatch.setattr(candidates_torch, "BYTES", 18 * values)
        monkeypatch.setattr(patches_torch, "VALUES", values)
        monkeypatch.setattr(settled_torch, "VALUES", values)
        monkeypatch.setattr(settled_torch, "PAIRS", pairs // 16)
        monkeypatch.setattr(pyramid_torch, "PART", part)
        [found] = search_together([query], galleries, 4, "cpu", distinct)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distinct", [False, True])
def test_patches_in_doubt_are_settled_in_the_order_of_positions(
    distinct: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros and ones: hundreds of patches are equally far, and no product tells which comes first."""
    query, neighbours = make_ties([(3, 9, 11)], 6)
    own, level = query[0].reshape(3, -1), neighbours[0]
    if distinct:
        expected = reference.search_distinct(own, level, 4)
    else:
        sq_distances, matches = reference.search_patches(query, neighbours, 4)
        expected = sq_distances.reshape(-1, 4), (matches @ [99, 11, 1]).reshape(-1, 4)
    [found] = search_together([query], [level[None]], 4, device, distinct)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    search = Search.of([torch.from_numpy(query[0][None, None]).to(device)], [level[None]], 4, distinct)
    chosen = search.choose()
    assert chosen.undecided.any()
    for pairs, looked in ((1, 0), (2000, 0), (2**30, 0), (2**30, 2**30)):
        monkeypatch.setattr(settled_torch, "PAIRS", pairs)
        monkeypatch.setattr(settled_torch, "LOOKED", looked)
        best, at = settled_torch.settled(search, chosen, 0, np.arange(99))
        np.testing.assert_array_equal(best, expected[0])
        np.testing.assert_array_equal(at, expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distinct", [False, True])
def test_units_in_doubt_are_looked_through(distinct: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few near copies of each patch, in one group and in several: what products cannot tell apart is measured."""
    rng = np.random.default_rng(0)
    query = [rng.normal(size=(40, 12, 16)).astype(np.float32)]
    level = rng.normal(size=(6, 40, 12, 16)).astype(np.float32)
    flat = level.reshape(6, 40, 192)
    for image, step in ((0, 0), (0, 64), (1, 64), (3, 5), (4, 128)):
        flat[image][:, (np.arange(0, 60, 3) + step) % 192] = query[0].reshape(40, 192)[:, :60:3] + 1e-4 * rng.normal(
            size=(40, 20)
        )
    own = query[0].reshape(40, -1)
    if distinct:
        expected = reference.search_distinct(own, level, 2)
    else:
        sq_distances, matches = reference.search_patches(query, [level], 2)
        expected = sq_distances.reshape(-1, 2), (matches @ [192, 16, 1]).reshape(-1, 2)
    search = Search.of(
        [torch.from_numpy(query[0][None, None]).to(device)], [torch.from_numpy(level[None]).to(device)], 2, distinct
    )
    chosen = search.choose()
    lanes = np.flatnonzero(chosen.undecided[0].cpu().numpy())
    assert 10 < len(lanes) < 100
    monkeypatch.setattr(settled_torch, "searched", lambda *_: pytest.fail("the long way"))
    best, at = settled_torch.settled(search, chosen, 0, lanes)
    np.testing.assert_allclose(best, expected[0][lanes], rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(at, expected[1][lanes])


def test_what_is_plain_is_decided_by_the_products() -> None:
    """Else the host waits, and every query takes the long way."""
    chosen = made([(64, 16, 16)], 8, 3).choose()
    assert chosen.undecided.float().mean() < 0.02


def test_one_huge_patch_hides_nothing() -> None:
    """What no float16 holds is all doubt, on its own side; the others are found as without it."""
    query, neighbours = make([(4, 6, 6)], 3)
    [expected] = search_together([query], [level[None] for level in neighbours], 2, "cpu")
    neighbours[0][1, :, 2, 2] = 3e18
    [found] = search_together([query], [level[None] for level in neighbours], 2, "cpu")
    kept = ~(expected[1] == 36 + 14).any(axis=1)
    np.testing.assert_allclose(found[0][kept], expected[0][kept], rtol=1e-5)
    np.testing.assert_array_equal(found[1][kept], expected[1][kept])


def test_auto_goes_to_a_gpu_that_was_measured_if_it_is_faster_and_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = make([(4, 6, 6)], 3)
    placed: list[str] = []

    def noted(own: Any, others: Any, device: str, wanted: Any) -> Any:
        placed.append(device)
        return search_torch(own, others, "cpu", wanted)

    monkeypatch.setattr(pyramid_torch, "search_torch", noted)
    monkeypatch.setattr("spade_faiss.patch_search.search.torch_device", lambda _: "cuda:0")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 60)
    needed = search_bytes([(4, 6, 6)], 3, 1, 4)
    for query_costs, free, expected in (
        (0.0, needed - 40, ["cuda:0"]), (0.0, needed - 41, []), (1e12, 2**40, []),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        monkeypatch.setattr(gpu_costs, "MEASURED", gpu_costs.GpuCosts("a card", query_costs, 0, 0, 0, 0, 1))
        placed.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("spade_faiss.patch_search.search.as_typed", lambda *_: torch.inference_mode())
            sf.search_patches(query, neighbours)
        assert placed == expected
