"""What a gallery holds, as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ..errors import GalleryError
from ..options import Patches
from ..recipes import RECIPES, Recipe
from ..store.manifest import Manifest
from ..store.secondary_indexes import IndexState


def info_of(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what one generation of a gallery holds; see GalleryReader.info."""
    recipe = recipe_of(path, manifest)
    return {
        "path": str(path),
        "generation": manifest.generation,
        "images": manifest.rows - manifest.removed,
        "removed": manifest.removed,
        "shards": len(manifest.shards),
        "bytes": sum(file.bytes for file in (*manifest.shards, manifest.index, manifest.keys) if file),
        "patches": manifest.patches,
        "bytes_per_image": manifest.bytes_per_image,
        "bytes_per_image_if": {patches: manifest.spec.bytes_with(patches) for patches in get_args(Patches)},
        "index": asdict(manifest.index_options) | IndexState.of(manifest).to_json(),
        "extractor": manifest.spec.to_json(),
        "recipe": recipe.to_json() if recipe else None,
        "created_by": manifest.created_by,
    }


def recipe_of(path: Path, manifest: Manifest) -> Recipe | None:
    """Return the recipe that a gallery was made with, if any.

    Raises:
        GalleryError: this release does not know the recipe.
    """
    name = manifest.recipe
    if name is None or name in RECIPES:
        return RECIPES[name] if name else None
    raise GalleryError(
        f"{path}: expected a recipe of this release ({', '.join(RECIPES)}), found {name!r}; "
        "it was made by a later release: install that one"
    )
