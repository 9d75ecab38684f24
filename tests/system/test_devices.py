"""Where each stage runs, on machines with and without GPUs; GPUs are pretended by their numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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

STAYS = r"a GPU is there, but the image index and the patch search stay on the CPU.*device='cuda'"
SEARCH = [devices.search_device, devices.faiss_device]


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Torch and FAISS see so many GPUs: two, unless the test has another number."""
    number = int(getattr(request, "param", 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: number, raising=False)
    monkeypatch.setattr(gpu_costs, "MEASURED", None)  # unless the test has measured one
    devices._warn_of_cpu.cache_clear()
    yield number
    devices._warn_of_cpu.cache_clear()


def levels() -> tuple[list[Any], list[Any]]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(3, 4, 5)).astype(np.float32)], [rng.normal(size=(2, 3, 4, 5)).astype(np.float32)]


@pytest.mark.parametrize("wanted", [None, "auto"])
def test_a_network_takes_the_first_gpu(gpus: int, wanted: str | None) -> None:
    assert devices.network_device(wanted) == "cuda:0"


@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.parametrize("wanted", [None, "auto", "cpu"])
def test_without_a_gpu_everything_is_on_the_cpu_in_silence(gpus: int, wanted: str | None) -> None:
    assert {resolve(wanted) for resolve in (devices.network_device, *SEARCH)} == {"cpu"}


def test_search_stays_on_the_cpu_and_says_so_once(gpus: int) -> None:
    with pytest.warns(UserWarning, match=STAYS) as caught:
        assert [resolve(wanted) for resolve in SEARCH for wanted in (None, "auto", "auto")] == ["cpu"] * 6
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("resolve", [devices.network_device, *SEARCH])
def test_a_name_is_taken_at_its_word(gpus: int, resolve: Any) -> None:
    assert [resolve(wanted) for wanted in ("cpu", "cuda", "cuda:0", "cuda:1")] == ["cpu", "cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(sf.DeviceError, match=r"device cuda:2: \w+ sees 2 GPUs here; choose cpu or auto"):
        resolve("cuda:2")
    for unknown in ("tpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(sf.DeviceError, match="device: expected auto, cpu, cuda or cuda:N, found"):
            resolve(unknown)


def test_once_measured_search_takes_the_first_gpu(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_costs, "MEASURED", gpu_costs.GpuCosts("a card", 1, 1, 1, 1, 1, 1))
    assert [resolve("auto") for resolve in SEARCH] == ["cuda:0", "cuda:0"]


# --- each caller of the policy ---------------------------------------------------------------------------------------


def test_the_image_index_goes_to_a_gpu_only_by_name(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, gpu, index: moved.append(gpu) or index, raising=False)
    monkeypatch.setattr(faiss_calls, "gpu_resources", lambda: None)
    index = faiss.IndexFlatL2(3)
    with pytest.warns(UserWarning, match=STAYS):
        assert faiss_calls.placed(index, "auto") is index
    assert moved == []
    faiss_calls.placed(index, "cuda:1")
    assert moved == [1]


@pytest.mark.parametrize("engine", ["auto", "flat", "pyramid"])
def test_the_patch_search_goes_to_a_gpu_only_by_name(gpus: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = levels()
    on_cpu = sf.search_patches(query, neighbours, 2, engine, "cpu")
    for device in (None, "auto"):
        devices._warn_of_cpu.cache_clear()
        with pytest.warns(UserWarning, match=STAYS):
            found = sf.search_patches(query, neighbours, 2, engine, device)
        assert all(np.array_equal(*pair) for pair in zip(found, on_cpu, strict=True))
    placed: list[str] = []

    def noted(*args: Any) -> tuple[Any, Any]:
        placed.append(next(arg for arg in args if isinstance(arg, str)))
        return on_cpu[0].reshape(20, 2), np.zeros((20, 2), np.int64)

    monkeypatch.setattr(flat, "search_flat", noted)
    monkeypatch.setattr(pyramid_torch, "search_torch", lambda *args: [noted(*args)])
    sf.search_patches(query, neighbours, 2, engine, "cuda:1")
    assert placed == ["cuda:1"]


def test_levels_are_kept_on_a_gpu_only_by_name(gpus: int) -> None:
    host = PyramidCache(0)
    with pytest.warns(UserWarning, match=STAYS):
        assert device_cache(sf.SearchOptions(engine="pyramid"), host) is None
    assert device_cache(sf.SearchOptions(engine="pyramid", device="cuda"), host) is not None


def test_a_batch_overlaps_the_search_only_where_one_is_on_a_gpu(
    gpus: int, toy_gallery: sf.Gallery, toy: sf.Extractor
) -> None:
    with pytest.warns(UserWarning, match=STAYS):
        assert not sf.Detector(toy_gallery, toy).pipeline().overlaps
    assert sf.Detector(toy_gallery, toy, sf.SearchOptions(device="cuda")).pipeline().overlaps


def test_a_query_by_default_runs_on_the_cpu(gpus: int, toy_gallery: sf.Gallery, toy: sf.Extractor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gallery = sf.Gallery.open(toy_gallery.path)
        found = sf.Detector(gallery, toy).query(image)
    assert len(caught) == 1
    expected = sf.Detector(toy_gallery, toy, sf.SearchOptions(device="cpu")).query(image)
    assert found.image_score == expected.image_score
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
