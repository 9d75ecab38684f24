"""A service over a toy gallery, in this process, as a client sees it."""

from __future__ import annotations

import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

import spade_faiss as sf
from spade_faiss.service.app import create_app
from spade_faiss.service.service import Service
from spade_faiss.service.settings import ServiceSettings
from tests.helpers.images import make_images

NAME = "tiles"
BASE = "http://127.0.0.1:8000"


def png(seed: int = 100, size: tuple[int, int] = (40, 48)) -> bytes:
    """A smooth random image, as those of make_images."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Served:
    """A running service, and a client of it."""

    client: TestClient
    service: Service
    normal: Path

    def inspect(self, content: bytes, kind: str = "image/png", **query: Any) -> Any:
        return self.client.post(
            f"/v1/galleries/{NAME}/inspect", content=content, headers={"Content-Type": kind}, params=query
        )

    def get(self, path: str, **query: Any) -> Any:
        answer = self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def generation(self) -> int:
        current = self.service.registry.named(NAME).current
        assert current is not None
        return current.number


def until(reached: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated gallery of 24 images, and their folder."""
    folder = tmp_path_factory.mktemp("prepared")
    make_images(folder / "normal", 24)
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    with sf.Gallery.create(folder / "tiles.gallery", toy.spec, index=sf.IndexOptions(device="cpu")) as gallery:
        gallery.add_images(folder / "normal", toy)
        sf.calibrate(sf.Detector(gallery, toy), 0.1).write(gallery.path)
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(prepared, tmp_path / "work")
    return tmp_path / "work"


def settings_of(workspace: Path, **changes: Any) -> ServiceSettings:
    settings = ServiceSettings(
        {NAME: workspace / "tiles.gallery"},
        data=workspace / "service",
        normal=(workspace / "normal",),
        poll_seconds=0.02,
        lock_seconds=0.2,
        recalibrate=False,
        batch_size=4,
    )
    return replace(settings, **changes)


@contextmanager
def served_by(settings: ServiceSettings, **headers: str) -> Iterator[Served]:
    app = create_app(settings)
    with TestClient(app, base_url=BASE, raise_server_exceptions=False, headers=headers) as client:
        service: Service = app.state.service
        until(lambda: service.is_ready or service.problem)
        yield Served(client, service, settings.normal[0])


@contextmanager
def listening(settings: ServiceSettings) -> Iterator[tuple[str, int, Service]]:
    """A service on a socket of its own: host, port and the service."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started and app.state.service.is_ready)
        host, port = server.servers[0].sockets[0].getsockname()
        yield host, port, app.state.service
    finally:
        app.state.service.events.end()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def socketed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, Service]]:
    """One for the tests of a module, over a gallery of their own."""
    workspace = tmp_path_factory.mktemp("socketed") / "work"
    shutil.copytree(prepared, workspace)
    with listening(settings_of(workspace, body_seconds=0.3)) as found:
        yield found


@pytest.fixture
def serve(workspace: Path) -> Callable[..., Any]:
    """Start a service over a workspace of its own, with other settings."""

    def start(**changes: Any) -> Any:
        return served_by(settings_of(workspace, **changes))

    return start


@pytest.fixture(scope="module")
def shared(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service for tests that leave the gallery as it is."""
    workspace = tmp_path_factory.mktemp("shared") / "work"
    shutil.copytree(prepared, workspace)
    with served_by(settings_of(workspace)) as served:
        yield served
