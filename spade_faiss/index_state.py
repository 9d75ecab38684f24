"""What became of a gallery's image index as the gallery grew, and when it should be built anew."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .index_kinds import IVF_FROM
from .manifest import IndexEntry, Manifest

GROWTH = 2  # times the images that there were when it was built
IMBALANCE = 2  # times the imbalance of its lists when it was built


@dataclass(frozen=True)
class IndexState:
    """The file of the index, where there is one, and why it should be built anew, where it should."""

    entry: IndexEntry | None
    rows: int  # of the gallery, which the file may not all cover
    outgrown: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> IndexState:
        """Look at a generation's index."""
        entry, wanted = manifest.index, manifest.index_options
        if entry is None:
            return cls(None, manifest.rows)
        facts, why = entry.facts, []
        if entry.trained and manifest.rows >= GROWTH * max(entry.trained, IVF_FROM):
            why.append(f"{manifest.rows} images, built for {entry.trained}")
        if facts.imbalance > IMBALANCE * facts.imbalance_trained:
            why.append(
                f"lists of uneven length (imbalance {facts.imbalance:.1f}, {facts.imbalance_trained:.1f} at first)"
            )
        if facts.recall is not None and facts.recall < wanted.recall:
            why.append(f"recall {facts.recall:.3f}, less than the {wanted.recall:g} wanted")
        return cls(entry, manifest.rows, tuple(why))

    def __str__(self) -> str:
        if self.entry is None:
            return "not written yet"
        facts = self.entry.facts
        text = f"{facts.factory}, {self.entry.bytes / 1e6:.1f} MB"
        if facts.recall is not None:
            visited = f"{facts.nprobe} lists visited, " if facts.nprobe else ""
            found = f"recall@{facts.k} {facts.recall:.3f} of normal images and of points between"
            text += f"; {found} ({visited}{facts.candidates:g} candidates for each neighbour)"
        if self.rows > self.entry.images:
            text += f"; {self.rows - self.entry.images} newer images are filled in when it is opened"
        if self.outgrown:
            text += f"; outgrown, `reindex` builds it anew: {'; '.join(self.outgrown)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        if self.entry is None:
            return {"file": None}
        facts = {
            f"{'measured_' if name == 'recall' else ''}{name}": value
            for name, value in asdict(self.entry.facts).items()
        }
        rest = {"file": self.entry.file, "bytes": self.entry.bytes, "images": self.entry.images}
        return {**facts, **rest, "trained": self.entry.trained, "outgrown": list(self.outgrown)}
