"""What a new gallery is made with, and whether one that is there agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from .._version import __version__
from ..errors import OptionError
from ..extractors.spec import ExtractorSpec
from ..index.factory import check_kind
from ..options import MIB, IndexOptions, Patches, is_count
from ..recipes import recipe_named
from ..store.manifest import Manifest

# A build that is killed loses at most a shard. Without levels, a byte of it stands for more work.
SHARD_BYTES: dict[Patches, int] = {"stored": 256 * MIB, "recompute": 16 * MIB}


def new_manifest(
    spec: ExtractorSpec, index: IndexOptions, shard_bytes: int | None, recipe: str | None, patches: Patches
) -> Manifest:
    """Check what a gallery is to be made with, and return the manifest of an empty one; raises as Gallery.create."""
    check_kind(index, spec.image_dim)
    if recipe is not None:
        recipe_named(recipe)
    if patches not in get_args(Patches) or (patches == "recompute" and spec.resized is None):
        choice = " or ".join(get_args(Patches)) if spec.resized else "stored, as features are not made from images"
        raise OptionError(f"patches: expected {choice}, found {patches!r}")
    if shard_bytes is not None and not is_count(shard_bytes):
        raise OptionError(f"shard_bytes: expected a whole number of bytes >= 1, found {shard_bytes!r}")
    size = shard_bytes or SHARD_BYTES[patches]
    return Manifest(spec, index, size, created_by=f"spade-faiss {__version__}", recipe=recipe, patches=patches)


def require_agreement(
    path: Path, manifest: Manifest, spec: ExtractorSpec, recipe: str | None, patches: Patches | None
) -> None:
    """Check that a gallery is as it would be made; recipe and patches that are None agree with any.

    Raises:
        SpecMismatchError: it has another spec.
        OptionError: it has another recipe, or has its patches the other way.
    """
    manifest.spec.require(spec, str(path))
    if recipe is not None and recipe_named(recipe).name != manifest.recipe:
        raise OptionError(f"{path}: expected its own recipe, {manifest.recipe or 'none'}, found {recipe}")
    if patches not in (None, manifest.patches):
        raise OptionError(f"{path}: expected patches as it has them, {manifest.patches}, found {patches}")
