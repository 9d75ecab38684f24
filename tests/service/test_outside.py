"""Other programs: the Open Inference Protocol, exports, drift, folders, webhooks."""

from __future__ import annotations

import asyncio
import base64
import csv
import http.client
import io
import json
import socket
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from spade_faiss.detect.regions import find_regions
from spade_faiss.service.inspecting import outer_rings
from spade_faiss.service.judging import drift
from spade_faiss.service.log.inspections import Line
from spade_faiss.service.pictures import pack, unpack
from spade_faiss.service.service import Service
from spade_faiss.service.web import routes_galleries, routes_label_studio, routes_v2
from tests.service.conftest import NAME, Served, png, until

INFER = f"/v2/models/{NAME}/infer"


def test_tritonclient(socketed: tuple[str, int, Service]) -> None:
    """The client that others use, over a socket."""
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    client = triton.InferenceServerClient(f"127.0.0.1:{socketed[1]}")
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


def test_a_client_that_stops_half_way(socketed: tuple[str, int, Service]) -> None:
    """It is told so and left; others are answered meanwhile."""
    host, port, service = socketed
    head = f"POST /v1/galleries/{NAME}/inspect HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
    with socket.create_connection((host, port), timeout=20) as slow, socket.create_connection((host, port)) as silent:
        slow.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + png()[:100])
        silent.sendall(head.encode()[:40])
        connection = http.client.HTTPConnection(host, port, timeout=20)
        connection.request("POST", f"/v1/galleries/{NAME}/inspect", png(), {"Content-Type": "image/png"})
        assert connection.getresponse().status == 200
        connection.close()
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (408, "too_slow")
    assert service.pool.depth == 0


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


IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(png(1)).decode()]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"outputs": [{"name": "anomaly_map"}] * 1000}, "each output once, found 'anomaly_map' 1000 times"),
        ({"outputs": [{"name": one} for one in ("score", "verdict", "score")]}, "'score' 2 times"),
        ({"id": "\ud800"}, r"an id that UTF-8 can write, found '\ud800'"),
        ({"id": "part \udfff"}, r"found 'part \udfff'"),
        ({"inputs": [{**IMAGE, "shape": [2**32, 2**32], "data": []}]}, "as the shape says, found 0"),
    ],
    ids=["a map 1000 times", "a score twice", "half a character", "another half", "a shape beyond 64 bits"],
)
def test_inference_that_is_refused(shared: Served, body: dict[str, Any], message: str) -> None:
    """Before anything is inspected."""
    before = shared.get("/v1/inspections", last=1)
    content = json.dumps({"inputs": [IMAGE], **body})
    answer = shared.client.post(INFER, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_tensor")
    assert message in answer.json()["error"]
    assert shared.get("/v1/inspections", last=1) == before


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "7.5"], ids=["long", "negative", "broken"])
def test_lengths_of_tensors_that_are_none(shared: Served, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    answer = shared.client.post(INFER, content=json.dumps({"inputs": [IMAGE]}), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_tensor")


def test_what_takes_long_is_done_beside_the_loop(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered while tensors and predictions are written; inspections wait for no export."""
    threads: dict[str, str] = {}

    def watched(module: Any, name: str) -> None:
        work = getattr(module, name)

        def working(*given: Any) -> Any:
            threads[name] = threading.current_thread().name.partition("_")[0]
            return work(*given)

        monkeypatch.setattr(module, name, working)

    watched(routes_v2.tensors, "written")
    watched(routes_v2, "_values")
    watched(routes_label_studio, "prediction")
    watched(routes_galleries, "export")
    assert shared.client.post(INFER, json={"inputs": [IMAGE]}).status_code == 200
    task = {"data": {"image": f"data:image/png;base64,{IMAGE['data'][0]}"}}
    assert shared.client.post(f"/label-studio/{NAME}/predict", json={"tasks": [task]}).status_code == 200
    assert shared.client.get(f"/v1/galleries/{NAME}/export").status_code == 200
    assert threads == {"written": "helper", "_values": "helper", "prediction": "helper", "export": "errand"}


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
        assert [_pixels(one["segmentation"], (40, 48)) for one in coco["annotations"]] == [
            one["area"] for one in coco["annotations"]
        ]
        archive = zipfile.ZipFile(io.BytesIO(served.client.get(export, params={"kind": "masks"}).content))
        mask = np.asarray(Image.open(archive.open(f"{first['id']}.png")))
        assert (mask > 0).sum() == sum(areas)


def test_maps_are_packed_without_loss(rng: np.random.Generator) -> None:
    scores = rng.standard_normal((13, 7)).astype(np.float32)
    np.testing.assert_array_equal(unpack(pack(scores)), scores)


def _inside(corners: Any, size: tuple[int, int]) -> Any:
    """Which pixels of (H, W) have their centres inside a closed polygon: rows cross it an odd number of times."""
    (x, y), found = np.array(corners).T, np.zeros(size, bool)
    for row in range(size[0]):
        crossed = (y[:-1] > row + 0.5) != (y[1:] > row + 0.5)
        share = (row + 0.5 - y[:-1][crossed]) / np.diff(y)[crossed]
        at = np.sort(x[:-1][crossed] + share * np.diff(x)[crossed])
        found[row] = np.searchsorted(at, np.arange(size[1]) + 0.5) % 2 == 1
    return found


def _pixels(segmentation: Any, size: tuple[int, int]) -> int:
    """How many pixels a segmentation of COCO covers."""
    if isinstance(segmentation, dict):
        return sum(segmentation["counts"][1::2])
    corners = np.reshape(segmentation[0], (-1, 2))
    return int(_inside(np.concatenate([corners, corners[:1]]), size).sum())


@pytest.mark.parametrize(("sigma", "fewer"), [(0, 1), (1, 1.5), (4, 3)])
def test_outlines_enclose_the_pixels_of_their_regions(rng: np.random.Generator, sigma: float, fewer: float) -> None:
    """Whatever their shape, with few corners; holes are filled."""
    scores = ndimage.gaussian_filter(rng.standard_normal((30, 40)), sigma)
    regions, labels = find_regions(scores.astype(np.float32), float(np.quantile(scores, 0.7)))
    found, corners, edges = outer_rings(labels, len(regions)), 0, 0
    for number, polygon in enumerate(found, start=1):
        mask = ndimage.binary_fill_holes(labels == number)
        np.testing.assert_array_equal(_inside(polygon, mask.shape), mask)
        corners += len(polygon) - 1
        edges += int(sum(np.diff(np.pad(mask, 1).astype(int), axis=axis).astype(bool).sum() for axis in (0, 1)))
    assert corners < edges / fewer  # one for each pixel's edge, if none is left out


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


class Broker:
    """An MQTT broker in a thread, which can be stopped and started again at its port."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def start(self) -> None:
        from amqtt.broker import Broker as Program

        plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
        listeners = {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}}

        async def start() -> Any:
            program = Program({"listeners": listeners, "plugins": plugins})
            await program.start()
            return program

        self._program = asyncio.run_coroutine_threadsafe(start(), self._loop).result(20)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._program.shutdown(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_mqtt(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results arrive at a subscriber of a real broker, those too that were made before the broker was there."""
    pytest.importorskip("amqtt", reason="amqtt is not installed")
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    for name in ("PAUSE", "FIRST"):
        monkeypatch.setattr(f"spade_faiss.service.delivery.{name}", 0.02)
    broker, bodies = Broker(), list[Any]()
    subscriber = paho.Client(CallbackAPIVersion.VERSION2)
    subscriber.on_message = lambda _, __, message: bodies.append(json.loads(message.payload))
    with serve(mqtt=f"mqtt://127.0.0.1:{broker.port}/line/results") as served:
        first = served.inspect(png(1)).json()
        until(lambda: served.service.database.rows("SELECT attempts FROM outbox")[0][0])  # in vain
        broker.start()
        subscriber.connect("127.0.0.1", broker.port)
        subscriber.subscribe("line/results", qos=1)
        subscriber.loop_start()
        until(lambda: len(bodies) == 1)
        second = served.inspect(png(2)).json()
        until(lambda: len(bodies) == 2)
        until(lambda: not served.service.delivery.waiting)
    assert [body["id"] for body in bodies] == [first["id"], second["id"]]
    subscriber.disconnect()
    subscriber.loop_stop()
    broker.close()


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
