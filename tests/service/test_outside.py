"""Other programs: the Open Inference Protocol, exports, drift, folders, webhooks."""

from __future__ import annotations

import base64
import csv
import io
import json
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from spade_faiss.service.app import create_app
from spade_faiss.service.inspections import Line
from spade_faiss.service.judging import drift
from spade_faiss.service.pictures import pack, polygons, unpack
from tests.service.conftest import NAME, Served, png, settings_of, until

INFER = f"/v2/models/{NAME}/infer"


def test_tritonclient(workspace: Path) -> None:
    """The client that others use, over a socket."""
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    app = create_app(settings_of(workspace))
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started and app.state.service.is_ready)
        port = server.servers[0].sockets[0].getsockname()[1]
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(NAME, "2")
        assert client.get_model_metadata(NAME)["versions"] == ["2"]
        tensor = triton.InferInput("image", [2], "BYTES")
        tensor.set_data_from_numpy(np.array([png(1), png(2)], np.object_))
        outputs = [triton.InferRequestedOutput(name) for name in ("verdict", "image_score", "anomaly_map")]
        found = client.infer(NAME, [tensor], outputs=outputs, model_version="2")
        assert found.as_numpy("anomaly_map").shape == (2, 40, 48)
        pixels = triton.InferInput("image", [40, 48, 3], "UINT8")
        pixels.set_data_from_numpy(np.asarray(Image.open(io.BytesIO(png(2)))))
        same = client.infer(NAME, [pixels])
        np.testing.assert_allclose(same.as_numpy("image_score"), found.as_numpy("image_score")[1:], rtol=1e-6)
        assert same.as_numpy("verdict")[0] == found.as_numpy("verdict")[1]
        with pytest.raises(triton.InferenceServerException, match="version"):
            client.infer(NAME, [tensor], model_version="9")
        client.close()
    finally:
        server.should_exit = True
        thread.join()


def test_inference_as_json(shared: Served) -> None:
    data = [base64.b64encode(png(1)).decode()]
    body = {"id": "7", "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": data}]}
    answer = shared.client.post(INFER, json=body).json()
    assert (answer["model_version"], answer["id"]) == ("2", "7")
    values = {one["name"]: one["data"] for one in answer["outputs"]}
    assert values["verdict"] == [shared.inspect(png(1)).json()["verdict"]]


@pytest.mark.parametrize(
    "tensor",
    [{}, {"name": "image"}, {"name": "image", "datatype": "BYTES", "shape": [2], "data": ["aa=="]},
     {"name": "image", "datatype": "FP32", "shape": [1], "data": [1]},
     {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["!"]},
     {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [300] * 12},
     {"name": "image", "datatype": "BYTES", "shape": [-1], "data": []},
     {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 4}}],
)  # fmt: skip
def test_tensors_that_are_none(shared: Served, tensor: dict[str, Any]) -> None:
    answer = shared.client.post(INFER, json={"inputs": [tensor]})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_tensor")
    assert isinstance(answer.json()["error"], str)  # as the protocol has it


def test_exports(serve: Callable[..., Any]) -> None:
    with serve() as served:
        odd, named = io.BytesIO(), {"Content-Type": "image/png", "X-Name": "=1+1"}
        Image.new("RGB", (48, 40), (255, 0, 0)).save(odd, "PNG")
        served.client.post(f"/v1/galleries/{NAME}/inspect", content=odd.getvalue(), headers=named)
        answer = served.inspect(png(1)).json()
        export = f"/v1/galleries/{NAME}/export"
        rows = list(csv.DictReader(io.StringIO(served.client.get(export, params={"kind": "csv"}).text)))
        assert [row["name"] for row in rows] == ["image", "'=1+1"]  # no spreadsheet runs it
        assert float(rows[0]["image_score"]) == answer["image_score"]
        lines = served.client.get(export, params={"kind": "jsonl"}).text.splitlines()
        assert json.loads(lines[0])["id"] == answer["id"]
        first = json.loads(lines[1])
        assert first["verdict"] == "anomalous"
        coco = served.get(export, kind="coco")
        areas = [one["area"] for one in coco["annotations"] if one["image_id"] == first["number"]]
        assert areas == [region["area"] for region in first["regions"]]
        assert [sum(one["segmentation"]["counts"][1::2]) for one in coco["annotations"]] == [
            one["area"] for one in coco["annotations"]
        ]
        archive = zipfile.ZipFile(io.BytesIO(served.client.get(export, params={"kind": "masks"}).content))
        mask = np.asarray(Image.open(archive.open(f"{first['id']}.png")))
        assert (mask > 0).sum() == sum(areas)


def test_maps_are_packed_without_loss(rng: np.random.Generator) -> None:
    scores = rng.standard_normal((13, 7)).astype(np.float32)
    np.testing.assert_array_equal(unpack(pack(scores)), scores)


def test_outlines_enclose_their_regions() -> None:
    labels = np.zeros((10, 12), np.uint8)
    labels[2:6, 3:9], labels[8, 11] = 1, 2
    large, small = polygons(labels, 2)
    xs, ys = np.array(large).T
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (3, 2, 9, 6)
    assert np.mean(small[:-1], axis=0).tolist() == [11.5, 8.5]  # the centre of its pixel


def test_drift_is_seen(shared: Served, rng: np.random.Generator) -> None:
    current = shared.service.registry.named(NAME).current
    assert current is not None
    assert current.calibration is not None
    scores = current.calibration.image_scores

    def parts(values: Any) -> list[Line]:
        return [Line(n, {"image_score": float(value), "label": None}) for n, value in enumerate(values)]

    assert drift(parts(rng.choice(scores, 60)), current.calibration)["alarm"] is False
    assert drift(parts(scores.max() * 1.1 + rng.random(60)), current.calibration)["toward"] == "higher scores"
    assert drift(parts(scores.max() * 1.1 + rng.random(60)), current.calibration)["alarm"] is True
    assert drift(parts(scores[:5]), current.calibration)["p_value"] is None


class Receiver(HTTPServer):
    """A webhook's receiver that fails at first."""

    def __init__(self, failures: int) -> None:
        self.failures, self.bodies = failures, list[dict[str, Any]]()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # http.server's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(self.server, Receiver)
        self.server.failures -= 1
        if self.server.failures < 0:
            self.server.bodies.append(body)
        self.send_response(503 if self.server.failures >= 0 else 204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_folder_and_a_webhook(serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives in a folder is inspected once, and its result arrives, though the receiver fails at first."""
    for module, name in (("watch", "PAUSE"), ("delivery", "PAUSE"), ("delivery", "FIRST")):
        monkeypatch.setattr(f"spade_faiss.service.{module}.{name}", 0.02)
    (workspace / "in").mkdir()
    receiver = Receiver(failures=2)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{receiver.server_port}/results"
    try:
        with serve(watch=(workspace / "in",), webhook=url) as served:
            for seed in (1, 2):
                (workspace / "in" / f"{seed}.png").write_bytes(png(seed))
            until(lambda: len(receiver.bodies) == 2)
            until(lambda: not served.service.delivery.waiting)
            ids = [one["id"] for one in served.get("/v1/inspections")["inspections"]]
            assert [body["id"] for body in receiver.bodies] == ids[::-1]
        with serve(watch=(workspace / "in",)) as served:
            (workspace / "in" / "3.png").write_bytes(png(3))
            until(lambda: len(served.get("/v1/inspections")["inspections"]) == 3)
            assert served.get("/v1/inspections")["inspections"][0]["name"] == "3.png"  # the others are known
    finally:
        receiver.shutdown()
        receiver.server_close()
