"""Commands on clusters: galleries side by side that are searched as one."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from ..errors import OptionError
from ..images.sources import ImageFile
from ..ingest.pipeline import Skipped
from . import options as args
from .detect_commands import CalibrateFlags, QueryFlags, calibrate_opened, listed, query_opened
from .evaluate_command import EvaluateFlags, evaluate_with
from .flags import PATH, ClusterPlace, flag, takes
from .gallery_commands import print_added
from .info_commands import print_problems
from .messages import exit_status, name_notes, name_skipped, one_line, with_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..cluster.cluster import Cluster
    from ..cluster.membership import MemberOptions, Partial

folder = click.argument("path", type=ClusterPlace(path_type=Path), metavar="CLUSTER")


@dataclass(frozen=True)
class MachineFlags:
    """Where members work."""

    ray: Annotated[
        str | None,
        flag(
            "--ray",
            metavar="ADDRESS|local",
            help="Let members work on the machines of the Ray cluster at this address, each where its gallery lies; "
            "local: in processes on this machine.  [default: in this process]",
        ),
    ]

    def options(self, normal: Sequence[Path | ImageFile] = (), partial: Partial = "refuse") -> MemberOptions:
        """Return how members are opened."""
        from ..cluster.membership import MemberOptions

        return MemberOptions(self.ray, partial, normal=tuple(normal))

    def open(self, path: Path, normal: Sequence[Path] = (), partial: Partial = "refuse") -> Cluster:
        """Open a cluster."""
        from ..cluster.cluster import Cluster

        return Cluster.open(path, options=self.options(normal, partial))


PartialFlag = Annotated[
    str,
    flag(
        "--partial",
        type=click.Choice(["refuse", "allow"]),
        default="refuse",
        show_default=True,
        help="Fail where a member is lost, or answer without it and name it with every image.",
    ),
]


@click.group()
def cluster() -> None:
    """Search galleries that lie side by side, on one machine or many, as one.

    CLUSTER is a folder with cluster.json, which names its members. A member is a gallery, and stays where it is.
    """


@dataclass(frozen=True)
class CreateFlags:
    """Options of `cluster create`."""

    place_by: Annotated[
        str | None,
        flag(
            "--place-by",
            metavar="REGEX",
            help="Place an added image on the member that this expression's match in its key names, or the first group "
            "in the match.  [default: by the key's hash]",
        ),
    ]
    nodes: Annotated[
        tuple[str, ...],
        flag(
            "--node",
            multiple=True,
            metavar="NAME=ADDRESS",
            help="The member NAME lies on the machine with this address in the Ray cluster. May be given again.",
        ),
    ]
    machines: MachineFlags


@cluster.command()
@folder
@click.argument("members", nargs=-1, required=True, metavar="MEMBER...")
@takes(CreateFlags)
def create(path: Path, members: tuple[str, ...], flags: CreateFlags) -> None:
    """Make CLUSTER of galleries: MEMBER is a gallery's path, or NAME=PATH; a name is that of the folder else."""
    from ..cluster.cluster import Cluster
    from ..cluster.membership import named

    pairs = [pair for member in members for pair in _pairs(member)]
    nodes = dict(_split(one, "--node") for one in flags.nodes)
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"members: expected each name once, found {twice!r} twice; name them, as north=PATH")
    made = Cluster.create(path, dict(named(dict(pairs))), flags.place_by, nodes, flags.machines.options())
    with made:
        _print_members(made)


def _pairs(member: str) -> list[tuple[str, str]]:
    from ..cluster.membership import named

    name, equals, path = member.partition("=")
    if equals and "/" not in name:
        return [(name, str(PATH.convert(path, None, None)))]
    return [(name, str(path)) for name, path in named([PATH.convert(member, None, None)])]


def _split(text: str, what: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{what}: expected NAME=ADDRESS, found {text!r}")
    return name, value


@dataclass(frozen=True)
class ClusterAddFlags:
    """Options of `cluster add`."""

    network: args.NetworkFlags
    ingest: args.IngestFlags


@cluster.command()
@folder
@args.sources
@takes(ClusterAddFlags, without=("strict",))
def add(path: Path, sources: tuple[Path, ...], flags: ClusterAddFlags) -> None:
    """Add the normal images in SOURCE... to the members that their keys are placed on.

    A key that a member has already stays there. This machine must see the members' folders. Run again after an
    interruption, `cluster add` goes on.
    """
    from ..cluster.cluster import Cluster

    ingest = flags.ingest
    ingest.check()
    with Cluster.update(path, timeout=ingest.wait) as opened:  # an interrupted run leaves members ahead
        extractor = flags.network.extractor_of(opened)
        report = opened.add_images(
            sources, extractor, replace=ingest.replace, workers=ingest.machines(), timeout=ingest.wait
        )
        print_added(opened, report)
        skipped = [Skipped(item.path, with_options(item.reason)) for item in report.skipped]
    name_skipped(skipped)
    if not ingest.quiet:
        name_notes(report.notes)
    exit_status(skipped)


@dataclass(frozen=True)
class ClusterQueryFlags:
    """Options of `cluster query`."""

    machines: MachineFlags
    partial: PartialFlag
    query: QueryFlags


@cluster.command()
@folder
@args.sources
@takes(ClusterQueryFlags, without=("cache", "cache_size"))
def query(path: Path, sources: tuple[Path, ...], flags: ClusterQueryFlags) -> None:
    """Look for anomalies in the images in SOURCE..., against the images of all members."""
    files = listed(sources, flags.query)
    with flags.machines.open(path, flags.query.normal, flags.partial) as opened:  # type: ignore[arg-type]
        exit_status(query_opened(opened, files, flags.query))


@dataclass(frozen=True)
class ClusterCalibrateFlags:
    """Options of `cluster calibrate`."""

    machines: MachineFlags
    calibrate: CalibrateFlags


@cluster.command()
@folder
@takes(ClusterCalibrateFlags)
def calibrate(path: Path, flags: ClusterCalibrateFlags) -> None:
    """Find the thresholds of CLUSTER from the images of all members: each is compared with all others."""
    with flags.machines.open(path, flags.calibrate.normal) as opened:
        calibrate_opened(opened, flags.calibrate, opened.write_calibration)


@dataclass(frozen=True)
class ClusterEvaluateFlags:
    """Options of `cluster evaluate`."""

    machines: MachineFlags
    evaluate: EvaluateFlags


@cluster.command()
@folder
@click.argument("dataset", type=PATH, required=False)
@takes(ClusterEvaluateFlags, without=("shots", "contaminate", "repeat", "false_alarms"))
def evaluate(path: Path, dataset: Path | None, flags: ClusterEvaluateFlags) -> None:
    """Query the test images of DATASET against CLUSTER, and print image and pixel metrics; see `evaluate`."""
    evaluate_with(path, dataset, flags.evaluate, flags.machines.open)


@dataclass(frozen=True)
class ClusterInfoFlags:
    """Options of `cluster info`."""

    machines: MachineFlags
    as_json: args.AsJson


@cluster.command()
@folder
@takes(ClusterInfoFlags)
def info(path: Path, flags: ClusterInfoFlags) -> None:
    """Print what CLUSTER holds, and whether its members are as it knows them."""
    with flags.machines.open(path) as opened:
        if flags.as_json:
            click.echo(json.dumps(opened.info()))
        else:
            _print_members(opened)


def _print_members(opened: Cluster) -> None:
    found = opened.info()
    click.echo(f"{one_line(opened.path)}: {found['images']} images on {len(found['members'])} members")
    for member in found["members"]:
        where = one_line(member["path"]) + (f" on {one_line(member['node'])}" if member["node"] else "")
        click.echo(f"  {member['name']}: {member['images']} images, generation {member['generation']}, {where}")
    recipe = found["recipe"]["name"] if found["recipe"] else "none"
    calibrated = "calibrated" if found["calibrated"] else "not calibrated"
    click.echo(
        f"extractor {found['extractor']['name']}, recipe {recipe}, generation {found['generation']}, {calibrated}"
    )


@dataclass(frozen=True)
class ClusterVerifyFlags:
    """Options of `cluster verify`."""

    files: args.Files
    machines: MachineFlags
    as_json: args.AsJson


@cluster.command()
@folder
@takes(ClusterVerifyFlags)
def verify(path: Path, flags: ClusterVerifyFlags) -> None:
    """Read all of the members of CLUSTER and compare it with what was written."""
    with flags.machines.open(path) as opened:
        problems = opened.verify(flags.files)
        print_problems(len(opened), problems, flags.as_json)
    if problems:
        sys.exit(1)


@dataclass(frozen=True)
class ChangeFlags:
    """Options of a command that changes cluster.json."""

    machines: MachineFlags
    wait: args.Wait


@cluster.command()
@folder
@takes(ChangeFlags)
def update(path: Path, flags: ChangeFlags) -> None:
    """Take the members of CLUSTER as they are now, after one was changed by itself; calibrate again then."""
    from ..cluster.cluster import Cluster

    with Cluster.update(path, flags.machines.options(), flags.wait) as opened:
        _print_members(opened)


@dataclass(frozen=True)
class MoveFlags:
    """Options of `cluster move`."""

    node: Annotated[
        str | None, flag("--node", metavar="ADDRESS", help="Its machine's address in the Ray cluster.  [default: any]")
    ]
    machines: MachineFlags


@cluster.command()
@folder
@click.argument("name")
@click.argument("to", type=PATH)
@takes(MoveFlags)
def move(path: Path, name: str, to: Path, flags: MoveFlags) -> None:
    """Say that the gallery of the member NAME lies at TO now, copied or moved there before."""
    from ..cluster.cluster import Cluster

    with Cluster.move(path, name, to, flags.node, flags.machines.options()) as opened:
        _print_members(opened)
