"""Members on the machines of a Ray cluster: each is an actor where its gallery lies.

An actor that dies is started again by Ray, and opens its gallery at the generation that the cluster knows. What it was
asked in the meantime is asked again. A member whose machine is gone, or that does not answer, is lost.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import MemberError, OptionError, first_line
from .manifest import MemberEntry
from .member import Answer, Member, MemberGallery, as_member_errors, known

LOCAL = "local"
RETRIES = 3  # times that a call is made again when the member's process has died
ANSWER_SECONDS = 120.0  # that a member may take to answer, a restart included
CONNECT_SECONDS = 10.0  # that the machine of a Ray cluster may take to answer
TOGETHER = 4  # calls that a member works on at the same time
STORE_BYTES = 2**28  # of the object store of a Ray that is started here: a query's pyramid takes a few MB


class Keeper:
    """An actor. It opens its gallery when it is first asked, so that what is wrong with it is an answer."""

    def __init__(self, entry: MemberEntry, arguments: tuple[Any, ...]) -> None:
        self._entry, self._arguments = entry, arguments
        self._gallery: MemberGallery | None = None
        self._lock = threading.Lock()

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the gallery."""
        with self._lock:
            if self._gallery is None:
                self._gallery = MemberGallery(self._entry, *self._arguments)
        return getattr(self._gallery, method)(*args)


def _known(name: str, path: str, node: str | None) -> MemberEntry:
    entry, gallery = known(name, path, node)
    gallery.close()
    return entry


class RayMember:
    """A member in another process, perhaps on another machine."""

    def __init__(self, name: str, ray: Any, actor: Any) -> None:
        self.name = name
        self._ray = ray
        self._actor = actor

    def call(self, method: str, *args: Any) -> Answer:
        """See Member."""
        with _as_member_errors(self._ray, self.name):
            waiting = self._actor.ask.remote(method, *args)

        def answer() -> Any:
            with _as_member_errors(self._ray, self.name):
                return self._ray.get(waiting, timeout=ANSWER_SECONDS)

        return answer

    def share(self, value: Any) -> Any:
        """See Member."""
        return self._ray.put(value)

    def close(self) -> None:
        """See Member."""
        with suppress(Exception):  # Ray may be gone already
            self._ray.kill(self._actor)


class RayCluster:
    """A Ray cluster, connected to."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    @classmethod
    def at(cls, address: str) -> RayCluster:
        """Connect to the Ray cluster at an address; "local": start one on this machine, for this process.

        A process that is connected already stays connected to its own.

        Raises:
            OptionError: Ray is not installed.
            MemberError: there is no cluster of this release of Ray at that address.
        """
        try:
            import ray
        except ImportError as error:
            raise OptionError(
                f"ray: expected the package ray for {address!r}, found none; install spade-faiss[ray]"
            ) from error
        if not ray.is_initialized():
            _require_listener(address)
            options: dict[str, Any] = {"address": address}
            if address == LOCAL:
                options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
            try:
                ray.init(**options, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # Ray raises whatever its layers raise
                raise MemberError(
                    f"ray {address}: expected a Ray cluster of release {ray.__version__}, found: {first_line(error)}"
                ) from error
        return cls(ray)

    def opener(self, arguments: tuple[Any, ...]) -> Callable[[MemberEntry], Member]:
        """Return what starts an actor for a member; arguments: of MemberGallery, beside the entry."""

        def opened(entry: MemberEntry) -> Member:
            options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": RETRIES, "max_concurrency": TOGETHER}
            actor = self.ray.remote(Keeper).options(**options, **self._on(entry.name, entry.node))
            return RayMember(entry.name, self.ray, actor.remote(entry, arguments))

        return opened

    def known(self, places: Sequence[tuple[str, str, str | None]]) -> list[MemberEntry]:
        """Return members as they are now, by name, path and node, each asked on its machine."""
        task = self.ray.remote(_known)
        waiting = [
            (name, task.options(num_cpus=0, **self._on(name, node)).remote(name, path, node))
            for name, path, node in places
        ]
        found = []
        for name, one in waiting:
            with _as_member_errors(self.ray, name):
                found.append(self.ray.get(one, timeout=ANSWER_SECONDS))
        return found

    def _on(self, name: str, node: str | None) -> dict[str, Any]:
        """Return the options that place work on a machine: by its address, name or id in the Ray cluster."""
        if node is None:
            return {}
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = [one for one in self.ray.nodes() if one["Alive"]]
        for one in alive:
            if node in (one["NodeManagerAddress"], one.get("NodeName"), one["NodeID"]):
                return {"scheduling_strategy": NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)}
        found = ", ".join(sorted({one["NodeManagerAddress"] for one in alive}))
        raise MemberError(f"member {name!r}: expected a machine {node} in the Ray cluster, found {found}")


def _require_listener(address: str) -> None:
    """Check that somebody listens at HOST:PORT, which Ray itself tries for minutes.

    Raises:
        MemberError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # a word that Ray knows, as "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise MemberError(f"ray {address}: expected a Ray cluster, found nobody who answers ({error})") from error


@contextmanager
def _as_member_errors(ray: Any, name: str) -> Iterator[None]:
    """Raise what Ray says of a lost member, and what is wrong with a member's files, as a MemberError that names it.

    What else a member raised is raised as it was.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            with as_member_errors(name):
                raise error.cause from None
        raise MemberError(f"member {name!r}: {first_line(error)}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise MemberError(f"member {name!r}: expected an answer in {ANSWER_SECONDS:g} s, found none") from error
    except ray.exceptions.RayError as error:
        raise MemberError(
            f"member {name!r}: lost ({type(error).__name__}); start its machine again, or answer without it "
            "(partial='allow')"
        ) from error
