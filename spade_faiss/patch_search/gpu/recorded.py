"""Searches of the same sizes on a GPU, started with one launch: see system/recorded.py."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from ...arrays import Array
from ...system.recorded import Recorder
from ...system.transfers import downloaded, joined, parted
from .candidates import Chosen, Search
from .patches import Levels

RECORDED = 8  # sizes

Choices = list[tuple[Search, Chosen]]
Choose = Callable[
    [list[torch.Tensor], list[torch.Tensor]], Choices
]  # by levels of queries, and of their neighbours, on the device
_recorder: Recorder[tuple[Choices, torch.Tensor]] = Recorder(RECORDED)


@contextmanager
def chosen(
    choose: Choose, queries: Sequence[Array | torch.Tensor], galleries: Levels, device: torch.device, kind: Hashable
) -> Iterator[tuple[Choices, list[Array]]]:
    """Choose and measure candidates, by a recorded search where there is one. What is found is to be read inside.

    Args:
        choose: what searches.
        queries: levels of b queries [(b, 1, c, h, w), ...].
        galleries: of their neighbours [(b, k, c, h, w), ...], arrays, or tensors on the device.
        device: of torch.
        kind: what `choose` depends on.

    Returns:
        what was found, and of each search, one after the other, its answer on the host.
    """
    number, on = len(queries), torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def call(levels: list[torch.Tensor]) -> tuple[Choices, torch.Tensor]:
        found = choose(levels[:number], levels[number:])
        return found, joined([part for _, one in found for part in one.answer])

    kind = choose.__name__, number, kind
    with on, _recorder.result(call, [*queries, *galleries], device, kind) as (found, content):  # kernels run there
        [host] = downloaded(content)
        yield found, parted(host, [part for _, one in found for part in one.answer])
