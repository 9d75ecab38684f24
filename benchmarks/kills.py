"""Kill commands at any instant, and fill the disk under them: what is lost, and does the same command finish the work?

python benchmarks/kills.py [--random 40] [--each 3] [--workers 6] [--full 15] [--seed 0]

Each command runs in a process of its own, which is killed (SIGKILL) after a random share of the undisturbed run's time,
or by itself at a failpoint (spade_faiss/failpoints.py): at the first, the last and other times that it passes it. The
disk is a small tmpfs where one can be mounted, which takes root; else writing fails at a limit on file size. After each
the gallery opens and verifies, has every image that was committed, with the same bytes, and the same command makes of
it what an undisturbed run makes: images, calibration, answers of a search and of a patch search.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import save
from kills_trials import COMMANDS, Trials, can_mount


class Tally:
    """Counts trials and keeps what went wrong."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[str] = []

    def take(self, groups: list[str], what: str, trial: Callable[[], bool]) -> None:
        """Do a trial, and count it in some groups: tried; killed (or refused) rather than done; survived."""
        outcome = ["tried"]
        try:
            outcome += ["stopped"] * trial() + ["survived"]
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
            print(self.failures[-1], flush=True)
        for group in groups:
            self.counts.setdefault(group, Counter()).update(outcome)

    def table(self, prefix: str) -> dict[str, Counter[str]]:
        """Return the counts of the groups whose name begins so."""
        return {name.removeprefix(prefix): found for name, found in self.counts.items() if name.startswith(prefix)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=40, help="kills of each command at random times")
    parser.add_argument("--each", type=int, default=3, help="kills at each failpoint of each command, at most")
    parser.add_argument("--workers", type=int, default=6, help="kills of `add --workers 2`, at random times")
    parser.add_argument("--full", type=int, default=15, help="points of a full disk for each command")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng, tally, start = np.random.default_rng(args.seed), Tally(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), list(COMMANDS))
        for name, course in trials.courses.items():
            slow = name == "add_by_workers"
            for delay in rng.uniform(0, course.seconds, args.workers if slow else args.random):
                tally.take(
                    ["all", f"command {name}", "at random times"],
                    f"{name} killed after {delay:.3f} s",
                    lambda name=name, delay=delay: trials.kill(name, after=delay),  # type: ignore[misc]
                )
            for step, times in () if slow else sorted(course.steps.items()):
                others = rng.permutation(np.arange(2, times))[: max(0, args.each - 2)].tolist()
                for number in sorted({1, times, *others})[-args.each :]:
                    tally.take(
                        ["all", f"command {name}", f"step {step}"],
                        f"{name} killed at {number} {step}",
                        lambda name=name, where=f"{number} {step}": trials.kill(name, where),  # type: ignore[misc]
                    )
            print(f"{name}: {tally.counts.get(f'command {name}')}", flush=True)
        mount = can_mount(Path(folder))
        for name in trials.courses:
            for share in rng.uniform(0, 1, 0 if name == "add_by_workers" else args.full):
                tally.take(
                    ["full", f"full {name}"],
                    f"{name} on a disk with {share:.3f} of the room",
                    lambda name=name, share=share: trials.fill(name, share, mount),  # type: ignore[misc]
                )
            print(f"{name} on a full disk: {tally.counts.get(f'full {name}')}", flush=True)
    save(
        "kills",
        {
            "arguments": vars(args),
            "kills": tally.counts["all"],
            "kills_by_command": tally.table("command "),
            "kills_at_random_times": tally.counts.get("at random times"),
            "kills_by_failpoint": dict(sorted(tally.table("step ").items())),
            "full_disk": "tmpfs" if mount else "limit on file size",
            "full_disk_points": tally.counts.get("full"),
            "full_disk_by_command": tally.table("full "),
            "seconds": round(time.perf_counter() - start),
            "failures": tally.failures,
        },
    )


if __name__ == "__main__":
    main()
