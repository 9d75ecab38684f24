"""Building on the machines of a Ray cluster: tasks make whole shards, and one process commits them.

Every attempt at a shard has a temporary name of its own, so an attempt that Ray has given up, and that goes on, harms
nothing. Tasks run at least once. The one committer adopts one attempt of each run, in the order of the runs, and
deletes the others: their effect is had exactly once. What is killed leaves temporary files, which the next writer
deletes; the same call goes on from the last commit, and gives the same keys in the same order.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import OptionError, SpadeError, WorkerError, first_line
from ..extractors.registry import Extractor
from ..images.sources import ImageFile
from ..ingest.runs import AHEAD, Job, Outcome, ShardMakers, load, make_shard
from ..options import is_count
from ..system.atomic_files import TEMPORARY
from .manifest import gallery_digest
from .ray_members import RayCluster

RETRIES = 5  # times that a run is made again when its process or machine has died


class RayMachines:
    """The machines of a Ray cluster, to build with: Gallery.add_images(..., workers=RayMachines("10.0.0.1:6379"))."""

    def __init__(self, address: str, workers: int | None = None) -> None:
        """Connect.

        Args:
            address: of the Ray cluster; "local": one is started on this machine.
            workers: tasks at the same time, each of which takes a CPU; None: as many as the cluster has CPUs.

        Raises:
            OptionError: Ray is not installed.
            MemberError: there is no Ray cluster of this release of Ray at that address.
        """
        if workers is not None and not is_count(workers):
            raise OptionError(f"workers: expected a number >= 1, found {workers!r}")
        self._ray = RayCluster.at(address).ray
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def makers(self, job: Job, runs: Sequence[list[ImageFile]]) -> ShardMakers:
        """See Machines."""
        return _Tasks(self._ray, job, runs, self.workers)


class _Tasks:
    """Runs on their way through a Ray cluster."""

    def __init__(self, ray: Any, job: Job, runs: Sequence[list[ImageFile]], workers: int) -> None:
        self._ray, self._job, self._runs, self._workers = ray, job, runs, workers
        self._build = secrets.token_hex(4)

    def __enter__(self) -> _Tasks:
        if self._runs:
            self._require_shared_storage()
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._job.folder.glob(f"{self._build}-*{TEMPORARY}"):
            path.unlink(missing_ok=True)

    def _require_shared_storage(self) -> None:
        """Ask every machine whether it sees the gallery and the first image, before any work begins.

        Raises:
            WorkerError: one does not; the message names it.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray, folder, first = self._ray, self._job.folder.parent, self._runs[0][0].path
        task, digest = ray.remote(_sight), gallery_digest(folder)
        asked = [
            (
                node["NodeManagerAddress"],
                task.options(
                    num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote(str(folder), str(first.absolute()), digest, f"{self._build}-{number}.seen{TEMPORARY}"),
            )
            for number, node in enumerate(ray.nodes())
            if node["Alive"]
        ]
        for number, (address, answer) in enumerate(asked):
            try:
                missing = ray.get(answer)
            except ray.exceptions.RayError as error:
                raise WorkerError(f"machine {address}: {first_line(error)}") from error
            if missing is None and not (self._job.folder / f"{self._build}-{number}.seen{TEMPORARY}").exists():
                missing = f"{folder}, as a folder of its own"
            if missing is not None:
                raise WorkerError(
                    f"machine {address}: expected to see {folder} and its images as this machine does, found "
                    f"{missing}; put both on storage that all machines share"
                )

    def outcomes(self, progress: Callable[[int], object]) -> Iterator[Outcome]:
        """Yield what became of each run, in order; see ShardMakers.

        Raises:
            WorkerError: a run's process was killed again and again, or failed with an error other than a SpadeError.
            SpadeError: raised in a task.
        """
        ray, todo = self._ray, deque(enumerate(self._runs))
        task = ray.remote(_make).options(num_cpus=1, max_retries=RETRIES)
        job = ray.put(replace(self._job, folder=self._job.folder.absolute()))
        running: dict[Any, int] = {}
        done, head = dict[int, Outcome](), 0
        try:
            while head < len(self._runs):
                while todo and len(running) < self._workers and todo[0][0] < head + AHEAD * self._workers:
                    run = todo.popleft()
                    running[task.remote(job, run, self._build)] = run[0]
                ready, _ = ray.wait(list(running), num_returns=1)
                for one in ready:
                    number = running.pop(one)
                    done[number] = self._outcome(one)
                    progress(len(self._runs[number]))
                while head in done:
                    yield done.pop(head)
                    head += 1
        finally:
            for one in running:
                ray.cancel(one, force=True)

    def _outcome(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SpadeError):
                raise error.cause from None
            raise WorkerError(f"Ray task: {first_line(error)}") from error
        except errors.RayError as error:
            raise WorkerError(
                f"Ray task: lost {RETRIES + 1} times ({type(error).__name__}), as when memory runs out; what was "
                "committed is kept: run it again"
            ) from error
        return outcome


def _sight(folder: str, image: str, digest: str, name: str) -> str | None:
    """Return what this machine does not see of a gallery, or of an image; leave a file for the committer to see."""
    if gallery_digest(Path(folder)) != digest:
        return f"another gallery, or none, at {folder}"
    try:
        (Path(folder) / "shards" / name).touch()
        with Path(image).open("rb"):
            return None
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


@lru_cache(maxsize=1)
def _loaded(job: Job) -> Extractor:
    return load(job)


def _make(job: Job, run: tuple[int, list[ImageFile]], build: str) -> Outcome:
    """Make a shard, as one attempt at a run."""
    import ray

    job = replace(job, processes=os.cpu_count() or 1)
    Image.MAX_IMAGE_PIXELS = job.max_pixels
    warnings.filterwarnings("ignore", module="PIL")  # an image that cannot be read is reported as an error
    where = f"machine {ray.util.get_node_ip_address()}, process {os.getpid()}"
    try:
        name = f"{build}-{run[0]:06d}-{secrets.token_hex(4)}.h5"
        return make_shard(job, _loaded(job), run, name, lambda _: True)
    except SpadeError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        raise WorkerError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
