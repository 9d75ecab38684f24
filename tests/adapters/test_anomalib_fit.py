"""What a fit of SpadeFaiss in anomalib's Engine leaves: a gallery and a checkpoint, and what does not go with them.

These run where anomalib is installed: `make test-anomalib`.
"""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import spade_faiss as sf
from tests.helpers.anomalib_engine import OPTIONS, TOY, engine, folder, own_gallery

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from anomalib.data import ImageBatch

    from spade_faiss.adapters.anomalib import SpadeFaiss

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_torch_thread", "quiet_anomalib")]


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
