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
        assert sample.spade_neighbour_keys == (keys := [one["key"] for one in result.line["neighbours"]])
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


def test_without_a_calibration_there_are_no_masks(built: Path, dataset: Any, tmp_path: Path) -> None:
    """An empty one would stand for a normal image; those of an earlier run are taken back."""
    results, view = shutil.copytree(built / "results", tmp_path / "results"), dataset.match_tags("test")
    for name, judged in (("run.json", r'(?<="thresholds": ){.*?}'), ("results.jsonl", r'(?<="verdict": )"\w+"')):
        (results / name).write_text(re.sub(judged, "null", (results / name).read_text()))
    for media in (None, tmp_path / "media"):
        to_fiftyone(dataset, built / "results", media=media)
        assert None not in view.values("spade_regions")
        to_fiftyone(dataset, results, media=media)
        assert view.values(["spade_regions", "spade_verdict.label"]) == ([None] * 5, ["unjudged"] * 5)


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


def state(dataset: Any) -> tuple[Any, ...]:
    """What an adapter may change: fields, masks' values and brain runs."""
    fields = {name: str(kind) for name, kind in dataset.get_field_schema().items()}
    return fields, dict(dataset.mask_targets), dataset.list_brain_runs()


@pytest.mark.parametrize("media", [False, True])
def test_a_damaged_map_leaves_all_samples_as_they_were(built: Path, dataset: Any, tmp_path: Path, media: bool) -> None:
    results, before = shutil.copytree(built / "results", tmp_path / "results"), state(dataset)
    last = max((results / "maps").rglob("*.npy"))
    last.write_bytes(b"")
    with pytest.raises(sf.ResultsError, match=r"001\.png\.npy: expected the map of b/001\.png, found none"):
        to_fiftyone(dataset, results, media=tmp_path / "media" if media else None)
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.OutputError, match="cannot write maps to"):
        to_fiftyone(dataset, built / "results", media=tmp_path / "file")
    assert state(dataset) == before


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("map", {"ftype": fo.StringField}, "Heatmap.* found fiftyone.core.fields.StringField; choose"),
        ("neighbours", {"ftype": fo.ListField, "subfield": fo.IntField}, "found .*IntField"),
        ("verdict", {"ftype": fo.EmbeddedDocumentField, "embedded_doc_type": fo.Detection}, "found .*Detection"),
        (
            "verdict",
            {"ftype": fo.EmbeddedDocumentField, "embedded_doc_type": fo.Classification, "read_only": True},
            "found a read-only one",
        ),
    ],
)
def test_fields_of_another_kind_are_left_alone(built: Path, dataset: Any, name: str, kind: Any, found: str) -> None:
    dataset.add_sample_field(f"spade_{name}", **kind)
    before = state(dataset)
    with pytest.raises(sf.OptionError, match=f"field: expected spade_{name} of .*{found}"):
        to_fiftyone(dataset, built / "results")
    assert state(dataset) == before
    for field in ("", "_spade", "a.b", None):
        with pytest.raises(sf.OptionError, match="field: expected letters, digits and '_' that fields' names begin"):
            to_fiftyone(dataset, built / "results", field=field)  # type: ignore[arg-type]


def test_what_is_no_data_set_of_images(built: Path, dataset: Any) -> None:
    for other in ("name", None):
        with pytest.raises(
            sf.OptionError, match=r"dataset: expected a fiftyone.Dataset of images .*, found (str|None)"
        ):
            to_fiftyone(other, built / "results")
    for sample in dataset.match_tags("test"):
        sample["boxes"] = fo.Detections(detections=[fo.Detection(label="a", bounding_box=[0, 0, 0.5, 0.5])])
        sample.save()
    for view in (dataset.to_patches("boxes"), dataset.group_by("filepath")):
        with pytest.raises(sf.OptionError, match=f"found a [A-Za-z]*View of {dataset.name}; give that"):
            to_fiftyone(view, built / "results")
    assert "spade_map" not in dataset.get_field_schema()


def test_videos_are_refused_and_groups_are_their_images(built: Path) -> None:
    register()
    given = {"backend": "spade-faiss", "gallery": str(built / "toy.gallery"), "embeddings": False}
    videos = fo.Dataset()
    videos.add_sample(fo.Sample(filepath=str(built / "a.mp4")))
    groups = fo.Dataset()
    groups.add_group_field("group", default="left")
    for left, right in zip(sorted(built.glob("test/*/*.png")), sorted(built.glob("normal/*.png")), strict=False):
        group = fo.Group()
        sides = {"left": left, "right": right}
        groups.add_samples(
            [fo.Sample(filepath=str(path), group=group.element(side)) for side, path in sides.items()], progress=False
        )
    groups.group_slice = "right"
    with pytest.raises(sf.OptionError, match="found video in"):
        to_fiftyone(videos, built / "results")
    added = to_fiftyone(groups, built / "results")
    assert (added.samples, len(added.without_results), added.without_sample) == (5, 5, [])
    groups.group_slice = "left"
    assert len(groups.first().spade_neighbours) == 5
    with pytest.raises(sf.OptionError, match="found video in"):
        fob.compute_similarity(videos, brain_key="spade", **given)
    with pytest.raises(sf.OptionError, match=r"found groups in .*select_group_slices\(media_type='image'\)\.clone\(\)"):
        fob.compute_similarity(groups, brain_key="spade", **given)
    assert videos.list_brain_runs() == groups.list_brain_runs() == []
    flat = groups.select_group_slices(media_type="image").clone()
    assert fob.compute_similarity(flat, brain_key="spade", **given).total_index_size == 5
    for made in (videos, groups, flat):
        made.delete()


def test_samples_whose_files_cannot_be_read(built: Path, tmp_path: Path) -> None:
    register()
    normal = shutil.copytree(built / "normal", tmp_path / "normal")
    made = fo.Dataset()
    for folder in (normal, built / "test"):
        made.add_images_dir(str(folder), recursive=True, progress=False)
    (normal / "003.png").unlink()
    before, given = state(made), {"backend": "spade-faiss", "gallery": str(built / "toy.gallery"), "embeddings": False}
    expected = r"003\.png: cannot be read: No such file or directory; put the file of sample \w+ back, .* give {}, the"
    with pytest.raises(sf.ImageError, match=expected.format("normal")):
        to_fiftyone(made, built / "results")
    with pytest.raises(sf.ImageError, match=expected.format("root")):
        fob.compute_similarity(made, brain_key="spade", **given)
    assert state(made) == before
    index = fob.compute_similarity(made, brain_key="spade", root=str(normal), **given)  # the key is free
    assert index.total_index_size == 12
    assert to_fiftyone(made, built / "results", normal=normal).samples == 5
    query = made.match({"filepath": str(built / "test/a/000.png")}).first()
    query["filepath"] = str(normal / "gone.png")
    query.save()
    with pytest.raises(sf.ImageError, match=r"gone\.png: cannot be read: .*; put the file of sample \w+ back"):
        made.sort_by_similarity(query.id, k=3, brain_key="spade")
    (normal / "gone.png").write_bytes(b"junk")
    with pytest.raises(sf.ImageError, match=r"gone\.png: expected an image"):
        made.sort_by_similarity(query.id, k=3, brain_key="spade")
    made.delete()


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


def test_samples_of_one_image_are_all_found(built: Path, dataset: Any, tmp_path: Path) -> None:
    register()
    shutil.copytree(built / "normal", tmp_path / "copy")
    dataset.add_images_dir(str(tmp_path / "copy"), progress=False)
    given = {"backend": "spade-faiss", "gallery": str(built / "toy.gallery"), "embeddings": False}
    assert fob.compute_similarity(dataset, brain_key="spade", **given).total_index_size == 24
    first = dataset.match_tags("test").first()
    nearest = dataset.sort_by_similarity(first.id, k=5, brain_key="spade", dist_field="far")
    names = [Path(path).name for path in nearest.values("filepath")]
    assert names[0:4:2] == names[1:4:2]
    assert len(set(names)) == 3
    far = nearest.values("far")
    assert far[0] == far[1] < far[2] == far[3] < far[4]
    assert len(dataset.sort_by_similarity(first.id, brain_key="spade")) == 24


def test_a_gallery_that_changes_after_its_index_was_made(built: Path, dataset: Any, tmp_path: Path) -> None:
    register()
    path = shutil.copytree(built / "toy.gallery", tmp_path / "toy.gallery")
    index = fob.compute_similarity(
        dataset, brain_key="spade", backend="spade-faiss", gallery=str(path), embeddings=False
    )
    query = dataset.match({"filepath": str(built / "normal/000.png")}).first().id
    with sf.Gallery.open(path) as gallery:
        gallery.remove(["000.png", "001.png"])
    assert len(dataset.sort_by_similarity(query, brain_key="spade")) == 12  # one generation until it is taken up
    index.reload()
    view = dataset.sort_by_similarity(query, brain_key="spade", dist_field="far")  # now a query of another image
    assert len(view) == 10
    assert not {"000.png", "001.png"} & {Path(one).name for one in view.match_tags("normal").values("filepath")}
    assert view.values("far")[0] > 0
    dataset.clear_cache()
    assert dataset.load_brain_results("spade").total_index_size == 10  # as another session does
    dataset.clear_cache()
    shutil.rmtree(path)
    with pytest.raises(sf.GalleryNotFoundError, match=r"gallery: expected one in .*toy\.gallery, found none; put it"):
        dataset.load_brain_results("spade")
    dataset.delete_brain_run("spade")


def test_an_index_that_cannot_be(built: Path, dataset: Any, similar: Any) -> None:
    given = {"backend": "spade-faiss", "gallery": str(built / "toy.gallery"), "embeddings": False, "brain_key": "other"}
    for changed, error, match in (
        ({"gallery": ""}, sf.OptionError, "gallery: expected the path of a gallery .* found none"),
        ({"gallery": 7}, sf.OptionError, "gallery: expected the path of a gallery .* found 7"),
        ({"gallery": "/no.gallery"}, sf.GalleryNotFoundError, r"gallery: expected one in /no\.gallery, found none"),
        ({"embeddings": np.zeros((17, 12))}, sf.OptionError, "embeddings: expected False"),
        ({"root": "/nowhere"}, sf.OptionError, "gallery: expected samples that are images of"),
        ({"galery": "a"}, sf.OptionError, "galery: expected gallery, root or weights .*, found an unknown name"),
        ({"patches_field": "boxes"}, sf.OptionError, "patches_field: expected none"),
        ({"brain_key": "spade"}, ValueError, "key 'spade' already exists"),
    ):
        with pytest.raises(error, match=match):
            fob.compute_similarity(dataset, **given | changed)
        assert dataset.list_brain_runs() == ["spade"]
    assert similar.total_index_size == 12


def test_queries_that_cannot_be(built: Path, dataset: Any, similar: Any) -> None:
    one = dataset.first().id
    for query, given, error, match in (
        (one, {"reverse": True}, sf.OptionError, "reverse: expected False"),
        (one, {"k": 0}, sf.OptionError, "k: expected a number >= 1, or None for all samples, found 0"),
        (one, {"k": 2.5}, sf.OptionError, "k: expected a number >= 1, .* found 2.5"),
        ("6" * 24, {}, sf.OptionError, "query: expected ids of samples, found 1 that the data set lacks"),
        (np.zeros(5), {}, sf.FeatureError, r"expected \(m, 12\) floats, found \(1, 5\)"),
        (np.full(12, np.nan), {}, sf.FeatureError, "expected finite values"),
    ):
        with pytest.raises(error, match=match):
            dataset.sort_by_similarity(query, brain_key="spade", **given)
    for change in (similar.add_to_index, similar.remove_from_index):
        with pytest.raises(sf.OptionError, match="Gallery"):
            change(np.zeros((1, 12)), [one])
    assert dataset.list_brain_runs() == ["spade"]  # which has its results


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
