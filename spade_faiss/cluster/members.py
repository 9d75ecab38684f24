"""All members of a cluster together: which of them holds what, and asking several at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..errors import MemberError, NotEnoughImagesError
from ..store.manifest import Manifest
from ..system.forks import remember
from .manifest import ClusterManifest, MemberEntry
from .member import Answer, LocalMember, LostMember, Member

RETRY = 5.0  # seconds after which a lost member is asked again
MOMENT = 0.5  # seconds that a query waits for its answer


@dataclass(frozen=True)
class Share:
    """What one member holds of some ids."""

    member: int
    at: Ids  # places among the ids, ascending
    rows: Ids  # of the member's gallery, in that order


class Members:
    """The members of one generation of a cluster. Global ids count their rows in their order. Threads may share it."""

    def __init__(
        self, cluster: ClusterManifest, opened: Callable[[MemberEntry], Member], tolerant: bool = False
    ) -> None:
        """Open every member, and ask it what it consists of.

        Args:
            cluster: the generation.
            opened: opens a member.
            tolerant: whether queries go on without members that are lost. One that is lost from the beginning counts
                as empty.

        Raises:
            MemberError: one cannot be opened, unless `tolerant`; or none can.
        """
        self.tolerant = tolerant
        self._lost: dict[int, float] = {}  # by number: when it was last asked
        self._lock = threading.Lock()
        members = list[Member]()
        for entry in cluster.members:
            try:
                members.append(opened(entry))
            except MemberError as error:
                members.append(LostMember(entry.name, error))
                if not tolerant:
                    for member in members:
                        member.close()
                    raise
        self.members = tuple(members)
        self.manifests = self._all_manifests()
        self.starts = np.array([0, *accumulate(one.rows for one in self.manifests)], np.int64)
        self.generation = cluster.generation
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    @property
    def parallel(self) -> int:
        """How many members work in processes of their own."""
        return sum(not isinstance(member, LocalMember) for member in self.members)

    def __len__(self) -> int:
        return len(self.members)

    def close(self) -> None:
        """Let go of all members."""
        for member in self.members:
            member.close()

    def _all_manifests(self) -> list[Manifest]:
        found, asked = dict[int, Manifest](), set(range(len(self)))
        while asked - set(found):
            try:
                found |= self.gather(dict.fromkeys(asked - set(found), ("manifest",)))
            except MemberError:
                asked -= set(self._lost)
                if not self.tolerant or not asked:
                    self.close()
                    raise
        for number in set(range(len(self))) - asked:  # its rows are not known: it is not asked again
            self._lost[number] = float("inf")
            found[number] = replace(next(iter(found.values())), shards=())
        return [found[number] for number in range(len(self))]

    @property
    def manifest(self) -> Manifest:
        """All members as one gallery, whose shards are named by their members."""
        shards = tuple(
            replace(shard, file=f"{member.name}/{shard.file}")
            for member, manifest in zip(self.members, self.manifests, strict=True)
            for shard in manifest.shards
        )
        return replace(self.manifests[0], shards=shards, generation=self.generation, index=None, keys=None)

    # Which member holds what.

    def shares(self, ids: Sequence[int] | Ids) -> list[Share]:
        """Return who holds which of some ids; members without any are left out."""
        asked = np.asarray(ids, np.int64)
        owners = np.searchsorted(self.starts, asked, side="right") - 1
        return [
            Share(number, at := np.flatnonzero(owners == number), asked[at] - self.starts[number])
            for number in np.unique(owners).tolist()
        ]

    # Asking them.

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the members that are lost."""
        return tuple(self.members[number].name for number in sorted(self._lost))

    def present(self) -> list[int]:
        """Return the numbers of the members that take part in a search."""
        return [number for number in range(len(self)) if number not in self._lost]

    def look_again(self) -> None:
        """Ask members that were lost a while ago whether they are back. A query waits a moment for the answers only."""
        now = time.monotonic()
        with self._lock:
            due = [number for number, asked in self._lost.items() if now - asked >= RETRY]
            self._lost.update(dict.fromkeys(due, now))
        for number in due:
            asking = threading.Thread(target=self._ask_again, args=(number,), daemon=True)
            asking.start()
            asking.join(MOMENT)

    def _ask_again(self, number: int) -> None:
        with suppress(MemberError):
            self.members[number].call("process")()
            with self._lock:
                self._lost.pop(number, None)

    def shared(self, value: Any) -> Any:
        """Return an argument in a form that several members can be given without copying it for each."""
        return self.members[self.present()[0]].share(value) if self.present() else value

    def gather(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call a method of several members, all at the same time.

        Args:
            calls: by the member's number, the method and its arguments.

        Returns:
            the answers, by number.

        Raises:
            MemberError: one of them is lost. The others have answered.
        """
        waiting: dict[int, Answer | MemberError] = {}
        for number, (method, *args) in calls.items():
            try:
                waiting[number] = self.members[number].call(method, *args)
            except MemberError as error:
                waiting[number] = error
        answers, lost = dict[int, Any](), list[MemberError]()
        for number, answer in waiting.items():
            try:
                if isinstance(answer, MemberError):
                    raise answer
                answers[number] = answer()
            except MemberError as error:
                lost.append(error)
                if self.tolerant:
                    with self._lock:
                        self._lost.setdefault(number, time.monotonic())
        if lost:
            raise lost[0]
        return answers

    def ask_owners(self, ids: Ids, method: str, *args: Any) -> list[tuple[Share, Any]]:
        """Call a method with the rows of some ids on those who hold them; returns their shares and answers."""
        shares = self.shares(ids)
        answers = self.gather({share.member: (method, share.rows, *args) for share in shares})
        return [(share, answers[share.member]) for share in shares]

    def search(
        self, features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, NDArray[np.float32]]:
        """Find the k nearest images among those of all members that take part; see Gallery.search.

        Each member returns its k nearest. They are merged by distance, and ties by id, which is what one gallery of
        all images returns.

        Raises:
            NotEnoughImagesError: all members together have fewer.
            MemberError: one was lost just now, or all are.
        """
        if not self.present():
            raise MemberError(f"expected a member of the cluster that can be reached, found none of {self.missing}")
        left_out = {share.member: share.rows for share in self.shares([] if without is None else np.unique(without))}
        none = np.empty(0, np.int64)
        found = self.gather(
            {number: ("search", features, k, left_out.get(number, none), nprobe) for number in self.present()}
        )
        all_ids = np.hstack([found[number][0] + self.starts[number] for number in found])
        all_squared = np.hstack([found[number][1] for number in found])
        if all_ids.shape[1] < (1 if self.missing else k):
            raise NotEnoughImagesError(
                f"expected at least K = {k} normal images, found {all_ids.shape[1]}; use a smaller K"
            )
        order = np.lexsort((all_ids, all_squared), axis=1)[:, :k]
        return np.take_along_axis(all_ids, order, 1), np.take_along_axis(all_squared, order, 1)
