"""Trouble that passes: a gallery, a log or a file that is not there for a while. Nothing is lost, and threads go on."""

from __future__ import annotations

import base64
import errno
import http.server
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf
from spade_faiss.detect.pipeline import Pipeline
from spade_faiss.errors import (
    CorruptGalleryError,
    GalleryNotFoundError,
    ImageError,
    NotEnoughImagesError,
    OptionError,
    OutputError,
)
from spade_faiss.images.decode import read_file
from spade_faiss.service import generations
from spade_faiss.service.app import create_app
from spade_faiss.service.delivery import Mqtt, Webhook
from spade_faiss.service.log.database import Database
from tests.helpers.processes import Program
from tests.service.conftest import NAME, Served, png, settings_of, until
from tests.service.test_outside import Receiver

FULL = sqlite3.OperationalError("database or disk is full")
BROKEN = sqlite3.OperationalError("disk I/O error")
LOCKED = sqlite3.OperationalError("database is locked")


def fails(errors: list[BaseException], work: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises these errors first, one a call."""

    def failing(*given: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return work(*given, **named)

    return failing


@pytest.fixture
def arriving(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to watch, quickly."""
    for module, name in (("watch", "PAUSE"), ("delivery", "PAUSE"), ("delivery", "FIRST")):
        monkeypatch.setattr(f"spade_faiss.service.{module}.{name}", 0.02)
    (workspace / "in").mkdir()
    return workspace / "in"


def inspected(served: Served) -> list[str]:
    """Names of the parts that were inspected, the oldest first."""
    lines = served.get("/v1/inspections")["inspections"]
    return [one["name"] for one in lines[::-1] if one["error"] is None]


def remembered(served: Served) -> int:
    return int(served.service.database.rows("SELECT COUNT(*) FROM arrivals")[0][0])


@pytest.mark.parametrize(
    "error",
    [GalleryNotFoundError("gone"), CorruptGalleryError("damaged"), NotEnoughImagesError("empty"), MemoryError(),
     OSError(errno.EMFILE, "Too many open files")],
    ids=repr,
)  # fmt: skip
def test_a_watched_file_waits_for_its_gallery(
    serve: Callable[..., Any], arriving: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with serve(watch=(arriving,)) as served:
        errors: list[BaseException] = [error] * 3
        registry = served.service.registry
        monkeypatch.setattr(registry, "loaded", fails(errors, registry.loaded))
        (arriving / "1.png").write_bytes(png(1))
        until(lambda: remembered(served) == 1)
        assert errors == []
        assert inspected(served) == ["1.png"]


def test_a_gallery_that_comes_after_its_service(serve: Callable[..., Any], workspace: Path, arriving: Path) -> None:
    shutil.move(workspace / "tiles.gallery", workspace / "away")
    (arriving / "1.png").write_bytes(png(1))
    with serve(watch=(arriving,)) as served:
        until(lambda: served.service.watch._seen)
        threading.Event().wait(0.3)  # some looks
        assert remembered(served) == 0
        shutil.move(workspace / "away", workspace / "tiles.gallery")
        until(lambda: remembered(served) == 1)
        assert inspected(served) == ["1.png"]


@pytest.mark.parametrize(
    "error",
    [CorruptGalleryError("shard 3: damaged"), OSError(errno.EMFILE, "Too many open files"), MemoryError("no memory")],
    ids=repr,
)
def test_a_watched_file_whose_neighbours_cannot_be_read(
    serve: Callable[..., Any],
    arriving: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """It holds up no other one, is tried again after longer and longer pauses, and is inspected once they can be."""
    is_whole = threading.Event()
    query = Pipeline._read
    refused: list[Any] = []

    def read(self: Pipeline, one: Any) -> Any:
        if not is_whole.is_set() and tuple(one.image_size) == (32, 48):
            refused.append(one)
            raise error
        return query(self, one)

    monkeypatch.setattr(Pipeline, "_read", read)
    with serve(watch=(arriving,)) as served:
        (arriving / "1.png").write_bytes(png(1, (32, 48)))
        (arriving / "2.png").write_bytes(png(2, (40, 40)))
        until(lambda: remembered(served) == 1)
        assert inspected(served) == ["2.png"]
        until(lambda: len(refused) >= 5)
        [(_, pause)] = served.service.watch._held.values()
        assert pause >= 8 * 0.02  # the pauses were 1, 2, 4 and 8 of the first
        is_whole.set()
        until(lambda: remembered(served) == 2)
        assert inspected(served) == ["2.png", "1.png"]
        assert not served.service.watch._held
    assert sum(str(error) in record.getMessage() for record in caplog.records if "watched" in record.getMessage()) == 1


@pytest.mark.parametrize("error", [FULL, BROKEN, LOCKED], ids=str)
def test_a_watched_file_waits_for_the_log(
    serve: Callable[..., Any], arriving: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with serve(watch=(arriving,)) as served:
        inspections = served.service.inspections
        monkeypatch.setattr(inspections, "add", fails([error] * 3, inspections.add))
        (arriving / "1.png").write_bytes(png(1))
        until(lambda: remembered(served) == 1)
        assert inspected(served) == ["1.png"]


@pytest.mark.parametrize("error", [FULL, BROKEN], ids=str)
def test_a_file_that_cannot_be_remembered_is_inspected_once(
    serve: Callable[..., Any],
    arriving: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    with serve(watch=(arriving,)) as served:
        watch = served.service.watch
        monkeypatch.setattr(watch, "remember", fails([error] * 4, watch.remember))
        (arriving / "1.png").write_bytes(png(1))
        until(lambda: remembered(served) == 1)
        (arriving / "0.png").write_bytes(png(2))
        until(lambda: remembered(served) == 2)
        assert inspected(served) == ["1.png", "0.png"]
    assert sum("watched folders" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("name", [b"a\xff.png", b"\x80\xfe z.png"])
def test_a_name_that_is_no_utf_8(
    serve: Callable[..., Any], arriving: Path, caplog: pytest.LogCaptureFixture, name: bytes
) -> None:
    """It is told once and left, also after a restart; what comes after it is inspected."""
    (arriving / os.fsdecode(name)).write_bytes(png(1))
    for count in (1, 2):
        with serve(watch=(arriving,)) as served:
            (arriving / f"z{count}.png").write_bytes(png(count))
            until(lambda more=count: remembered(served) == more + 1)
            assert inspected(served) == ["z1.png", "z2.png"][:count]
    assert sum("expected a name in UTF-8" in record.getMessage() for record in caplog.records) == 1


def test_a_file_that_cannot_be_read_for_now(
    serve: Callable[..., Any], arriving: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others are inspected meanwhile, and it is when it can be read."""
    is_open = threading.Event()

    def read(path: Path) -> bytes:
        if path.name == "1.png" and not is_open.is_set():
            raise ImageError(f"{path}: cannot be read: Permission denied") from PermissionError(errno.EACCES, "denied")
        return read_file(path)

    monkeypatch.setattr("spade_faiss.service.watch.read_file", read)
    with serve(watch=(arriving,)) as served:
        for seed in (1, 2):
            (arriving / f"{seed}.png").write_bytes(png(seed))
        until(lambda: remembered(served) == 1)
        assert inspected(served) == ["2.png"]
        threading.Event().wait(0.3)  # some looks
        is_open.set()
        until(lambda: remembered(served) == 2)
        assert inspected(served) == ["2.png", "1.png"]
    assert sum("Permission denied" in record.getMessage() for record in caplog.records) == 1


WEBHOOKS = [
    "http://host:99999/", "https://host:0/", "http://host:a/", "http://[/", "http://a..b/", f"http://{'a' * 64}/",
    "http://host/\u00fc", "http://host/?q=\u00fc", "http://host/a b", "http://ho st/", "http:///a", "ftp://host/",
    "http://host/\udcff",
]  # fmt: skip
TOPICS = [
    "mqtt://host:99999/a", "mqtt://host:0/a", "mqtt://[/a", "mqtt://a..b/a", "mqtt://host/a/+/b", "mqtt://host",
    "mqtt://host/a#b", "mqtt://host/a/#", "mqtt://host/a?qos=2", "mqtt://user:p#w@host/a",
    "mqtt://host/\udcff",
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "url"), [*((Webhook, url) for url in WEBHOOKS), *((Mqtt, url) for url in TOPICS)], ids=ascii
)
def test_addresses_that_are_none(target: type[Webhook | Mqtt], url: str) -> None:
    with pytest.raises(OptionError, match=rf"{target.__name__.lower()}: expected .*, found '"):
        target(url)


@pytest.mark.parametrize(
    "url", ["http://b\u00fccher.example:8080/a%20b?c=d", "https://[::1]:1/", "HTTP://host"], ids=ascii
)
def test_webhooks_that_are_some(url: str) -> None:
    Webhook(url)


@pytest.mark.parametrize(
    ("before", "name", "password"),
    [
        ("", None, None), ("line:secret@", "line", "secret"), ("line@", "line", None),
        ("a%40b:p%2Fq%3A%25@", "a@b", "p/q:%"),
        ("m%C3%BC:%C3%9F@", "m\u00fc", "\u00df"),
    ],
)  # fmt: skip
def test_the_name_and_password_in_an_address_are_sent(before: str, name: str | None, password: str | None) -> None:
    seen = []

    class Asked(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Asked) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        Webhook(f"http://{before}127.0.0.1:{server.server_port}/x").send("{}")
        thread.join()
    whole = base64.b64encode(f"{name}:{password or ''}".encode()).decode()
    assert seen == [None if name is None else f"Basic {whole}"]
    broker = Mqtt(f"mqtt://{before}127.0.0.1:1/topic")
    try:
        assert (broker._client.username or None) == name
        assert broker._client.password == password
    finally:
        broker.close()


class Unwell:
    """A log that cannot be written at first."""

    def __init__(self, database: Database, errors: list[BaseException]) -> None:
        self.rows, self._database, self._errors = database.rows, database, errors

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        with self._database.writing() as connection:
            if self._errors:
                raise self._errors.pop(0)
            yield connection


@pytest.mark.parametrize("error", [FULL, LOCKED], ids=str)
def test_results_are_sent_once_though_the_log_cannot_be_written(
    serve: Callable[..., Any], arriving: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    receiver = Receiver(failures=0)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    try:
        with serve(webhook=f"http://127.0.0.1:{receiver.server_port}/") as served:
            delivery = served.service.delivery
            delivery._database = Unwell(served.service.database, [error] * 4)
            ids = [served.inspect(png(seed)).json()["id"] for seed in (1, 2)]
            until(lambda: not delivery.waiting)
            assert [body["id"] for body in receiver.bodies] == ids
    finally:
        receiver.shutdown()
        receiver.server_close()
    assert sum("cannot be sent" in record.getMessage() for record in caplog.records) == 1


PASSING = [CorruptGalleryError("gallery.json: Too many open files"), MemoryError(), OSError(errno.EMFILE, "Too many")]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_commit_that_cannot_be_taken_up_at_once(
    serve: Callable[..., Any],
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """It is tried again until it can be; the trouble is told once, and shown meanwhile."""
    monkeypatch.setattr(generations, "AGAIN", 0.05)
    errors: list[BaseException] = [error] * 1000
    with serve() as served:
        monkeypatch.setattr(generations, "Generation", fails(errors, generations.Generation))
        with sf.Gallery.open(workspace / "tiles.gallery") as gallery:
            gallery.remove(["000.png"])
        until(lambda: len(errors) < 998)
        assert served.get(f"/v1/galleries/{NAME}")["problem"] == (str(error) or type(error).__name__)
        assert served.inspect(png()).json()["generation"] == 2  # the generation before it goes on
        errors.clear()
        until(lambda: served.generation == 3)
        assert served.get(f"/v1/galleries/{NAME}")["problem"] is None
    assert sum("cannot be taken up" in record.getMessage() for record in caplog.records) == 1


def test_a_commit_after_one_that_cannot_be_taken_up(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one is not tried at every look; the next one is, at once."""
    errors: list[BaseException] = [MemoryError(), MemoryError()]
    with serve() as served, sf.Gallery.open(workspace / "tiles.gallery") as gallery:
        monkeypatch.setattr(generations, "AGAIN", 3600)
        monkeypatch.setattr(generations, "Generation", fails(errors, generations.Generation))
        gallery.remove(["000.png"])
        until(lambda: len(errors) == 1)
        threading.Event().wait(0.3)  # some looks
        assert len(errors) == 1
        errors.clear()
        gallery.remove(["001.png"])
        until(lambda: served.generation == 4)
        assert served.service.registry.named(NAME).problem is None


def test_a_second_service_takes_a_folder_of_its_own(serve: Callable[..., Any], workspace: Path) -> None:
    with serve() as served:
        for _ in range(2):
            with pytest.raises(OutputError, match=r"service: expected a folder .*; choose another folder \(data="):
                create_app(settings_of(workspace))
        answer = served.inspect(png()).json()
        beside = sqlite3.connect(workspace / "service" / "log.sqlite")
        assert beside.execute("SELECT uid FROM inspections").fetchall() == [(answer["id"],)]
        beside.close()
        with serve(data=workspace / "other") as other:
            assert other.inspect(png()).status_code == 200
    with serve() as served:
        assert len(served.get("/v1/inspections")["inspections"]) == 1


def test_a_killed_service_keeps_no_folder(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from spade_faiss.service.log.database import Database; "
        "kept = Database(pathlib.Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with Program(code, tmp_path) as program:
        assert program.stdout.readline().strip() == "open"
        with pytest.raises(OutputError, match="no other service"):
            Database(tmp_path)
        program.kill()
        program.wait()
        Database(tmp_path).close()


def test_a_log_that_cannot_be_opened_is_not_held(tmp_path: Path) -> None:
    database = Database(tmp_path / "data")
    with database.writing() as connection:
        connection.execute("PRAGMA user_version = 9")
    database.close()
    kept = []
    for _ in range(2):
        with pytest.raises(OutputError, match="expected a log of version 1, found 9") as raised:
            Database(tmp_path / "data")
        kept.append(raised)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot open"):
        Database(tmp_path / "file")
