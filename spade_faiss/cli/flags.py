"""Options of a command as one typed object: a frozen dataclass whose fields carry their options.

A field is annotated with its option, or is a group of options, which is another such dataclass:

    @dataclass(frozen=True)
    class CopyFlags:
        times: Annotated[int, flag("--times", type=int, default=1, help="Number of copies.")]
        network: NetworkFlags

    @click.command()
    @takes(CopyFlags)
    def copy(flags: CopyFlags) -> None: ...

Help lists the options in the order of the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import click

from ..object_store.address import Address, is_address, refuse_address
from ..report.output_files import FORMAT

Command = TypeVar("Command", bound=Callable[..., Any])
Kind = TypeVar("Kind")
Options = TypeVar("Options")


class LocalPath(click.Path):
    """A path on this machine. Empty text, as of a shell variable that is not set, is none: it would be `.`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn the text into a path."""
        if not os.fspath(value):
            self.fail("expected a path, found an empty text", param, ctx)
        if is_address(value):
            self.fail(f"expected a path on this machine, found the address of an object store: {value}", param, ctx)
        return super().convert(value, param, ctx)


PATH = LocalPath(path_type=Path)  # type: ignore[type-var,unused-ignore]
FOLDER = LocalPath(file_okay=False, path_type=Path)  # type: ignore[type-var,unused-ignore] # may be missing yet


@dataclasses.dataclass(frozen=True)
class Flag:
    """The option of a field: its names and the attributes of click.option."""

    names: tuple[str, ...]
    attributes: dict[str, Any]


def flag(*names: str, **attributes: Any) -> Flag:
    """Describe the option of a field, as click.option does; its parameter has the field's name."""
    return Flag(names, attributes)


def takes(kind: type[Any], without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Declare the options of a dataclass on a command, which receives them as `flags`.

    Args:
        kind: the dataclass.
        without: fields whose options the command does not have; each is as if its option were not given.
    """
    options = dict(_options(kind))
    absent = {name: _not_given(options.pop(name)) for name in without}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(**given: Any) -> Any:
            given |= absent
            return command(flags=_filled(kind, given), **given)

        decorated: Any = called
        for name, option in reversed(options.items()):
            decorated = click.option(*option.names, name, **option.attributes)(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def _not_given(option: Flag) -> Any:
    """Return what click gives for an option that is not given."""
    nothing = () if option.attributes.get("multiple") else False if option.attributes.get("is_flag") else None
    return option.attributes.get("default", nothing)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Return the fields' annotations; a group's are evaluated once for all the commands that have it."""
    return get_type_hints(kind, include_extras=True)


def _options(kind: type[Any]) -> Iterator[tuple[str, Flag]]:
    """Yield the name and the option of each field, and of the groups' fields, in order."""
    hints = _hints(kind)  # type: ignore[arg-type,unused-ignore] # no type of a dataclass is hashable to mypy
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            yield field.name, get_args(hint)[1]
        else:
            yield from _options(hint)


def _filled(kind: type[Kind], given: dict[str, Any]) -> Kind:
    """Make the dataclass of what click has parsed, which is taken out of `given`."""
    hints = _hints(kind)  # type: ignore[arg-type,unused-ignore] # no type of a dataclass is hashable to mypy
    is_option = {name: get_origin(hint) is Annotated for name, hint in hints.items()}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given.pop(name) if is_option[name] else _filled(hints[name], given) for name in names})


def require_folders(normal: Iterable[object]) -> None:
    """Raise a usage error if one of the paths of --normal is no folder: nothing would be found there."""
    for path in normal:
        if isinstance(path, Path) and not path.is_dir():
            raise click.UsageError(
                f"--normal: expected a folder, found {'a file' if path.exists() else 'none'}: {path}"
            )


def changed(options: Options, **given: Any) -> Options:
    """Return an options dataclass with the values given on the command line; None is a value not given."""
    values = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(options, **values)  # type: ignore[type-var]


class GalleryPlace(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A gallery: a folder or, for a command that only reads, the address of one in an object store."""

    name = "PATH"

    def __init__(self, read_only: bool) -> None:
        self._read_only = read_only

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Turn the text into a path, or an Address."""
        if is_address(value):
            if not self._read_only:
                refuse_address(value)
            return Address(value)
        path: Path = PATH.convert(value, param, ctx)
        if _is_made(path, "cluster.json") and not _is_made(path, "gallery.json"):
            self.fail(f"{path}: expected a gallery, found a cluster{_instead(ctx, 'cluster')}", param, ctx)
        return path


class ClusterPlace(LocalPath):
    """A cluster: a folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Turn the text into a path."""
        path: Path = super().convert(value, param, ctx)
        if _is_made(path, "gallery.json") and not _is_made(path, "cluster.json"):
            self.fail(f"{path}: expected a cluster, found a gallery{_instead(ctx)}", param, ctx)
        return path


def _is_made(folder: Path, name: str) -> bool:
    """Return whether this package has made a file in a folder; other programs' files have such names, too."""
    with contextlib.suppress(OSError, ValueError):
        return FORMAT in (folder / name).read_bytes()
    return False


def _instead(ctx: click.Context | None, *groups: str) -> str:
    """Return advice to take the command of the running one's name in other groups, if there is one."""
    command = ctx.find_root().command if ctx else None
    words = (*groups, ctx.info_name or "") if ctx else ()
    for word in words:
        command = command.commands.get(word) if isinstance(command, click.Group) else None
    return f"; take `{' '.join(words)}`" if command else ""


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic from click 8.4 on
    """Pixels: 224, or 224x448 for height x width."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Turn the text into a (height, width)."""
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"expected pixels, as 224 or 224x448 (height x width), found {value!r}", param, ctx)
        return int(parts[0]), int(parts[-1])


class Seconds(click.FloatRange):
    """Seconds, at least 0, or more than that; no NaN."""

    name = "SECONDS"

    def __init__(self, positive: bool = False) -> None:
        super().__init__(0, min_open=positive)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Turn the text into a number."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):  # which no range leaves out
            self.fail(f"expected seconds, as 2.5, found {value!r}", param, ctx)
        return seconds


class Bytes(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes with a unit: 4GB, 512MiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn the text into bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", str(value).strip(), re.IGNORECASE)
        size = 0.0
        if found:
            size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
        if size < 1:
            self.fail(f"expected a size, as 4GB or 512MiB, found {value!r}", param, ctx)
        return int(size)


class Window(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A distance on the grid of a level: 2 cells, a share of its sides (0.1 or 1.0), or all."""

    name = "CELLS|SHARE|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float | str:
        """Turn the text into what SearchOptions.window takes, which checks its range."""
        text = str(value).strip().lower()
        if text == "all":
            return text
        try:
            return int(text) if text.isdecimal() else float(text)
        except ValueError:
            self.fail(f"expected cells, as 2, a share of the sides, as 0.1, or all, found {value!r}", param, ctx)
