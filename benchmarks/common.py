"""What every benchmark needs: the machine in words, memory as it is used, child processes, results as a file."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
# Beside the benchmarks in a checkout; where they are installed, in the folder that the command is run in.
RESULTS = Path(
    os.environ.get("SPADE_FAISS_BENCH_OUTPUT")
    or (HERE / "results" if (HERE.parent / "pyproject.toml").exists() else "bench-results")
)

# Children are forked from a clean process that has imported everything: seconds each otherwise.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["spade_faiss.cli", "spade_faiss.detect.detector", "spade_faiss.patch_search.flat", "torch"]
)


def machine() -> dict[str, Any]:
    """Describe the machine and the libraries."""
    import faiss
    import torch  # 500 MB, which whoever only asks for memory does not want in it

    import spade_faiss

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "avx512": any("avx512f" in line for line in _lines("/proc/cpuinfo") if line.startswith("flags")),
        "memory_gib": _meminfo("MemTotal") // 2**30,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "spade_faiss": spade_faiss.__version__,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _meminfo(name: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith(name)), 0)


def available_bytes() -> int:
    """Return the memory that a process could still have."""
    return _meminfo("MemAvailable")


def resident_mib() -> float:
    """Return the resident memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """Sample the resident memory while a block runs; `above` is its peak over the start, in MiB."""

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = resident_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, resident_mib())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def above(self) -> float:
        return self._peak - self._start

    @property
    def peak(self) -> float:
        return self._peak


def end_with_the_parent() -> None:
    """Begin a process that ends when its parent does, however that was: a benchmark that is killed leaves nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def save(name: str, result: dict[str, Any], show: bool = True, part: bool = False) -> None:
    """Print a result, unless told not to, and write it with the machine's description to RESULTS/NAME.json.

    What is a part only is written to NAME.part.json, which goes when the whole is there: who stops a benchmark has what
    was measured, and the last whole result.
    """
    result = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **result}
    text = json.dumps(result, indent=1)
    if show and not part:
        print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    written, of_parts = RESULTS / f"{name}.json.written", RESULTS / f"{name}.part.json"
    written.write_text(text + "\n")
    written.replace(of_parts if part else RESULTS / f"{name}.json")
    if not part:
        of_parts.unlink(missing_ok=True)
