"""Networks that torch need not make: the same extractor, and never one of other weights, options or code."""

from __future__ import annotations

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
from tests.helpers.images import write_images
from tests.helpers.kept_networks import VIEWS, assert_same, load, random_weights
from tests.helpers.runtimes import SIDE

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "timm_is_not_imported"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]


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


def in_a_forked_process(run: Callable[[], bool]) -> bool:
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(60)
            code = 0 if run() else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_forked_process_goes_on_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str], name: str
) -> None:
    """Wherever it is by then."""
    random_weights(tmp_path / "w.pth", name)
    monkeypatch.chdir(tmp_path)
    load(Path("w.pth"), f"timm:{name}")
    extractor = load(Path("w.pth"), f"timm:{name}")
    expected = load(Path("w.pth"), f"timm:{name}", runtime="torch").extract(VIEWS)
    extractor.extract(VIEWS)
    monkeypatch.chdir("/")

    def goes_on() -> bool:
        found = [extractor.extract(VIEWS) for _ in range(2)]
        pairs = [pair for one in found for pair in zip(one.levels, expected.levels, strict=True)]
        return all(np.array_equal(a, b) for a, b in pairs) and len(made) == 3

    assert in_a_forked_process(goes_on)


def test_a_forked_process_takes_no_other_weights(weights: Path) -> None:
    load(weights)
    extractor = load(weights)
    extractor.extract(VIEWS)

    def is_refused(message: str) -> bool:
        with pytest.raises(sf.WeightsError, match=message):
            extractor.extract(VIEWS)
        return True

    random_weights(weights, seed=1)
    assert in_a_forked_process(lambda: is_refused("expected the weights that this process began with, found others"))
    weights.unlink()
    assert in_a_forked_process(lambda: is_refused("found nothing there"))
    extractor.extract(VIEWS)  # the parent needs it no more


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


def test_other_libraries_and_other_code(
    tmp_path: Path, weights: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(weights)
    monkeypatch.setattr(kept_networks, "_version", lambda library: "another")
    load(weights)
    assert len(made) == 2
    (tmp_path / "code.py").touch()
    monkeypatch.setattr(kept_networks, "CODE", (*kept_networks.CODE[:-1], tmp_path / "code.py"))
    load(weights)
    assert len(made) == 3


def test_a_library_is_told_by_its_place_and_version() -> None:
    for library in kept_networks.LIBRARIES:
        place, content = kept_networks._version(library)
        assert place == sys.modules[library].__file__
        assert sys.modules[library].__version__.partition("+")[0] in content


@pytest.mark.parametrize("step", ["_made", "choose"])
def test_weights_that_are_replaced_meanwhile(weights: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Before they are read, and after: neither file is bound to the network of the other."""
    before, run = weights.read_bytes(), getattr(networks, step)

    def late(*given: Any) -> Any:
        random_weights(weights, seed=1)
        return run(*given)

    with monkeypatch.context() as patch:
        patch.setattr(networks, step, late)
        load(weights)
    after = weights.read_bytes()
    for content in (before, after):
        weights.write_bytes(content)
        found = load(weights)
        assert_same(found, load(weights))
        assert found.spec.weights_sha256 == load(weights, runtime="torch").spec.weights_sha256


def test_torchs_default_dtype_changes_nothing(weights: Path, made: list[str]) -> None:
    first = load(weights)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(load(weights), first)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(made) == 1


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
    own_cache: Path, weights: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(networks, "is_imported", lambda: True)
        load(weights)
    assert not list(own_cache.rglob("networks/*"))
    load(weights)
    monkeypatch.setattr(networks, "is_imported", lambda: True)
    load(weights)
    assert len(made) == 3


def test_the_last_are_kept(own_cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_networks, "MOST", 3)
    for bits in (9, 10, 11, 12):
        load(weights, bits=bits)
    assert len(list(own_cache.rglob("networks/*"))) == 3


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none"):
        assert kept_networks.request_of("resnet18", path, sf.FeatureOptions()) is None


def test_without_a_known_file_nothing_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_networks, "load_model", lambda *_: timm.create_model("test_resnet"))
    load(None)
    assert not list(own_cache.rglob("networks/*"))
