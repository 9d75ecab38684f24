"""Galleries that clusters are made of."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images


def make_members(folder: Path, north: int, south: int) -> dict[str, Path]:
    """Make two galleries of the toy extractor, of so many images; keys begin with the member's name."""
    made = {}
    for seed, (name, n) in enumerate((("north", north), ("south", south)), start=1):
        images = make_images(folder / "images" / name, n, seed)
        for file in sorted(images.iterdir()):
            file.rename(file.with_name(f"{name}-{file.name}"))
        made[name] = folder / f"{name}.gallery"
        make_gallery(made[name], images)[0].close()
    return made
