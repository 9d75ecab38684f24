"""The command that hands regions on to label tools: export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import click

from ..labels.export import Format
from ..labels.export import export as write_labels
from ..labels.label_studio import LOCAL_FILES
from ..labels.shapes import Shapes
from .flags import PATH, flag, takes


@dataclass(frozen=True)
class ExportFlags:
    """Options of `export`."""

    format: Annotated[
        Format,
        flag(
            "--format",
            type=click.Choice(get_args(Format)),
            required=True,
            help="What to write. coco: JSON of instances; labelstudio: JSON of tasks with predictions; cvat: XML 1.1 "
            "for images; masks: a PNG for each image.",
        ),
    ]
    output: Annotated[
        Path,
        flag("-o", "--output", type=PATH, required=True, help="File to write; with masks, a folder: new or empty."),
    ]
    shapes: Annotated[
        Shapes,
        flag(
            "--shapes",
            type=click.Choice(get_args(Shapes)),
            default="masks",
            show_default=True,
            help="Write regions as masks, or as polygons with the same pixels, which a person can drag.",
        ),
    ]
    label: Annotated[str, flag("--label", default="anomaly", show_default=True, help="Name of the regions' class.")]
    prefix: Annotated[
        str,
        flag(
            "--prefix",
            default=LOCAL_FILES,
            show_default=True,
            metavar="URL",
            help="What goes before an image's key to make its URL, with labelstudio.",
        ),
    ]


@click.command()
@click.argument("results", type=PATH)
@takes(ExportFlags)
def export(results: Path, flags: ExportFlags) -> None:
    """Write the regions in RESULTS, the folder of `query --output`, as the file of a label tool."""
    images = write_labels(results, flags.output, flags.format, flags.shapes, flags.label, flags.prefix)
    click.echo(f"{images} {'image' if images == 1 else 'images'} -> {flags.output}")
