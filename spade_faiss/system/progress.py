"""The progress bar of every command that goes through images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(
    items: Iterable[Any] | int, description: str, progress: bool, total: int | None = None, unit: str = "image"
) -> tqdm[Any]:
    """Return a progress bar over images, or other things, on standard error.

    Args:
        items: what to iterate over; or the number of images, where the caller calls `update` after each.
        description: text before the bar.
        progress: False: show nothing; True: show the bar where standard error is a terminal.
        total: number of items, where they are an iterator.
        unit: what the items are.
    """
    from tqdm import tqdm  # here: what shows no bar need not wait for it

    disable = None if progress else True  # None: tqdm looks whether it is a terminal
    if isinstance(items, int):
        return tqdm(total=items, unit=unit, disable=disable, desc=description)
    return tqdm(items, total=total, unit=unit, disable=disable, desc=description)
