from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import spade_faiss as sf
from tests.helpers.stores import BUCKET, CREDENTIALS, gallery_of_shards, s3, s3_server


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto's client of an empty store, which this process and those that it starts use."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    found = s3(server)
    found.create_bucket(Bucket=BUCKET)
    yield found
    found.close()
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST")).close()


@pytest.fixture
def memory() -> Iterator[str]:
    """The address of a gallery in the memory of this process."""
    yield "memory://bucket/tiles.gallery"
    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


@pytest.fixture
def gallery(tmp_path: Path) -> sf.Gallery:
    return gallery_of_shards(tmp_path / "tiles.gallery")
