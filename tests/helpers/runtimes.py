"""A network of one convolution, and which runtime is chosen for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spade_faiss.extractors.runtimes import TorchNetwork, choose

SIDE = 32


def small(forward: Any = None) -> TorchNetwork:
    """A network of one convolution, or another forward pass."""
    kernel = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32))

    def convolution(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        level = F.conv2d(batch, kernel, stride=4)
        return level.mean(dim=(2, 3)), [level]

    forward = forward or convolution
    return TorchNetwork("small", forward, forward, "float32", (SIDE, SIDE), {"name": "small"})


def chosen(network: TorchNetwork, wanted: str = "auto") -> str:
    with torch.inference_mode():
        return choose(wanted, network, "cpu")[0]  # type: ignore[arg-type]
