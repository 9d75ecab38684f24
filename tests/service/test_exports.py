"""Exports of the log: their contents, and parts without a verdict, which are never exported as if they were normal."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.service.conftest import NAME, Served, png, until

EXPORT = f"/v1/galleries/{NAME}/export"


def red() -> bytes:
    """A defect."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def error_of(served: Served, kind: str, **query: Any) -> str:
    answer = served.client.get(EXPORT, params={"kind": kind, **query})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_judged")
    message = str(answer.json()["error"]["message"])
    assert "\n" not in message
    return message


def coco_ids(served: Served, left_out: Sequence[tuple[str, str]] = (), **query: Any) -> list[str]:
    """The inspections in a COCO export, which are those in an export of masks; both say which are not, and why."""
    answers = [served.client.get(EXPORT, params={"kind": kind, **query}) for kind in ("coco", "masks")]
    assert [answer.headers["X-Left-Out"] for answer in answers] == [str(len(left_out))] * 2
    coco = answers[0].json()
    ids = [one["id"] for one in coco["images"]]
    with zipfile.ZipFile(io.BytesIO(answers[1].content)) as archive:
        assert [one["id"] for one in json.loads(archive.read("index.json"))] == ids
        assert set(archive.namelist()) == {"index.json", "left_out.json", *(f"{one}.png" for one in ids)}
        assert json.loads(archive.read("left_out.json")) == coco["info"]["left_out"]
    assert [(one["id"], one["why"]) for one in coco["info"]["left_out"]] == list(left_out)
    return ids


def rows_of(served: Served) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(served.client.get(EXPORT, params={"kind": "csv"}).text)))


@pytest.mark.parametrize("kind", ["coco", "masks"])
@pytest.mark.parametrize("count", [1, 3])
def test_parts_of_a_gallery_that_is_not_calibrated(
    serve: Callable[..., Any], workspace: Path, kind: str, count: int
) -> None:
    (workspace / "tiles.gallery" / "calibration.json").unlink()
    with serve() as served:
        ids = [served.inspect(red()).json()["id"] for _ in range(count)]
        message = error_of(served, kind)
        assert f"for each of {count} parts, found {count} without, the newest is {ids[-1]}:" in message
        assert coco_ids(served, [(one, "not_judged") for one in ids[::-1]], judged_only=True) == []
        for row in rows_of(served):
            assert (row["verdict"], row["regions"], row["error"]) == ("", "", "")
        lines = served.client.get(EXPORT, params={"kind": "jsonl"}).text.splitlines()
        assert [(json.loads(one)["verdict"], json.loads(one)["thresholds"]) for one in lines] == [(None, None)] * count


def test_a_gallery_that_was_calibrated_between(serve: Callable[..., Any], workspace: Path, tmp_path: Path) -> None:
    calibration = workspace / "tiles.gallery" / "calibration.json"
    shutil.move(calibration, tmp_path)
    with serve() as served:
        before = served.inspect(red()).json()["id"]
        shutil.copy(tmp_path / calibration.name, calibration)
        until(lambda: served.get(f"/v1/galleries/{NAME}")["calibration"])
        after = served.inspect(red()).json()
        assert after["regions"] != []
        for kind in ("coco", "masks"):
            assert f"found 1 without, the newest is {before}:" in error_of(served, kind)
        assert coco_ids(served, last=1) == [after["id"]]
        assert coco_ids(served, [(before, "not_judged")], judged_only=True) == [after["id"]]
        rows = [(row["verdict"], row["regions"]) for row in rows_of(served)]
        assert rows == [("anomalous", str(len(after["regions"]))), ("", "")]


@pytest.mark.parametrize(("k", "threshold"), [(3, None), (3, 0.1), (3, 1e6)])
def test_parts_that_were_not_judged_by_the_gallerys_thresholds(
    serve: Callable[..., Any], k: int, threshold: float | None
) -> None:
    """With another k there are no regions, whatever verdict an image threshold gives."""
    own = {} if threshold is None else {"threshold": threshold}
    with serve() as served:
        first, other, last = (served.inspect(red(), **query).json()["id"] for query in ({}, {"k": k, **own}, {}))
        assert f"each of 3 parts, found 1 without, the newest is {other}:" in error_of(served, "coco")
        assert coco_ids(served, [(other, "not_judged")], judged_only=True) == [last, first]


def test_a_threshold_of_the_request_is_a_verdict(serve: Callable[..., Any]) -> None:
    with serve() as served:
        ids = [served.inspect(red(), threshold=one).json()["id"] for one in (1e6, 0)]
        assert coco_ids(served) == ids[::-1]
        annotations = served.get(EXPORT, kind="coco")["annotations"]
        assert {one["image_id"] for one in annotations} == {served.get(f"/v1/inspections/{ids[1]}")["number"]}


def test_failed_parts_are_in_no_file_of_labels(serve: Callable[..., Any]) -> None:
    with serve() as served:
        part = served.inspect(png(1)).json()["id"]
        served.inspect(b"no image")
        [failed, _] = rows_of(served)
        assert (failed["error"], failed["regions"]) == ("bad_image", "")
        for judged_only in (False, True):
            assert coco_ids(served, [(failed["id"], "bad_image")], judged_only=judged_only) == [part]


def test_defects_whose_map_is_gone_are_named(serve: Callable[..., Any]) -> None:
    with serve(kept=1) as served:
        ids = [served.inspect(red()).json()["id"] for _ in range(3)]
        assert coco_ids(served, [(one, "map_not_kept") for one in ids[1::-1]]) == ids[2:]
        answer = served.client.get(EXPORT, params={"kind": "csv", "judged_only": True})
        assert answer.headers["X-Left-Out"] == "0"


def test_an_empty_log_is_exported(serve: Callable[..., Any]) -> None:
    with serve() as served:
        assert coco_ids(served) == []
        assert rows_of(served) == []
