"""The command `bench`: the benchmarks by name."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path

import click

from ..errors import OptionError
from .flags import FOLDER

OUTPUT = "SPADE_FAISS_BENCH_OUTPUT"  # environment variable that tells the benchmarks the folder for results


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--output",
    type=FOLDER,
    help="Write results to this folder; goes before NAME.  "
    "[default: benchmarks/results in a checkout, otherwise ./bench-results]",
)
@click.argument("name", required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def bench(output: Path | None, name: str | None, args: tuple[str, ...]) -> None:
    """Run the benchmark NAME with its own ARGS, such as --help; without NAME, list them."""
    found = benchmarks()
    if name is None:
        for each, path in found.items():
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            click.echo(f"{each:16} {about.splitlines()[0] if about else ''}")
        return
    if name not in found:
        raise OptionError(f"bench: expected one of {', '.join(found)}, found {name!r}")
    if output is not None:
        os.environ[OUTPUT] = str(output)
    path, sys.argv = found[name], [str(found[name]), *args]
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        raise OptionError(
            f"bench {name}: expected the package {error.name}, found none; pip install 'spade-faiss[bench]'"
        ) from error


def benchmark_folder() -> Path:
    """Return the folder of the benchmarks: beside the package in a checkout, in it when installed from a wheel."""
    here = Path(__file__).parents[1]
    for folder in (here / "benchmarks", here.parent / "benchmarks"):
        if (folder / "common.py").is_file():
            return folder
    raise OptionError(f"{here / 'benchmarks'}: expected the benchmarks, found none; install spade-faiss again")


def benchmarks() -> dict[str, Path]:
    """Return the scripts that measure something, by name; the other files are shared by them."""
    scripts = {path.stem: path for path in sorted(benchmark_folder().glob("*.py"))}
    return {name: path for name, path in scripts.items() if "def main()" in path.read_text(encoding="utf-8")}
