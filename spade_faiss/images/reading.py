"""Image files to views in bounded memory: how much is decoded at the same time is counted in bytes, not images."""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import Pixels
from ..options import MIB
from ..system.prefetch import ByteGate
from .decode import decode_with_facts, image_bytes
from .facts import Facts
from .tiling import Tiling

DECODE_BYTES = 256 * MIB  # of images that a process decodes at the same time; one larger image is decoded alone


@dataclass(frozen=True)
class Viewed:
    """What a network gets of an image, and what else is known of it."""

    views: list[Pixels]  # of its tiles
    size: tuple[int, int]  # (H, W) of the image
    facts: Facts
    pixels: Pixels | None = None  # (H, W, 3), where there was room to keep them


def decoding_gate(processes: int = 1) -> ByteGate:
    """Return what bounds the images that one of so many processes decodes at the same time."""
    return ByteGate(DECODE_BYTES // processes)


def view_of(
    content: bytes, name: str, tiling: Tiling, bits: int | None, gate: ByteGate, kept: ByteGate | None = None
) -> Viewed:
    """Decode a file and make the network's views, while the gate has room for it.

    Args:
        content: of the file.
        name: of the file, for errors.
        tiling: how the image is cut into tiles, and each is viewed.
        bits: see decode.
        gate: bounds what threads decode at the same time.
        kept: room for pixels that are kept; None: they are not. Who has used them makes room again.

    Raises:
        ImageError: as decode.
    """
    with gate.room(image_bytes(content)):
        decoded = decode_with_facts(content, name, bits)
        height, width = decoded.pixels.shape[:2]
        keep = kept is not None and kept.enter(decoded.pixels.nbytes)
        pixels = decoded.pixels if keep else None
        return Viewed(tiling.views(decoded.pixels), (height, width), decoded.facts, pixels)
