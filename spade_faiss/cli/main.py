"""The command line: parse, call, print.

Results go to stdout, progress and notes to stderr. Exit status: 0 done, 1 it could not be done, 2 wrong usage,
3 done but some inputs were skipped, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from .._version import __version__
from ..errors import SpadeError
from ..system import interrupts
from .backbone_command import export_backbone
from .bench import bench
from .cluster_commands import cluster
from .demo import demo
from .detect_commands import audit, calibrate, query
from .evaluate_command import evaluate
from .export_command import export
from .gallery_commands import add, build, compact, reindex, remove, trust
from .info_commands import info, verify
from .messages import escape_what_cannot_be_printed, note, print_log, with_options
from .object_commands import pull, push
from .serve_command import serve


class _Program(click.Group):
    """Ends by Ctrl-C with the status that shells know; click would say `Aborted!`, with that of an error."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                click.echo(err=True)  # ends the line with the terminal's ^C
            sys.exit(interrupts.STATUS)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="spade-faiss")
def cli() -> None:
    """Find defects by comparing images with normal ones only, however many there are."""


for command in (
    build, add, remove, trust, compact, reindex, info, verify, calibrate, audit, query, export, evaluate, cluster,
    serve, demo, bench, export_backbone, push, pull,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command line; an error becomes one line on stderr."""
    interrupts.raise_as_usual()
    # A thread that writes or answers gets its turn 50 times sooner beside one that computes.
    sys.setswitchinterval(1e-4)
    warnings.filterwarnings("ignore", module="PIL")  # an image that Pillow cannot read gets a line of its own
    warnings.showwarning = lambda message, *_, **__: note(message)
    escape_what_cannot_be_printed()
    print_log()
    try:
        Path.cwd()
    except OSError:
        click.echo("spade-faiss: error: the working directory is gone; change to one that exists", err=True)
        sys.exit(1)
    try:
        cli.main(prog_name="spade-faiss", standalone_mode=True)
    except SpadeError as error:
        running: click.Command | None = cli
        for name in sys.argv[1:]:  # nothing goes before a command, as groups have no options
            if not isinstance(running, click.Group):
                break
            running = running.commands.get(name)
        click.echo(f"spade-faiss: error: {with_options(error, running)}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        _print_no_more()
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if _is_of_printing(error):
            where = "what is printed cannot be written to where stdout leads: "
            _print_no_more()
        with contextlib.suppress(OSError):  # stderr may lead there, too
            click.echo(f"spade-faiss: error: {where}{error.strerror or error}", err=True)
        sys.exit(1)


def _is_of_printing(error: OSError) -> bool:
    """Return whether an error comes from click's own print."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_globals.get("__name__") == "click.utils"


def _print_no_more() -> None:
    """Let what is still to be printed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
