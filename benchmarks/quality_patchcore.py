"""PatchCore on the features of any extractor: plain, in torch, and anomalib's own where it is installed.

The patches are those of "Towards Total Recall in Industrial Anomaly Detection" (Roth et al., CVPR 2022): two levels,
each averaged over 3 x 3 positions, the coarser upsampled to the finer, concatenated; a coreset of 1 % of them is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.detect.scoring import SIGMA_SIDE, anomaly_map

RATIO = 0.01  # of the patches are kept
PROJECTED = 128  # channels in which the coreset is chosen
SIGMA = 4  # px of the network's input
CHUNK = 1024  # patches whose distances are computed at the same time

Map = NDArray[np.float32]


def patchcore_features() -> sf.FeatureOptions:
    """Return the options of the features that PatchCore takes: two levels, as the network gives them."""
    return dataclasses.replace(sf.RECIPES["robust"].features, strides=(8, 16), dtype="float32")


class PatchCore(Protocol):
    """Learns normal images, and scores others."""

    def fit(self, batches: Iterable[Sequence[Pixels]]) -> None:
        """Keep a coreset of the patches of normal images' views, given in batches."""
        ...

    def score(self, views: Sequence[Pixels], sizes: Sequence[tuple[int, int]]) -> list[tuple[float, Map]]:
        """Return the image score of each view, and its map at the (height, width) of its image."""
        ...


class PlainPatchCore:
    """Squared L2 to the nearest patch of the coreset; the image score is the largest of the patches."""

    def __init__(self, extractor: sf.Extractor, device: str = "cpu", seed: int = 0, ratio: float = RATIO) -> None:
        """Take an extractor of two levels, finest first."""
        self._extractor, self._device, self._ratio = extractor, device, ratio
        self._random = torch.Generator().manual_seed(seed)
        self.bank = torch.empty(0)

    def embed(self, views: Sequence[Pixels]) -> Tensor:
        """Return the patches of views, (n, h, w, channels) float32."""
        levels = levels_of(self._extractor, views, self._device)
        pooled = [F.avg_pool2d(level, 3, 1, 1, count_include_pad=True) for level in levels]
        grid = pooled[0].shape[2:]
        parts = [pooled[0], *(F.interpolate(one, grid, mode="bilinear", align_corners=False) for one in pooled[1:])]
        return torch.cat(parts, 1).permute(0, 2, 3, 1)

    def fit(self, batches: Iterable[Sequence[Pixels]]) -> None:
        """See PatchCore.fit."""
        patches = torch.cat([self.embed(views).flatten(0, 2) for views in batches])
        self.bank = patches[coreset(patches, self._ratio, self._random)]

    def distances(self, views: Sequence[Pixels]) -> Tensor:
        """Return the squared distance of each patch to the nearest of the coreset, (n, h, w) float32."""
        patches = self.embed(views)
        found = [sq_distances(some, self.bank).amin(1) for some in patches.flatten(0, 2).split(CHUNK)]
        return torch.cat(found).view(patches.shape[:3])

    def score(self, views: Sequence[Pixels], sizes: Sequence[tuple[int, int]]) -> list[tuple[float, Map]]:
        """See PatchCore.score."""
        found, view = self.distances(views).cpu().numpy(), self._extractor.spec.view
        assert view is not None
        sigma = SIGMA * SIGMA_SIDE / view.resized[0]
        return [
            (float(one.max()), anomaly_map(one[..., None], size, view, sigma))
            for one, size in zip(found, sizes, strict=True)
        ]


class AnomalibPatchCore:
    """The model of anomalib, whose network is replaced by an extractor."""

    def __init__(
        self, extractor: sf.Extractor, device: str = "cpu", seed: int = 0, ratio: float = RATIO, neighbours: int = 9
    ) -> None:
        """Take an extractor of two levels, finest first.

        Raises:
            ModuleNotFoundError: anomalib is not installed.
        """
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        self._seed, self._ratio, self._device = seed, ratio, device
        # Its own network is made, not loaded, and thrown away.
        self.model = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False, num_neighbors=neighbours)
        self.model.feature_extractor = _Levels(extractor, device)
        self.model.layers = list(extractor.spec.level_names)
        self.model.to(device)

    def fit(self, batches: Iterable[Sequence[Pixels]]) -> None:
        """See PatchCore.fit."""
        self.model.train()
        for views in batches:
            self.model(as_batch(views).to(self._device))
        torch.manual_seed(self._seed)  # anomalib draws from the global generator
        np.random.seed(self._seed)  # noqa: NPY002
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            self.model.subsample_embedding(self._ratio)
        self.model.eval()

    def score(self, views: Sequence[Pixels], sizes: Sequence[tuple[int, int]]) -> list[tuple[float, Map]]:
        """See PatchCore.score."""
        found = self.model(as_batch(views).to(self._device))
        maps = [
            F.interpolate(one[None].float(), size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
            for one, size in zip(found.anomaly_map, sizes, strict=True)
        ]
        return list(zip(map(float, found.pred_score), maps, strict=True))


class _Levels(torch.nn.Module):
    """An extractor in the place of anomalib's network: pixels to levels by name."""

    def __init__(self, extractor: sf.Extractor, device: str) -> None:
        super().__init__()
        self._extractor, self._device = extractor, device

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        views = [np.ascontiguousarray(one) for one in batch.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)]
        names = self._extractor.spec.level_names
        return dict(zip(names, levels_of(self._extractor, views, self._device), strict=True))


def levels_of(extractor: sf.Extractor, views: Sequence[Pixels], device: str) -> list[Tensor]:
    """Return the levels of views, [(n, c, h, w), ...] float32."""
    return [torch.from_numpy(level.astype(np.float32)).to(device) for level in extractor.extract(views).levels]


def as_batch(views: Sequence[Pixels]) -> Tensor:
    """Return views as (n, 3, h, w) float32 of 0 to 255."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float()


def sq_distances(some: Tensor, others: Tensor) -> Tensor:
    """Return the squared distances of (n, c) and (m, c), (n, m), never below 0."""
    norms = some.square().sum(1, keepdim=True) + others.square().sum(1)
    return norms.addmm_(some, others.T, alpha=-2).clamp_min_(0)


def coreset(patches: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Choose patches by greedy k-centre: each is the one farthest from those before it, in a random projection.

    Args:
        patches: (n, c).
        ratio: share of the patches to choose; at least one is.
        generator: draws the projection and the first patch.

    Returns:
        their (m,) indices.
    """
    n, channels = patches.shape
    if channels > PROJECTED:
        matrix = torch.randn(channels, PROJECTED, generator=generator) / PROJECTED**0.5
        patches = patches @ matrix.to(patches.device)
    norms = patches.square().sum(1)
    chosen = torch.randint(n, (1,), generator=generator).to(patches.device)
    found, nearest = [chosen], torch.full_like(norms, torch.inf)
    for _ in range(max(1, int(ratio * n)) - 1):
        centre = patches[chosen[0]]
        nearest = torch.minimum(nearest, norms + norms[chosen] - 2 * (patches @ centre))
        nearest[chosen] = -torch.inf  # rounding must not choose it again
        chosen = nearest.argmax(0, keepdim=True)
        found.append(chosen)
    return torch.cat(found)


def has_anomalib() -> bool:
    """Return whether anomalib's model can be imported."""
    try:
        import anomalib.models.image.patchcore.torch_model  # noqa: F401
    except ImportError:
        return False
    return True


def batched_views(images: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of up to `size` items."""
    batch: list[Any] = []
    for one in images:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
