"""The galleries of all members as one snapshot: what a Detector asks of a snapshot, asked of those who hold it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..errors import MemberError
from ..store.file_pool import FilePool
from ..store.row_reader import RowReader
from ..store.snapshot import Snapshot
from .members import Members

KEPT = 100_000  # texts of images, as keys, that are kept here of each kind


class FederatedRows(RowReader):
    """Reads image features and names of any images of a cluster by their global ids."""

    def __init__(self, folder: Path, members: Members) -> None:
        manifest = members.manifest
        super().__init__(folder, manifest.shards, manifest.schema, FilePool())
        self._members = members
        self._kept: dict[str, dict[int, str]] = {}  # texts of ids that were asked for lately

    def read(self, ids: Ids) -> NDArray[np.float32]:
        """See RowReader."""
        return self._in_order(ids, np.empty((len(ids), self._d), np.float32), "features")

    def texts(self, ids: Ids, name: str) -> list[str]:
        """See RowReader."""
        kept = self._kept.get(name, {})
        unknown = [one for one in np.asarray(ids).tolist() if one not in kept]
        found: dict[int, str] = {}
        for share, texts in self._members.ask_owners(np.array(unknown, np.int64), "texts", name):
            found.update(zip((share.rows + self._members.starts[share.member]).tolist(), texts, strict=True))
        texts_in_order = [found[one] if one in found else kept[one] for one in np.asarray(ids).tolist()]
        if len(found) < KEPT:
            with self._lock:
                kept = self._kept.setdefault(name, {})
                if len(kept) + len(found) > KEPT:
                    self._kept[name] = kept = {}
                kept.update(found)
        return texts_in_order

    def image_checksums(self, ids: Ids) -> NDArray[np.uint64]:
        """See RowReader."""
        return self._in_order(ids, np.empty(len(ids), np.uint64), "image_checksums")

    def checksums(self, ids: Ids) -> NDArray[np.uint64]:
        """See RowReader."""
        answers = self._members.ask_owners(ids, "checksums")
        found = np.empty((len(ids), answers[0][1].shape[1] if answers else 0), np.uint64)
        for share, checksums in answers:
            found[share.at] = checksums
        return found

    def _in_order(self, ids: Ids, out: NDArray[Any], method: str) -> NDArray[Any]:
        for share, values in self._members.ask_owners(ids, method):
            out[share.at] = values
        return out


class FederatedSnapshot(Snapshot):
    """One generation of a cluster. It opens no shard: members do."""

    def __init__(self, folder: Path, members: Members) -> None:
        super().__init__(folder, members.manifest)
        self.members = members
        self.rows = FederatedRows(folder, members)

    def identity(self, row_id: int) -> tuple[str, int]:
        """See Snapshot. Members have the files: what is kept of images is of one generation of the cluster."""
        return f"generation {self.manifest.generation}", row_id

    def find_exactly(self, keys: Sequence[str]) -> list[int | None]:
        """See Snapshot. Where queries go on without lost members, their keys are not found."""
        found: list[int | None] = [None] * len(keys)
        answers = self._asked_for(list(keys))
        for number, rows in answers.items():
            for at, row in enumerate(rows):
                if row is not None:
                    found[at] = row + int(self.members.starts[number])
        return found

    def _asked_for(self, keys: list[str]) -> dict[int, Any]:
        while True:  # each turn that fails finds one more member lost
            some = self.members.present() if self.members.tolerant else range(len(self.members))
            try:
                return self.members.gather(dict.fromkeys(some, ("find", keys)))
            except MemberError:
                if not self.members.tolerant:
                    raise

    def shown(self, row_id: int) -> str:
        """See Snapshot."""
        [share] = self.members.shares([row_id])
        answer: str = self.members.gather({share.member: ("shown", int(share.rows[0]))})[share.member]
        return answer

    def read_into(self, ids: Sequence[int] | Ids, out: Sequence[list[Array]], verify: bool = True) -> None:
        """See Snapshot. Where a member recomputes patches, it does so on its own machine."""
        for share, levels in self.members.ask_owners(np.asarray(ids, np.int64), "levels", verify):
            for row, at in enumerate(share.at.tolist()):
                for target, level in zip(out[at], levels, strict=True):
                    target[...] = level[row]

    def search(
        self, image_features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, Array]:
        """See Snapshot."""
        queries, k = self._as_search(image_features, k)
        return self.members.search(queries, k, without, nprobe)
