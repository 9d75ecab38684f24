"""The service as Label Studio's machine learning back end: predictions for tasks, and images that are never fetched."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.service.conftest import NAME, Served, png

URL = f"/label-studio/{NAME}"
CONFIG = '<View><Image name="img" value="$photo"/><{0} name="tag" toName="img"><Label value="blot"/></{0}></View>'


def white() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def huge() -> bytes:
    """A PNG whose header says 8192 x 8192 px."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 8192, 8192, 8, 2, 0, 0, 0)
    content = white()
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def predict(served: Served, image: object, name: str = "image", **body: Any) -> Any:
    return served.client.post(f"{URL}/predict", json={"tasks": [{"id": 1, "data": {name: image}}], **body})


def test_label_studio_is_answered(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a b.png").write_bytes(white())
    (tmp_path / "outside.png").write_bytes(white())
    with serve(label_files=tmp_path / "files") as served:
        assert served.get(f"{URL}/health")["status"] == "UP"
        version = served.client.post(f"{URL}/setup", json={"schema": CONFIG.format("BrushLabels")}).json()
        [found] = predict(served, data_uri(white())).json()["results"]
        assert found["model_version"] == version["model_version"]
        assert [one["type"] for one in found["result"]] == ["brushlabels"] * len(found["result"]) != []
        [line] = served.get("/v1/inspections", last=1)["inspections"]
        assert (line["verdict"], len(line["regions"])) == ("anomalous", len(found["result"]))
        [again] = predict(served, f"/v1/inspections/{line['id']}/picture").json()["results"]
        [local] = predict(served, "/data/local-files/?d=a%20b.png").json()["results"]
        assert again == local == found
        body = {"label_config": CONFIG.format("PolygonLabels")}
        [named] = predict(served, data_uri(white()), "photo", **body).json()["results"]
        first = named["result"][0]
        assert (first["from_name"], first["to_name"], first["value"]["polygonlabels"]) == ("tag", "img", ["blot"])
        [normal] = predict(served, data_uri(png(1))).json()["results"]
        assert 0 <= normal["score"] < 1
        for escape in ("../outside.png", str(tmp_path / "outside.png"), "none.png", "%00", "."):
            answer = predict(served, f"/data/local-files/?d={escape}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_task"), escape


@pytest.mark.parametrize(
    "image",
    [None, 7, "", "http://example.org/a.png", "file:///etc/passwd", "s3://bucket/a.png", "//host/data/local-files/?d=a",
     "data:image/png,abc", "data:image/png;base64,!", "/data/upload/1/a.png", "http://[", data_uri(b"no image")],
)  # fmt: skip
def test_images_that_are_none(shared: Served, image: object) -> None:
    answer = predict(shared, image)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] in ("bad_task", "bad_image")


@pytest.mark.parametrize(
    ("bad", "status", "code", "message"),
    [
        ({}, 422, "bad_task", r"Task 8: Expected the address of an image in data\.image, .* found none\."),
        ({"photo": "a.png"}, 422, "bad_task", r"in data\.image, as the labelling .* has it, found data\.photo\."),
        ({"image": "/data/upload/1/a.png"}, 422, "bad_task", "Task 8: Expected an image as a data: URI"),
        ({"image": "data/local-files/?d=a.png"}, 422, "bad_task", "Task 8: Expected an image as a data: URI"),
        ({"image": "data:image/png;base64,"}, 422, "bad_image", "found an empty body"),
        ({"image": data_uri(white()[:-30])}, 422, "bad_image", "Task 8: image: "),  # cut short
        ({"image": data_uri(huge())}, 413, "too_many_pixels", "at most 64000000 pixels, found 8192 x 8192"),
        ({"image": "/v1/inspections/0/picture"}, 404, "unknown_inspection", "Task 8: "),
        ({"image": "/data/local-files/?d=a.png"}, 422, "no_local_files", "start with --label-files DIR"),
    ],
)
def test_one_bad_task_leaves_all_uninspected(shared: Served, bad: Any, status: int, code: str, message: str) -> None:
    before = shared.get("/v1/inspections", last=1)
    tasks = [{"id": 7, "data": {"image": data_uri(white())}}, {"id": 8, "data": bad}]
    answer = shared.client.post(f"{URL}/predict", json={"tasks": tasks})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert re.search(message, error["message"])
    assert error["message"].endswith(" No task was inspected.")
    assert "Task 7" not in error["message"]
    assert shared.get("/v1/inspections", last=1) == before


def test_all_bad_tasks_are_named(shared: Served) -> None:
    tasks: list[Any] = [{"id": number, "data": {"image": "http://host/a.png"}} for number in range(10, 17)] + [3]
    answer = shared.client.post(f"{URL}/predict", json={"tasks": tasks})
    message = answer.json()["error"]["message"]
    assert re.findall(r"Task (\d+):", message) == ["10", "11", "12", "13", "14"]
    assert message.endswith("nothing is fetched. 3 more tasks likewise. No task was inspected.")
    answer = shared.client.post(f"{URL}/predict", json={"tasks": [{"data": {"image": data_uri(white())}}] * 33})
    assert answer.json()["error"]["message"] == "Expected a list of 1 to 32 (--queue) tasks, found 33 of them."


def test_tasks_of_one_id_are_answered_in_their_order(shared: Served) -> None:
    tasks = [{"id": 1, "data": {"image": data_uri(content)}} for content in (white(), png(1), white())]
    found = shared.client.post(f"{URL}/predict", json={"tasks": tasks}).json()["results"]
    assert found[0] == found[2] != found[1]


def test_local_files_are_those_of_the_folder(serve: Callable[..., Any], tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.png").write_bytes(white())
    (files / "large.png").write_bytes(white() + bytes(5000))
    (files / "none.png").write_text("no image")
    (tmp_path / "outside.png").write_bytes(white())
    (files / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(files / "pipe.png")
    with serve(label_files=files, body_bytes=4000) as served:

        def outcome(place: str) -> tuple[int, str]:
            answer = predict(served, f"/data/local-files/?d={place}")
            return answer.status_code, answer.json().get("error", {}).get("code", "none")

        for place in ("a.png", "./a.png", "none/../a.png"):
            assert outcome(place) == (200, "none")
        for place in ("link.png", "pipe.png", "gone.png", "../outside.png", "%2e%2e/outside.png"):
            assert outcome(place) == (422, "bad_task"), place
        assert outcome("none.png") == (422, "bad_image")
        assert outcome("large.png") == (413, "too_large")


def test_a_gallery_without_thresholds_predicts_nothing(serve: Callable[..., Any], workspace: Path) -> None:
    """An empty prediction would stand for a normal part."""
    (workspace / "tiles.gallery" / "calibration.json").unlink()
    with serve() as served:
        uid = served.inspect(white()).json()["id"]
        for answer, code in (
            (served.client.post(f"{URL}/setup", json={}), "not_calibrated"),
            (predict(served, data_uri(white())), "not_calibrated"),
            (predict(served, f"/v1/inspections/{uid}/picture"), "not_judged"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, code)


@pytest.mark.parametrize("query", [{"k": 3}, {"k": 3, "threshold": 0.1}])
def test_a_part_without_thresholds_of_a_calibrated_gallery(shared: Served, query: dict[str, Any]) -> None:
    uid = shared.inspect(white(), **query).json()["id"]
    answer = predict(shared, f"/v1/inspections/{uid}/picture")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_judged")
    assert re.search(f"Expected inspection {uid} with a verdict .* found none: ", answer.json()["error"]["message"])


def test_an_inspection_that_has_no_map(serve: Callable[..., Any]) -> None:
    with serve(kept=1) as served:
        served.inspect(b"no image")
        [failed] = served.get("/v1/inspections", last=1)["inspections"]
        old = served.inspect(white()).json()["id"]
        served.inspect(white())
        for uid in (failed["id"], old):
            answer = predict(served, f"/v1/inspections/{uid}/picture")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_kept")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"tasks": []}, "bad_task"),
        ({"tasks": "all"}, "bad_task"),
        ({"tasks": [3]}, "bad_task"),
        ([], "bad_parameter"),
        ({"tasks": [{}], "label_config": "<View>"}, "bad_label_config"),
        ({"tasks": [{}], "label_config": "<View/>"}, "bad_label_config"),
        ({"tasks": [{}], "label_config": "<!DOCTYPE a><View/>"}, "bad_label_config"),
    ],
)
def test_requests_that_are_none(shared: Served, body: Any, code: str) -> None:
    answer = shared.client.post(f"{URL}/predict", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)


def test_local_files_are_served_only_if_asked_for(shared: Served) -> None:
    answer = predict(shared, "/data/local-files/?d=a.png")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_local_files")
    assert shared.client.get("/label-studio/none/health").status_code == 404
    for route in ("setup", "predict"):
        assert shared.client.post(f"/label-studio/none/{route}", json={"tasks": [{}]}).status_code == 404


def test_its_password_is_the_token(serve: Callable[..., Any], tmp_path: Path) -> None:
    token = "inspect-0123456789:ab"
    (tmp_path / "tokens").write_text(f"studio inspect {token}\nscreen read read-0123456789abcdef\n")
    with serve(tokens=tmp_path / "tokens") as served:

        def status(path: str, *credentials: str) -> int:
            return int(served.client.post(path, auth=credentials or None, json={}).status_code)

        assert status(f"{URL}/setup", "any", token) == 200
        assert served.client.get(f"{URL}/health", auth=("", "read-0123456789abcdef")).status_code == 200
        assert status(f"{URL}/setup", "any", "read-0123456789abcdef") == 403
        assert status(f"{URL}/setup", token, "") == status(f"{URL}/setup") == 401
        assert status("/v1/galleries/tiles/calibrate", "any", token) == 401  # elsewhere it is no token
        for credentials in ("", "!", base64.b64encode(b"\xff\xfe").decode()):
            answer = served.client.post(f"{URL}/setup", json={}, headers={"Authorization": f"Basic {credentials}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_wrong")


@pytest.mark.parametrize("name", [b"\xff.png", b"a\x80b.png"])
def test_a_local_file_whose_name_is_no_utf_8(serve: Callable[..., Any], tmp_path: Path, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(white())
    with serve(label_files=tmp_path) as served:
        body = {"tasks": [{"data": {"image": f"/data/local-files/?d={os.fsdecode(name)}"}}]}
        answer = served.client.post(f"{URL}/predict", content=json.dumps(body))
        assert answer.status_code == 200
        [line] = served.get("/v1/inspections")["inspections"]
        assert line["name"] == name.decode(errors="replace")
