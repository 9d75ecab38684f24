"""What SpadeFaiss and anomalib's datamodules do with what is not as it should be.

These run where anomalib is installed: `make test-anomalib`.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spade_faiss as sf
from tests.helpers.anomalib_engine import TOY, engine
from tests.helpers.images import make_images

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from anomalib.data import Folder
    from torchvision.transforms.v2 import Grayscale, Lambda

    from spade_faiss.adapters.anomalib import SpadeFaiss
    from spade_faiss.adapters.anomalib_data import category_of
    from spade_faiss.adapters.anomalib_pixels import pixels_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_torch_thread", "quiet_anomalib")]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """6 normal images, and 2 + 2 to test with."""
    for number, (name, count) in enumerate({"good": 6, "bad": 2, "test_good": 2}.items()):
        make_images(tmp_path / "parts" / name, count, seed=number)
    return tmp_path / "parts"


def folder(root: Path, normal: str = "good", **options: Any) -> Any:
    given = {"num_workers": 0, "train_batch_size": 2, "eval_batch_size": 2, "val_split_mode": "same_as_test"}
    return Folder(
        name="parts", root=root, normal_dir=normal, abnormal_dir="bad", normal_test_dir="test_good", **given | options
    )


def model(gallery: Path, **options: Any) -> Any:
    return SpadeFaiss(gallery=gallery, visualizer=False, **TOY | options)


@pytest.mark.parametrize("name", ["layers", "num_neighbors", "pre_trained", "coreset_sampling_ratio", "k"])
def test_names_of_other_models_say_where_settings_go(tmp_path: Path, name: str) -> None:
    with pytest.raises(sf.OptionError, match=rf"{name}: expected gallery, backbone, .*; settings go into options, as"):
        model(tmp_path / "g", **{name: 1})


def test_an_address_becomes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sf.GalleryError, match=r"s3://bucket/g: expected a folder, found the address of"):
        model("s3://bucket/g")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixels_come_back_in_every_precision(dtype: torch.dtype) -> None:
    """The trainer gives tensors of its precision."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    [found] = pixels_of((torch.from_numpy(values).float() / 255).to(dtype))
    np.testing.assert_array_equal(found, values[0].transpose(1, 2, 0))


def test_grey_and_transparent_files_are_read_as_this_package_reads_them(parts: Path, tmp_path: Path) -> None:
    for number, mode in enumerate(("L", "LA", "RGBA", "P")):
        path = parts / "good" / f"00{number}.png"
        Image.open(path).convert(mode).save(path)
    module = folder(parts)
    engine(tmp_path).fit(model=model(tmp_path / "g"), datamodule=module)
    theirs = sf.Gallery.open(tmp_path / "g")
    extractor = theirs.load_extractor()
    with sf.Gallery.create(tmp_path / "own", extractor.spec, recipe="paper") as own:
        own.add_images(parts / "good", extractor)
        for path in sorted((parts / "good").iterdir()):
            rows = [theirs.snapshot().find(str(path)), own.snapshot().find(path.name)]
            for one, other in zip(theirs.read(rows[:1]), own.read(rows[1:]), strict=True):
                np.testing.assert_array_equal(one, other)


def test_a_datamodule_without_normal_images_makes_no_gallery(parts: Path, tmp_path: Path) -> None:
    (parts / "empty").mkdir()
    for normal, error, match in (
        ("empty", RuntimeError, "Found 0 .*NORMAL images in .*parts/empty"),
        ("nowhere", FileNotFoundError, "Path does not exist: .*parts/nowhere"),
    ):
        with pytest.raises(error, match=match):
            engine(tmp_path).fit(model=model(tmp_path / "g"), datamodule=folder(parts, normal))
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("augmentations", "error", "match"),
    [
        (Grayscale(1), sf.ImageError, r"expected \(n, 3, H, W\) tensors .*found \(1, 1, .*; convert grey"),
        (Lambda(lambda x: torch.cat([x, x[:1]])), sf.ImageError, r"found \(1, 4, .*; convert grey images and those"),
        (Lambda(lambda x: x * 255), sf.ImageError, "found values from .*; leave Normalize out"),
        (Lambda(lambda x: x - 0.5), sf.ImageError, "found values from -0"),
    ],
)
def test_a_fit_goes_on_after_tensors_that_were_refused(
    parts: Path, tmp_path: Path, augmentations: Any, error: Any, match: str
) -> None:
    def fit(**options: Any) -> None:
        module = folder(parts, **options)
        engine(tmp_path).fit(model=model(tmp_path / "g"), datamodule=module)

    with pytest.raises(error, match=match):
        fit(train_augmentations=augmentations)
    assert len(sf.Gallery.open(tmp_path / "g")) == 0
    fit()  # the lock is free
    assert len(sf.Gallery.open(tmp_path / "g")) == 6


@pytest.mark.parametrize("phase", ["fit", "test"])
def test_an_error_in_a_loading_worker_is_one_line(parts: Path, tmp_path: Path, phase: str) -> None:
    """The resizing is done there, and torch makes the worker's traceback the message."""
    fitted, grey = model(tmp_path / "g"), {"num_workers": 1, "train_augmentations": Grayscale(1)}
    if phase == "test":
        engine(tmp_path).fit(model=fitted, datamodule=folder(parts))
        grey = {"num_workers": 1, "test_augmentations": Grayscale(1)}
    with pytest.raises(sf.ImageError) as caught:
        getattr(engine(tmp_path), phase)(model=fitted, datamodule=folder(parts, **grey))
    assert re.fullmatch(
        r"image: expected \(n, 3, H, W\) tensors .*, found \(1, 1, .*in the datamodule", str(caught.value)
    )
    assert len(sf.Gallery.open(tmp_path / "g")) == (0 if phase == "fit" else 6)


def test_a_fit_goes_on_after_an_image_that_cannot_be_read(parts: Path, tmp_path: Path) -> None:
    content = (parts / "good/003.png").read_bytes()
    (parts / "good/003.png").write_text("no image")
    module = folder(parts)
    with pytest.raises(OSError, match=r"cannot identify image file '.*good/003\.png'"):
        engine(tmp_path).fit(model=model(tmp_path / "g"), datamodule=module)
    sf.Gallery.open(tmp_path / "g").reindex()  # the lock is free
    (parts / "good/003.png").write_bytes(content)
    engine(tmp_path).fit(model=model(tmp_path / "g"), datamodule=module)
    assert len(sf.Gallery.open(tmp_path / "g")) == 6


def test_more_neighbours_than_normal_images(parts: Path, tmp_path: Path) -> None:
    module = folder(parts)
    with pytest.raises(sf.NotEnoughImagesError, match=r"k: expected at most the number of .*, 6, found 7"):
        engine(tmp_path).fit(model=model(tmp_path / "g", options=TOY["options"] | {"k": 7}), datamodule=module)
    generation = sf.Gallery.open(tmp_path / "g").generation
    engine(tmp_path).fit(model=model(tmp_path / "g"), datamodule=module)
    assert sf.Gallery.open(tmp_path / "g").generation == generation  # its images were kept


def test_a_checkpoint_knows_its_gallery_from_one_of_the_same_generation(parts: Path, tmp_path: Path) -> None:
    runner = engine(tmp_path, barebones=False, enable_progress_bar=False)
    fitted = model(tmp_path / "g")
    runner.fit(model=fitted, datamodule=folder(parts))
    make_images(tmp_path / "others", 6, seed=5)
    with sf.Gallery.create(tmp_path / "other", fitted.model.extractor.spec, recipe="paper") as other:
        other.add_images(tmp_path / "others", fitted.model.extractor)
        generation = other.generation
    assert generation == sf.Gallery.open(tmp_path / "g").generation
    expected = rf"expected generation {generation} .*, found generation {generation} of checksum \w{{12}}, for which"
    with pytest.raises(sf.GalleryError, match=expected):
        SpadeFaiss.load_from_checkpoint(runner.best_model_path, gallery=tmp_path / "other", visualizer=False)
    shutil.copytree(tmp_path / "g", tmp_path / "damaged")
    (tmp_path / "damaged/gallery.json").write_text("{")
    with pytest.raises(sf.CorruptGalleryError, match=r"damaged/gallery\.json: damaged or edited"):
        SpadeFaiss.load_from_checkpoint(runner.best_model_path, gallery=tmp_path / "damaged", visualizer=False)


def test_a_folder_is_predicted_as_by_its_datamodule(parts: Path, tmp_path: Path) -> None:
    fitted = model(tmp_path / "g")
    engine(tmp_path).fit(model=fitted, datamodule=folder(parts))

    def scores(**source: Any) -> dict[str, float]:
        batches = engine(tmp_path).predict(model=fitted, **source)
        return {
            path: float(score) for one in batches for path, score in zip(one.image_path, one.pred_score, strict=True)
        }

    own, every = scores(data_path=parts / "bad"), scores(datamodule=folder(parts))
    assert own
    assert own == {path: every[path] for path in own}


def test_what_is_no_datamodule() -> None:
    with pytest.raises(sf.OptionError, match=r"datamodule: expected one of anomalib\.data, found str"):
        category_of("parts")  # type: ignore[arg-type]
