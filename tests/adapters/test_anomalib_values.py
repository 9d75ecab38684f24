"""What SpadeFaiss gives in anomalib's Engine, against this package's own way from files to maps.

These run where anomalib is installed: `make test-anomalib`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets import from_folders
from spade_faiss.evaluate import EvaluationOptions, evaluate
from tests.helpers.anomalib_engine import TOY, engine, folder, own_gallery
from tests.helpers.parts import write_parts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from anomalib.post_processing import PostProcessor
    from torchmetrics.classification import BinaryAUROC
    from torchvision.transforms.v2 import Normalize
    from torchvision.tv_tensors import Mask

    from spade_faiss.adapters.anomalib import SpadeFaiss
    from spade_faiss.adapters.anomalib_data import category_of
    from spade_faiss.adapters.anomalib_pixels import ViewResize, pixels_of
    from spade_faiss.adapters.anomalib_processing import RankingPostProcessor

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_torch_thread", "quiet_anomalib")]


def assert_equal_features(theirs: sf.Gallery, gallery: sf.Gallery, root: Path) -> None:
    assert len(theirs) == len(gallery) == 8
    for path in (root / "good").iterdir():
        rows = [theirs.snapshot().find(str(path)), gallery.snapshot().find(path.name)]
        assert None not in rows
        for one, other in zip(theirs.read(rows[:1]), gallery.read(rows[1:]), strict=True):
            assert np.array_equal(one, other)


def predicted(batches: Any, name: str) -> dict[str, np.ndarray]:
    return {
        path: value.squeeze(0).numpy() if value.ndim else value.item()
        for batch in batches
        for path, value in zip(batch.image_path, getattr(batch, name), strict=True)
    }


class Raw(PostProcessor):
    """Hands raw scores on, so that they can be compared."""

    def __init__(self) -> None:
        super().__init__(enable_normalization=False, enable_thresholding=False)


@pytest.mark.parametrize("own_size", [False, True])
def test_features_scores_and_maps_equal_those_of_files(parts: Path, tmp_path: Path, own_size: bool) -> None:
    options = {"pre_processor": False} if own_size else {}
    model = SpadeFaiss(gallery=tmp_path / "theirs", post_processor=Raw(), visualizer=False, **TOY, **options)
    runner, module = engine(tmp_path), folder(parts)
    runner.fit(model=model, datamodule=module)
    batches = runner.predict(model=model, datamodule=module)

    gallery, extractor = own_gallery(parts, tmp_path / "ours")
    assert_equal_features(sf.Gallery.open(tmp_path / "theirs"), gallery, parts)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=3))
    scores, maps = predicted(batches, "pred_score"), predicted(batches, "anomaly_map")
    assert len(scores) == 8
    for path in scores:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        found = detector.query(pixels if own_size else extractor.spec.view.resize(pixels))
        assert maps[path].shape == ((40, 48) if own_size else (32, 32))
        assert np.abs(maps[path] - found.anomaly_map).max() < 1e-5
        assert scores[path] == pytest.approx(found.image_score, rel=1e-6)


@pytest.mark.parametrize("validation", [{}, {"limit_val_batches": 0}], ids=["validated", "not_validated"])
def test_metrics_equal_those_of_evaluate(parts: Path, tmp_path: Path, validation: dict[str, int]) -> None:
    model = SpadeFaiss(gallery=tmp_path / "theirs", visualizer=False, pre_processor=False, **TOY)
    runner, module = engine(tmp_path, **validation), folder(parts)
    runner.fit(model=model, datamodule=module)
    [found] = runner.test(model=model, datamodule=module)

    gallery, extractor = own_gallery(parts, tmp_path / "ours")
    category = from_folders(parts / "good", parts / "bad", masks=parts / "masks", test_normal=parts / "test_good")
    own = evaluate(sf.Detector(gallery, extractor, sf.SearchOptions(k=3)), category, EvaluationOptions()).metrics
    assert found["image_AUROC"] == pytest.approx(own["image_AUROC"], abs=1e-6)
    assert found["pixel_AUROC"] == pytest.approx(own["pixel_AUROC"], abs=1e-5)


def test_a_datamodule_is_a_labelled_set(parts: Path) -> None:
    own = from_folders(parts / "good", parts / "bad", masks=parts / "masks", test_normal=parts / "test_good")
    found = category_of(folder(parts))
    assert sorted(image.path for image in found.normal) == sorted(image.path for image in own.normal)
    assert {image.key for image in found.normal} == {f"good/{number}.png" for number in range(8)}
    roles = [{(sample.path, sample.anomalous, sample.mask) for sample in each.test} for each in (found, own)]
    assert roles[0] == roles[1]
    assert found.masks
    module = folder(parts)
    module.setup()
    module.test_data.samples["mask_path"] = None
    assert not category_of(module).masks


def test_images_of_several_sizes_are_resized_where_they_are_read(tmp_path: Path) -> None:
    write_parts(tmp_path, lambda number: (40 + 4 * number, 48))
    model = SpadeFaiss(gallery=tmp_path / "g", visualizer=False, **TOY)
    engine(tmp_path).fit(model=model, datamodule=folder(tmp_path, num_workers=1))
    theirs = sf.Gallery.open(tmp_path / "g")
    assert_equal_features(theirs, own_gallery(tmp_path, tmp_path / "ours")[0], tmp_path)
    theirs.remove([str(tmp_path / "good/0.png")])  # no worker of the data loader has kept the writer's lock


def test_tiles_are_cut_from_images_at_their_own_size(parts: Path, tmp_path: Path) -> None:
    options = {"image_size": 32, "crop": 32, "tile": 32, "overlap": 0}
    model = SpadeFaiss(tmp_path / "g", "toy", "paper", options=options, visualizer=False)
    assert model.pre_processor is None
    engine(tmp_path).fit(model=model, datamodule=folder(parts))
    assert len(sf.Gallery.open(tmp_path / "g")) == 8 * 4
    generation = model.model.detector.gallery.generation
    engine(tmp_path).fit(model=model, datamodule=folder(parts))  # nothing is new, and no tile is another image
    assert sf.Gallery.open(tmp_path / "g").generation == generation


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 1, 32, 32), r"found \(2, 1, 32, 32\) float32; convert grey"),
        (torch.zeros(2, 4, 32, 32), r"found \(2, 4, 32, 32\) float32; convert grey"),
        (torch.zeros(3, 32, 32), r"found \(3, 32, 32\) float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint16), "uint16; scale it"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8; scale it"),
        (torch.full((2, 3, 32, 32), 255.0), "found values from 255 to 255; leave Normalize out"),
        (torch.full((2, 3, 32, 32), -0.5), "found values from -0.5"),
        (torch.full((2, 3, 32, 32), float("nan")), "found values from nan"),
    ],
)
def test_other_tensors_are_refused(images: torch.Tensor, found: str) -> None:
    with pytest.raises(sf.ImageError, match=found):
        pixels_of(images)


def test_a_normalised_datamodule_is_refused(parts: Path, tmp_path: Path) -> None:
    module = folder(parts, augmentations=Normalize(mean=[0.5] * 3, std=[0.2] * 3))
    with pytest.raises(sf.ImageError, match="leave Normalize out"):
        engine(tmp_path).fit(model=SpadeFaiss(gallery=tmp_path / "g", visualizer=False, **TOY), datamodule=module)


def test_pixels_of_8_bits_come_back_as_they_were() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    [found] = pixels_of(torch.from_numpy(values).float() / 255)
    assert np.array_equal(found, values[0].transpose(1, 2, 0))


def test_resizing_equals_the_extractors_view_and_keeps_masks_binary() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    found, mask = ViewResize((32, 24))(images, Mask(torch.ones(2, 37, 53, dtype=torch.uint8)))
    view = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=(32, 24), strides=(4, 8))).spec.view
    for one, other in zip(pixels_of(found), pixels, strict=True):
        assert np.array_equal(one, view.resize(other))
    assert mask.shape == (2, 32, 24)
    assert mask.unique().tolist() == [1]


def test_scores_beyond_those_of_the_validation_keep_their_order() -> None:
    low, high, threshold = (torch.tensor(value) for value in (1.0, 3.0, 2.0))
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 30.0, 31.0, 3000.0])
    found = RankingPostProcessor._normalize(scores, low, high, threshold)
    assert found is not None
    assert found[2] == 0.5
    assert (found.diff() > 0).all()
    assert found.min() > 0
    assert found.max() < 1
    clamped = PostProcessor._normalize(scores, low, high, threshold)
    assert (clamped.diff() == 0).any()  # which is why


def test_scores_without_a_validation_keep_their_order_in_batches_of_one() -> None:
    """torchmetrics takes a batch with a value beyond [0, 1] for logits."""
    scores, labels = torch.tensor([0.8, 0.9, 0.95, 1.05, 1.2, 900.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    unknown = torch.tensor(float("nan"))
    raw, ours = BinaryAUROC(), BinaryAUROC()
    for score, label in zip(scores.split(1), labels.split(1), strict=True):
        raw.update(score, label)
        ours.update(RankingPostProcessor._normalize(score, unknown, unknown, unknown), label)
    assert raw.compute() < 0.5  # which is why
    assert ours.compute() == 1
