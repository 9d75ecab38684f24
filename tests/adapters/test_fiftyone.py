"""A real FiftyOne with a real mongod, in an environment of its own: make test-fiftyone. Elsewhere all is skipped."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.report.results import Results
from tests.helpers.images import make_images

if importlib.util.find_spec("fiftyone") is None:
    pytest.skip("fiftyone is not installed: make test-fiftyone", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
DATABASE = Path(tempfile.mkdtemp(prefix="spade-faiss-fiftyone-"))  # not the user's
atexit.register(shutil.rmtree, DATABASE, ignore_errors=True)  # after FiftyOne has ended it
os.environ |= {"FIFTYONE_DATABASE_DIR": str(DATABASE), "FIFTYONE_DO_NOT_TRACK": "true"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fiftyone as fo
    import fiftyone.brain as fob

    from spade_faiss.adapters.fiftyone import register, to_fiftyone


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated gallery of normal images, and the results of a query of others."""
    from click.testing import CliRunner

    from spade_faiss.cli.main import cli

    folder = tmp_path_factory.mktemp("fiftyone")
    make_images(folder / "normal", 12)
    make_images(folder / "test" / "a", 3, seed=8)
    make_images(folder / "test" / "b", 2, seed=9)  # with the same file names
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=2))
    with sf.Gallery.create(folder / "toy.gallery", toy.spec) as gallery:
        gallery.add_images(folder / "normal", toy)
        sf.calibrate(sf.Detector(gallery, toy), 0.2).write(gallery.path)
    query = ["query", folder / "toy.gallery", folder / "test", "--output", folder / "results", "--no-report", "--quiet"]
    assert CliRunner().invoke(cli, [str(word) for word in query]).exit_code == 0
    return folder


@pytest.fixture
def dataset(built: Path) -> Iterator[Any]:
    made = fo.Dataset()
    for name in ("normal", "test"):
        made.add_images_dir(str(built / name), tags=name, recursive=True, progress=False)
    yield made
    made.delete()


def test_results_become_fields(built: Path, dataset: Any) -> None:
    added = to_fiftyone(dataset, built / "results")
    assert (added.samples, len(added.without_results), added.without_sample) == (5, 12, [])
    results = Results.open(built / "results")
    by_path = {str(result.path): result for result in results}
    id_of = {Path(sample.filepath).name: sample.id for sample in dataset.match_tags("normal")}
    for sample in dataset.match_tags("test"):
        result = by_path[sample.filepath]
        assert sample.spade_map.range == [0, 255]
        np.testing.assert_array_equal(sample.spade_map.map, np.rint(results.scale.apply(result.anomaly_map()) * 255))
        np.testing.assert_array_equal(sample.spade_regions.mask > 0, result.labels() > 0)
        assert sample.spade_verdict.label == result.line["verdict"]
        assert sample.spade_verdict.confidence == result.line["score"]
        assert sample.spade_verdict.p_value == result.line["p_value"]
        keys = [one["key"] for one in result.line["neighbours"]]
        assert sample.spade_neighbour_keys == keys
        assert sample.spade_neighbours == [id_of[key] for key in keys]
    assert dataset.mask_targets["spade_regions"] == {255: "anomaly"}
    assert dataset.match_tags("normal").first().spade_map is None


def test_maps_as_files(built: Path, dataset: Any, tmp_path: Path) -> None:
    to_fiftyone(dataset, built / "results", field="run", media=tmp_path / "media")
    results = Results.open(built / "results")
    by_path = {str(result.path): result for result in results}
    for sample in dataset.match_tags("test"):
        result = by_path[sample.filepath]
        expected = np.rint(results.scale.apply(result.anomaly_map()) * 255)
        np.testing.assert_array_equal(sample.run_map.get_map(), expected)
        np.testing.assert_array_equal(sample.run_regions.get_mask() > 0, result.labels() > 0)


def test_files_that_have_moved_are_found_by_their_places(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "test", tmp_path / "moved")
    moved = fo.Dataset()
    moved.add_images_dir(str(tmp_path / "moved"), recursive=True, progress=False)
    with pytest.raises(sf.OptionError, match="give root, the folder that was queried"):
        to_fiftyone(moved, built / "results")
    assert to_fiftyone(moved, built / "results", root=tmp_path / "moved").samples == 5
    assert moved.first().spade_neighbours is None
    moved.delete()


def test_normal_images_are_named_by_their_folder(built: Path, dataset: Any, tmp_path: Path) -> None:
    results = shutil.copytree(built / "results", tmp_path / "results")
    run = (results / "run.json").read_text()
    (results / "run.json").write_text(run.replace("toy.gallery", "gone.gallery"))
    for normal, count in ((None, 0), (built / "normal", 12)):
        to_fiftyone(dataset, results, normal=normal)
        first = dataset.match_tags("test").first()
        assert (len(first.spade_neighbours or ()), len(first.spade_neighbour_keys)) == (count, 12)


def test_what_does_not_fit_is_said(built: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = dataset.match_tags("normal")
    with pytest.raises(sf.OptionError, match=r"dataset: expected samples of images in .*, found none among 12"):
        to_fiftyone(view, built / "results")
    added = to_fiftyone(dataset.match_tags("test").limit(2), built / "results")
    assert (added.samples, added.without_results, len(added.without_sample)) == (2, [], 3)
    monkeypatch.setattr("spade_faiss.adapters.fiftyone.DOCUMENT", 1000)
    with pytest.raises(sf.OptionError, match=r"media: expected a folder for maps, as that of a/000\.png, 48 x 40 px"):
        to_fiftyone(dataset, built / "results")


@pytest.fixture
def similar(built: Path, dataset: Any) -> Any:
    register()
    return fob.compute_similarity(
        dataset, brain_key="spade", backend="spade-faiss", gallery=str(built / "toy.gallery"), embeddings=False
    )


def found(built: Path, vectors: Any, k: int) -> tuple[list[str], Any]:
    """The files that Gallery.search finds."""
    with sf.Gallery.open(built / "toy.gallery") as gallery:
        ids, sq_distances = gallery.search(vectors, k)
        return [str(built / "normal" / key) for key in gallery.keys(ids[0])], sq_distances[0]


def test_sort_by_similarity_is_gallery_search(built: Path, dataset: Any, similar: Any) -> None:
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=2))
    assert (similar.total_index_size, similar.config.method) == (12, "spade-faiss")
    for sample in [*dataset.match_tags("test").limit(2), dataset.match_tags("normal").first()]:
        with sf.Gallery.open(built / "toy.gallery") as gallery:
            detection = sf.Detector(gallery, toy, sf.SearchOptions(k=5)).query(sample.filepath)
        view = dataset.sort_by_similarity(sample.id, k=5, brain_key="spade", dist_field="far")
        expected = [str(built / "normal" / key) for key in detection.neighbours.keys]
        assert view.values("filepath") == expected
        np.testing.assert_allclose(view.values("far"), detection.neighbours.sq_distances, rtol=1e-5, atol=1e-9)


def test_vectors_views_and_other_sessions(built: Path, dataset: Any, similar: Any) -> None:
    vector = np.random.default_rng(0).random((1, 12), np.float32)
    expected, sq_distances = found(built, vector, 12)
    assert dataset.sort_by_similarity(vector[0], brain_key="spade").values("filepath") == expected
    dataset.clear_cache()
    loaded = dataset.load_brain_results("spade")  # as another session does
    view = dataset.match_tags("normal").limit(4)
    shown = [path for path in expected if path in view.values("filepath")]
    assert loaded.use_view(view).sort_by_similarity(vector[0], k=3).values("filepath") == shown[:3]
    samples, _, far = loaded.use_view(dataset)._kneighbors(query=np.repeat(vector, 2, axis=0), k=2, return_dists=True)
    assert len(samples) == 2
    np.testing.assert_array_equal(far[1], sq_distances[:2])
    mean = dataset.sort_by_similarity(dataset.match_tags("normal").values("id")[:2], k=3, brain_key="spade")
    vectors, ids, _ = loaded.get_embeddings(dataset.match_tags("normal").values("id")[:2])
    assert len(ids) == 2
    assert mean.values("filepath") == found(built, vectors.mean(axis=0, keepdims=True), 3)[0]
    dataset.delete_brain_run("spade")
    assert (built / "toy.gallery" / "gallery.json").exists()


def test_an_index_that_cannot_be(built: Path, dataset: Any, similar: Any) -> None:
    path = str(built / "toy.gallery")
    with pytest.raises(sf.OptionError, match="gallery: expected the path of a gallery"):
        fob.compute_similarity(dataset, backend="spade-faiss", embeddings=False)
    with pytest.raises(sf.GalleryNotFoundError):
        fob.compute_similarity(dataset, backend="spade-faiss", gallery="/no.gallery", embeddings=False)
    with pytest.raises(sf.OptionError, match="embeddings: expected False"):
        fob.compute_similarity(dataset, backend="spade-faiss", gallery=path, embeddings=np.zeros((17, 12)))
    with pytest.raises(sf.OptionError, match="gallery: expected samples that are images of"):
        fob.compute_similarity(fo.Dataset(), backend="spade-faiss", gallery=path, embeddings=False)
    with pytest.raises(sf.OptionError, match="reverse: expected False"):
        dataset.sort_by_similarity(dataset.first().id, k=3, reverse=True, brain_key="spade")


def test_a_database_that_does_not_start(tmp_path: Path) -> None:
    """FiftyOne takes one that runs already, as that of this process, whatever its folder; so it is named here."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("FIFTYONE")}
    nobody = "mongodb://localhost:1/?serverSelectionTimeoutMS=200"
    environment = ours | {"FIFTYONE_DATABASE_URI": nobody, "PYTHONWARNINGS": "ignore"}
    code = """
import spade_faiss as sf
from spade_faiss.adapters.fiftyone import register
try:
    register()
except sf.WorkerError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    [line] = run.stdout.splitlines()
    assert re.match("fiftyone: expected its database to start, found ConnectionError: Could not connect", line)
