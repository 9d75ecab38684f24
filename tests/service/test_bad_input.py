"""Whatever comes: one JSON error with a code, a sentence and the request's id, and the service goes on."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import sqlite3
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image
from starlette.testclient import TestClient

from spade_faiss.errors import OptionError
from spade_faiss.service.server import Server, run
from spade_faiss.service.settings import ServiceSettings, named_galleries
from tests.service.conftest import BASE, NAME, Served, png, settings_of, until

INSPECT = f"/v1/galleries/{NAME}/inspect"


def error(answer: Any, status: int) -> str:
    """The code of an error, whose form is checked."""
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"code", "message", "request_id"}
    assert found["message"]
    assert found["request_id"] == answer.headers["X-Request-ID"]
    return str(found["code"])


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 1.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def large() -> bytes:
    """One within what Pillow takes, and beyond what the service does."""
    buffer = io.BytesIO()
    Image.new("L", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


BODIES = {
    "empty": (b"", 422, "bad_image"),
    "no image": (b"hello", 422, "bad_image"),
    "truncated": (png()[:-40], 422, "bad_image"),
    "bomb": (bomb(), 413, "too_many_pixels"),
    "large": (large(), 413, "too_many_pixels"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "bad_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 422, "bad_image"),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_image(shared: Served, name: str) -> None:
    body, status, code = BODIES[name]
    assert error(shared.inspect(body), status) == code
    assert shared.inspect(png()).status_code == 200
    assert shared.get("/v1/inspections", last=2)["inspections"][1]["error"]["code"] == code


@pytest.mark.parametrize(
    ("query", "code"),
    [("threshold=nan", "bad_parameter"), ("threshold=-1", "bad_parameter"), ("k=0", "bad_parameter"),
     ("map=exe", "bad_parameter"), ("threshold=inf", "bad_parameter"), ("k=1000", "bad_parameter")],
)  # fmt: skip
def test_parameters_that_are_none(shared: Served, query: str, code: str) -> None:
    answer = shared.client.post(f"{INSPECT}?{query}", content=png(), headers={"Content-Type": "image/png"})
    assert error(answer, 422) == code


def test_content_types(shared: Served) -> None:
    assert error(shared.inspect(png(), "text/plain"), 415) == "wrong_content_type"
    assert error(shared.client.post(INSPECT, content=png()), 415) == "wrong_content_type"
    broken = shared.client.post(INSPECT, content=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert error(broken, 400) == "bad_request"
    assert error(shared.client.post(INSPECT, data={"image": "text"}, files={}), 415) == "wrong_content_type"


def test_the_case_of_a_content_type(serve: Callable[..., Any]) -> None:
    with serve() as served:
        part = served.inspect(png(), "Image/PNG").json()["id"]
        body, kind = f'{{"inspection": "{part}"}}', {"Content-Type": "Application/JSON; charset=utf-8"}
        assert served.client.post(f"/v1/galleries/{NAME}/normal", content=body, headers=kind).status_code == 200


def test_more_images_than_may_wait(serve: Callable[..., Any]) -> None:
    with serve(queue=3) as served:
        for count, status in ((3, 200), (4, 413), (40, 413)):
            files = [("image", (f"{number}.png", png(number), "image/png")) for number in range(count)]
            answer = served.client.post(INSPECT, files=files)
            assert answer.status_code == status
            if status == 413:
                assert error(answer, 413) == "too_many_images"
        assert served.service.pool.depth == 0


def test_unknown_names(shared: Served) -> None:
    client = shared.client
    assert error(client.post("/v1/galleries/none/inspect", content=png(), headers={"Content-Type": "image/png"}), 404)
    assert error(client.get("/v1/galleries/none"), 404) == "unknown_gallery"
    assert error(client.get("/v1/inspections/none"), 404) == "unknown_inspection"
    assert error(client.get("/nowhere"), 404) == "not_found"
    assert error(client.put(INSPECT), 405) == "method_not_allowed"
    assert error(client.post("/v1/changes/999/undo"), 404) == "unknown_change"


@pytest.mark.parametrize(
    "key", ["../gallery.json", "%2e%2e%2fgallery.json", "..%2f..%2fetc%2fpasswd", "a%00b", "/etc/passwd"]
)
def test_keys_never_become_paths(shared: Served, key: str) -> None:
    assert shared.client.delete(f"/v1/galleries/{NAME}/normal/{key}").status_code in (404, 405)
    assert error(shared.client.get(f"/v1/galleries/{NAME}/picture?key={key}"), 404) == "unknown_key"
    assert (shared.normal.parent / "tiles.gallery" / "gallery.json").exists()


def with_settings(served: Served, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Give a running service other bounds."""
    monkeypatch.setattr(served.service, "settings", replace(served.service.settings, **changes))


def test_a_body_that_is_too_large(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(shared.inspect(bytes(100_000_000)), 413) == "body_too_large"
    with_settings(shared, monkeypatch, body_bytes=10_000)
    assert error(shared.inspect(b"x" * 10_001), 413) == "body_too_large"
    parts = (b"x" * 5000 for _ in range(3))  # without a length
    answer = shared.client.post(INSPECT, content=parts, headers={"Content-Type": "image/png"})
    assert error(answer, 413) == "body_too_large"
    assert shared.inspect(png(size=(40, 40))).status_code == 200


def test_a_full_queue_and_a_client_that_has_gone(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(queue=2) as served:
        pool, release, searched = served.service.pool, threading.Event(), []
        search = pool._search

        def slow(generation: Any, run: Any, images: Any, taken: Any) -> None:
            release.wait(20)
            search(generation, run, images, taken)
            searched.append(1)

        monkeypatch.setattr(pool, "_search", slow)
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(served.inspect(png()))) for _ in range(3)]
        threads[0].start()
        until(lambda: pool.depth == 0 and not pool._reserved and len(pool._waiting) == 0 and threads[0].is_alive())
        threading.Event().wait(0.3)  # the first is at the search
        for thread in threads[1:]:
            thread.start()
        until(lambda: pool.depth == 2)
        refused = served.inspect(png())
        assert error(refused, 429) == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        gone = pool._waiting[0]
        assert gone.future.cancel()  # as for a client that has left
        release.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503]


def test_an_image_that_waited_too_long(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(shared, monkeypatch, deadline=0.05)
    monkeypatch.setattr(shared.service.pool, "submit", lambda jobs: shared.service.pool.release(len(jobs)))
    assert error(shared.inspect(png()), 503) == "deadline"


def test_another_writer(serve: Callable[..., Any], workspace: Path) -> None:
    with serve() as served:
        with FileLock(workspace / "tiles.gallery" / "writer.lock"):
            add = served.client.post(
                f"/v1/galleries/{NAME}/normal", content=png(), headers={"Content-Type": "image/png"}
            )
            assert error(add, 423) == "gallery_locked"
            assert served.inspect(png()).status_code == 200
        assert served.get("/v1/changes")["changes"][0]["state"] == "failed"
        assert served.client.post(
            f"/v1/galleries/{NAME}/normal", content=png(), headers={"Content-Type": "image/png"}
        ).json()["state"] == "done"  # fmt: skip


FULL_AT = {"picture": "service.normal_set.write_whole", "trust": "store.trusted.write_whole",
           "commit": "store.manifest.write_whole"}  # fmt: skip


@pytest.mark.parametrize("what", FULL_AT)
def test_a_full_disk(shared: Served, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Whatever is written when the disk is full: nothing is added, and when there is room again it is."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before, image = (
        shared.generation,
        {"content": png(50 + list(FULL_AT).index(what)), "headers": {"Content-Type": "image/png"}},
    )
    with monkeypatch.context() as patch:
        patch.setattr(f"spade_faiss.{FULL_AT[what]}", full)
        assert error(shared.client.post(f"/v1/galleries/{NAME}/normal", **image), 507) == "disk_full"
    assert shared.generation == before
    assert shared.inspect(png()).status_code == 200
    added = shared.client.post(f"/v1/galleries/{NAME}/normal", **image).json()
    assert added["state"] == "done"
    shared.client.post(f"/v1/changes/{added['id']}/undo")


def test_a_full_disk_of_the_log(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inspection that cannot be kept is not answered as if it were."""

    def full(*_: Any) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(shared.service.inspections, "add", full)
        assert error(shared.inspect(png()), 507) == "disk_full"
    assert shared.inspect(png()).status_code == 200


def test_a_damaged_gallery(serve: Callable[..., Any], workspace: Path) -> None:
    manifest = workspace / "tiles.gallery" / "gallery.json"
    whole = manifest.read_bytes()
    with serve() as served:
        manifest.write_bytes(whole[:-20])
        until(lambda: served.service.registry.named(NAME).problem)
        assert served.inspect(png()).status_code == 200  # the generation before it goes on
        assert "gallery.json" in served.get(f"/v1/galleries/{NAME}")["problem"]
        manifest.write_bytes(whole)
        until(lambda: not served.service.registry.named(NAME).problem)
    manifest.write_bytes(whole[:-20])
    with serve() as served:
        assert error(served.client.get("/health/ready"), 503) == "not_ready"
        assert error(served.inspect(png()), 503) == "gallery_damaged"


def test_a_gallery_that_is_removed(serve: Callable[..., Any], workspace: Path) -> None:
    path = workspace / "tiles.gallery"
    with serve() as served:
        shutil.move(path, workspace / "away")
        until(lambda: served.service.registry.named(NAME).problem)
        assert error(served.inspect(png()), 503) == "gallery_gone"
        shutil.move(workspace / "away", path)
        until(lambda: not served.service.registry.named(NAME).problem)
        assert served.inspect(png()).status_code == 200


def test_a_mistake_of_ours(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.service, "inspect", None)
    assert error(shared.inspect(png()), 500) == "internal"


def test_settings_that_are_none() -> None:
    assert list(named_galleries(("a/b.gallery", "x=c.gallery"))) == ["b", "x"]
    with pytest.raises(OptionError, match="twice"):
        named_galleries(("a/b.gallery", "c/b.gallery"))
    for name in ("..", "a/b", ""):
        with pytest.raises(OptionError, match="names"):
            ServiceSettings({name: Path("x")})
    with pytest.raises(OptionError, match="deadline"):
        ServiceSettings({"a": Path("x")}, deadline=float("nan"))
    for argument in ("", "x="):
        with pytest.raises(OptionError, match="expected a path, found an empty text"):
            named_galleries((argument,))
    for name, value in (("normal", (Path("nosuch"),)), ("label_files", Path(__file__))):
        with pytest.raises(OptionError, match=f"{name}: expected a folder, found"):
            ServiceSettings({"a": Path("x")}, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pillows", "given", "limit"), [(1000, 4000, 4000), (1000, 1999, 1999), (5000, 2000, 5000), (None, 2000, None)]
)
def test_a_limit_of_pixels_above_that_of_pillow(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, pillows: int | None, given: int, limit: int | None
) -> None:
    """An image within the service's limit is decoded, one beyond is not."""
    logger = logging.getLogger("spade_faiss.service")
    for name, value in (("handlers", []), ("propagate", True), ("level", logger.level)):
        monkeypatch.setattr(logger, name, value)  # and set back
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    statuses = []

    def run_here(server: Server, _: object) -> None:
        with TestClient(server.config.app, base_url=BASE) as client:
            for size in ((30, 40), (40, 49), (40, 101)):
                headers = {"Content-Type": "image/png"}
                statuses.append(client.post(INSPECT, content=png(size=size), headers=headers).status_code)

    monkeypatch.setattr(Server, "run", run_here)
    run(settings_of(workspace, pixels=given, port=0))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert statuses == [200, 200 if given >= 1960 else 413, 413]
