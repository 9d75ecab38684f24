"""Networks run by OpenVINO: torch's features, whatever the batch and the threads, and what is said where it cannot."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import spade_faiss as sf
from spade_faiss.extractors import openvino_network, runtimes
from spade_faiss.extractors.networks import NetworkExtractor
from spade_faiss.extractors.runtimes import TorchNetwork, choose
from tests.helpers.images import write_images

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]

NAMES = ("test_resnet", "test_vit")  # timm's small ones
SIDE = 32
VIEWS = list(np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name in NAMES:
        torch.save(timm.create_model(name).state_dict(), folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def cache_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache folder, shared by the tests that leave it alone."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(cache_of_all: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_of_all))
    monkeypatch.delenv(runtimes.VARIABLE)
    return cache_of_all


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(runtimes.VARIABLE)
    return tmp_path / "cache"


@pytest.fixture
def load(weights: dict[str, Path]) -> Callable[..., NetworkExtractor]:
    def loaded(name: str = "test_resnet", **options: Any) -> NetworkExtractor:
        given = {"image_size": SIDE, "dtype": "float32", "device": "cpu", **options}
        found = sf.load_extractor(f"timm:{name}", weights[name], sf.FeatureOptions(**given))
        assert isinstance(found, NetworkExtractor)
        return found

    return loaded


Load = Callable[..., NetworkExtractor]


def arrays(features: sf.Features) -> list[Any]:
    return [features.image, *features.levels]


def same(one: sf.Features, other: sf.Features) -> bool:
    return all(map(np.array_equal, arrays(one), arrays(other)))


def small(forward: Any = None) -> TorchNetwork:
    """A network of one convolution, or another forward pass."""
    kernel = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32))

    def convolution(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        level = F.conv2d(batch, kernel, stride=4)
        return level.mean(dim=(2, 3)), [level]

    forward = forward or convolution
    return TorchNetwork("small", forward, forward, "float32", (SIDE, SIDE), {"name": "small"})


def chosen(network: TorchNetwork, wanted: str = "auto") -> str:
    with torch.inference_mode():
        return choose(wanted, network, "cpu")[0]  # type: ignore[arg-type]


def explained(network: TorchNetwork) -> str:
    """What auto says when torch runs a network; openvino, asked for by name, is refused for the same reason."""
    with pytest.warns(UserWarning, match=r"^torch runs small, because ") as caught:
        assert chosen(network) == "torch"
    [message] = [str(warning.message).partition(", because ")[2] for warning in caught]
    with pytest.raises(sf.OptionError, match=r"^runtime: expected OpenVINO to run small, found that ") as refused:
        chosen(network, "openvino")
    assert message in str(refused.value)
    assert str(refused.value).endswith("; take runtime='torch'")
    assert "\n" not in message
    return message


# --- the features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_are_torchs(load: Load, cache: Path, name: str) -> None:
    by_torch, converted = load(name, runtime="torch"), load(name, runtime="openvino")
    assert (by_torch.runtime, converted.runtime) == ("torch", "openvino")
    assert converted.spec == by_torch.spec  # a gallery takes either
    assert converted.spec.to_json() == by_torch.spec.to_json()
    for one, other in zip(arrays(converted.extract(VIEWS)), arrays(by_torch.extract(VIEWS)), strict=True):
        assert 0 < np.abs(one - other).max() < 1e-5 * np.abs(other).max()  # 0: it was torch that ran


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", NAMES)
def test_features_do_not_depend_on_the_batch_or_the_threads(load: Load, name: str) -> None:
    """So that a build by several processes, with fewer threads each, equals one by a single process bit for bit."""
    extractor = load(name, runtime="openvino")
    together = extractor.extract(VIEWS)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for size in (1, 3, 16):
            for start in range(0, 16, size):
                part = extractor.extract(VIEWS[start : start + size])
                assert same(part, together[start : start + size])


@pytest.mark.usefixtures("cache")
def test_pickled_for_a_worker_process(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker takes the runtime that the parent chose, whatever it would measure itself."""
    extractor = load(runtime="openvino")
    pickled = pickle.dumps(extractor)
    monkeypatch.setenv(runtimes.VARIABLE, "torch")
    again = pickle.loads(pickled)
    assert (again.runtime, again.spec) == ("openvino", extractor.spec)
    assert same(again.extract(VIEWS), extractor.extract(VIEWS))
    assert pickle.loads(pickle.dumps(load(runtime="auto"))).runtime == "torch"


@pytest.mark.usefixtures("cache")
def test_a_forked_process_goes_on_by_torch(load: Load) -> None:
    """The child has none of the threads that OpenVINO would wait for."""
    extractor = load(runtime="openvino")
    torch.set_num_threads(2)
    extractor.extract(VIEWS)  # starts them
    expected = load(runtime="torch").extract(VIEWS[:1])
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(30)
            with pytest.warns(UserWarning, match="OpenVINO does not run in a process that was forked"):
                assert chosen(small()) == "torch"
            code = 0 if same(extractor.extract(VIEWS[:1]), expected) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert len(extractor.extract(VIEWS)) == len(VIEWS)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_a_gallery_of_torchs_features_is_queried(load: Load, tmp_path: Path, patches: Any) -> None:
    by_torch = load(runtime="torch", image_size=64)
    folder = write_images(tmp_path / "images", 6)
    paths = sorted(folder.iterdir())
    with sf.Gallery.create(tmp_path / "g", by_torch.spec, patches=patches) as gallery:
        gallery.add_images(folder, by_torch)
        converted = gallery.load_extractor(runtime="openvino")
        assert isinstance(converted, NetworkExtractor)
        assert converted.runtime == "openvino"
        scores = []
        for extractor in (by_torch, converted):
            detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=2))
            found = [detector.query(path) for path in paths]
            assert [one.neighbours.keys[0] for one in found] == [path.name for path in paths]
            scores.append([one.neighbours.sq_distances for one in found])
    own, others = np.array(scores[1])[:, 0], np.array(scores[1])[:, 1]
    assert (own < 1e-6 * others).all()
    assert np.array(scores[0]) == pytest.approx(np.array(scores[1]), rel=1e-3, abs=float(1e-6 * others.max()))


def test_nothing_is_reported_to_a_web_service(load: Load, cache: Path) -> None:
    """OpenVINO would report its import and each conversion, and fork this process for that."""
    load(runtime="openvino")
    assert "openvino_telemetry" not in sys.modules
    assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__ == "openvino.tools.ovc.telemetry_stub"  # type: ignore[attr-defined]


# --- what auto takes -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
def test_auto_takes_what_was_faster_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([2.0, 1.0])
    monkeypatch.setattr(runtimes, "_seconds", lambda *_: next(measured))  # torch's, then OpenVINO's
    assert chosen(small()) == "openvino"
    monkeypatch.setattr(runtimes, "convert", None)  # would fail: it is converted and measured once
    assert chosen(small()) == "openvino"
    monkeypatch.setenv(runtimes.VARIABLE, "torch")
    assert runtimes.wanted_runtime("auto") == "torch"
    assert runtimes.wanted_runtime("openvino") == "openvino"


@pytest.mark.usefixtures("own_cache")
def test_auto_leaves_a_slower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1.0, 2.0])
    monkeypatch.setattr(runtimes, "_seconds", lambda *_: next(measured))
    for _ in range(2):
        assert chosen(small()) == "torch"  # and says nothing: warnings are errors here
    assert chosen(small(), "openvino") == "openvino"


@pytest.mark.usefixtures("own_cache")
def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino_network.cpu_core.cache_clear()
    assert chosen(small()) == "torch"
    with pytest.raises(sf.OptionError, match=r"openvino cannot be imported .*pip install 'spade-faiss\[openvino\]'"):
        chosen(small(), "openvino")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("devices", [[], ["GPU"]])
def test_without_a_cpu_plug_in(monkeypatch: pytest.MonkeyPatch, devices: list[str]) -> None:
    class Core:
        available_devices = devices

    monkeypatch.setattr(openvino_network.load_openvino(), "Core", Core)
    openvino_network.cpu_core.cache_clear()
    assert f"has no CPU plug-in here, but {devices[0] if devices else 'no device'}" in explained(small())
    openvino_network.cpu_core.cache_clear()


def test_a_gpu_and_wrong_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", small(), "cuda:0")[0] == "torch"
    with pytest.raises(sf.OptionError, match="found device cuda:0; take device='cpu' or runtime='torch'"):
        choose("openvino", small(), "cuda:0")
    with pytest.raises(sf.OptionError, match=r"^runtime: expected auto, torch or openvino, found 'onnx'"):
        sf.FeatureOptions(runtime="onnx")  # type: ignore[arg-type]
    monkeypatch.setenv(runtimes.VARIABLE, "onnx")
    with pytest.raises(sf.OptionError, match=r"^environment variable SPADE_FAISS_RUNTIME: expected auto, torch or o"):
        runtimes.wanted_runtime("auto")
    with pytest.raises(sf.OptionError, match=r"^extractor toy has no network, found openvino"):
        sf.load_extractor("toy", options=sf.FeatureOptions(runtime="openvino"))


# --- networks that it cannot run -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
def test_a_network_that_cannot_be_converted() -> None:
    network = small(lambda batch: (torch.linalg.eigvals(batch[:, 0, :4, :4]).real, [batch]))
    assert explained(network).startswith("OpenVINO cannot convert the network (")
    assert "cannot convert" in explained(network)  # as is known from before


@pytest.mark.usefixtures("own_cache")
def test_a_network_whose_way_depends_on_its_input() -> None:
    """A trace has the way of one image only, so that others get the wrong features."""
    probes = runtimes._probes((SIDE, SIDE))
    assert (probes.mean(dim=(1, 2, 3))[0] > 0) != (probes.mean(dim=(1, 2, 3))[1:] > 0).all()

    def forward(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = [image * 2 if image.mean() > 0 else image.abs() for image in batch]
        return torch.stack([one.mean(dim=(1, 2)) for one in found]), [torch.stack(found)]

    assert "OpenVINO's features differ from torch's by " in explained(small(forward))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("off", "taken"), [(0.5e-4, True), (2e-4, False)])
def test_the_gate(monkeypatch: pytest.MonkeyPatch, off: float, taken: bool) -> None:
    """Features that differ by more than 1e-4 of their scale are torch's."""
    run = openvino_network.OpenVinoNetwork.__call__

    def other(self: Any, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        image, levels = run(self, batch)
        return image, [level * (1 + off) for level in levels]

    monkeypatch.setattr(openvino_network.OpenVinoNetwork, "__call__", other)
    if taken:
        assert chosen(small(), "openvino") == "openvino"
    else:
        assert "by 0.0002 of a level's scale, more than 0.0001" in explained(small())


def test_difference() -> None:
    image, level = torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 10.0, 0.0, 0.0])
    assert runtimes.difference((image, [level]), (image, [level])) == 0
    # a hundredth of the largest value; of the root mean squares, sqrt(2 / 4) * 0.1 / sqrt(100 / 4)
    off = level + torch.tensor([0.1, 0.0, 0.1, 0.0])
    assert runtimes.difference((image, [off]), (image, [level])) == pytest.approx(0.1 / 2**0.5 / 5)
    assert np.isnan(runtimes.difference((image, [level * np.nan]), (image, [level])))
    assert runtimes.difference((image * 0 + 1, [level]), (image * 0, [level])) > 1e30
    with pytest.raises(ValueError, match=r"\(3,\), not \(4,\)"):
        runtimes.difference((image, [level[:3]]), (image, [level]))


# --- the cache folder ------------------------------------------------------------------------------------------------


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def half_written(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the weights
    path.write_bytes(content)


def of_another_network(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def with_weights_of_another(path: Path, other: Path) -> None:
    """Whole as a file, but not what about.json speaks of."""
    rewritten(path, lambda name, content: zipfile.ZipFile(other).read(name) if name == "model.bin" else content)


def of_another_version(path: Path, _: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        about = json.loads(content) if name == "about.json" else None
        return json.dumps({**about, "identity": {**about["identity"], "openvino": "1"}}).encode() if about else content

    rewritten(path, change)


def not_a_zip(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as file:
        parts = {name: change(name, file.read(name)) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (truncated, "cut short or changed"),
        (half_written, "cut short or changed"),
        (flipped, "cut short or changed"),
        (not_a_zip, "cut short or changed"),
        (of_another_network, r"another network or machine \(name\)"),
        (of_another_version, r"another network or machine \(openvino\)"),
        (with_weights_of_another, "a model with another checksum"),
    ],
)
def test_a_file_that_is_not_the_converted_network(own_cache: Path, damage: Any, found: str) -> None:
    """It is never loaded: the network is converted again, in its place."""
    network = small()
    other = replace(
        network, identity={"name": "other"}, exact=lambda x: scaled(network, x), forward=lambda x: scaled(network, x)
    )
    assert chosen(network, "openvino") == "openvino"
    [path] = own_cache.rglob("*.zip")
    assert chosen(other, "openvino") == "openvino"
    [another] = set(own_cache.rglob("*.zip")) - {path}
    damage(path, another)
    with pytest.warns(UserWarning, match=rf"^{path}: expected a converted network, found .*{found}.*; it is converted"):
        _, forward = choose("openvino", network, "cpu")
    batch = runtimes._probes(network.crop)
    assert runtimes.difference(forward(batch), network.exact(batch)) < 1e-5
    assert chosen(network, "openvino") == "openvino"  # it was written again, and is loaded without a warning
    assert not list(own_cache.rglob("*.tmp"))


def scaled(network: TorchNetwork, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    image, [level] = network.exact(batch)
    return image, [level * 3.0]


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = (
        r"^the network is converted in memory, in each process: .* cannot be used: Not a directory; set XDG_CACHE_HOME"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        assert chosen(small(), "openvino") == "openvino"
    assert len(caught) == 1


def test_a_full_disk_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtimes.converted, "publish", full)
    with pytest.warns(UserWarning, match="cannot be used: No space left on device; set XDG_CACHE_HOME"):
        assert chosen(small(), "openvino") == "openvino"
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_bfloat16_enters_the_spec(load: Load, tmp_path: Path) -> None:
    exact, rounded = load(runtime="torch"), load(runtime="torch", precision="bfloat16")
    assert exact.spec.to_json().keys() == rounded.spec.to_json().keys() - {"precision", "runtime"}
    assert (rounded.spec.precision, rounded.spec.runtime) == ("bfloat16", "torch")
    off = runtimes.difference(
        *(
            [torch.from_numpy(a) for a in arrays(e.extract(VIEWS))]
            and ((torch.from_numpy(f.image), [torch.from_numpy(level) for level in f.levels]))
            for e in (rounded, exact)
            for f in [e.extract(VIEWS)]
        )
    )
    assert 1e-4 < off < 0.1
    with sf.Gallery.create(tmp_path / "g", rounded.spec) as gallery:
        assert gallery.load_extractor().spec == rounded.spec
        with pytest.raises(sf.SpecMismatchError, match="precision: expected bfloat16, found float32"):
            gallery.spec.require(exact.spec, "g")
        other = sf.ExtractorSpec.from_json({**rounded.spec.to_json(), "runtime": "openvino"})
        with pytest.raises(sf.SpecMismatchError, match="runtime: expected torch, found openvino"):
            gallery.spec.require(other, "g")


@pytest.mark.usefixtures("own_cache")
def test_bfloat16_by_openvino_where_the_cpu_has_it(load: Load) -> None:
    """OpenVINO computes in float32 in silence where it has not."""
    options = {"runtime": "openvino", "precision": "bfloat16"}
    if "BF16" in openvino_network.platform()["abilities"].split():
        assert load(**options).spec.runtime == "openvino"
        return
    with pytest.raises(sf.OptionError, match="found that this CPU computes in f32, not bfloat16, by OpenVINO; take r"):
        load(**options)
    with pytest.warns(UserWarning, match="^torch runs timm:test_resnet, because this CPU computes in f32"):
        assert load(precision="bfloat16").spec.runtime == "torch"
