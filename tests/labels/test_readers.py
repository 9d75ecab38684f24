"""Exports read back by the tools' own libraries, in an environment of their own: make test-labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_faiss.labels import export
from spade_faiss.report.results import Results
from tests.helpers.images import write_images
from tests.helpers.polygons import filled
from tests.labels.conftest import Masks

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_label_studio_reads_its_brush_masks(tmp_path: Path, results: Path) -> None:
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    export(results, tmp_path / "tasks.json", "labelstudio")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    for task, result in zip(tasks, Results.open(results), strict=True):
        labels = result.labels()
        for number, found in enumerate(task["predictions"][0]["result"], start=1):
            mask = brush.decode_rle(found["value"]["rle"]).reshape(*labels.shape, 4)[..., 3]
            np.testing.assert_array_equal(mask, 255 * (labels == number))


def test_label_studio_converts_its_polygons_to_coco(tmp_path: Path, results: Path, drawn: Masks) -> None:
    converter = pytest.importorskip("label_studio_sdk.converter")
    from pycocotools.coco import COCO

    export(results, tmp_path / "tasks.json", "labelstudio", "polygons")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    for number, task in enumerate(tasks):  # as if a person had accepted them
        task |= {"id": number, "annotations": [{"id": number, **task.pop("predictions")[0]}]}
    (tmp_path / "accepted.json").write_text(json.dumps(tasks))
    config = '<View><Image name="image" value="$image"/><PolygonLabels name="label" toName="image"><Label value="anomaly"/></PolygonLabels></View>'  # noqa: E501
    made = converter.Converter(config, str(tmp_path), download_resources=False)
    made.convert_to_coco(str(tmp_path / "accepted.json"), str(tmp_path / "coco"), is_dir=False)
    read = COCO(str(tmp_path / "coco" / "result.json"))
    names = {image["id"]: Path(image["file_name"]).name for image in read.dataset["images"]}
    assert len(read.anns) == sum(len(one.regions) for one in Results.open(results))
    for image, name in names.items():
        masks = [read.annToMask(one) for one in read.imgToAnns[image]]
        found = np.any(masks, axis=0) if masks else np.zeros(1)
        expected = drawn[f"a/{name}"]
        assert np.sum(found != expected) <= 0.05 * expected.sum() + 1, name  # it rounds coordinates


@pytest.mark.parametrize("shapes", ["masks", "polygons"])
def test_datumaro_reads_cvat(tmp_path: Path, results: Path, drawn: Masks, shapes: Any) -> None:
    datumaro = pytest.importorskip("datumaro")
    for key, mask in drawn.items():
        [written] = write_images(tmp_path / "written" / key, 1, size=mask.shape).iterdir()
        (tmp_path / "cvat" / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        written.rename(tmp_path / "cvat" / "images" / key)
    export(results, tmp_path / "cvat" / "annotations.xml", "cvat", shapes, label="scratch")
    read = datumaro.Dataset.import_from(str(tmp_path / "cvat"), "cvat")
    items = {item.id: item.annotations for item in read}
    assert {f"{name}.png" for name in items} == set(drawn)
    for result in Results.open(results):
        labels, found = result.labels(), items[result.key.removesuffix(".png")]
        assert len(found) == len(result.regions)
        for number, annotation in enumerate(found, start=1):
            assert float(annotation.attributes["peak"]) == result.regions[number - 1].peak
            if shapes == "masks":
                np.testing.assert_array_equal(annotation.image, labels == number)
            else:
                corners = np.array(annotation.points).reshape(-1, 2)
                height, width = labels.shape
                np.testing.assert_array_equal(filled([corners], (height, width)), labels == number)
