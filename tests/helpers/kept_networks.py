"""Extractors of small networks with random weights, whose making can be spared; see kept_networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import spade_faiss as sf
from spade_faiss.extractors.networks import NetworkExtractor
from tests.helpers.runtimes import SIDE

OPTIONS: dict[str, Any] = {"image_size": SIDE, "device": "cpu", "runtime": "openvino"}
VIEWS = list(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))


def random_weights(path: Path, name: str = "test_resnet", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    torch.save(timm.create_model(name).state_dict(), path)
    return path


def load(weights: Path | None, name: str = "timm:test_resnet", **options: Any) -> NetworkExtractor:
    found = sf.load_extractor(name, weights, sf.FeatureOptions(**{**OPTIONS, **options}))
    assert isinstance(found, NetworkExtractor)
    return found


def assert_same(one: NetworkExtractor, other: NetworkExtractor) -> None:
    assert one.spec == other.spec
    assert one.spec.to_json() == other.spec.to_json()
    assert (one.runtime, one.device, one.batch_size) == (other.runtime, other.device, other.batch_size)
    found, expected = one.extract(VIEWS), other.extract(VIEWS)
    for a, b in zip([found.image, *found.levels], [expected.image, *expected.levels], strict=True):
        assert np.array_equal(a, b)
