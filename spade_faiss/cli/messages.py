"""What the library says, in the words of the command line, and how a command ends that skipped inputs.

The library names Python parameters, as replace=True; a person at a shell needs the option, as --replace.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import click

from ..ingest.pipeline import Skipped

EXIT_SKIPPED = 3
OPTIONS = {  # a parameter, as library messages spell it -> the option
    "timeout=SECONDS": "--wait SECONDS",
    "replace=True": "--replace",
    "weights=FILE": "--weights FILE",
    "normal=FOLDER": "--normal DIR",
    "workers=1": "--workers 1",
    "PIL.Image.MAX_IMAGE_PIXELS=N": "--max-pixels N",
    "patches='recompute'": "--patches recompute",
}


def with_options(message: object, command: click.Command | None = None) -> str:
    """Return a message in which parameters are spelled as the options of a command, as far as it has them.

    Args:
        message: a library error, or another text of the library.
        command: None: the one that is running.
    """
    text = str(message)
    if command is None:
        context = click.get_current_context(silent=True)
        command = context.command if context else None
    if command is None:
        return text
    known = {name for parameter in command.params for name in parameter.opts}
    for parameter, option in OPTIONS.items():
        if option.split()[0] in known:
            text = text.replace(parameter, option)
    return text


def name_notes(notes: Sequence[str]) -> None:
    """Print the notes of a run on stderr; the gallery's bits are spelled as `build` takes them."""
    for note in notes:
        text = re.sub(r"\bbits=(\d+)", r"--bits \1", with_options(note))
        click.echo(f"spade-faiss: note: {text}", err=True)


def name_skipped(skipped: Sequence[Skipped]) -> None:
    """Name the inputs that were skipped, on stderr."""
    for item in skipped:
        click.echo(f"spade-faiss: skipped: {with_options(item.reason)}", err=True)


def exit_status(skipped: Sequence[Skipped]) -> None:
    """End with the exit status of a command that skipped inputs, if any were."""
    if skipped:
        sys.exit(EXIT_SKIPPED)
