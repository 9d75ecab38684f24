"""A cluster: galleries side by side, each on the disk of its machine, that are searched as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arrays import Array, Ids
from ..detect.calibration import Calibration
from ..errors import GalleryError, OptionError, SpadeError
from ..extractors.registry import Extractor
from ..gallery.reader import GalleryReader
from ..gallery.verify import Problem
from ..images.annotations import with_photos
from ..images.sources import ImageFile, list_sources, without_twin_names
from ..ingest.pipeline import IngestReport, begun_report
from ..ingest.runs import Machines
from ..pyramids.cache import PyramidCache
from ..pyramids.reader import StoredPyramids
from ..store.snapshot import Snapshot
from ..system.atomic_files import storage_errors
from .adding import add_images, as_it_is, shared_out, take
from .manifest import FILE, ClusterManifest, require_different, writing
from .members import Members
from .membership import MemberOptions, check, commit, named, now, opener, repeated_key
from .placing import compiled
from .snapshot import FederatedSnapshot


class Cluster(GalleryReader):
    """One generation of a cluster, open for reading; Federation queries it.

    It reads like a Gallery. Ids count the images of all members, in the order of the members.

    >>> cluster = sf.Cluster.create("plant.cluster", ["toy.gallery"])
    >>> cluster
    Cluster('plant.cluster', 12 images on 1 members, toy, generation 0)
    """

    def __init__(self, path: str | Path, device: str = "auto", options: MemberOptions | None = None) -> None:
        """Open a cluster; see open."""
        self.options = options or MemberOptions()
        super().__init__(Path(path), device)

    @classmethod
    def open(  # type: ignore[override]  # what is cached is up to the members
        cls, path: str | Path, device: str = "auto", options: MemberOptions | None = None
    ) -> Cluster:
        """Open a cluster, and its members at the generations that it knows.

        Args:
            path: its folder, with cluster.json.
            device: not used: members say where their image indexes are searched.
            options: how members are opened; None: in this process.

        Raises:
            GalleryNotFoundError: there is no cluster at that path.
            CorruptGalleryError: cluster.json is damaged or of another format version.
            MemberError: a member cannot be opened, or is at another generation; the message names it.

        >>> _ = sf.Cluster.create("plant.cluster", ["toy.gallery"])
        >>> len(sf.Cluster.open("plant.cluster"))
        12
        """
        return cls(path, device, options)

    @classmethod
    def create(
        cls,
        path: str | Path,
        members: Mapping[str, str | Path] | Sequence[str | Path],
        place_by: str | None = None,
        nodes: Mapping[str, str] | None = None,
        options: MemberOptions | None = None,
    ) -> Cluster:
        """Make a cluster of galleries, which stay where they are.

        Args:
            path: a folder without a cluster.
            members: galleries by name; of a sequence, the names of the folders without their suffix are the names.
            place_by: a regular expression whose match in a key names the member that add_images places it on; None:
                by the key's hash.
            nodes: for members that lie on another machine of a Ray cluster, its address there.
            options: how members are opened.

        Raises:
            GalleryError: there is a cluster already, the folder cannot be written, a member is an address.
            MemberError: a member is no gallery, or its features, recipe or patches are not those of the first.
            OptionError: a name or gallery that is given twice, a name that is none, place_by is no pattern.
            KeyConflictError: two members have the same key.

        >>> sf.Cluster.create("plant.cluster", {"hall": "toy.gallery"}).names()
        ['hall']
        """
        folder, galleries = Path(path), named(members)
        if place_by is not None:
            compiled(place_by)
        if unknown := set(nodes or {}) - {name for name, _ in galleries}:
            raise OptionError(f"nodes: expected names of members, found {', '.join(sorted(unknown))}")
        require_different([name for name, _ in galleries], "name")
        require_different([str(Path(member).absolute()) for _, member in galleries if not nodes], "gallery")
        options = options or MemberOptions()
        places = [(name, str(member), (nodes or {}).get(name)) for name, member in galleries]
        manifest = ClusterManifest(tuple(now(places, options)), place_by=place_by)
        check(folder, manifest, options)  # a cluster that is refused leaves no folder behind
        with storage_errors(f"cannot make {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        with writing(folder, 0):
            if (folder / FILE).exists():
                raise GalleryError(f"{folder}: expected no cluster there, found one; use another folder")
            manifest.write(folder)
        return cls(folder, options=options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._place, self._device, self.options), {"path": self.path}

    def __repr__(self) -> str:
        snapshot = self._snapshot
        return (
            f"Cluster({str(self.path)!r}, {len(snapshot)} images on {len(self.cluster.members)} members, "
            f"{self.spec.name}, generation {self.generation})"
        )

    def _last_commit(self) -> Snapshot:
        self.cluster = ClusterManifest.read(self._place)
        members = Members(self.cluster, opener(self.options), self.options.partial == "allow")
        return FederatedSnapshot(self._place, members)

    def snapshot(self) -> FederatedSnapshot:
        """Return the open generation, for several calls that must agree on ids.

        >>> cluster = sf.Cluster.create("plant.cluster", ["toy.gallery"])
        >>> len(cluster.snapshot())
        12
        """
        assert isinstance(self._snapshot, FederatedSnapshot)
        return self._snapshot

    def close(self) -> None:
        """Let go of the members. A cluster in a `with` statement closes at its end.

        >>> with sf.Cluster.create("plant.cluster", ["toy.gallery"]) as cluster:
        ...     len(cluster)
        12
        """
        self.snapshot().members.close()
        super().close()

    def names(self) -> list[str]:
        """Return the names of the members, in the order of ids.

        >>> sf.Cluster.create("plant.cluster", ["toy.gallery"]).names()
        ['toy']
        """
        return self.cluster.names()

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that holds for all members together, if there is one."""
        return self.cluster.calibration

    def read(
        self,
        ids: Sequence[int] | Ids,
        extractor: Extractor | None = None,
        normal: Sequence[str | Path | ImageFile] = (),
    ) -> list[Array]:
        """Read the pyramid levels of images from their members; see Gallery.read.

        Args:
            ids: the images.
            extractor: not used: members re-extract what they do not store.
            normal: likewise.

        >>> [level.shape for level in sf.Cluster.create("plant.cluster", ["toy.gallery"]).read([4, 7])]
        [(2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 2, 2)]
        """
        return PyramidCache(0).read(StoredPyramids(self._snapshot), ids)

    def info(self) -> dict[str, Any]:
        """Return what the cluster holds, as JSON values.

        >>> info = sf.Cluster.create("plant.cluster", ["toy.gallery"]).info()
        >>> info["images"], [member["name"] for member in info["members"]], info["calibrated"]
        (12, ['toy'], False)
        """
        snapshot, recipe = self.snapshot(), self.recipe
        members = [
            {
                "name": entry.name,
                "path": entry.path,
                "node": entry.node,
                "generation": entry.generation,
                "images": manifest.rows - manifest.removed,
                "bytes": sum(file.bytes for file in (*manifest.shards, manifest.index, manifest.keys) if file),
            }
            for entry, manifest in zip(self.cluster.members, snapshot.members.manifests, strict=True)
        ]
        return {
            "path": str(self.path),
            "generation": self.generation,
            "images": len(snapshot),
            "members": members,
            "missing": list(snapshot.members.missing),
            "place_by": self.cluster.place_by,
            "patches": self.patches,
            "extractor": self.spec.to_json(),
            "recipe": recipe.to_json() if recipe else None,
            "calibrated": self.calibration is not None,
            "created_by": self.cluster.created_by,
        }

    def verify(self, files: bool = True, normal: Sequence[str | Path | ImageFile] = ()) -> list[Problem]:
        """Read everything that members hold and compare it with what was written; an empty list is a clean cluster.

        Args:
            files: where members recompute patches, read every image file as well.
            normal: not used: members have the files.

        >>> sf.Cluster.create("plant.cluster", ["toy.gallery"]).verify()
        []
        """
        members = self.snapshot().members
        found = members.gather(dict.fromkeys(range(len(members)), ("problems", files)))
        problems = [
            replace(problem, file=f"{members.members[number].name}: {problem.file}")
            for number, some in found.items()
            for problem in some
        ]
        if not problems and (twice := repeated_key(members)):
            problems.append(Problem(FILE, f"expected each key on one member, found {twice}"))
        return problems

    # What changes it.

    @classmethod
    def update(cls, path: str | Path, options: MemberOptions | None = None, timeout: float = 0) -> Cluster:
        """Take the members as they are now, after one was changed by itself: a new generation of the cluster.

        Args:
            path: the cluster's folder.
            options: how members are opened.
            timeout: seconds to wait for another process that is changing the cluster.

        Returns:
            the cluster, open.

        Raises:
            MemberError, KeyConflictError: as create.

        >>> _ = sf.Cluster.create("plant.cluster", ["toy.gallery"])
        >>> gallery.remove(["000.png"])
        >>> cluster = sf.Cluster.update("plant.cluster")
        >>> len(cluster), cluster.generation
        (11, 1)
        """
        folder, options = Path(path), options or MemberOptions()
        with writing(folder, timeout):
            manifest = ClusterManifest.read(folder)
            places = [(entry.name, entry.path, entry.node) for entry in manifest.members]
            commit(folder, manifest, now(places, options), options)
        return cls(folder, options=options)

    @classmethod
    def move(
        cls, path: str | Path, name: str, to: str | Path, node: str | None = None, options: MemberOptions | None = None
    ) -> Cluster:
        """Say that a member's gallery lies elsewhere now. It must be the same gallery, at the same generation.

        Args:
            path: the cluster's folder.
            name: of the member.
            to: where its gallery is, copied or moved there before.
            node: address of its machine in the Ray cluster; None: any machine that sees the path.
            options: how members are opened.

        Returns:
            the cluster, open.

        Raises:
            OptionError: no member has that name.
            MemberError: what lies there is not the member's gallery, or not the whole of it.

        >>> import shutil
        >>> _ = sf.Cluster.create("plant.cluster", ["toy.gallery"])
        >>> _ = shutil.copytree("toy.gallery", "copy.gallery")
        >>> cluster = sf.Cluster.move("plant.cluster", "toy", "copy.gallery")
        >>> [member["path"].endswith("copy.gallery") for member in cluster.info()["members"]]
        [True]
        """
        folder, options = Path(path), options or MemberOptions()
        with writing(folder, 0):
            manifest = ClusterManifest.read(folder)
            entry = replace(manifest.member(name), path=str(Path(to).absolute()), node=node)
            opened = opener(options)(entry)
            try:
                opened.call("require_files")()
            finally:
                opened.close()
            members = tuple(entry if member.name == name else member for member in manifest.members)
            replace(manifest, members=members).write(folder)  # the same images: what holds for them goes on to hold
        return cls(folder, options=options)

    def write_calibration(self, calibration: Calibration, timeout: float = 0) -> None:
        """Keep a calibration in cluster.json; every Federation over the cluster then gives verdicts.

        Args:
            calibration: that sf.calibrate returned for a Federation over this cluster, as it is open.
            timeout: seconds to wait for another process that is changing the cluster.

        Raises:
            GalleryError: the cluster has changed since, or another was made in its place.

        >>> cluster = sf.Cluster.create("plant.cluster", ["toy.gallery"])
        >>> cluster.write_calibration(sf.calibrate(sf.Federation(cluster, toy), false_alarms=0.2))
        >>> sf.Federation(cluster, toy).query("normal/000.png").verdict
        'normal'
        """
        with writing(self._place, timeout):
            manifest = ClusterManifest.read(self._place)
            if manifest.generation != calibration.generation:
                raise GalleryError(
                    f"{self.path}: expected generation {calibration.generation}, which was calibrated, found "
                    f"{manifest.generation}; calibrate again"
                )
            if manifest.images() != self.cluster.images():
                raise GalleryError(
                    f"{self.path}: expected the members that were opened, found others; open it and calibrate again"
                )
            self.cluster = replace(manifest, calibration=calibration)
            self.cluster.write(self._place)

    def add_images(
        self,
        sources: str | Path | Sequence[str | Path | ImageFile],
        extractor: Extractor,
        *,
        replace: bool = False,
        workers: int | Machines = 1,
        timeout: float = 0,
    ) -> IngestReport:
        """Add the images of files and folders, each to the member that its key is placed on; see Gallery.add_images.

        A key that a member has already stays there. Members are written one after the other by this process, so that
        it must see their folders. An interrupted call leaves members ahead of the cluster; the same call goes on.

        Args:
            sources: files and folders.
            extractor: of the members' spec.
            replace: take changed content under a key that is there.
            workers: processes that decode, extract and write, or machines; see Gallery.add_images.
            timeout: seconds to wait for another process that is changing the cluster.

        Raises:
            MemberError: a member cannot be opened.
            OptionError: place_by gives a key no member.
            GalleryError: a member cannot be written. What others were given by then is in the cluster.

        >>> cluster = sf.Cluster.create("plant.cluster", ["toy.gallery"])
        >>> report = cluster.add_images("test", toy, replace=True)
        >>> report.added, len(cluster)
        (1, 12)
        """
        paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
        files = with_photos(without_twin_names(list_sources(paths)))
        report = begun_report(files)
        with writing(self._place, timeout):
            manifest = ClusterManifest.read(self._place)
            entries, shares = list(manifest.members), shared_out(manifest, files)
            try:
                for number, share in enumerate(shares):
                    entries[number], own = add_images(entries[number], share, extractor, replace, workers)
                    take(report, own)
            except Exception:
                with suppress(SpadeError):  # else the members that have been written would be ahead of the cluster
                    entries[number] = as_it_is(entries[number])
                    commit(self._place, manifest, entries, self.options)
                raise
            commit(self._place, manifest, entries, self.options)
        self.refresh()
        return report
