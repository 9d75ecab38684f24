"""SpadeFaiss in anomalib's Engine, against this package's own way from files to maps.

These run where anomalib is installed: `make test-anomalib`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    pytest.importorskip("anomalib", reason="anomalib is not installed: make test-anomalib")
    from anomalib.data import Folder, ImageBatch
    from anomalib.engine import Engine
    from anomalib.post_processing import PostProcessor
    from torchvision.transforms.v2 import Normalize
    from torchvision.tv_tensors import Mask

    from spade_faiss.adapters.anomalib import SpadeFaiss
    from spade_faiss.adapters.anomalib_data import category_of
    from spade_faiss.adapters.anomalib_pixels import ViewResize, pixels_of
    from spade_faiss.adapters.anomalib_processing import RankingPostProcessor

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_torch_thread")]

TOY = {"backbone": "toy", "recipe": "paper", "options": {"image_size": 32, "crop": 32, "k": 3}}
OPTIONS = sf.FeatureOptions(image_size=32, crop=32, strides=(4, 8, 16))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("anomalib", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one size: 8 normal ones, 4 + 4 to test with, and masks."""
    return write_parts(tmp_path_factory.mktemp("parts"), lambda number: (40, 48))


def write_parts(root: Path, size_of: Any) -> Path:
    rng = np.random.default_rng(0)
    for kind, n in (("good", 8), ("bad", 4), ("test_good", 4)):
        (root / kind).mkdir()
        for number in range(n):
            pixels = rng.integers(100, 160, (*size_of(number), 3)).astype(np.uint8)
            if kind == "bad":
                pixels[8:24, 12:30] = 200
                mask = np.zeros(size_of(number), np.uint8)
                mask[8:24, 12:30] = 255
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / "masks" / f"{number}.png")
            Image.fromarray(pixels).save(root / kind / f"{number}.png")
    return root


def folder(root: Path, **options: Any) -> Any:
    given = {"num_workers": 0, "train_batch_size": 3, "eval_batch_size": 3, "val_split_mode": "same_as_test"} | options
    return Folder(
        name="parts", root=root, normal_dir="good", abnormal_dir="bad", normal_test_dir="test_good", mask_dir="masks",
        **given,
    )  # fmt: skip


def engine(root: Path, **options: Any) -> Any:
    return Engine(default_root_dir=root / "results", **{"logger": False, "barebones": True} | options)


def own_gallery(root: Path, path: Path) -> tuple[sf.Gallery, Any]:
    extractor = sf.load_extractor("toy", options=OPTIONS)
    gallery = sf.Gallery.create(path, extractor.spec, recipe="paper")
    gallery.add_images(root / "good", extractor)
    return gallery, extractor


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


def test_metrics_equal_those_of_evaluate(parts: Path, tmp_path: Path) -> None:
    model = SpadeFaiss(gallery=tmp_path / "theirs", visualizer=False, pre_processor=False, **TOY)
    runner, module = engine(tmp_path), folder(parts)
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


class Stops(torch.nn.Module):
    """An augmentation that ends the fit at its nth image."""

    def __init__(self, at: int, how: Any) -> None:
        super().__init__()
        self.left, self.how = at, how

    def forward(self, image: Any, mask: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            self.how()
        return image if mask is None else (image, mask)


def fail() -> None:
    raise RuntimeError("the camera is on fire")


class Counting:
    """An extractor that counts what goes through it."""

    def __init__(self, extractor: Any) -> None:
        self.spec, self.batch_size, self.views, self._extractor = extractor.spec, extractor.batch_size, 0, extractor

    def extract(self, views: Any) -> Any:
        self.views += len(views)
        return self._extractor.extract(views)


@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_fit_that_was_cut_off_goes_on_where_it_was(parts: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "g"
    if how == "kill":  # a shard, and so a commit, a batch
        sf.Gallery.create(path, sf.load_extractor("toy", options=OPTIONS).spec, recipe="paper", shard_bytes=1).close()

    def first(how: Any) -> None:
        model, module = SpadeFaiss(gallery=path, visualizer=False, **TOY), folder(parts)
        module.setup("fit")
        module.train_data.augmentations = Stops(7, how)  # in the third batch of 3
        data = module.train_data
        loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=data.collate_fn)
        engine(tmp_path).fit(model=model, train_dataloaders=loader)

    if how == "error":
        with pytest.raises(RuntimeError, match="on fire"):
            first(fail)
    elif not (child := os.fork()):
        try:
            first(lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(sf.Gallery.open(path)) >= 3

    model = SpadeFaiss(gallery=path, visualizer=False, **TOY)
    counting = model.model.extractor = Counting(model.model.extractor)
    engine(tmp_path).fit(model=model, datamodule=folder(parts))
    assert len(sf.Gallery.open(path)) == 8
    assert counting.views - 8 in (2, 5)  # 8 of the validation; a loader may be a batch ahead


@pytest.fixture(scope="module")
def fitted(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder with a gallery and the checkpoint of its fit, and the metrics of its test."""
    root = tmp_path_factory.mktemp("fitted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = engine(root, barebones=False, enable_progress_bar=False)
        model = SpadeFaiss(gallery=root / "g", visualizer=False, **TOY)
        runner.fit(model=model, datamodule=folder(parts))
        [found] = runner.test(model=model, datamodule=folder(parts))
        shutil.copy(runner.best_model_path, root / "model.ckpt")
    return root, found


@pytest.fixture
def copied(fitted: tuple[Path, dict[str, float]], tmp_path: Path) -> Path:
    shutil.copytree(fitted[0] / "g", tmp_path / "moved")
    shutil.copy(fitted[0] / "model.ckpt", tmp_path)
    return tmp_path


def test_a_checkpoint_holds_no_features_and_finds_its_gallery(
    fitted: tuple[Path, dict[str, float]], parts: Path, tmp_path: Path
) -> None:
    root, found = fitted
    record = torch.load(root / "model.ckpt", weights_only=True)["spade_faiss_gallery"]
    assert set(record) == {"path", "generation", "checksum"}
    assert record["path"] == str(root / "g")
    assert (root / "model.ckpt").stat().st_size < 20_000
    model = SpadeFaiss.load_from_checkpoint(root / "model.ckpt", visualizer=False)
    assert engine(tmp_path).test(model=model, datamodule=folder(parts)) == [found]
    model = SpadeFaiss(gallery=root / "g", visualizer=False, options={"k": 3})  # the rest is the gallery's
    again = engine(tmp_path).test(model=model, datamodule=folder(parts), ckpt_path=root / "model.ckpt")
    assert again == [found]


def test_a_gallery_elsewhere_is_given_by_its_path(copied: Path, fitted: Any, parts: Path) -> None:
    model = SpadeFaiss.load_from_checkpoint(copied / "model.ckpt", gallery=copied / "moved", visualizer=False)
    assert model.gallery == copied / "moved"
    assert engine(copied).test(model=model, datamodule=folder(parts)) == [fitted[1]]


def test_a_gallery_that_is_gone_changed_or_anothers_is_named(copied: Path) -> None:
    def load(**options: Any) -> Any:
        return SpadeFaiss.load_from_checkpoint(copied / "model.ckpt", visualizer=False, **options)

    with pytest.raises(sf.GalleryNotFoundError, match=r"the checkpoint's gallery in .*gone, found none; copy it"):
        load(gallery=copied / "gone")
    with pytest.raises(sf.SpecMismatchError, match="moved"):
        load(gallery=copied / "moved", options={"image_size": 64, "crop": 64})
    gallery = sf.Gallery.open(copied / "moved")
    generation = gallery.generation
    gallery.remove(gallery.snapshot().keys([0]))
    expected = rf"expected generation {generation} of the checkpoint in .*moved, found generation {generation + 1} "
    with pytest.raises(sf.GalleryError, match=expected):
        load(gallery=copied / "moved")


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(sf.GalleryError, match="expected one of SpadeFaiss after its fit"):
        SpadeFaiss(visualizer=False, **TOY).on_load_checkpoint({"hyper_parameters": {}})


def test_another_backbone_cannot_go_on_with_a_gallery(copied: Path, parts: Path) -> None:
    options = TOY | {"options": {"image_size": 64, "crop": 64}}
    model = SpadeFaiss(gallery=copied / "moved", visualizer=False, **options)
    with pytest.raises(sf.SpecMismatchError):
        engine(copied).fit(model=model, datamodule=folder(parts))


def test_a_gallery_of_other_images_is_not_mixed_with_these(parts: Path, tmp_path: Path) -> None:
    gallery, _ = own_gallery(parts, tmp_path / "g")  # its keys are not paths of this datamodule
    model = SpadeFaiss(gallery=tmp_path / "g", visualizer=False, **TOY)
    with pytest.raises(sf.GalleryError, match=r"only images of this datamodule in .*, found 8 others"):
        engine(tmp_path).fit(model=model, datamodule=folder(parts))
    gallery.refresh()
    assert len(gallery) == 8
    gallery.remove(["0.png"])  # the lock is free again


def test_without_a_datamodule_other_images_are_noticed_at_the_end(parts: Path, tmp_path: Path) -> None:
    gallery, _ = own_gallery(parts, tmp_path / "g")
    module = folder(parts)
    module.setup("fit")
    loader = torch.utils.data.DataLoader(module.train_data, batch_size=3, collate_fn=module.train_data.collate_fn)
    model = SpadeFaiss(gallery=tmp_path / "g", visualizer=False, **TOY)
    with pytest.raises(sf.GalleryError, match="found 8 others"):
        engine(tmp_path).fit(model=model, train_dataloaders=loader)
    gallery.refresh()
    gallery.remove(["0.png"])  # the lock is free again


def test_without_a_path_the_gallery_is_in_the_folder_of_the_run(parts: Path, tmp_path: Path) -> None:
    runner = engine(tmp_path, barebones=False, enable_progress_bar=False)
    model = SpadeFaiss(visualizer=False, **TOY)
    runner.fit(model=model, datamodule=folder(parts))
    assert model.gallery == Path(runner.trainer.default_root_dir) / "spade.gallery"
    assert model.gallery.is_relative_to(tmp_path)
    again = SpadeFaiss.load_from_checkpoint(runner.best_model_path, visualizer=False)
    assert again.gallery == model.gallery.absolute()


def test_images_that_have_changed_are_refused(parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    shutil.copytree(parts, root)
    model = SpadeFaiss(gallery=tmp_path / "g", visualizer=False, **TOY)
    engine(tmp_path).fit(model=model, datamodule=folder(root))
    Image.new("RGB", (48, 40)).save(root / "good/3.png")
    with pytest.raises(sf.KeyConflictError, match="with the pixels that it was stored with, found others"):
        engine(tmp_path).fit(model=model, datamodule=folder(root))


def test_an_existing_gallery_is_tested_without_a_fit(parts: Path, tmp_path: Path) -> None:
    own_gallery(parts, tmp_path / "g")
    model = SpadeFaiss(gallery=tmp_path / "g", visualizer=False)
    assert model.model.extractor.spec.name == "toy"
    assert model.model.extractor.spec.level_shapes == sf.load_extractor("toy", options=OPTIONS).spec.level_shapes
    [found] = engine(tmp_path).test(model=model, datamodule=folder(parts))
    assert found["pixel_AUROC"] > 0.9


def test_nothing_to_fit_or_to_test_with_is_said(parts: Path, tmp_path: Path) -> None:
    model = SpadeFaiss(gallery=tmp_path / "g", visualizer=False, **TOY)
    with pytest.raises(sf.GalleryNotFoundError, match=r"gallery: expected one that was fitted in .*; fit first, or"):
        engine(tmp_path).test(model=model, datamodule=folder(parts))
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.GalleryError, match=r"cannot make the gallery .*file/g: Not a directory"):
        engine(tmp_path).fit(model=SpadeFaiss(tmp_path / "file" / "g", **TOY), datamodule=folder(parts))
    module = folder(parts)
    module.setup("fit")
    module.train_data._samples = module.train_data.samples.iloc[:0]
    loader = torch.utils.data.DataLoader(module.train_data, batch_size=3, collate_fn=module.train_data.collate_fn)
    with pytest.raises(sf.NotEnoughImagesError, match="expected normal images to train with, found none"):
        engine(tmp_path).fit(model=model, train_dataloaders=loader)
    sf.Gallery.open(tmp_path / "g").reindex()  # the lock is free again


def batch(**values: Any) -> Any:
    return ImageBatch(**{"image": torch.zeros(2, 3, 32, 32), "image_path": ["a.png", "b.png"]} | values)


def test_training_batches_need_paths_and_normal_images(tmp_path: Path) -> None:
    model = SpadeFaiss(gallery=tmp_path / "g", **TOY)
    model._filling = object()
    with pytest.raises(sf.ImageError, match="expected the path of each image"):
        model.training_step(batch(image_path=None))
    with pytest.raises(sf.ImageError, match=r"b\.png: expected normal images .* labelled as anomalous"):
        model.training_step(batch(gt_label=torch.tensor([False, True])))


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


def test_export_says_what_to_use_instead(tmp_path: Path) -> None:
    model = SpadeFaiss(gallery=tmp_path / "g", **TOY)
    for kind in ("torch", "onnx", "openvino"):
        with pytest.raises(sf.OptionError, match=r"copy the gallery's folder and query it with spade_faiss\.Detector"):
            engine(tmp_path).export(model=model, export_type=kind)


def test_unknown_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(sf.OptionError, match=r"options: expected names among .*image_size.*, found 'neighbours'"):
        SpadeFaiss(gallery=tmp_path / "g", options={"neighbours": 3})
    with pytest.raises(sf.OptionError, match="kappa: expected a number >= 1"):
        SpadeFaiss(gallery=tmp_path / "g", options={"kappa": 0})
    with pytest.raises(sf.OptionError, match=r"options: expected names and values, .*, found list"):
        SpadeFaiss(gallery=tmp_path / "g", options=["k"])  # type: ignore[arg-type]
