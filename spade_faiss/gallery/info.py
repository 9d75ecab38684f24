"""What a gallery holds, as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ..errors import CorruptGalleryError, GalleryError
from ..options import Patches
from ..recipes import RECIPES, Recipe
from ..store.copies import Copies
from ..store.manifest import Manifest
from ..store.secondary_indexes import IndexState
from ..store.snapshot import Snapshot


def info_of(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what one generation of a gallery holds; see GalleryReader.info."""
    return {
        "path": str(path),
        "generation": manifest.generation,
        "images": manifest.rows - manifest.removed,
        "removed": manifest.removed,
        "shards": len(manifest.shards),
        "bytes": sum(file.bytes for file in (*manifest.shards, manifest.index, manifest.keys) if file),
        "patches": manifest.patches,
        "bytes_per_image": manifest.schema.bytes_per_image,
        "bytes_per_image_if": {patches: manifest.spec.bytes_with(patches) for patches in get_args(Patches)},
        "index": asdict(manifest.index_options) | IndexState.of(manifest).to_json(),
        "extractor": manifest.spec.to_json(),
        "recipe": _recipe_to_json(manifest.recipe),
        "created_by": manifest.created_by,
    }


def copies_in(snapshot: Snapshot) -> int | None:
    """Count the images whose content another image of a snapshot has too; None: too many to be quick, or damaged."""
    repeated = Copies(snapshot).repeated_if_quick()
    return None if repeated is None else len(repeated)


def copies_from(snapshot: Snapshot, first: int) -> int | None:
    """Count the images from an id on whose content an image of a lower id has too; None: files are damaged."""
    try:
        return Copies(snapshot).count_among(first)
    except CorruptGalleryError:
        return None


def recipe_of(path: Path, manifest: Manifest) -> Recipe | None:
    """Return the recipe that a gallery was made with; None: no recipe.

    Raises:
        GalleryError: a later release made the gallery, with a recipe that this release does not know.
    """
    if manifest.recipe is not None and manifest.recipe not in RECIPES:
        raise GalleryError(
            f"{path}: made by a later release ({manifest.created_by}): expected recipe {' or '.join(RECIPES)}, "
            f"found {manifest.recipe!r}; query it with that release"
        )
    return None if manifest.recipe is None else RECIPES[manifest.recipe]


def _recipe_to_json(name: str | None) -> dict[str, Any] | None:
    if name is not None and name not in RECIPES:
        return {"name": name, "what": "unknown to this release", "features": {}, "search": {}, "score": {}}
    return None if name is None else RECIPES[name].to_json()
