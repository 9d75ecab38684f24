"""What decoding found out about image files beside their pixels, and the notes that a run makes of it."""

from __future__ import annotations

from dataclasses import dataclass

LOW = (1023, 4095)  # largest values of 10 and 12 bits, which cameras store in 16


@dataclass(frozen=True)
class Facts:
    """What decoding found out about an image file."""

    more_frames: bool = False  # only the first one was read
    # Largest value, // 256, of an image with 16 bits a value that declares no fewer; None: other images
    high_byte: int | None = None


NO_FACTS = Facts()


class FactCounts:
    """The facts of a run's images, counted; `notes` says what a user has to know."""

    def __init__(self) -> None:
        self._more_frames = 0
        self._deep = 0  # images with 16 bits a value that declare no fewer
        self._high_byte = 0

    def add(self, facts: Facts) -> None:
        """Count an image."""
        self._more_frames += facts.more_frames
        if facts.high_byte is not None:
            self._deep += 1
            self._high_byte = max(self._high_byte, facts.high_byte)

    def merge(self, other: FactCounts) -> None:
        """Count the images that another one has counted."""
        self._more_frames += other._more_frames
        self._deep += other._deep
        self._high_byte = max(self._high_byte, other._high_byte)

    def notes(self, bits: int | None) -> list[str]:
        """Return a line for each thing that should not pass in silence.

        Args:
            bits: of the gallery; None: not chosen.
        """
        notes = []
        if self._more_frames:
            notes.append(f"{_images(self._more_frames)} with several frames or pages: only the first of each was read")
        largest = next((limit for limit in LOW if self._high_byte <= limit // 256), None)
        if bits is None and self._deep and largest:
            fewer = (largest + 1).bit_length() - 1
            notes.append(
                f"{_images(self._deep)} with 16 bits a value, and no value above {largest}: they are nearly black as "
                f"16 bits; if the camera gives {fewer} bits, build the gallery with bits={fewer} (bits=16 if not)"
            )
        return notes


def _images(number: int) -> str:
    return f"{number} image{'s' if number != 1 else ''}"
