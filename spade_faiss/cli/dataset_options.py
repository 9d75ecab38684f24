"""Labelled sets on the command line: the same words name the training images for `build`, the others for `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..datasets.category import Category
from ..datasets.folders import from_folders
from ..datasets.layouts import open_dataset
from ..errors import OptionError
from ..images.sources import ImageFile, find_images
from .options import together

FOLDERS = ("normal", "abnormal", "masks", "test_normal")
SETTINGS = ("seed", "every")
PATH = click.Path(path_type=Path)  # type: ignore[type-var,unused-ignore]

labelled = together(
    click.option("--layout", help="Of the data set, where its folders do not tell."),
    click.option("--category", multiple=True, help="Only this one; may be given again.  [default: all]"),
    click.option("--every", type=int, help="shanghaitech: every Nth frame of a video.  [default: 1]"),
    click.option("--normal", type=PATH, help="Instead of a data set: any folder of images without defects ..."),
    click.option("--abnormal", type=PATH, help="... and one with; a subfolder is a type of defect."),
    click.option("--masks", type=PATH, help="Of --abnormal: NAME or NAME_mask, in subfolders as the images."),
    click.option("--test-normal", type=PATH, help="To test with.  [default: a fifth of --normal, drawn]"),
    click.option("--seed", type=int, help="Of the draw from magnetic_tile or --normal.  [default: 0]"),
)


def open_labelled(dataset: Path | None, given: dict[str, Any]) -> list[Category]:
    """Open the categories that a command was given: of a data set, or of any folders.

    Raises:
        click.UsageError: neither, both, or options of the one with the other.
    """
    from ..evaluate import choose

    folders = {name: given[name] for name in FOLDERS}
    settings = {name: given[name] for name in SETTINGS if given[name] is not None}
    if dataset is not None:
        _refuse(given, FOLDERS, "a data set has its own")
        return choose(open_dataset(dataset, given["layout"], **settings), given["category"])
    if folders["normal"] is None or folders["abnormal"] is None:
        raise click.UsageError("expected a data set, or both --normal and --abnormal")
    _refuse(given, ("layout", "category", "every"), "goes with a data set, not with --normal")
    if folders["test_normal"] is not None:
        _refuse(given, ("seed",), "there is nothing to draw beside --test-normal")
    return [from_folders(**folders, seed=settings.get("seed", 0))]


def gallery_paths(gallery: Path, categories: Sequence[Category]) -> list[Path]:
    """Return the path of each category's gallery.

    Raises:
        OptionError: there are several categories, and nothing to tell their galleries apart.
    """
    if len(categories) > 1 and "{category}" not in str(gallery):
        names = ", ".join(category.name for category in categories)
        raise OptionError(
            f"{gallery}: expected {{category}} in the path, for one gallery each of {names}; or --category"
        )
    return [Path(str(gallery).replace("{category}", category.name)) for category in categories]


def training_images(
    gallery: Path, sources: Sequence[Path], dataset: Path | None, given: dict[str, Any]
) -> dict[Path, list[ImageFile]]:
    """Return the images to build each gallery of: those in files and folders, or the training images of a labelled set.

    Raises:
        click.UsageError: neither or both, or options that do not go together.
    """
    if dataset is None and not any(given[name] for name in FOLDERS):
        if not sources:
            raise click.UsageError("expected SOURCE..., or --dataset, or both --normal and --abnormal")
        _refuse(given, ("layout", "category", *SETTINGS), "goes with a labelled set, not with SOURCE...")
        return {gallery: find_images(sources)}
    if sources:
        raise click.UsageError(f"{sources[0]}: expected SOURCE... or a labelled set, found both")
    categories = open_labelled(dataset, given)
    paths = gallery_paths(gallery, categories)
    return {path: category.normal for path, category in zip(paths, categories, strict=True)}


def _refuse(given: dict[str, Any], names: Sequence[str], why: str) -> None:
    for name in names:
        if given[name] not in (None, ()):
            raise click.UsageError(f"--{name.replace('_', '-')}: {why}")
