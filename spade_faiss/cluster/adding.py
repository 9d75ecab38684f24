"""Adding images to a cluster: which member gets which, and one report of all."""

from __future__ import annotations

from collections.abc import Sequence

from ..extractors.registry import Extractor
from ..images.sources import ImageFile, Listing
from ..ingest.pipeline import IngestReport
from ..ingest.runs import Machines
from .manifest import ClusterManifest, MemberEntry
from .member import known
from .placing import placed


def shared_out(manifest: ClusterManifest, files: Listing) -> list[list[ImageFile]]:
    """Share files out among the members: where their keys are already, or else where they are placed."""
    names, keys = manifest.names(), [file.key for file in files]
    where: dict[str, str] = {}
    for entry in manifest.members:
        with known(entry.name, entry.path, entry.node)[1] as gallery:
            found = gallery.snapshot().find_all(keys)
            where |= {key: entry.name for key, row in zip(keys, found, strict=True) if row is not None}
    new = [key for key in keys if key not in where]
    where |= zip(new, placed(new, names, manifest.place_by), strict=True)
    shares: dict[str, list[ImageFile]] = {name: [] for name in names}
    for file in files:
        shares[where[file.key]].append(file)
    return list(shares.values())


def take(report: IngestReport, own: IngestReport) -> None:
    """Add what became of one member's images to the report of all."""
    report.added += own.added
    report.replaced += own.replaced
    report.unchanged += own.unchanged
    report.skipped += own.skipped
    report.notes += own.notes
    report.seconds += own.seconds
    report.copies = None if own.copies is None or report.copies is None else report.copies + own.copies


def add_images(
    entry: MemberEntry, files: Sequence[ImageFile], extractor: Extractor, replaced: bool, workers: int | Machines
) -> tuple[MemberEntry, IngestReport]:
    """Add images to a member's gallery as it is now; returns what the cluster has to know of it."""
    after, gallery = known(entry.name, entry.path, entry.node)
    with gallery:
        if not files:
            return after, IngestReport(copies=0)
        report = gallery.add_images(files, extractor, replace=replaced, workers=workers)
    return as_it_is(entry), report


def as_it_is(entry: MemberEntry) -> MemberEntry:
    """Return what a cluster has to know of a member's gallery as it is now."""
    after, gallery = known(entry.name, entry.path, entry.node)
    gallery.close()
    return after
