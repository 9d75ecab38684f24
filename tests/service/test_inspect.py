"""Images in, verdicts out, a line in the log."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.service.web import routes_v2
from tests.service.conftest import NAME, Served, png, until

INFER = f"/v2/models/{NAME}/infer"


def detector_of(workspace: Path) -> sf.Detector:
    gallery = sf.Gallery.open(workspace / "tiles.gallery")
    return sf.Detector(gallery, gallery.load_extractor())


def test_an_answer_is_that_of_a_query(shared: Served) -> None:
    answer = shared.inspect(png(), map="npy", matches=True).json()
    found = detector_of(shared.normal.parent).query(png())
    assert found.judgement is not None
    assert answer["image_score"] == found.image_score
    assert (answer["verdict"], answer["p_value"]) == (found.verdict, found.judgement.p_value)
    assert [one["key"] for one in answer["neighbours"]] == found.neighbours.keys
    assert [region["box"] for region in answer["regions"]] == [list(region.box) for region in found.regions]
    scores = np.load(io.BytesIO(base64.b64decode(answer["map"]["base64"])))
    np.testing.assert_array_equal(scores, found.anomaly_map)
    cell = answer["matches"]["grid"][1] + 2  # row 1, column 2
    assert answer["matches"]["neighbour"][0][cell] == found.matches[1, 2, 0, 0]
    assert answer["thresholds"]["false_alarms"] == 0.1


def test_what_was_inspected_can_be_looked_at(shared: Served) -> None:
    answer = shared.inspect(png(3)).json()
    uid = answer["id"]
    assert shared.get(f"/v1/inspections/{uid}")["image_score"] == answer["image_score"]
    assert shared.client.get(f"/v1/inspections/{uid}/picture").content == png(3)
    assert Image.open(io.BytesIO(shared.client.get(f"/v1/inspections/{uid}/thumbnail").content)).size == (200, 167)
    found = detector_of(shared.normal.parent).query(png(3))
    scores = np.load(io.BytesIO(shared.client.get(f"/v1/inspections/{uid}/map?kind=npy").content))
    np.testing.assert_array_equal(scores, found.anomaly_map)
    tiff = Image.open(io.BytesIO(shared.client.get(f"/v1/inspections/{uid}/map?kind=tiff").content))
    np.testing.assert_array_equal(np.asarray(tiff), found.anomaly_map)
    layer = Image.open(io.BytesIO(shared.client.get(f"/v1/inspections/{uid}/map?kind=layer").content))
    assert (layer.mode, layer.size) == ("RGBA", (48, 40))
    assert (
        len(shared.get(f"/v1/inspections/{uid}/matches")["row"][0]) == found.matches.shape[0] * found.matches.shape[1]
    )
    assert shared.get(f"/v1/inspections/{uid}/neighbours")["neighbours"] == answer["neighbours"]
    assert shared.get("/v1/inspections", last=1)["inspections"][0]["id"] == uid


def test_a_batch_keeps_its_order_and_its_bad_images(shared: Served) -> None:
    files = [("image", (f"{n}.png", png(n) if n != 1 else b"no image", "image/png")) for n in range(3)]
    answer = shared.client.post(f"/v1/galleries/{NAME}/inspect", files=files).json()["inspections"]
    assert [one["name"] for one in answer] == ["0.png", "1.png", "2.png"]
    assert [one["error"] and one["error"]["code"] for one in answer] == [None, "bad_image", None]
    single = shared.inspect(png(2)).json()
    assert answer[2]["image_score"] == pytest.approx(single["image_score"], rel=1e-6)


def test_a_threshold_of_the_request_decides(shared: Served) -> None:
    score = shared.inspect(png(5)).json()["image_score"]
    assert shared.inspect(png(5), threshold=score).json()["verdict"] == "normal"
    low = shared.inspect(png(5), threshold=score / 2).json()
    assert low["thresholds"]["image"] == score / 2
    assert low["score"] == pytest.approx(2 / 3)


def test_regions_that_are_too_small_do_not_count_at_any_threshold(
    shared: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A threshold of the request judges by the regions that the gallery's settings count."""
    answer = shared.inspect(odd(), threshold=0.01).json()
    areas = [region["area"] for region in answer["regions"]]
    assert answer["verdict"] == "anomalous"
    current = shared.service.registry.named(NAME).current
    assert current is not None
    for least, expected in ((max(areas), [max(areas)]), (max(areas) + 1, [])):
        monkeypatch.setattr(current.detector, "score", replace(current.detector.score, min_region=least))
        answer = shared.inspect(odd(), threshold=0.01).json()
        assert [region["area"] for region in answer["regions"]] == expected
        assert answer["verdict"] == ("anomalous" if expected else "normal")


def odd() -> bytes:
    """A part as no normal image is."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_another_k_has_no_verdict(shared: Served) -> None:
    answer = shared.inspect(png(5), k=3).json()
    assert (answer["verdict"], len(answer["neighbours"])) == (None, 3)
    gallery = sf.Gallery.open(shared.normal.parent / "tiles.gallery")
    found = sf.Detector(gallery, gallery.load_extractor(), sf.SearchOptions(k=3), calibrated=False).query(png(5))
    assert answer["image_score"] == found.image_score


def test_each_answer_has_an_example_that_fits(shared: Served) -> None:
    """In the description: of the answer's schema, and with the parts that a real answer has."""
    schemas = pytest.importorskip("jsonschema_rs", reason="schemathesis is not installed")
    description = shared.get("/openapi.json")
    values = {"{name}": NAME, "{uid}": shared.inspect(png(3)).json()["id"], "{version}": "2"}
    for path, operations in description["paths"].items():
        address = path
        for name, value in values.items():
            address = address.replace(name, value)
        for method, operation in operations.items():
            content = operation["responses"]["200"].get("content", {}).get("application/json", {})
            schema, example = content.get("schema"), content.get("example")
            if schema is None or (example is None and "$ref" in schema):  # a file; or the model has an example
                continue
            assert example is not None, (method, path)
            schemas.validate({**schema, "components": description["components"]}, example)
            if method == "get":
                more = {"x": 1, "y": 2} if "score-at" in path else {"false_alarms": 0.2} if "rejudge" in path else {}
                assert set(shared.get(address, **more)) >= set(example), path


def test_galleries_are_loaded_when_asked_for_and_so_many_at_once(serve: Callable[..., Any], workspace: Path) -> None:
    path = workspace / "tiles.gallery"
    with serve(galleries={NAME: path, "second": path, "third": path}, loaded=2) as served:

        def loaded() -> list[str]:
            return [one["name"] for one in served.get("/v1/galleries")["galleries"] if one["loaded"]]

        assert loaded() == [NAME]
        first = served.inspect(png()).json()
        for name, expected in (("second", [NAME, "second"]), ("third", ["second", "third"])):
            address = f"/v1/galleries/{name}/inspect"
            answer = served.client.post(address, content=png(), headers={"Content-Type": "image/png"}).json()
            assert (answer["gallery"], answer["image_score"]) == (name, first["image_score"])
            assert loaded() == expected
        assert served.inspect(png()).json()["image_score"] == first["image_score"]  # loaded again


def committing(served: Served, workspace: Path, before: Callable[..., Any]) -> Callable[..., Any]:
    """A function before which there is a commit, the first time, that is taken up."""
    keys = ["000.png"]

    def later(*given: Any) -> Any:
        if keys:
            with sf.Gallery.open(workspace / "tiles.gallery") as gallery:
                gallery.remove([keys.pop()])
            until(lambda: served.generation == 3)
        return before(*given)

    return later


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_a_request_of_several_images_sees_one_generation(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """Though a commit comes while the first of them is searched; the next request sees that."""
    with serve() as served:
        pool = served.service.pool
        following = committing(served, workspace, pool._next)
        pool_next = pool._next
        monkeypatch.setattr(pool, "_next", lambda *like: following(*like) if like else pool_next())
        for expected in (2, 3):
            if protocol == "v1":
                files = [("image", (f"{seed}.png", png(seed), "image/png")) for seed in range(3)]
                found = served.client.post(f"/v1/galleries/{NAME}/inspect", files=files).json()["inspections"]
            else:
                answer = served.client.post(INFER, json=tensor(3)).json()
                assert answer["model_version"] == str(expected)
                [output] = [one for one in answer["outputs"] if one["name"] == "inspection"]
                found = [served.get(f"/v1/inspections/{uid}") for uid in output["data"]]
            assert [one["generation"] for one in found] == [expected] * 3
        until(lambda: served.service.registry.named(NAME).current._users == 0)


@pytest.mark.parametrize("version", ["2", None])
def test_a_commit_before_a_version_is_inferred_in(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    with serve() as served:
        monkeypatch.setattr(routes_v2.tensors, "read", committing(served, workspace, routes_v2.tensors.read))
        address = INFER.replace("/infer", f"/versions/{version}/infer") if version else INFER
        answer = served.client.post(address, json=tensor(2))
        if version:
            assert (answer.status_code, "found version '2'" in answer.json()["error"]) == (404, True)
            assert served.get("/v1/inspections")["inspections"] == []
        else:
            assert answer.json()["model_version"] == "3"
        assert served.service.pool.depth == 0


def tensor(count: int) -> dict[str, Any]:
    data = [base64.b64encode(png(seed)).decode() for seed in range(count)]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [count], "data": data}]}


def test_what_waits_is_answered_at_the_end(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As SIGTERM asks for; what comes later is sent away."""
    with serve() as served:
        pool, release, answers = served.service.pool, threading.Event(), list[Any]()
        search = pool._search
        monkeypatch.setattr(pool, "_search", lambda *given: (release.wait(20), search(*given)))
        posting = [threading.Thread(target=lambda: answers.append(served.inspect(png()))) for _ in range(2)]
        for thread in posting:
            thread.start()
        until(lambda: len(pool._waiting) == 1)  # the other one is being searched
        ending = threading.Thread(target=pool.close)
        ending.start()
        until(lambda: pool._ending)
        late = served.inspect(png())
        release.set()
        for thread in (*posting, ending):
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert (late.status_code, late.json()["error"]["code"]) == (503, "ending")
