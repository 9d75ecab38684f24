"""Networks with random weights, views for them, and how their features are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss.arrays import Pixels
from spade_faiss.errors import WeightsError
from spade_faiss.extractors.features import Features
from spade_faiss.extractors.registry import Extractor, load_extractor
from spade_faiss.options import FeatureOptions

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PAPER_SHAPES = {
    "resnet18": (((64, 56, 56), (128, 28, 28), (256, 14, 14)), 512),
    "wide_resnet50_2": (((256, 56, 56), (512, 28, 28), (1024, 14, 14)), 2048),
}
State = dict[str, torch.Tensor]


def load(name: str = "efficientnet_lite0", weights: Path | None = None, **options: Any) -> Extractor:
    return load_extractor(name, weights, FeatureOptions(**{"dtype": "float32", "device": "cpu", **options}))


def views(n: int, size: tuple[int, int] = (224, 224)) -> list[Pixels]:
    """Blurred noise: something to see at every stride."""
    noise = np.random.default_rng(0).integers(0, 256, (n, size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    large = np.kron(noise, np.ones((1, 8, 8, 1), np.uint8))[:, : size[0], : size[1]]
    return list(np.ascontiguousarray(large))


def normalised(images: list[Pixels], mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(n, 3, h, w) float32, by the way of [0, 1]."""
    batch = (np.stack(images) / 255 - np.array(mean)) / np.array(std)
    return torch.from_numpy(batch.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def random_state(make: Callable[[], torch.nn.Module]) -> State:
    """Weights of an untrained network, with running statistics unlike those that it starts with."""
    return randomised(make)[1]


def randomised(make: Callable[[], torch.nn.Module]) -> tuple[Any, State]:
    """Such a network with its weights."""
    torch.manual_seed(0)
    model = make()
    state: State = model.state_dict()  # shares its memory
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return model, state


def assert_close(found: Features, expected: Features, tolerance: float = 1e-4) -> None:
    """Equal within a share of the largest value, array by array."""
    pairs = [(found.image, expected.image), *zip(found.levels, expected.levels, strict=True)]
    for one, other in pairs:
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def assert_same(found: Features, expected: Features) -> None:
    assert np.array_equal(found.image, expected.image)
    assert all(np.array_equal(one, other) for one, other in zip(found.levels, expected.levels, strict=True))


def refused(weights: Path, name: str = "resnet18") -> str:
    """What is said against a file with weights, in one line that starts with its path; returned without the path."""
    with pytest.raises(WeightsError) as caught:
        load(name, weights)
    message = str(caught.value)
    assert message.startswith(f"{weights}: ")
    assert "\n" not in message
    return message.removeprefix(f"{weights}: ")
