"""Networks as files for other programs: run by OpenVINO from the file, they give the extractor's features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import spade_faiss as sf
from spade_faiss.extractors import openvino_network
from spade_faiss.extractors.export import export_backbone
from spade_faiss.extractors.registry import load_extractor
from tests.helpers.command_line import Spade

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]

VIEWS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> sf.Extractor:
    path = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    options = sf.FeatureOptions(image_size=32, dtype="float32", neighbourhood=3, strides=(4, 8), device="cpu")
    return load_extractor("timm:test_resnet", path, options)


@pytest.mark.parametrize("suffix", [".xml", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_the_file_gives_the_features(extractor: sf.Extractor, tmp_path: Path, suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"network{suffix}"
    names = export_backbone(extractor, path)
    assert names == ["image", *(f"level_{name}" for name in extractor.spec.level_names)]
    assert {file.suffix for file in tmp_path.iterdir()} == {suffix, ".bin"} - ({".bin"} if suffix == ".onnx" else set())
    core = openvino_network.cpu_core()
    run = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [output.get_any_name() for output in run.outputs] == names
    expected = extractor.extract(list(VIEWS))
    for n in (1, 3):  # any number of images
        found = run({"views": VIEWS[:n]})
        for name, array in zip(names, [expected.image, *expected.levels], strict=True):
            assert found[name].shape == array[:n].shape
            assert np.abs(found[name] - array[:n]).max() < 1e-5 * np.abs(array).max()


def test_what_cannot_be_exported(extractor: Any, toy: sf.Extractor, tmp_path: Path) -> None:
    with pytest.raises(sf.OptionError, match=r"^export: expected a file that ends in \.onnx or \.xml, found .*\.pt"):
        export_backbone(extractor, tmp_path / "network.pt")
    with pytest.raises(sf.OptionError, match=r"^export: expected an extractor with a network, found toy"):
        export_backbone(toy, tmp_path / "network.xml")
    with pytest.raises(sf.OutputError, match=r"cannot write .*: No such file or directory"):
        export_backbone(extractor, tmp_path / "none" / "network.xml")
    assert not list(tmp_path.iterdir())


def test_command(spade: Spade, tmp_path: Path, extractor: Any) -> None:
    sf.Gallery.create(tmp_path / "g", extractor.spec)
    found = spade("export-backbone", tmp_path / "g", tmp_path / "network.xml")
    assert found.status == 0
    assert found.out.endswith(
        f"network.xml: views 32x32x3 to image, {', '.join(f'level_{n}' for n in extractor.spec.level_names)}\n"
    )
    assert (tmp_path / "network.xml").is_file()
    assert (tmp_path / "network.bin").is_file()
