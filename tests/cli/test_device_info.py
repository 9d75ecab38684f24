"""What `info --device` prints, with GPUs pretended; the memory table of the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import pytest
import torch

import spade_faiss as sf
from spade_faiss.cli.device_info import print_devices
from spade_faiss.patch_search.gpu.memory import kept_bytes, search_bytes
from spade_faiss.system import gpu_costs
from spade_faiss.system.devices_seen import advice
from tests.helpers.command_line import Spade

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
LEVELS = {
    "efficientnet_lite0: 24 x 56 x 56, 40 x 28 x 28, 112 x 14 x 14": ((24, 56, 56), (40, 28, 28), (112, 14, 14)),
    "wide_resnet50_2: 256 x 56 x 56, 512 x 28 x 28, 1024 x 14 x 14": ((256, 56, 56), (512, 28, 28), (1024, 14, 14)),
    "ViT-B/14 at 518 px: 768 x 37 x 37": ((768, 37, 37),),
}


@pytest.fixture(params=[0, 2])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Torch and FAISS see so many GPUs."""
    facts = SimpleNamespace(name="A card", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: request.param, raising=False)
    return int(request.param)


def test_what_is_seen(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_devices(None, as_json=True)
    seen = json.loads(capsys.readouterr().out)
    assert (len(seen["torch"]["gpus"]), seen["faiss"]["gpus"]) == (gpus, gpus)
    place = "cuda:0" if gpus else "cpu"
    assert seen["auto"] == {"network": place, "patch search": place, "image index": place}
    print_devices(None, as_json=False)
    printed = capsys.readouterr().out
    assert f"sees {'2 GPUs' if gpus else 'no GPU'}" in printed
    assert ("cuda:1     A card, capability 9.0, 60.0 of 80.0 GiB free" in printed) is bool(gpus)
    assert f"measured   {gpu_costs.MEASURED.card}" in printed
    assert ("to do" in printed) is not bool(gpus)


@pytest.mark.parametrize(
    ("cuda", "in_torch", "in_faiss", "expected"),
    [
        (None, 0, 0, "has no CUDA"),
        ("13.0", 0, 0, "sees no GPU: nvidia-smi"),
        ("13.0", 1, 0, "faiss-gpu"),
    ],
)
def test_advice(cuda: Any, in_torch: int, in_faiss: int, expected: str) -> None:
    seen = {"torch": {"cuda": cuda, "gpus": [{}] * in_torch}, "faiss": {"gpus": in_faiss}}
    assert expected in advice(seen)


def test_the_memory_of_a_gallery(spade: Spade, toy_gallery: sf.Gallery) -> None:
    memory = json.loads(spade("info", toy_gallery.path, "--device", "--json").out)["memory"]
    assert memory["images"] == memory["k"] == len(toy_gallery)
    assert memory["kept_bytes"] == kept_bytes(toy_gallery.spec.level_shapes, len(toy_gallery))
    assert "to keep all 12 images there" in spade("info", toy_gallery.path, "--device").out
    assert "expected GALLERY or --device" in spade("info").err


def test_the_table_of_the_documentation() -> None:
    for name, shapes in LEVELS.items():
        sizes = [f"{search_bytes(shapes, k) / 2**30:.1f} GiB" for k in (5, 50, 150)]
        assert f"| {name} | {' | '.join(sizes)} |" in PAGE.read_text(encoding="utf-8")
    for name in ("efficientnet_lite0", "wide_resnet50_2"):
        shapes = next(shapes for title, shapes in LEVELS.items() if title.startswith(name))
        assert f"{kept_bytes(shapes, 1) / 2**20:.2f} MiB" in PAGE.read_text(encoding="utf-8")


@pytest.mark.cuda
@pytest.mark.parametrize("k", [5, 20])
def test_a_search_takes_no_more_memory_than_is_said(k: int) -> None:
    from spade_faiss.patch_search.gpu.search import search_together

    shapes = ((256, 28, 28), (512, 14, 14))
    query = [torch.randn(shape).numpy() for shape in shapes]
    neighbours = [torch.randn(k, *shape, device="cuda").half() for shape in shapes]
    sides = [query], [level[None] for level in neighbours]
    search_together(*sides, 1, "cuda:0")  # what is measured to be faster at the first takes more
    torch.cuda.reset_peak_memory_stats()
    search_together(*sides, 1, "cuda:0")
    assert torch.cuda.max_memory_allocated() <= search_bytes(shapes, k)
