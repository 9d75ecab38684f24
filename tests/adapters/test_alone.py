"""What of the adapters can be tested without anomalib and FiftyOne: a few classes stand in for theirs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.adapters import anomalib_gallery, fiftyone
from spade_faiss.report.results import Results
from tests.helpers.images import make_images
from tests.helpers.results import masks, write_results


def loaded(monkeypatch: pytest.MonkeyPatch, name: str, **classes: list[str]) -> Any:
    """An adapter's module, as another one beside it, over modules that have some classes without content."""
    for module, names in classes.items():
        path = module.replace("__", ".")
        stub: Any = ModuleType(path)
        for one in names:
            setattr(stub, one, type(one, (), {}))
        for above in (path.partition(".")[0], path.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, above, ModuleType(above))
        monkeypatch.setitem(sys.modules, path, stub)
    place = Path(sf.__file__).parent / "adapters" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"spade_faiss.adapters._alone_{name}", place)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# --- anomalib --------------------------------------------------------------------------------------------------------


def rows_of(rows: list[dict[str, Any]]) -> Any:
    return SimpleNamespace(samples=SimpleNamespace(to_dict=lambda _: rows))


def datamodule(kind: Any, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Any:
    made = kind()
    made.name, made.train_data, made.test_data = "parts", rows_of(train), rows_of(test)
    return made


def test_several_masks_of_an_image_are_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the rows of MVTec LOCO."""
    data = loaded(monkeypatch, "anomalib_data", anomalib__data=["AnomalibDataModule"])
    normal = {"image_path": str(tmp_path / "train/0.png"), "label_index": 0}
    folder = tmp_path / "ground_truth/0"
    for found, expected in (([str(folder / "0.png"), str(folder / "1.png")], folder), (str(folder), folder)):
        bad = {"image_path": str(tmp_path / "test/0.png"), "label_index": 1, "mask_path": found}
        category = data.category_of(datamodule(data.AnomalibDataModule, [normal], [bad]))
        assert (category.masks, category.test[0].mask) == (True, expected)


def test_rows_without_labels_are_of_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    data = loaded(monkeypatch, "anomalib_data", anomalib__data=["AnomalibDataModule"])
    video = {"image_path": "a.avi", "mask_path": "a.npy"}
    with pytest.raises(sf.OptionError, match=r"datamodule: expected images with labels, .* parts, as of videos; write"):
        data.category_of(datamodule(data.AnomalibDataModule, [video], [video]))


def test_no_rounding_turns_the_order_of_scores_round(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"anomalib__post_processing": ["PostProcessor"], "anomalib__pre_processing": ["PreProcessor"]}
    processing = loaded(monkeypatch, "anomalib_processing", **classes)
    unknown, scores = torch.tensor(float("nan")), torch.linspace(-2000, 2000, 1_000_001).unique()
    scores = torch.cat([scores, torch.linspace(-10, 10, 1_000_001)]).sort().values
    found = processing.RankingPostProcessor._normalize(scores, unknown, unknown, unknown)
    assert (found.diff() >= 0).all()
    z = scores.double()
    torch.testing.assert_close(found.double(), 0.5 + z / (1 + 2 * z.abs()), rtol=0, atol=1e-7)
    apart = torch.tensor([1000.0, 1000.5])  # by more than what its description says
    assert processing.RankingPostProcessor._normalize(apart, unknown, unknown, unknown).diff() > 0


def test_a_commit_that_fails_gives_the_lock_back(
    tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise sf.GalleryError("full")

    filling = anomalib_gallery.Filling(tmp_path / "g", toy, None)
    monkeypatch.setattr(filling._writer, "commit", full)
    with pytest.raises(sf.GalleryError, match="full"):
        filling.finish()
    with filling.gallery.writer():
        pass


# --- FiftyOne --------------------------------------------------------------------------------------------------------


def test_each_field_has_pictures_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        write_results(tmp_path / name, {"a/0.png": mask})
        for name, mask in (("one", masks()["a/ring.png"]), ("two", masks()["a/islands.png"]))
    ]
    sample = {"id": "7", "filepath": "/images/a/0.png"}
    images = SimpleNamespace(
        _root_dataset=None, values=lambda names: [[sample[name]] for name in names], select=lambda _: images,
        iter_samples=lambda **_: [Sample()],
    )  # fmt: skip

    class Sample(dict[str, Any]):
        id = "7"

    tool = SimpleNamespace(Heatmap=SimpleNamespace, Segmentation=SimpleNamespace, Classification=SimpleNamespace)
    monkeypatch.setattr(fiftyone, "load_fiftyone", lambda: tool)
    monkeypatch.setattr(fiftyone, "images_of", lambda _: images)
    monkeypatch.setattr(fiftyone, "_require_fields", lambda *_: None)
    monkeypatch.setattr(fiftyone, "_declare", lambda *_: None)
    errors: Any = ModuleType("pymongo.errors")
    errors.ConnectionFailure = ConnectionError
    monkeypatch.setitem(sys.modules, "pymongo", ModuleType("pymongo"))
    monkeypatch.setitem(sys.modules, "pymongo.errors", errors)
    for name, folder in zip(("run1", "run2"), results, strict=True):
        fiftyone.to_fiftyone(None, Results.open(folder), name, media=tmp_path / "media")
    found = [tmp_path / "media" / name / "maps/a/0.png.png" for name in ("run1", "run2")]
    found += [tmp_path / "media" / name / "regions/maps/a/0.png.png" for name in ("run1", "run2")]
    assert sorted(found) == sorted((tmp_path / "media").rglob("*.png"))
    assert len({path.read_bytes() for path in found}) == 4


def test_a_reload_that_fails_leaves_the_index_as_it_was(
    tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["Similarity", "SimilarityConfig", "SimilarityIndex"]
    similarity = loaded(monkeypatch, "fiftyone_similarity", fiftyone__brain__similarity=names)
    monkeypatch.setattr(similarity, "images_of", lambda samples: samples)
    monkeypatch.setattr(similarity.SimilarityIndex, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(similarity.SimilarityIndex, "reload", lambda _: None, raising=False)
    make_images(tmp_path / "normal", 4)
    with sf.Gallery.create(tmp_path / "g", toy.spec) as gallery:
        gallery.add_images(tmp_path / "normal", toy)
    paths = sorted(str(path) for path in (tmp_path / "normal").iterdir())
    samples = SimpleNamespace(media_type="image", name="parts", values=lambda _: [list("abcd"), paths])
    config = SimpleNamespace(gallery=str(tmp_path / "g"), root=str(tmp_path / "normal"))
    index = similarity.SpadeSimilarityIndex(samples, config, None)
    index._samples, index.config = samples, config
    generation, features = index._gallery.generation, index.get_embeddings("b")[0]
    with sf.Gallery.open(tmp_path / "g") as gallery:
        gallery.remove(["000.png"])
        gallery.compact()
    paths, kept = ["/elsewhere/0.png"] * 4, paths
    with pytest.raises(sf.OptionError, match="found none among 4"):
        index.reload()
    assert (index._gallery.generation, index.total_index_size) == (generation, 4)
    np.testing.assert_array_equal(index.get_embeddings("b")[0], features)
    paths = kept
    index.reload()
    assert index._gallery.generation > generation
    assert index.sample_ids.tolist() == list("bcd")
    np.testing.assert_array_equal(index.get_embeddings("b")[0], features)
