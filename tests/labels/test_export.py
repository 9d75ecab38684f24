"""Exports read back: COCO by pycocotools; brush masks and CVAT's by the text of their formats; PNG masks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

import spade_faiss as sf
from spade_faiss.labels import export
from spade_faiss.report.results import Results
from tests.helpers.polygons import filled
from tests.helpers.results import RUN, write_results
from tests.labels.conftest import Masks

Mask = NDArray[np.bool_]


def regions_of(results: Path) -> dict[str, list[Mask]]:
    """The regions as the maps have them, by key."""
    return {
        one.key: [one.labels() == number for number in range(1, len(one.regions) + 1)] for one in Results.open(results)
    }


# pycocotools is compiled for the NumPy before 2
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("shapes", ["masks", "polygons"])
def test_pycocotools_reads_the_regions(tmp_path: Path, results: Path, shapes: Any) -> None:
    from pycocotools.coco import COCO

    assert export(results, tmp_path / "regions.json", "coco", shapes, label="scratch") == 9
    read = COCO(str(tmp_path / "regions.json"))
    found = {image["file_name"]: read.imgToAnns[image["id"]] for image in read.dataset["images"]}
    expected = regions_of(results)
    assert found.keys() == expected.keys()
    for key, regions in found.items():
        for annotation, mask in zip(regions, expected[key], strict=True):
            np.testing.assert_array_equal(read.annToMask(annotation), mask)
            left, top, width, height = annotation["bbox"]
            assert ndimage.find_objects(mask.astype(int)) == [(slice(top, top + height), slice(left, left + width))]
            assert annotation["area"] == mask.sum()
            assert annotation["score"] > RUN.thresholds["pixel"]  # type: ignore[index]
    assert {one["generation"] for one in read.dataset["images"]} == {4}
    assert read.dataset["images"][0]["thresholds"] == {"image": 2.0, "pixel": 1.0, "false_alarms": 0.05}
    assert read.loadCats(read.getCatIds()) == [{"id": 1, "name": "scratch"}]


def unpacked(rle: list[int]) -> NDArray[np.uint8]:
    """What @thi.ng/rle-pack reads: 32 bits of count, 5 of word size, four sizes of 4, then runs and literals."""
    bits = iter(np.unpackbits(np.array(rle, np.uint8)).tolist())

    def take(count: int) -> int:
        return int("".join(str(next(bits)) for _ in range(count)), 2)

    count, word, sizes, values = take(32), take(5) + 1, [take(4) + 1 for _ in range(4)], list[int]()
    while len(values) < count:
        is_run, length = take(1), take(sizes[take(2)]) + 1
        values += [take(word)] * length if is_run else [take(word) for _ in range(length)]
    return np.array(values, np.uint8)


def test_label_studio_brush_masks(tmp_path: Path, results: Path) -> None:
    export(results, tmp_path / "tasks.json", "labelstudio", prefix="http://images/?d=")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    for task, (key, masks) in zip(tasks, regions_of(results).items(), strict=True):
        assert task["data"]["image"] == f"http://images/?d={key}"
        assert task["data"]["thresholds"]["image"] == 2.0
        [prediction] = task["predictions"]
        assert re.fullmatch(r"spade-faiss \S+, generation 4", prediction["model_version"])
        assert prediction["score"] == (0.75 if masks else 0.25)
        for result, mask in zip(prediction["result"], masks, strict=True):
            assert (result["original_height"], result["original_width"]) == mask.shape
            assert (result["type"], result["value"]["brushlabels"]) == ("brushlabels", ["anomaly"])
            np.testing.assert_array_equal(unpacked(result["value"]["rle"]).reshape(*mask.shape, 4)[..., 3] > 0, mask)
            assert 0.5 < result["score"] < 1


def polygons(path: Path, shapes: dict[str, list[Mask]]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Each region's polygon in pixels, with the image's name, from a file of Label Studio or CVAT."""
    if path.suffix == ".xml":
        for name, found in shapes_of(path):
            for one in found:
                yield name, np.array([pair.split(",") for pair in one.attrib["points"].split(";")], float)
        return
    for task in json.loads(path.read_text()):
        name = task["data"]["name"]
        for one in task["predictions"][0]["result"]:
            size = np.array([one["original_width"], one["original_height"]])
            assert size.tolist() == list(shapes[name][0].shape[::-1])
            yield name, np.array(one["value"]["points"]) * size / 100


@pytest.mark.parametrize(("format", "name"), [("labelstudio", "tasks.json"), ("cvat", "annotations.xml")])
def test_polygons_have_the_pixels_of_their_regions(tmp_path: Path, results: Path, format: Any, name: str) -> None:
    """One pixel, the whole image, holes."""
    export(results, tmp_path / name, format, "polygons")
    left = regions_of(results)
    for key, corners in polygons(tmp_path / name, regions_of(results)):
        mask = left[key].pop(0)
        np.testing.assert_array_equal(filled([corners], (mask.shape[0], mask.shape[1])), mask)
    assert not any(left.values())


def test_label_studio_polygons_are_in_percent(tmp_path: Path, results: Path) -> None:
    export(results, tmp_path / "tasks.json", "labelstudio", "polygons")
    by_name = {task["data"]["name"]: task for task in json.loads((tmp_path / "tasks.json").read_text())}
    [whole] = by_name["a/whole.png"]["predictions"][0]["result"]
    assert whole["type"] == "polygonlabels"
    points = np.array(whole["value"]["points"])
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([0, 0], [100, 100])


def shapes_of(path: Path) -> Iterator[tuple[str, list[ElementTree.Element]]]:
    root = ElementTree.parse(path).getroot()
    assert root.findtext("version") == "1.1"
    assert [label.findtext("name") for label in root.iter("label")] == ["anomaly"]
    return ((image.attrib["name"], list(image)) for image in root.iter("image"))


def test_cvat_masks(tmp_path: Path, results: Path) -> None:
    export(results, tmp_path / "annotations.xml", "cvat")
    found, expected = dict(shapes_of(tmp_path / "annotations.xml")), regions_of(results)
    assert found.keys() == expected.keys()
    for key, shapes in found.items():
        for shape, mask in zip(shapes, expected[key], strict=True):
            left, top, width, height = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
            runs = [int(one) for one in shape.attrib["rle"].split(",")]
            crop = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)  # row by row, 0s first
            np.testing.assert_array_equal(crop, mask[top : top + height, left : left + width])
            assert crop.sum() == mask.sum()
            facts = {one.attrib["name"]: float(one.text or "") for one in shape}
            assert (facts["generation"], facts["image_threshold"], facts["pixel_threshold"]) == (4, 2, 1)


def test_cvat_polygons(tmp_path: Path, results: Path) -> None:
    export(results, tmp_path / "annotations.xml", "cvat", "polygons")
    [pixel] = dict(shapes_of(tmp_path / "annotations.xml"))["a/pixel.png"]
    corners = [tuple(map(float, pair.split(","))) for pair in pixel.attrib["points"].split(";")]
    assert sorted(corners) == [(9, 7.5), (9.5, 7), (9.5, 8), (10, 7.5)]


def test_masks_equal_the_regions(tmp_path: Path, results: Path, drawn: Masks) -> None:
    export(results, tmp_path / "masks", "masks")
    index = json.loads((tmp_path / "masks" / "index.json").read_text())
    assert [one["name"] for one in index] == list(drawn)
    for one in index:
        read = np.asarray(Image.open(tmp_path / "masks" / one["file"]))
        np.testing.assert_array_equal(read, 255 * drawn[one["name"]])
        assert one["verdict"] == ("anomalous" if drawn[one["name"]].any() else "normal")
    with pytest.raises(sf.OutputError, match="masks: expected a new or empty folder for masks"):
        export(results, tmp_path / "masks", "masks")


@pytest.mark.parametrize("existed", [False, True])
def test_after_an_error_no_masks_are_left(tmp_path: Path, drawn: Masks, existed: bool) -> None:
    results = write_results(tmp_path / "results", {"a/1.png": drawn["a/ring.png"], "a/2.png": drawn["a/pixel.png"]})
    (results / "maps/a/2.png.npy").write_bytes(b"")
    output = tmp_path / "new" / "masks"
    if existed:
        output.mkdir(parents=True)
    with pytest.raises(sf.ResultsError, match=r"expected the map of a/2\.png"):
        export(results, output, "masks")
    assert not list(output.iterdir()) if existed else not output.parent.exists()


def test_a_mask_where_another_ones_folder_is(tmp_path: Path, drawn: Masks) -> None:
    pixel = drawn["a/pixel.png"]
    results = write_results(tmp_path / "results", {"a": pixel, "a.png/b": pixel})
    with pytest.raises(sf.OutputError, match=r"cannot write \S+/masks/a\.png/b\.png: "):
        export(results, tmp_path / "masks", "masks")
    assert not (tmp_path / "masks").exists()


def test_a_long_run_is_split(tmp_path: Path) -> None:
    mask = np.ones((150, 150), np.bool_)  # 4 * 150 * 150 values are more than a run's 16 bits can say
    mask[0, :3] = False
    export(write_results(tmp_path / "results", {"a.png": mask}), tmp_path / "tasks.json", "labelstudio")
    [task] = json.loads((tmp_path / "tasks.json").read_text())
    rle = task["predictions"][0]["result"][0]["value"]["rle"]
    np.testing.assert_array_equal(unpacked(rle).reshape(150, 150, 4)[..., 3] > 0, mask)
    assert len(rle) < 30


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "yolo"}, "format: expected one of coco, labelstudio, cvat, masks, found 'yolo'"),
        ({"shapes": "boxes"}, "shapes: expected one of masks, polygons, found 'boxes'"),
        ({"format": "masks", "shapes": "polygons"}, "shapes: expected 'masks' with format 'masks'"),
        ({"label": " "}, "label: expected the name of a class, found ' '"),
        (
            {"format": "cvat", "label": "a\udcff"},
            "label: expected text that XML can hold, found the character '\\udcff'",
        ),
    ],
)
def test_options_that_do_not_exist(tmp_path: Path, results: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(sf.OptionError, match=re.escape(message)):
        export(results, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_names_that_a_format_cannot_hold(tmp_path: Path, drawn: Masks) -> None:
    results = write_results(tmp_path / "results", {"a\x01.png": drawn["a/pixel.png"], "ü &.png": drawn["a/ring.png"]})
    with pytest.raises(sf.OutputError, match=r"expected a name that XML can hold, found the character '\\x01'"):
        export(results, tmp_path / "annotations.xml", "cvat")
    export(results, tmp_path / "tasks.json", "labelstudio")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [
        f"/data/local-files/?d={name}" for name in ("a%01.png", "%C3%BC%20%26.png")
    ]


@pytest.mark.parametrize(("format", "name"), [("coco", "gallery.json"), ("masks", "shards2")])
def test_nothing_is_written_into_a_gallery(
    tmp_path: Path, results: Path, toy: sf.Extractor, format: Any, name: str
) -> None:
    sf.Gallery.create(tmp_path / "g", toy.spec).close()
    before = {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    with pytest.raises(sf.OutputError, match=rf"g/{name}: expected a place for labels, found the gallery "):
        export(results, tmp_path / "g" / name, format)
    assert {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()} == before
