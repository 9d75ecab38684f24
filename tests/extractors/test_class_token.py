"""Tokens of vision transformers: each level and class token against timm's own, taken apart by hand."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from spade_faiss.errors import OptionError, SpecMismatchError
from spade_faiss.extractors.registry import Extractor, load_extractor
from spade_faiss.extractors.spec import ExtractorSpec
from spade_faiss.extractors.tokens import blocks_at
from spade_faiss.options import FeatureOptions
from tests.helpers.vision_transformers import make_tiny, with_random_weights

pytestmark = pytest.mark.usefixtures("one_torch_thread")

RAD: dict[str, Any] = {"blocks": (0.25, 0.5, 0.75, 1), "tokens": "normalised", "image_feature": "class_token"}
MEAN_STD = 0.5  # of test_vit's pixels, each channel


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """A function of a name that makes a tiny network with random weights, and the file of these."""
    make_tiny(monkeypatch)
    return partial(with_random_weights, folder=tmp_path)


def load(name: str, weights: Path | None = None, **options: Any) -> Extractor:
    return load_extractor(name, weights, FeatureOptions(**{"dtype": "float32", "device": "cpu", **options}))


def views(side: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8))


def unit(tokens: np.ndarray) -> np.ndarray:
    return tokens / np.linalg.norm(tokens, axis=1, keepdims=True)


def tokens_by_hand(model: Any, extractor: Extractor, images: list[np.ndarray]) -> list[np.ndarray]:
    """Run block after block; after each, all tokens (n, prefix + h w, d) through the final norm."""
    spec, found = extractor.spec, []
    batch = (np.stack(images) / 255 - np.array(spec.mean)) / np.array(spec.std)
    hooks = [block.register_forward_hook(lambda _block, _in, out: found.append(out)) for block in model.blocks]
    with torch.inference_mode():
        model(torch.from_numpy(batch.astype(np.float32)).permute(0, 3, 1, 2))
        for hook in hooks:
            hook.remove()
        return [model.norm(tokens).numpy() for tokens in found]


@pytest.mark.parametrize(
    ("name", "side", "prefix", "blocks"),
    [
        ("test_vit", 160, 1, [1, 3, 4, 5]),  # of 6
        ("vit_small_patch14_reg4_dinov2", 70, 5, [3, 6, 9, 11]),
        ("vit_small_patch16_dinov3", 256, 5, [3, 6, 9, 11]),
    ],
)
def test_levels_and_class_token(name: str, side: int, prefix: int, blocks: list[int], tiny: Any) -> None:
    model, path = tiny(name)
    extractor = load(f"timm:{name}", path, image_size=side, **RAD)
    assert extractor.spec.level_names == tuple(map(str, blocks))
    images = views(side)
    found, by_hand = extractor.extract(images), tokens_by_hand(model, extractor, images)
    for level, block in zip(found.levels, blocks, strict=True):
        n, d, h, w = level.shape
        expected = unit(by_hand[block][:, prefix:].reshape(n, h, w, d).transpose(0, 3, 1, 2))
        assert np.abs(level - expected).max() < 1e-5
    assert np.abs(found.image - unit(by_hand[11 if prefix > 1 else 5][:, 0])).max() < 1e-5
    assert np.linalg.norm(found.image, axis=1) == pytest.approx(1)


def test_equals_forward_intermediates(tiny: Any) -> None:
    model, path = tiny("test_vit")
    images = views(160)
    batch = torch.from_numpy(np.stack(images).astype(np.float32) / 255).sub(MEAN_STD).div(MEAN_STD).permute(0, 3, 1, 2)
    for normalised in (False, True):
        tokens: Any = "normalised" if normalised else "plain"
        extractor = load("timm:test_vit", path, levels=("2", "4"), tokens=tokens, image_feature="class_token")
        found = extractor.extract(images)
        with torch.inference_mode():
            both = model.forward_intermediates(
                batch, indices=[2, 4], norm=normalised, return_prefix_tokens=True, intermediates_only=True
            )
        for level, (expected, _) in zip(found.levels, both, strict=True):
            numbers = unit(expected.numpy()) if normalised else expected.numpy()
            assert np.abs(level - numbers).max() <= 1e-5 * np.abs(numbers).max()
        token = both[-1][1][:, 0]
        with torch.inference_mode():
            expected_image = unit((token if normalised else model.norm(token)).numpy())
        assert np.abs(found.image - expected_image).max() < 1e-5


def test_each_option_alone(tiny: Any) -> None:
    _, path = tiny("test_vit")
    images = views(160)
    plain, normalised, by_class, named = (
        load("timm:test_vit", path, levels=("1", "3", "5"), **options).extract(images)
        for options in (
            {"tokens": "plain", "image_feature": "pooled", "blocks": (0.5,)},  # levels that are named win
            {"tokens": "normalised"},
            {"image_feature": "class_token"},
            {},
        )
    )
    assert np.array_equal(plain.image, named.image)
    assert np.array_equal(normalised.image, named.image)
    for number, level in enumerate(named.levels):
        assert np.array_equal(plain.levels[number], level)
        assert np.array_equal(by_class.levels[number], level)
        assert np.linalg.norm(normalised.levels[number], axis=1) == pytest.approx(1)
    # test_vit's pooled feature is its last class token, of another length.
    assert np.abs(by_class.image - unit(named.image)).max() < 1e-5


@pytest.mark.parametrize("depth", [5, 12, 13, 24, 32, 40])
def test_blocks_at_shares(depth: int) -> None:
    assert blocks_at((0.25, 0.5, 0.75, 1), depth) == [depth // 4, depth // 2, 3 * depth // 4, depth - 1]
    assert blocks_at(tuple(block / depth for block in range(1, depth)), depth) == list(range(1, depth))


def test_blocks_of_a_shallow_network(tiny: Any) -> None:
    _, path = tiny("test_vit")
    message = r"^blocks: expected shares of different blocks, found blocks \[5, 5\] of 6; take levels$"
    with pytest.raises(OptionError, match=message):
        load("timm:test_vit", path, blocks=(0.9, 1))


# The first token of test_vit2 and 3 is a register, and 3 pools by attention. timm does not return cait's class token.
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("test_vit2", "timm:test_vit2, which has none"),
        ("test_vit3", "timm:test_vit3, which has none"),
        ("cait_xxs24_224", "timm:cait_xxs24_224, whose class token timm does not return"),
    ],
)
def test_without_a_class_token(name: str, found: str, tiny: Any) -> None:
    _, path = tiny(name)
    expected = f"image_feature: expected a vision transformer with a class token, found {found}; take image_feature="
    with pytest.raises(OptionError) as caught:
        load(f"timm:{name}", path, **RAD)
    assert str(caught.value) == expected + '"pooled"'


@pytest.mark.parametrize("name", ["test_vit2", "test_vit3"])
def test_pooled_in_its_place(name: str, tiny: Any) -> None:
    model, path = tiny(name)
    extractor = load(f"timm:{name}", path, **{**RAD, "image_feature": "pooled"})
    found, by_hand = extractor.extract(views(160)), tokens_by_hand(model, extractor, views(160))
    assert found.levels[-1].shape == (2, model.embed_dim, 10, 10)
    expected = unit(by_hand[-1][:, 1:].reshape(2, 10, 10, -1).transpose(0, 3, 1, 2))
    assert np.abs(found.levels[-1] - expected).max() < 1e-5
    assert np.array_equal(found.image, load(f"timm:{name}", path).extract(views(160)).image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            RAD,
            "image_feature: expected a vision transformer with a class token, found {}; take "
            'image_feature="pooled", tokens="plain", levels or strides',
        ),
        (
            {"tokens": "normalised"},
            'tokens: expected a vision transformer whose tokens can be normalised, found {}; take tokens="plain"',
        ),
        (
            {"blocks": (1,)},
            "blocks: expected a vision transformer whose blocks share one grid, found {}; take levels or strides",
        ),
    ],
)
@pytest.mark.parametrize("name", ["toy", "resnet18", "timm:test_resnet"])
def test_networks_without_tokens(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = None
    if name != "toy":
        import torchvision

        make = {"resnet18": torchvision.models.resnet18}.get(name, partial(timm.create_model, "test_resnet"))
        weights = tmp_path / "weights.pth"
        torch.save(make().state_dict(), weights)
    with pytest.raises(OptionError) as caught:
        load(name, weights, **options)
    assert str(caught.value) == message.format(name)


def test_spec_of_tokens(tiny: Any) -> None:
    _, path = tiny("test_vit")
    extractor = load("timm:test_vit", path, **RAD)
    spec = extractor.spec
    assert repr(spec).endswith("float32, normalised tokens, class token 64)")
    assert ExtractorSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    again = load_extractor("timm:test_vit", path, spec.options())
    assert again.spec == spec
    copied = pickle.loads(pickle.dumps(extractor))
    assert np.array_equal(copied.extract(views(160)).image, extractor.extract(views(160)).image)
    plain = load("timm:test_vit", path, levels=spec.level_names, tokens="plain", image_feature="pooled").spec
    assert not {"tokens", "image_feature"} & set(plain.to_json())  # earlier releases open such a gallery
    with pytest.raises(SpecMismatchError) as caught:
        spec.require(plain, "here")
    for field in ("tokens: expected normalised, found plain", "image_feature: expected class_token, found pooled"):
        assert field in str(caught.value)
