"""`bench gpu` without a GPU: every part at tiny sizes, its time, what `auto` would go by; the stand-in for FAISS."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import faiss
import pytest
import torch
import without_faiss

import spade_faiss as sf
from spade_faiss.patch_search.pyramid import search as pyramid
from spade_faiss.system.gpu_costs import GpuCosts
from tests.helpers.benchmarks import BENCHMARKS

sys.path.append(str(BENCHMARKS))
import common
import gpu
import gpu_parts
import gpu_whole


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy in place of a network, nothing compiled, one size: what is tested is the way, not the time."""

    @contextlib.contextmanager
    def toy(run: gpu_parts.Run, name: str) -> Iterator[sf.Extractor]:
        yield sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=3, image_size=64))

    def small(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=small))  # 3 s to import
    monkeypatch.setattr(pyramid, "bfloat16_pays", lambda: False)
    monkeypatch.setattr(gpu_whole, "loaded", toy)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(gpu_parts, "TINY_SHAPES", {"two levels": ((4, 6, 6), (5, 3, 3))})
    monkeypatch.setattr(gpu_parts.Run, "seconds", lambda self, call, repeats=0: max(1e-9, self.once(call)[0]))


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("with_faiss", [True, False])
def test_every_part_runs_without_a_gpu(with_faiss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_faiss:
        monkeypatch.setattr(without_faiss, "is_missing", lambda: True)
    run = gpu_parts.Run("cpu", dry=True)
    *_, found = gpu.measured(run, 0)  # no time at all: a dry run leaves nothing out for that
    assert list(found) == list(gpu.PARTS)
    assert [cell["k"] for cell in found["patch_search"]] == [2, 3]
    for cell in found["patch_search"]:
        assert max(value for name, value in cell.items() if name.endswith("difference")) < 1e-5
        assert ("flat_cpu_ms" in cell) is with_faiss
    assert found["retrieval"]["200"]["numpy_agrees"] == 1
    assert found["retrieval"]["200"].get("faiss_flat_cpu_recall", 1) == 1
    assert any(without_faiss.WHY in text for text in run.left_out) is not with_faiss
    assert not any("time" in text for text in run.left_out)
    assert set(gpu.verdict(found["patch_search"])) == {"two levels, K = 2", "two levels, K = 3"}


def test_what_there_is_no_time_for_is_said() -> None:
    run = gpu_parts.Run("cpu", dry=False, until=time.monotonic() + 60)
    assert run.has(30, "a part")
    assert not run.has(90, "another")
    assert run.left_out == ["another: the part's share of the time is used up"]


def test_shares_are_all_of_the_time() -> None:
    assert 0.9 < sum(share for share, _ in gpu.PARTS.values()) <= 1
    assert gpu.SECONDS == 480


def test_without_a_gpu_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    monkeypatch.setattr(gpu, "PARTS", {"nothing": (1.0, lambda run: {})})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "missing on this machine: torch sees no CUDA device; FAISS sees no GPU"
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert "--dry-run" in capsys.readouterr().err


def test_what_was_measured_before_the_machine_was_gone_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: gpu_parts.Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
    monkeypatch.setattr(common, "machine", lambda: {"gpus": ["A card"]})
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    parts = {"decode": (0.5, lambda run: {"images_per_s": 7}), "build": (0.4, gone), "network": (0.1, gone)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(KeyboardInterrupt):
        gpu.main()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["decode"] == {"images_per_s": 7}
    assert written["not_reached"] == ["build", "network"]


def test_costs_are_fitted_to_what_was_measured() -> None:
    costs = GpuCosts("A card", 2e5, 2e-6, 3e-3, 2e-4, 1e-2, 10**5)
    cells = []
    for patches, channels, values, k in ((3136, 176, 128_576, 5), (3136, 1792, 1_404_928, 5), (256, 768, 196_608, 5),
                                         (3136, 176, 128_576, 50), (256, 768, 196_608, 150)):  # fmt: skip
        pairs = patches**2 * k
        taken = costs.query + pairs * (channels * costs.multiply + costs.pair) + patches * k * channels * costs.value
        upload = taken + costs.upload * k * values
        cells.append({"patches": patches, "channels": channels, "values": values, "k": k, "torch_ms": taken / 1e6,
                      "upload_and_search_ms": upload / 1e6})  # fmt: skip
    retrieval = {str(10**n): {"faiss_flat_gpu_1_ms": 1.0, "faiss_flat_cpu_1_ms": 10.0 ** (n - 5) + 0.1} for n in (4, 5)}
    found = gpu.costs_of("A card", cells, {"retrieval": retrieval})
    assert found is not None
    for name in ("query", "multiply", "pair", "value", "upload"):
        assert getattr(found, name) == pytest.approx(getattr(costs, name), rel=0.02)
    assert found.index_from == 10**5
    assert gpu.costs_of("A card", cells[:2], {}) is None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """FAISS's stand-in, and its error as it is outside of the tests."""
    monkeypatch.setattr(without_faiss, "ERROR", ModuleNotFoundError)
    return without_faiss.StandIn("faiss")


def test_the_stand_in_for_faiss_can_be_imported_and_no_more(stand_in: Any) -> None:
    assert hasattr(stand_in, "IndexFlat")  # all that system/faiss_guard asks for
    assert not isinstance(3, (stand_in.IndexFlat, stand_in.IndexIVFFlat))
    assert stand_in.get_num_gpus() == 0
    stand_in.omp_set_num_threads(1)
    for call in (lambda: stand_in.IndexFlatL2(3), lambda: stand_in.knn, lambda: stand_in.index_factory(3, "Flat")):
        with pytest.raises(ModuleNotFoundError, match="FAISS is not installed"):
            call()
    with pytest.raises(AttributeError):
        _ = stand_in.__wrapped__


def test_faiss_is_missing_only_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    assert not without_faiss.is_missing()
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert without_faiss.is_missing()
    monkeypatch.setitem(sys.modules, "faiss", stand_in)
    assert without_faiss.is_missing()
