"""How members are opened, what they are now, and whether they go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..errors import GalleryError, KeyConflictError, MemberError, OptionError
from ..extractors.registry import Extractor
from ..images.sources import ImageFile
from ..object_store.address import refuse_address
from ..options import SearchOptions
from .manifest import ClusterManifest, MemberEntry
from .member import LocalMember, Member, MemberGallery, known
from .members import Members

Partial = Literal["refuse", "allow"]
Opened = Callable[[MemberEntry], Member]


@dataclass(frozen=True)
class MemberOptions:
    """How the members of a cluster are opened.

    Attributes:
        ray: address of a Ray cluster whose machines have the members, or "local"; None: this process.
        partial: allow: queries go on without members that are lost, and every detection names them; refuse: they fail.
        cache_bytes: of pyramid levels that each member keeps in memory.
        normal: more places where a member may find image files, see Detector.
        extractor: re-extracts patches that are not stored; None: each member loads its own.

    >>> sf.MemberOptions(partial="allow").cache_bytes == sf.SearchOptions().cache_bytes
    True
    """

    ray: str | None = None
    partial: Partial = "refuse"
    cache_bytes: int = SearchOptions.cache_bytes
    normal: tuple[str | Path | ImageFile, ...] = ()
    extractor: Extractor | None = None

    def __post_init__(self) -> None:
        if self.partial not in get_args(Partial):
            raise OptionError(f"partial: expected refuse or allow, found {self.partial!r}")


def opener(options: MemberOptions) -> Opened:
    """Return what opens members: in this process, or on the machines of a Ray cluster."""
    arguments = options.extractor, options.normal, options.cache_bytes
    if options.ray is None:
        return lambda entry: LocalMember(entry, MemberGallery(entry, *arguments))
    from .ray_members import RayCluster  # here: Ray is an extra

    return RayCluster.at(options.ray).opener(arguments)


def named(members: Mapping[str, str | Path] | Sequence[str | Path]) -> list[tuple[str, str | Path]]:
    """Return galleries with their names: of a sequence, those of the folders without their suffix."""
    if isinstance(members, (str, Path)) or not members:
        raise OptionError(f"members: expected galleries, by name or in a list, found {members!r}")
    pairs: list[tuple[str, str | Path]] = (
        list(members.items())
        if isinstance(members, Mapping)
        else [(Path(member).absolute().name.removesuffix(".gallery"), member) for member in members]
    )
    for _, member in pairs:
        refuse_address(member)
    return pairs


def now(places: Sequence[tuple[str, str, str | None]], options: MemberOptions) -> list[MemberEntry]:
    """Return members as they are now, by name, path and node."""
    if options.ray is not None:
        from .ray_members import RayCluster  # here: Ray is an extra

        return RayCluster.at(options.ray).known(places)
    entries = []
    for name, path, node in places:
        entry, gallery = known(name, path, node)
        gallery.close()
        entries.append(entry)
    return entries


def check(folder: Path, manifest: ClusterManifest, options: MemberOptions) -> None:
    """Check that the members go together.

    Raises:
        MemberError, KeyConflictError: they do not.
    """
    members = Members(manifest, opener(options))
    try:
        first, *others = members.manifests
        for name, other in zip(manifest.names()[1:], others, strict=True):
            try:
                first.spec.require(other.spec, f"{folder}: member {name!r}")
            except GalleryError as error:
                raise MemberError(str(error)) from error
            for what in ("recipe", "patches"):
                expected, found = getattr(first, what), getattr(other, what)
                if expected != found:
                    raise MemberError(
                        f"{folder}: member {name!r}: expected {what} {expected!r}, as {manifest.names()[0]!r} has, "
                        f"found {found!r}"
                    )
        if twice := repeated_key(members):
            raise KeyConflictError(f"{folder}: expected each key on one member, found {twice}; remove it from one")
    finally:
        members.close()


def commit(folder: Path, manifest: ClusterManifest, members: Sequence[MemberEntry], options: MemberOptions) -> None:
    """Write the next generation with these members, if they go together; nothing where none has changed."""
    following = manifest.followed_by(members)
    if following is not manifest:
        check(folder, following, options)
        following.write(folder)


def repeated_key(members: Members) -> str | None:
    """Return a key that two members have, with their names; None: there is none."""
    found = members.gather(dict.fromkeys(members.present(), ("key_hashes",)))
    hashes = np.concatenate([one[0] for one in found.values()])
    ids = np.concatenate([one[1].astype(np.int64) + members.starts[number] for number, one in found.items()])
    order = np.argsort(hashes, kind="stable")
    for at in np.flatnonzero(np.diff(hashes[order]) == 0).tolist():
        pair = ids[order[at : at + 2]]
        texts = [texts[0] for one in pair for _, texts in members.ask_owners(np.array([one]), "texts", "keys")]
        names = [members.members[members.shares([one])[0].member].name for one in pair]
        if texts[0] == texts[1]:
            return f"{texts[0]!r} on {names[0]!r} and {names[1]!r}"
    return None
