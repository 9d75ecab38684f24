"""Weights from files of every kind, what is refused, and what is said where there are none."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from spade_faiss.errors import FeatureError, WeightsError
from spade_faiss.extractors.features import Features
from spade_faiss.extractors.registry import Extractor
from spade_faiss.extractors.weights import _made, _Unfilled
from tests.helpers.networks import State, assert_same, load, refused, views

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.slow]  # `make test-fast` leaves it out


@pytest.fixture(scope="module")
def lite_from_state(lite_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Extractor]:
    """The embedded network with its own weights, by way of a file of some kind."""

    def through(save: Callable[[State, Path], object], name: str) -> Extractor:
        path = tmp_path_factory.mktemp("weights") / name
        save({name: tensor.contiguous() for name, tensor in lite_model.state_dict().items()}, path)
        return load(weights=path)

    return through


@pytest.mark.parametrize(
    ("name", "save"),
    [
        pytest.param("w.pth", torch.save, id="pth"),
        pytest.param("w.safetensors", save_file, id="safetensors"),
        pytest.param("w.pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path), id="state_dict"),
        pytest.param("w.pth", lambda state, path: torch.save({"model": state}, path), id="model"),
        pytest.param(
            "w.ckpt",
            lambda state, path: torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, path),
            id="module-prefix",
        ),
        pytest.param(
            "w.pth", partial(torch.save, _use_new_zipfile_serialization=False), id="pth-of-old"
        ),  # before torch 1.6
    ],
)
def test_files_of_every_kind(
    lite_from_state: Callable[..., Extractor], lite: Extractor, lite_features: Features, name: str, save: Any
) -> None:
    extractor = lite_from_state(save, name)
    assert extractor.spec == dataclasses.replace(lite.spec, weights=name)
    assert_same(extractor.extract(views(3)), lite_features)


def test_weights_of_another_network(resnet18_file: Path) -> None:
    for name in ("efficientnet_lite0", "resnet34", "timm:test_resnet"):
        assert "weights of another network" in refused(resnet18_file, name)


def test_weights_of_another_shape(resnet18_state: State, tmp_path: Path) -> None:
    torch.save({**resnet18_state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "grey.pth")
    said = refused(tmp_path / "grey.pth")
    assert "weights of another network" in said
    assert "conv1.weight" in said


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"x", b"these are\nno weights\n", b"PK\3\4", bytes(1000)], ids=repr)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert "expected a state dict (.pth or .safetensors)" in refused(path)


@pytest.mark.parametrize("share", [0.1, 0.9, 0.9999])
def test_truncated_weights(tmp_path: Path, share: float) -> None:
    save_file({"a": torch.zeros(500, 50)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.zeros(500, 50)}, tmp_path / "w.pth")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert "could not read it" in refused(path)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"a": 1}, {"state_dict": {"a": "b"}}, {1: torch.zeros(3)}, {}, None],
    ids=["tensor", "list", "number", "text", "number-as-name", "nothing-in-it", "none"],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused(tmp_path / "w.pth")


class _Code:
    """What a malicious file would hold: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, suffix: str) -> None:
    zipped, bare, wrapped = (tmp_path / f"{name}{suffix}" for name in ("zipped", "bare", "wrapped"))
    code = _Code(tmp_path / "it ran")
    torch.save({"a": code}, zipped)
    bare.write_bytes(pickle.dumps(code, protocol=2))
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3), "b": code}}, wrapped)
    for path in (zipped, bare, wrapped):
        assert "could not read it" in refused(path)
        assert not code.folder.exists()
    pickle.loads(bare.read_bytes())
    assert code.folder.exists()  # it would have


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("extractor", ["efficientnet_lite0", "resnet18", "timm:test_resnet"])
def test_missing_file(tmp_path: Path, extractor: str, name: str) -> None:
    assert "found nothing there" in refused(tmp_path / name, extractor)


def test_folder_of_weights(tmp_path: Path) -> None:
    assert "could not read it" in refused(tmp_path)


def test_values_too_large_for_float16_are_refused_with_the_way_out(
    resnet18_state: State, resnet18_file: Path, tmp_path: Path
) -> None:
    large = {n: t * 1e6 if n == "layer3.1.bn2.weight" else t for n, t in resnet18_state.items()}
    torch.save(large, tmp_path / "large.pth")
    extractors = {d: load("resnet18", tmp_path / "large.pth", image_size=64, dtype=d) for d in ("float16", "float32")}
    with pytest.raises(FeatureError, match=r"^level 2: expected values within ±65504.*dtype float32"):
        extractors["float16"].extract(views(1, (64, 64)))
    assert np.isfinite(extractors["float32"].extract(views(1, (64, 64))).levels[2]).all()


# --- no network ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Downloads fail at once, and nothing is cached; returns the folder of torch's cache."""

    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("network is unreachable\n(tried five times)")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(timm.models._hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", unreachable)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet18", "resnet18-f37072fd.pth from https://download.pytorch.org/models/resnet18-f37072fd.pth"),
        ("wide_resnet50_2", "wide_resnet50_2-95faca4d.pth from https://"),
        ("timm:resnet18", "model.safetensors of timm/resnet18.a1_in1k"),
        ("timm:vit_tiny_patch16_224", "model.safetensors of timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    ],
)
def test_no_weights_to_be_had(name: str, file: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"extractor {name}: its weights could not be downloaded (network is unreachable); ")
    assert f"bring the file {file}" in message
    assert message.endswith(" and pass it as weights=FILE")
    assert "\n" not in message


@pytest.mark.usefixtures("no_network")
def test_weights_never_touch_the_network(resnet18_file: Path) -> None:
    for name in ("resnet18", "timm:resnet18"):
        load(name, resnet18_file, image_size=32)
    load(image_size=32)  # the embedded ones do not either


def test_torchvisions_cache_is_used(no_network: Path, resnet18_file: Path) -> None:
    no_network.mkdir(parents=True)
    (no_network / "resnet18-f37072fd.pth").write_bytes(resnet18_file.read_bytes())
    load("resnet18", resnet18_file, image_size=32).spec.require(load("resnet18", image_size=32).spec, "the cache")


@pytest.mark.parametrize(
    "name", ["resnet18", "timm:tf_efficientnet_lite0", "timm:vit_tiny_patch16_224", "timm:hiera_tiny_224"]
)
def test_a_network_whose_weights_follow_draws_no_random_numbers(name: str) -> None:
    before = torch.get_rng_state()
    _made(timm.create_model if name.startswith("timm:") else torchvision.models.get_model, name.removeprefix("timm:"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (0.5, 0.6), (1.0, 2.0), (-9.0, -8.0)])
def test_initialisers_that_draw_until_it_suits_come_to_an_end(low: float, high: float) -> None:
    with _Unfilled():
        parameter = torch.nn.Parameter(torch.full((40, 50), float("nan")))
        torch.nn.init.trunc_normal_(parameter, 0.0, 1.0, low, high)
    assert parameter.isfinite().all()
