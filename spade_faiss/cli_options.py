"""What several commands share: options and arguments, the objects that they make, and how a command ends."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from .features import Extractor, load_extractor
from .gallery import Gallery
from .ingest import Skipped
from .options import MIB, FeatureOptions, ScoreOptions, SearchOptions

EXIT_SKIPPED = 3

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic from click 8.4 on
    """Pixels: 224, or 224x448 for height x width."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Turn the text into a (height, width)."""
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"expected pixels, as 224 or 224x448 (height x width), found {value!r}", param, ctx)
        return int(parts[0]), int(parts[-1])


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make one decorator of several, in the order in which help lists them."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


gallery = click.argument("gallery", type=click.Path(path_type=Path))
sources = click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
quiet = click.option("--quiet", is_flag=True, help="No progress and no notes on stderr.")
as_json_lines = click.option("--json", "as_lines", is_flag=True, help="Print JSON, for a program to read.")
strict = click.option("--strict", is_flag=True, help="Stop at the first image that cannot be taken.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
network = together(
    click.option(
        "--weights", type=click.Path(path_type=Path), help="Weights file (.pth, .safetensors), never the network."
    ),
    click.option(
        "--batch-size", type=int, default=FeatureOptions.batch_size, show_default=True, help="Images in a pass."
    ),
    device,
)
replace = click.option(
    "--replace", is_flag=True, help="Take changed images under a key that is in the gallery already."
)

search = together(
    click.option("-k", type=int, help="Neighbours whose patches are searched.  [default: 50, or all images if fewer]"),
    click.option("--kappa", type=int, default=SearchOptions.kappa, show_default=True, help="Nearest patches averaged."),
    click.option("--k-score", type=int, help="Neighbours averaged into the image score.  [default: -k]"),
    click.option("--nprobe", type=int, help="IVF: lists visited.  [default: as the index was made]"),
    click.option("--engine", default=SearchOptions.engine, show_default=True, help="Of patches: auto, flat, pyramid."),
    click.option("--block-mib", type=int, default=256, show_default=True, help="Memory of the flat engine's gallery."),
    click.option("--image-score", type=click.Choice(["knn", "map_max"]), default="knn", show_default=True,
                 help="Distance to the nearest images, or the map's maximum."),
    click.option("--sigma", type=float, default=ScoreOptions.sigma, show_default=True, help="Smoothing, px at 224 px."),
)  # fmt: skip


def search_options(given: dict[str, Any]) -> SearchOptions:
    """Make SearchOptions of what was given on the command line."""
    names = ("k", "kappa", "k_score", "engine", "nprobe", "device", "localise")
    return SearchOptions(block_bytes=given["block_mib"] * MIB, **{name: given[name] for name in names if name in given})


def score_options(given: dict[str, Any]) -> ScoreOptions:
    """Make ScoreOptions of what was given on the command line."""
    return ScoreOptions(**{name: given[name] for name in ("image_score", "sigma", "min_region") if name in given})


def extractor_of(opened: Gallery, weights: Path | None, given: dict[str, Any]) -> Extractor:
    """Load the extractor that made a gallery."""
    return load_extractor(opened.spec.name, weights, opened.spec.options(given["batch_size"], given["device"]))


def name_skipped(skipped: Sequence[Skipped]) -> None:
    """Name the inputs that were skipped, on stderr."""
    for item in skipped:
        click.echo(f"spade-faiss: skipped: {item.reason}", err=True)


def exit_status(skipped: Sequence[Skipped]) -> None:
    """End with the exit status of a command that skipped inputs, if any were."""
    if skipped:
        sys.exit(EXIT_SKIPPED)
