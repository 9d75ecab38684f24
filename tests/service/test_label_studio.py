"""The service as Label Studio's machine learning back end: predictions for tasks, and images that are never fetched."""

from __future__ import annotations

import base64
import io
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


def test_a_task_that_is_none_is_refused_before_others_are_inspected(shared: Served) -> None:
    before = shared.get("/v1/inspections", last=1)
    tasks = [{"data": {"image": data_uri(white())}}, {"data": {}}]
    answer = shared.client.post(f"{URL}/predict", json={"tasks": tasks})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_task")
    assert "in task 1" in answer.json()["error"]["message"]
    assert shared.get("/v1/inspections", last=1) == before


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
