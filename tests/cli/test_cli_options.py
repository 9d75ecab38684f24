"""Options as typed objects, and library messages in the words of the command line."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import click
import pytest
from click.testing import CliRunner

import spade_faiss as sf
from spade_faiss.cli import flags as typed
from spade_faiss.cli.flags import changed, flag, takes
from spade_faiss.cli.main import cli
from spade_faiss.cli.messages import OPTIONS, with_options
from spade_faiss.cli.search_flags import SearchFlags
from tests.helpers.command_line import Spade
from tests.helpers.images import make_images

PACKAGE = Path(sf.__file__).parent


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Annotated[int | None, flag("--size", type=int, help="Size.")]
    wait: Annotated[bool, flag("--wait", is_flag=True, help="Wait.")]


@dataclasses.dataclass(frozen=True)
class Outer:
    kind: Annotated[str, flag("--index", default="auto", help="Kind.")]
    size: Inner  # a group may have the name of an option in it
    names: Annotated[tuple[str, ...], flag("-n", multiple=True, help="Names.")]


@click.command()
@click.argument("path")
@takes(Outer)
def command(path: str, flags: Outer) -> None:
    """Show what it is given."""
    click.echo(f"{path} {flags}")


def test_a_command_gets_one_object_with_groups() -> None:
    run = CliRunner().invoke(command, ["a", "-n", "x", "--size", "3", "-n", "y"], catch_exceptions=False)
    expected = Outer(kind="auto", size=Inner(size=3, wait=False), names=("x", "y"))
    assert run.output == f"a {expected}\n"


def test_a_command_without_some_options_has_their_defaults() -> None:
    @click.command()
    @takes(Outer, without=("kind", "size", "wait", "names"))
    def fewer(flags: Outer) -> None:
        click.echo(str(flags))

    run = CliRunner().invoke(fewer, [], catch_exceptions=False)
    assert run.output == f"{Outer(kind='auto', size=Inner(size=None, wait=False), names=())}\n"
    assert "Error: No such option" in CliRunner().invoke(fewer, ["--wait"]).output


def test_help_lists_options_in_the_order_of_the_fields() -> None:
    names = [parameter.name for parameter in command.params if isinstance(parameter, click.Option)]
    assert names == ["kind", "size", "wait", "names"]


def test_what_is_not_given_stays() -> None:
    assert changed(sf.SearchOptions(k=5), k=None, kappa=2) == sf.SearchOptions(k=5, kappa=2)
    with pytest.raises(TypeError, match="k_apple"):
        changed(sf.SearchOptions(), k_apple=1)


def test_every_search_option_arrives() -> None:
    """An option that is declared, and not passed on, would be ignored without a word."""
    given: dict[str, Any] = {
        "k": 3, "kappa": 2, "k_score": 4, "nprobe": 5, "level_weights": "spread", "engine": "flat", "block_mib": 6,
        "cache_mib": 7, "device_cache_mib": 8, "no_verify": True, "image_score": "map", "positions": "damped",
        "sigma": 1.5, "tile_places": "same", "matching": "by_level", "metric": "cosine", "window": 2, "distinct": True,
        "leave_out": 0.2, "fusion": "relative", "truncate": 3.0,
    }  # fmt: skip
    assert set(given) == {field.name for field in dataclasses.fields(SearchFlags)}
    flags = SearchFlags(**given)
    assert flags.search_options("cpu") == sf.SearchOptions(
        k=3, kappa=2, k_score=4, nprobe=5, level_weights="spread", engine="flat", block_bytes=6 * 2**20, device="cpu",
        cache_bytes=7 * 2**20, device_cache_bytes=8 * 2**20, verify_reads=False,
        tile_places="same", matching="by_level", metric="cosine", window=2, distinct=True, leave_out=0.2,
    )  # fmt: skip
    assert flags.score_options() == sf.ScoreOptions(
        image_score="map", positions="damped", sigma=1.5, fusion="relative", truncate=3.0
    )
    nothing = SearchFlags(**dict.fromkeys(given))
    assert (nothing.search_options("auto"), nothing.score_options()) == (sf.SearchOptions(), sf.ScoreOptions())


def test_types_of_fields_are_those_of_their_options() -> None:
    """A field that click fills with None says so; so does one that it fills with a default."""
    for kind in _kinds():
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if hasattr(hint, "__metadata__"):
                value, option = get_args(hint)
                attributes = option.attributes
                default = "default" in attributes and attributes["default"] is not None
                filled = default or attributes.get("is_flag") or attributes.get("multiple")
                assert (type(None) in get_args(value)) == (not filled), f"{kind.__name__}.{name}"


def _kinds() -> list[type[Any]]:
    from spade_faiss.cli import (
        dataset_options,
        demo,
        detect_commands,
        evaluate_command,
        gallery_commands,
        info_commands,
        options,
    )

    modules = (
        dataset_options, demo, detect_commands, evaluate_command, gallery_commands, info_commands, options
    )  # fmt: skip
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Flags")
    }
    assert len(found) > 15
    return list(found)


def commands() -> dict[str, click.Command]:
    """All commands, those of groups too."""
    groups = {name: each for name, each in cli.commands.items() if isinstance(each, click.Group)}
    return cli.commands | {
        f"{group} {name}": one for group, each in groups.items() for name, one in each.commands.items()
    }


def test_help_is_in_sentences() -> None:
    for name, each in commands().items():
        for option in each.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts}"
                sentence = option.help.partition("  [default")[0].strip()
                assert re.fullmatch(r"[A-Z].*[.]|auto.*[.]|shanghaitech: .*[.]", sentence, re.DOTALL), sentence


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize(("parameter", "option"), OPTIONS.items())
def test_a_message_names_the_option_of_the_running_command(parameter: str, option: str) -> None:
    message = f"found something; try {parameter}, or not"
    with_it = [each for each in commands().values() if option.split()[0].rstrip(":") in options_of(each)]
    assert with_it
    assert len(with_it) < len(commands())
    for each in commands().values():
        expected = f"found something; try {option}, or not" if each in with_it else message
        assert with_options(message, each) == expected
    assert with_options(message) == message  # no command is running


def test_advice_that_takes_an_option_of_another_command() -> None:
    for message, expected in (
        ("name that as test_normal", "name that as --test-normal"),
        ("sample, seed: expected whole numbers", "--sample, --seed: expected whole numbers"),
        ("or add the present file (replace=True), or", "or add the present file, with add --replace, or"),
    ):
        assert with_options(message, commands()["query"]) == expected


def test_a_sample_that_is_too_small_is_to_be_larger(gallery: Path, spade: Spade) -> None:
    error = spade("calibrate", gallery, "--sample", 5, "--false-alarms", 0.1).error
    assert "found 5; take a larger --sample, or ask for a rate" in error
    assert "found 12; add normal images" in spade("calibrate", gallery, "--sample", 50, "--false-alarms", 0.01).error


def test_errors_and_notes_of_a_command_name_its_options(
    tmp_path: Path, gallery: Path, normal: Path, spade: Spade, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: sf.Gallery, *rest: object, **options: object) -> None:
        warnings.warn("no network; give weights=FILE or replace=True", stacklevel=2)
        raise sf.GalleryLockedError("busy; wait (timeout=SECONDS), or give weights=FILE")

    monkeypatch.setattr(sf.Gallery, "add_images", busy)
    monkeypatch.setattr(sf.Gallery, "remove", busy)
    monkeypatch.setattr(warnings, "filters", [])
    run = spade("add", gallery, normal)
    assert run.error == "spade-faiss: error: busy; wait (--wait SECONDS), or give --weights FILE"
    assert "spade-faiss: note: no network; give --weights FILE or --replace" in run.err
    assert spade("remove", gallery, "000.png").error.endswith("busy; wait (--wait SECONDS), or give weights=FILE")


def test_skipped_images_are_told_the_option(gallery: Path, normal: Path, spade: Spade) -> None:
    make_images(normal, 1, seed=77)
    run = spade("add", gallery, normal)
    advice = "key '000.png' is in the gallery with other content; --replace takes the new content"
    assert advice in run.err
    [line] = (gallery / "skipped.jsonl").read_text().splitlines()
    assert advice in json.loads(line)["reason"]


@pytest.mark.parametrize("room", ["gallery", "ingest"])
def test_the_library_names_no_option(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert not [text for text in texts if isinstance(text, str) and re.search(r"--[a-z]", text)], path.name


def test_sizes() -> None:
    assert typed.Size().convert("224x448", None, None) == (224, 448)
    assert typed.Size().convert("224", None, None) == (224, 224)
    assert typed.Bytes().convert("1.5kB", None, None) == 1500
    assert typed.Bytes().convert("512 MiB", None, None) == 2**29
    for text in ("0GB", "much", "-1"):
        with pytest.raises(click.BadParameter, match="expected a size, as 4GB"):
            typed.Bytes().convert(text, None, None)
