"""Labelled sets on the command line: the same options name training images for `build`, test images for `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from ..errors import OptionError
from ..images.sources import ImageFile, list_sources
from .flags import PATH, flag

if TYPE_CHECKING:
    from ..datasets.category import Category
    from ..datasets.draws import Draws

FOLDERS = ("normal", "abnormal", "masks", "test_normal")
SETTINGS = ("seed", "every")


@dataclass(frozen=True)
class LabelledFlags:
    """A data set's layout and categories, or folders of any images."""

    layout: Annotated[str | None, flag("--layout", help="Layout of the data set, if its folders do not tell.")]
    category: Annotated[
        tuple[str, ...],
        flag("--category", multiple=True, help="Take this category only. May be given again.  [default: all]"),
    ]
    every: Annotated[
        int | None, flag("--every", type=int, help="shanghaitech: take every Nth frame of a video.  [default: 1]")
    ]
    normal: Annotated[
        Path | None, flag("--normal", type=PATH, help="Instead of a data set, take any folder of defect-free images.")
    ]
    abnormal: Annotated[
        Path | None,
        flag("--abnormal", type=PATH, help="Take the defective images of this folder. A subfolder is a defect type."),
    ]
    masks: Annotated[
        Path | None,
        flag(
            "--masks",
            type=PATH,
            help="Masks of --abnormal: NAME, NAME_mask, NAME_GT and the like, in such subfolders or beside the images.",
        ),
    ]
    test_normal: Annotated[
        Path | None,
        flag(
            "--test-normal",
            type=PATH,
            help="Test with the defect-free images of this folder.  [default: a fifth of --normal, drawn]",
        ),
    ]
    seed: Annotated[
        int | None,
        flag(
            "--seed",
            type=int,
            help="Seed of the draw from magnetic_tile, kolektor_sdd or --normal, and of those of `evaluate`.  "
            "[default: 0]",
        ),
    ]


@dataclass(frozen=True)
class DrawFlags:
    """What is drawn at random from the images of a set, instead of taking the gallery as it is."""

    shots: Annotated[
        int | None,
        flag(
            "--shots",
            type=int,
            metavar="N",
            help="Few shots: compare with N normal training images only, drawn with --seed.  [default: GALLERY]",
        ),
    ]
    contaminate: Annotated[
        float | None,
        flag(
            "--contaminate",
            type=float,
            metavar="SHARE",
            help="Put anomalous test images among the normal ones and leave them out of the test: as many as this "
            "share of the normal ones' number, such as 0.05, drawn with --seed.",
        ),
    ]
    repeat: Annotated[
        int,
        flag(
            "--repeat",
            type=int,
            default=1,
            show_default=True,
            metavar="R",
            help="Draw R times, with the seeds S, S + 1, ...; print mean and standard deviation.",
        ),
    ]
    false_alarms: Annotated[
        float | None,
        flag(
            "--false-alarms",
            type=float,
            metavar="RATE",
            help="Calibrate the gallery of each draw for this rate first: verdicts in the report, and doubts of all "
            "images where the recipe wary else knows those of 256.  [default: no calibration]",
        ),
    ]

    def draws(self, seed: int | None) -> Draws:
        """Check these options, and return the library's; it is false where nothing is drawn.

        Raises:
            OptionError: a value outside its range, or --repeat alone.
            click.UsageError: --false-alarms alone.
        """
        from ..datasets.draws import Draws

        if self.shots is None and self.contaminate is None:
            if self.false_alarms is not None:
                raise click.UsageError(
                    "--false-alarms: goes with --shots or --contaminate; to evaluate GALLERY with a calibration, "
                    "calibrate it first"
                )
            return Draws(repeat=self.repeat)  # the seed is that of the set's own draw
        return Draws(self.shots, self.contaminate, self.repeat, seed or 0)


def open_labelled(dataset: Path | None, flags: LabelledFlags, drawing: bool = False) -> list[Category]:
    """Open the categories that a command was given: of a data set, or of any folders.

    Args:
        dataset: the folder of the data set, if it is one.
        flags: the options.
        drawing: whether the command draws with the seed too, so that a set that draws nothing may have one.

    Raises:
        click.UsageError: neither, both, or options of the one with the other.
    """
    from ..datasets.folders import from_folders  # here: the layouts are for `build` and `evaluate` alone
    from ..datasets.layouts import open_dataset, takes_setting
    from ..evaluate import choose

    if dataset is not None:
        _refuse(flags, FOLDERS, "a data set has its own")
        settings = {name: value for name in SETTINGS if (value := getattr(flags, name)) is not None}
        if drawing and not takes_setting(dataset, flags.layout, "seed"):
            settings.pop("seed", None)
        return choose(open_dataset(dataset, flags.layout, **settings), flags.category)
    if flags.normal is None or flags.abnormal is None:
        raise click.UsageError("expected a data set, or both --normal and --abnormal")
    _refuse(flags, ("layout", "category", "every"), "goes with a data set, not with --normal")
    if flags.test_normal is not None and not drawing:
        _refuse(flags, ("seed",), "there is nothing to draw beside --test-normal")
    return [from_folders(flags.normal, flags.abnormal, flags.masks, flags.test_normal, seed=flags.seed or 0)]


def training_images(
    gallery: Path, sources: Sequence[Path], dataset: Path | None, flags: LabelledFlags
) -> Mapping[Path, list[ImageFile]]:
    """Return the images to build each gallery from: those in files and folders, or a labelled set's training images.

    Raises:
        click.UsageError: neither or both, or options that do not go together.
    """
    if dataset is None and not any(getattr(flags, name) for name in FOLDERS):
        if not sources:
            raise click.UsageError("expected SOURCE..., or --dataset, or both --normal and --abnormal")
        _refuse(flags, ("layout", "category", *SETTINGS), "goes with a labelled set, not with SOURCE...")
        return {gallery: list_sources(sources)}
    if sources:
        raise click.UsageError(f"{sources[0]}: expected SOURCE... or a labelled set, found both")
    categories = open_labelled(dataset, flags)
    paths = gallery_paths(gallery, categories)
    return {path: category.normal for path, category in zip(paths, categories, strict=True)}


def gallery_paths(gallery: Path, categories: Sequence[Category]) -> list[Path]:
    """Return the path of each category's gallery.

    Raises:
        OptionError: several categories, and no {category} in the path to tell their galleries apart.
    """
    if len(categories) > 1 and "{category}" not in str(gallery):
        names = ", ".join(category.name for category in categories)
        raise OptionError(
            f"{gallery}: expected {{category}} in the path, for one gallery each of {names}; or --category"
        )
    return [Path(str(gallery).replace("{category}", category.name)) for category in categories]


def _refuse(flags: LabelledFlags, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(flags, name) not in (None, ()):
            raise click.UsageError(f"--{name.replace('_', '-')}: {why}")
