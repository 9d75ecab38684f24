"""What a GPU was measured to cost: `auto` puts the image index and the patch search on one by these figures alone.

`spade-faiss bench gpu` prints the value that MEASURED takes for the card that it ran on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuCosts:
    """Nanoseconds on a card, but for the last.

    Attributes:
        card: its name.
        query: of a search, however small.
        multiply: per channel of a pair of patches.
        pair: per pair of patches.
        value: per value of the neighbours' levels: upsampling and rounding.
        upload: per value of the neighbours' levels that is not there yet.
        index_from: number of normal images from which an image index there is faster than on the CPU.
    """

    card: str
    query: float
    multiply: float
    pair: float
    value: float
    upload: float
    index_from: int


# benchmarks/results/gpu.json; other cards are taken to be like this one.
MEASURED = GpuCosts(
    card="NVIDIA H200", query=1020000.0, multiply=3.02e-06, pair=0.00175, value=0.0, upload=0.0798, index_from=10000
)  # fmt: skip
