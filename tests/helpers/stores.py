"""Object stores for tests: moto's server on the loopback address, and a gallery to push."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf

from .galleries import OWN, random_features_of

BUCKET = "bucket"
N, SHARD = 8, 4  # images of the gallery, and of each of its shards
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "name",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's server; yields its URL. Its environment must be set by the caller: CREDENTIALS, AWS_ENDPOINT_URL."""
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        yield "http://{}:{}".format(*running.get_host_and_port())
    finally:
        running.stop()


def s3(url: str) -> Any:
    """Return boto's client of a server."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="name", aws_secret_access_key="secret", region_name="us-east-1"
    )


def features_between(first: int, end: int) -> sf.Features:
    """Features of images of the gallery."""
    every = random_features_of(2 * N)
    return sf.Features(every.image[first:end], [level[first:end] for level in every.levels])


def append(gallery: sf.Gallery, first: int, end: int) -> None:
    gallery.append([f"{number:03}" for number in range(first, end)], features_between(first, end))


def gallery_of_shards(folder: Path, n: int = N) -> sf.Gallery:
    """A gallery with a shard for every SHARD images."""
    gallery = sf.Gallery.create(folder, OWN, index="flat")
    for first in range(0, n, SHARD):
        append(gallery, first, min(first + SHARD, n))
    return gallery


def same(one: sf.Gallery, other: sf.Gallery) -> bool:
    """Return whether two galleries hold the same images, with the same features, and answer alike."""
    keys = one.keys()
    if keys != other.keys():
        return False
    ids = one.snapshot().ids()
    found = [gallery.search(features_between(0, 3).image, 2) for gallery in (one, other)]
    pairs = [*zip(one.read(ids), other.read(ids), strict=True), *zip(*found, strict=True)]
    return all(np.array_equal(a, b) for a, b in pairs)
