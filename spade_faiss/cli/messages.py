"""What the library says, in the words of the command line, and how a command ends that skipped inputs.

The library names Python parameters, as replace=True; a person at a shell needs the option, as --replace.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ..ingest.pipeline import Skipped

EXIT_SKIPPED = 3
LOG = logging.getLogger("spade_faiss")
OPTIONS = {  # a parameter, as library messages spell it -> the option
    "timeout=SECONDS": "--wait SECONDS",
    "replace=True": "--replace",
    "check=True": "--check",
    "tokens=FILE": "--tokens FILE",
    "data=FOLDER": "--data DIR",
    "image_score='knn'": "--image-score knn",
    "localise='suspicious'": "--localise suspicious",
    "localise='all'": "--localise all",
    "cache=FOLDER": "--cache DIR",
    "cache_bytes=SIZE": "--cache-size SIZE",
    "weights=FILE": "--weights FILE",
    "normal=FOLDER": "--normal DIR",
    "masks=FOLDER": "--masks DIR",
    "layout=NAME": "--layout NAME",
    "skip_bad_images=True": "--skip-bad-images",
    "skip_bad_masks=True": "--skip-bad-masks",
    "ignore_label=": "--ignore-label ",
    "shots=N": "--shots N",
    "contaminate=SHARE": "--contaminate SHARE",
    "repeat=": "--repeat ",
    "workers=1": "--workers 1",
    "group=REGEX": "--group REGEX",
    "PIL.Image.MAX_IMAGE_PIXELS=N": "--max-pixels N",
    "tile=HxW": "--tile HxW",
    "patches='recompute'": "--patches recompute",
    "device='cuda'": "--device cuda",
    "device='cpu'": "--device cpu",
    "runtime='torch'": "--runtime torch",
    "runtime='auto'": "--runtime auto",
    "precision='float32'": "--precision float32",
    "distinct=True": "--distinct",
    "distinct=False": "--no-distinct",
    "leave_out=": "--leave-out ",
    "fusion='relative'": "--fusion relative",
    "fusion='harmonic'": "--fusion harmonic",
    "fusion='harmonic_squares'": "--fusion harmonic_squares",
    "fusion='mean'": "--fusion mean",
    "level_weights='equal'": "--level-weights equal",
    "matching='by_level'": "--matching by_level",
    "metric='cosine'": "--metric cosine",
    "metric='l2'": "--metric l2",
    "window='all'": "--window all",
    "engine='auto'": "--engine auto",
    "place_by:": "--place-by:",
    "port=N": "--port N",
    "label_files:": "--label-files:",
    "partial='allow'": "--partial allow",
}
COMMANDS = {
    "let the cluster take it up (Cluster.update)": "let the cluster take it up: cluster update",
    "make one with Cluster.create": "make one with cluster create",
    "make one with Gallery.create": "make one with build",
    "name that as test_normal": "name that as --test-normal",
    "take a larger sample": "take a larger --sample",
    "sample, seed: expected": "--sample, --seed: expected",
    "add the present file (replace=True)": "add the present file, with add --replace",
    "build it from category.normal alone": "build it from the training images alone, with build --dataset",
}
PUSHED = "the folder that was pushed"
# Of features that no option of the command line sets, but a recipe does.
TOKENS = re.compile(r"take (?:(?:(?:image_feature|tokens)=\"\w+\"|levels or strides)(?:, )?)+")
REPAIR = re.compile(r"mend (.+?) with Gallery\.repair")  # what is said of a damaged shard
UNSAFE = ("Cc", "Zl", "Zp")  # Unicode categories that end a line or move the cursor
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # these reverse the text


def with_options(message: object, command: click.Command | None = None) -> str:
    """Return a message in which parameters are spelled as the options of a command, as far as it has them.

    Args:
        message: a library error, or another text of the library.
        command: None: the one that is running.
    """
    text = one_line(message)
    if command is None:
        context = click.get_current_context(silent=True)
        command = context.command if context else None
    if command is None:
        return text
    text = REPAIR.sub(_repair_command, text)
    for call, run in COMMANDS.items():
        text = text.replace(call, run)
    if {"--recipe", "--extractor"} <= {name for parameter in command.params for name in parameter.opts}:
        text = TOKENS.sub("take --extractor timm:NAME of one, or another --recipe", text)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for parameter, option in OPTIONS.items():
        if option.split()[0].rstrip(":") in known:
            text = text.replace(parameter, option)
    return text


def _repair_command(found: re.Match[str]) -> str:
    if found[1] == PUSHED:
        return f"mend {PUSHED} (`spade-faiss verify GALLERY --repair`)"
    return f"mend it: `spade-faiss verify {shlex.quote(found[1])} --repair`"


def without_repair(text: str) -> str:
    """Return a message of the library without the advice to repair, for a command that checks or repairs."""
    return re.sub(rf"; {REPAIR.pattern}(, and push it again)?$", "", text)


def one_line(text: object) -> str:
    r"""Return a text with control characters, as a file's name may hold them, as escapes: a\nb."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(
        one.encode("unicode_escape").decode() if one in BIDIRECTIONAL or unicodedata.category(one) in UNSAFE else one
        for one in found
    )


def as_line(values: dict[str, Any]) -> str:
    """Return values as a line of JSON that stdout can encode: letters are escaped if it cannot."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(values)
    return text


def escape_what_cannot_be_printed() -> None:
    """Let stdout and stderr write a character that they cannot encode as an escape, as in a Windows code page."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError, OSError):  # detached or closed
                stream.reconfigure(errors="backslashreplace")


def note(text: object) -> None:
    """Print a note on stderr."""
    click.echo(f"spade-faiss: note: {with_options(text)}", err=True)


class _AsNotes(logging.Handler):
    """Prints what the package logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        note(record.getMessage())


def print_log() -> None:
    """Print what the package logs while it works as notes on stderr, from now on."""
    LOG.addHandler(_AsNotes())
    LOG.setLevel(logging.INFO)


def name_notes(notes: Iterable[str]) -> None:
    """Print the notes of a run on stderr; the gallery's bits are spelled as `build` takes them."""
    for text in notes:
        note(re.sub(r"\bbits=(\d+)", r"--bits \1", text))


def name_skipped(skipped: Iterable[Skipped]) -> None:
    """Name the inputs that were skipped, on stderr."""
    for item in skipped:
        click.echo(f"spade-faiss: skipped: {with_options(item.reason)}", err=True)


def exit_status(skipped: Sequence[Skipped]) -> None:
    """End with the exit status of a command that skipped inputs, if any were."""
    if skipped:
        sys.exit(EXIT_SKIPPED)
