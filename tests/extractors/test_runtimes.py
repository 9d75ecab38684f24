"""Networks run by OpenVINO: torch's features, whatever the batch and the threads; bfloat16."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import spade_faiss as sf
from spade_faiss.extractors import openvino_network, runtimes
from spade_faiss.extractors.networks import NetworkExtractor
from tests.helpers.images import write_images
from tests.helpers.runtimes import SIDE, chosen, small

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]

NAMES = ("test_resnet", "test_vit")  # timm's small ones
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
