"""A cache of pyramid levels on a GPU, kept between queries.

Levels go there through pinned memory, image by image: while one is on its way, the next is copied into place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..extractors.spec import ExtractorSpec
from ..options import SearchOptions
from ..system.devices import torch_device
from .cache import LevelCache, PyramidCache
from .reader import PyramidSource

if TYPE_CHECKING:
    import torch


class DeviceCache(LevelCache["torch.Tensor"]):
    """A LevelCache of tensors of the stored dtype on a torch device; it uploads from a cache in memory."""

    def __init__(self, limit: int, device: str, host: PyramidCache) -> None:
        super().__init__(limit)
        self._device = device
        self._host = host

    def _empty(self, spec: ExtractorSpec, *n: int) -> list[torch.Tensor]:
        import torch

        dtype = getattr(torch, spec.dtype)
        return [torch.empty((*n, *shape), dtype=dtype, device=self._device) for shape in spec.level_shapes]

    def _copy(self, targets: list[torch.Tensor], levels: list[torch.Tensor]) -> None:
        import torch

        torch._foreach_copy_(targets, levels)  # a launch or two, where each level would take one

    def _fetch(self, source: PyramidSource, ids: Sequence[int], out: Sequence[list[torch.Tensor]]) -> None:
        import torch

        levels = [torch.from_numpy(level) for level in self._host.read(source, ids)]
        pinned = torch.device(self._device).type == "cuda"
        for position, targets in enumerate(out):
            for target, level in zip(targets, levels, strict=True):
                one = level[position].pin_memory() if pinned else level[position]
                target.copy_(one, non_blocking=pinned)
        if pinned:  # another thread, with a stream of its own, may use them next
            torch.cuda.current_stream(torch.device(self._device)).synchronize()


def device_cache(options: SearchOptions, host: PyramidCache) -> DeviceCache | None:
    """Return a cache on the GPU that the search runs on; None: no GPU, or the engine "flat", which searches arrays."""
    device = torch_device(options.device) if options.engine != "flat" else "cpu"
    return None if device == "cpu" else DeviceCache(options.device_cache_bytes, device, host)
