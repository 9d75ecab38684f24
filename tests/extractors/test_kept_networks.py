"""Networks that torch need not make: the same extractor, and never one of other weights, options or code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import spade_faiss as sf
from spade_faiss.extractors import kept_networks, networks, openvino_network, runtimes, torch_networks
from spade_faiss.extractors.networks import NetworkExtractor
from spade_faiss.system import user_cache
from spade_faiss.system.sealed_json import sealed
from tests.helpers.images import write_images
from tests.helpers.runtimes import SIDE

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]

OPTIONS: dict[str, Any] = {"image_size": SIDE, "device": "cpu", "runtime": "openvino"}
VIEWS = list(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
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


def random_weights(path: Path, name: str = "test_resnet", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    torch.save(timm.create_model(name).state_dict(), path)
    return path


def load(weights: Path | None, name: str = "timm:test_resnet", **options: Any) -> NetworkExtractor:
    found = sf.load_extractor(name, weights, sf.FeatureOptions(**{**OPTIONS, **options}))
    assert isinstance(found, NetworkExtractor)
    return found


def kept(cache: Path) -> list[Path]:
    """What is kept of a network, by the options that were given and by those of its spec."""
    paths = sorted(cache.rglob("networks/*.json"))
    assert len(paths) == 2
    return paths


def assert_same(one: NetworkExtractor, other: NetworkExtractor) -> None:
    assert one.spec == other.spec
    assert one.spec.to_json() == other.spec.to_json()
    assert (one.runtime, one.device, one.batch_size) == (other.runtime, other.device, other.batch_size)
    found, expected = one.extract(VIEWS), other.extract(VIEWS)
    for a, b in zip([found.image, *found.levels], [expected.image, *expected.levels], strict=True):
        assert np.array_equal(a, b)


# --- the same extractor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:test_resnet", {}),
        ("timm:test_resnet", {"neighbourhood": 3, "count_include_pad": True, "dtype": "float32", "batch_size": 2}),
        ("timm:test_vit", {"image_size": 64, "crop": SIDE, "tokens": "normalised", "image_feature": "class_token"}),
        ("efficientnet_lite0", {"strides": (8, 16), "normalisation": "trained", "bits": 12, "tile": 80}),
    ],
)
def test_what_is_kept_is_what_would_be_made(tmp_path: Path, made: list[str], name: str, options: Any) -> None:
    is_embedded = name == "efficientnet_lite0"
    weights = None if is_embedded else random_weights(tmp_path / "w.pth", name.removeprefix("timm:"))
    first, again = load(weights, name, **options), load(weights, name, **options)
    assert made == [name]
    assert_same(again, first)
    assert_same(pickle.loads(pickle.dumps(again)), first)
    assert load(weights, name, **{**options, "batch_size": 5}).batch_size == 5
    assert made == [name]


def test_the_file_of_its_weights_may_move(weights: Path, tmp_path: Path, made: list[str]) -> None:
    """The spec names the file that was given."""
    load(weights)
    moved = tmp_path / "folder" / "moved.pth"
    moved.parent.mkdir()
    weights.rename(moved)
    again = load(moved)
    assert (again.spec.weights, again.spec.weights_path) == ("moved.pth", str(moved))
    assert len(made) == 1


def test_a_gallery_is_built_and_queried(weights: Path, tmp_path: Path, made: list[str]) -> None:
    images = write_images(tmp_path / "images", 4)
    paths = sorted(images.iterdir())
    with sf.Gallery.create(tmp_path / "g", load(weights).spec) as gallery:
        gallery.add_images(images, load(weights))
        detector = sf.Detector(gallery, gallery.load_extractor(runtime="openvino"), sf.SearchOptions(k=2))
        assert detector.query(paths[2]).neighbours.keys[0] == paths[2].name
    assert made == ["timm:test_resnet"]


def test_timm_and_torchvision_are_not_imported(own_cache: Path) -> None:
    """In processes of their own, the default extractor."""
    code = (
        "import sys, spade_faiss as sf; found = sf.load_extractor(options=sf.FeatureOptions(image_size=64, "
        "runtime='openvino')); found.extract([__import__('numpy').zeros((64, 64, 3), 'uint8')]); "
        "print(found.spec.weights_sha256, *sorted({'timm', 'torchvision'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code]
    first, second = (subprocess.check_output(command, text=True).split() for _ in range(2))
    assert first[1:] == ["timm", "torchvision"]
    assert second == first[:1]


def test_a_forked_process_goes_on_by_torch(weights: Path, made: list[str]) -> None:
    load(weights)
    extractor = load(weights)
    expected = load(weights, runtime="torch").extract(VIEWS)
    extractor.extract(VIEWS)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(60)
            found = [extractor.extract(VIEWS) for _ in range(2)]
            is_same = all(
                np.array_equal(a, b) for one in found for a, b in zip(one.levels, expected.levels, strict=True)
            )
            code = 0 if is_same and len(made) == 3 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


# --- never another ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 64},
        {"image_size": 64, "crop": SIDE},
        {"dtype": "float32"},
        {"neighbourhood": 3},
        {"levels": ("2", "3")},
        {"strides": (8,)},
        {"normalisation": "imagenet"},
        {"bits": 10},
        {"tile": 64},
        {"runtime": "torch"},
    ],
    ids=str,
)
def test_other_options_make_the_network(
    own_cache: Path, weights: Path, made: list[str], options: dict[str, Any]
) -> None:
    load(weights)
    other = load(weights, **options)
    assert len(made) == 2
    shutil.rmtree(own_cache)
    assert other.spec.to_json() == load(weights, **options).spec.to_json()


def test_other_weights_under_the_same_name(weights: Path, made: list[str]) -> None:
    first = load(weights)
    random_weights(weights, seed=1)
    second = load(weights)
    assert len(made) == 2
    assert first.spec.weights_sha256 != second.spec.weights_sha256
    weights.write_bytes(b"no weights")
    with pytest.raises(sf.WeightsError, match="could not read it"):
        load(weights)
    weights.unlink()
    with pytest.raises(sf.WeightsError, match="found nothing there"):
        load(weights)


def test_another_network_of_the_same_file(weights: Path) -> None:
    load(weights)
    with pytest.raises(sf.WeightsError, match="weights of another network"):
        load(weights, "timm:test_vit")


def test_other_libraries_and_other_code(weights: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load(weights)
    monkeypatch.setattr(kept_networks, "version", lambda library: "another")
    load(weights)
    assert len(made) == 2
    monkeypatch.setattr(kept_networks, "_code_digest", lambda: "another")
    load(weights)
    assert len(made) == 3


def test_the_code_that_is_digested_is_there() -> None:
    names = {path.name for path in kept_networks.CODE}
    assert {
        "networks.py",
        "torch_networks.py",
        "pooling.py",
        "spec.py",
        "tokens.py",
        "weights.py",
        "options.py",
    } <= names
    assert all(path.is_file() for path in kept_networks.CODE)


def test_what_auto_would_not_take(weights: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch was faster, or a variable asks for it."""
    seconds = {True: 2.0, False: 1.0}
    by_openvino = openvino_network.OpenVinoNetwork
    monkeypatch.setattr(runtimes, "_seconds", lambda forward, _: seconds[isinstance(forward, by_openvino)])
    load(weights)
    assert load(weights, runtime="auto").runtime == "torch"
    assert len(made) == 2
    monkeypatch.setenv(runtimes.VARIABLE, "openvino")
    assert load(weights, runtime="auto").runtime == "openvino"
    assert len(made) == 2
    monkeypatch.setenv(runtimes.VARIABLE, "torch")
    assert load(weights, runtime="auto").runtime == "torch"
    assert len(made) == 3


def test_a_model_of_the_callers_may_have_the_name(
    weights: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(weights)
    monkeypatch.setattr(networks, "is_imported", lambda: True)
    load(weights)
    assert len(made) == 2


def test_without_a_known_file_nothing_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_networks, "load_model", lambda *_: timm.create_model("test_resnet"))
    load(None)
    assert not list(own_cache.rglob("networks/*"))


# --- what is in its place --------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path: Path) -> None:
    content = path.read_text()
    path.write_text(content.replace('"image_dim": ', '"image_dim": 1'))


def of_another(path: Path) -> None:
    """Whole, of another network."""
    values = json.loads(path.read_bytes())
    values["request"]["name"] = "other"
    del values["xxh3"]
    path.write_bytes(sealed(values))


def without_a_field(path: Path) -> None:
    values = json.loads(path.read_bytes())
    del values["spec"]["image_dim"], values["xxh3"]
    path.write_bytes(sealed(values))


def with_a_bad_value(path: Path) -> None:
    values = json.loads(path.read_bytes())
    values["spec"]["image_dim"] = -1
    del values["xxh3"]
    path.write_bytes(sealed(values))


def a_list(path: Path) -> None:
    path.write_text("[]")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [truncated, flipped, of_another, without_a_field, with_a_bad_value, a_list, a_folder]
)
def test_what_cannot_be_used_is_made_again(
    own_cache: Path, weights: Path, made: list[str], damage: Callable[[Path], None]
) -> None:
    first = load(weights)
    for path in kept(own_cache):
        damage(path)
    assert_same(load(weights), first)
    assert len(made) == 2
    assert_same(load(weights), first)
    assert len(made) == (3 if damage is a_folder else 2)


def test_a_converted_network_that_is_gone_or_damaged(own_cache: Path, weights: Path, made: list[str]) -> None:
    first = load(weights)
    [path] = own_cache.rglob("*.zip")
    path.unlink()
    assert_same(load(weights), first)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="expected a converted network, found a file that is cut short or changed"):
        assert_same(load(weights), first)
    assert len(made) == 3


def test_a_full_disk_leaves_nothing(own_cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(user_cache, "publish", full)
    with pytest.warns(UserWarning, match="cannot be used: No space left on device") as caught:
        load(weights)
    assert len(caught) == 1
    assert not [path for path in own_cache.rglob("*") if path.is_file()]
