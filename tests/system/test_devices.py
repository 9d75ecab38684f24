"""Where each stage runs, on machines with and without GPUs; GPUs are pretended by their numbers."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.index import faiss_calls
from spade_faiss.patch_search import flat
from spade_faiss.patch_search.gpu import search as pyramid_torch
from spade_faiss.pyramids.cache import PyramidCache
from spade_faiss.pyramids.device_cache import device_cache
from spade_faiss.system import devices, gpu_costs

RESOLVE = [devices.torch_device, devices.faiss_device]


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Torch and FAISS see so many GPUs: two, unless the test has another number."""
    number = int(getattr(request, "param", 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: number, raising=False)
    return number


def levels() -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(3, 4, 5)).astype(np.float32)], [rng.normal(size=(2, 3, 4, 5)).astype(np.float32)]


@pytest.mark.parametrize("wanted", [None, "auto"])
def test_auto_is_the_first_gpu(gpus: int, wanted: str | None) -> None:
    assert [resolve(wanted) for resolve in RESOLVE] == ["cuda:0", "cuda:0"]


@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.parametrize("wanted", [None, "auto", "cpu"])
def test_without_a_gpu_everything_is_on_the_cpu(gpus: int, wanted: str | None) -> None:
    assert [resolve(wanted) for resolve in RESOLVE] == ["cpu", "cpu"]


@pytest.mark.parametrize("resolve", RESOLVE)
def test_a_name_is_taken_at_its_word(gpus: int, resolve: Any) -> None:
    assert [resolve(wanted) for wanted in ("cpu", "cuda", "cuda:0", "cuda:1")] == ["cpu", "cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(sf.DeviceError, match=r"device cuda:2: \w+ sees 2 GPUs here; choose cpu or auto"):
        resolve("cuda:2")
    for unknown in ("tpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(sf.DeviceError, match="device: expected auto, cpu, cuda or cuda:N, found"):
            resolve(unknown)


# --- each caller of the policy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "free", "expected"), [(9_999, 2**40, []), (10_000, 2**40, [0]), (10_000, 2**20, [])]
)
def test_an_image_index_goes_to_a_gpu_if_it_is_large_enough_and_fits(
    gpus: int, monkeypatch: pytest.MonkeyPatch, images: int, free: int, expected: list[int]
) -> None:
    """From as many images on as benchmarks/results/gpu.json has it, or where a GPU is named."""
    moved: list[int] = []
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, gpu, index: moved.append(gpu) or index, raising=False)
    monkeypatch.setattr(faiss_calls, "gpu_resources", lambda: None)
    monkeypatch.setattr(faiss_calls, "free_gpu_bytes", lambda _: free)
    index = faiss.IndexFlatL2(3)
    index.add(np.zeros((images, 3), np.float32))
    assert faiss_calls.placed(index, "auto") is index
    assert moved == expected
    faiss_calls.placed(index, "cuda:1")
    assert moved == [*expected, 1]


@pytest.mark.parametrize("engine", ["auto", "flat", "pyramid"])
def test_a_patch_search_goes_to_a_gpu_by_name_or_if_it_is_expected_to_pay(
    gpus: int, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, neighbours = levels()
    on_cpu, placed = sf.search_patches(query, neighbours, 2, engine, "cpu"), list[str]()

    def noted(*args: Any) -> tuple[Any, Any]:
        placed.append(next(arg for arg in args if isinstance(arg, str)))
        return on_cpu[0].reshape(20, 2), np.zeros((20, 2), np.int64)

    monkeypatch.setattr(pyramid_torch, "search_torch", lambda *args: [noted(*args)])
    monkeypatch.setattr("spade_faiss.patch_search.gpu.memory.fits", lambda *_: True)
    if engine != "flat":  # to FAISS a search goes by the device alone
        for device in (None, "auto"):
            found = sf.search_patches(query, neighbours, 2, engine, device)
            assert all(np.array_equal(*pair) for pair in zip(found, on_cpu, strict=True))
        assert placed == [], "too small"
        monkeypatch.setattr(gpu_costs, "MEASURED", gpu_costs.GpuCosts("a card", 1, 0, 0, 0, 0, 1))
        sf.search_patches(query, neighbours, 2, engine, "auto")
        assert placed == ["cuda:0"]
    monkeypatch.setattr(flat, "search_flat", noted)
    placed.clear()
    sf.search_patches(query, neighbours, 2, engine, "cuda:1")
    assert placed == ["cuda:1"]


def test_levels_are_kept_on_a_gpu_where_there_is_one(gpus: int) -> None:
    host = PyramidCache(0)
    assert device_cache(sf.SearchOptions(engine="pyramid"), host) is not None
    assert device_cache(sf.SearchOptions(engine="pyramid", device="cpu"), host) is None


def test_a_batch_overlaps_the_search_only_where_one_is_on_a_gpu(
    gpus: int, toy_gallery: sf.Gallery, toy: sf.Extractor
) -> None:
    assert not sf.Detector(toy_gallery, toy, sf.SearchOptions(device="cpu")).pipeline().overlaps
    assert sf.Detector(toy_gallery, toy, sf.SearchOptions(device="cuda")).pipeline().overlaps
    assert sf.Detector(toy_gallery, toy).pipeline().overlaps
