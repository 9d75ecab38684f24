"""Write docs/cli.md, the page of the command line, from the program itself.

`python docs/generate_cli.py` writes it; with `--check` nothing is written, and the exit status is 1 when it is out of
date.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 120  # of a line

HEAD = """\
<!-- `python docs/generate_cli.py` writes this page from the program: change the help texts, not the page. -->

# Command line

`spade-faiss COMMAND --help` prints what this page says.

Results go to stdout. Progress and notes go to stderr. `--json` prints what a program would read.

| exit status | meaning |
| --- | --- |
| 0 | The command is done. |
| 1 | The command failed. One line on stderr says why. `verify` prints the problems that it has found on stdout. |
| 2 | Arguments are unknown, missing or wrong. Some that do not go together are found later: then it is 1. |
| 3 | The command is done, but it skipped some inputs. stderr names each; `skipped.jsonl` of what it wrote, too. |

A key is the path of an image relative to its source, with forward slashes.
"""


def escaped(text: str) -> str:
    """Return plain text as Markdown. What stands in backticks is code already."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    parts[::2] = [re.sub(r"([*<{\\])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def wrapped(text: str, indent: str = "") -> str:
    """Break text into lines; all but the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield a command and all below it, each with its context, groups before their members."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if (member := command.get_command(context, name)) is not None and not member.hidden:
                yield from commands(member, click.Context(member, info_name=name, parent=context))


def paragraphs(command: click.Command) -> Iterator[str]:
    """Yield the paragraphs of a command's help text."""
    text = (command.help or "").partition("\f")[0]
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.strip():
            yield wrapped(escaped(block.replace("\b", "")))


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield a list item for each option."""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None and "--help" not in parameter.opts:
            name, text = record
            yield wrapped(f"- `{name}`" + (f": {escaped(text)}" if text else ""), indent="  ")


def section(command: click.Command, context: click.Context) -> str:
    """Return the section of one command."""
    depth = context.command_path.count(" ")
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"{'#' * (depth + 1)} {context.info_name}"] if depth else []
    parts.append(f"```text\n{context.command_path} {usage}\n```")
    parts += paragraphs(command)
    if found := list(options(command, context)):
        parts.append("\n".join(found))
    return "\n\n".join(parts)


def page() -> str:
    """Return the whole page."""
    from spade_faiss.cli import cli

    root = click.Context(cli, info_name="spade-faiss")
    return HEAD + "\n" + "\n\n".join(section(*each) for each in commands(cli, root)) + "\n"


def main() -> int:
    """Write the page, or check it; returns the exit status."""
    new = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == new:
        return 0
    print(f"{PAGE}: out of date; run `python docs/generate_cli.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))  # this checkout, whatever is installed
    sys.exit(main())
