"""Python programs in processes of their own, which are forked from one that has imported everything.

A fresh interpreter takes three seconds to import torch, FAISS and HDF5. Take one where that is what is tested: how the
package is imported, how an interpreter ends, how the package itself starts processes.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).parents[2]
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    "tests.helpers.quick_disk",
    "spade_faiss.cli",
    "spade_faiss.detect.detector",
    "spade_faiss.ingest.workers",
    "spade_faiss.patch_search.flat",
    "tests.helpers.crash",
    "tests.helpers.images",
    "tests.helpers.readers",
    "tests.helpers.shards",
    "tests.helpers.workers",
    "encodings.ascii",
    "numpy.ma",
    "numpy.random",
    "torch",
    "tests.helpers.warm",  # the last
]


def preload() -> None:
    """Say what the process that is forked from imports; heeded until it has started."""
    FORKSERVER.set_forkserver_preload(PRELOAD)


preload()


class Program:
    """Code that runs as a program of its own would, with sys.argv[1:] and pipes: a subprocess.Popen(text=True)."""

    def __init__(self, code: str, *arguments: object, cwd: object = None) -> None:
        ends: list[tuple[int, int]] = [os.pipe() for _ in range(3)]
        theirs = [
            Connection(ends[0][0], writable=False),
            Connection(ends[1][1], readable=False),
            Connection(ends[2][1], readable=False),
        ]
        words = [str(argument) for argument in arguments]
        self.process = FORKSERVER.Process(target=_run, args=(code, words, None if cwd is None else str(cwd), *theirs))
        self.process.start()
        for connection in theirs:
            connection.close()
        self.stdin: IO[str] = os.fdopen(ends[0][1], "w")
        self.stdout: IO[str] = os.fdopen(ends[1][0], newline="")  # with the \r of a progress bar
        self.stderr: IO[str] = os.fdopen(ends[2][0], newline="")

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 300) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def communicate(self, timeout: float = 300, given: str = "") -> tuple[str, str]:
        """Give it all of stdin, and return what it says until its pipes end.

        It is killed at the timeout (s). Its pipes end with the last process that it has started.

        Raises:
            TimeoutError: they did not end then either.
        """
        said: dict[str, str] = {}

        def read(name: str) -> None:
            with getattr(self, name) as pipe:
                said[name] = pipe.read()

        threads = [threading.Thread(target=read, args=(name,), daemon=True) for name in ("stdout", "stderr")]
        threads.append(threading.Thread(target=self._give, args=(given,), daemon=True))
        end = time.monotonic() + timeout
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            self.kill()
        for thread in threads:
            thread.join(10)
            if thread.is_alive():
                raise TimeoutError(f"process {self.pid}: others that it has started hold its pipes {timeout} s later")
        self.wait()
        return said["stdout"], said["stderr"]

    def _give(self, given: str) -> None:
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(given)

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.wait()
        self.process.close()
        for pipe in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@dataclass
class Done:
    """What a program that has ended leaves: as subprocess.CompletedProcess."""

    returncode: int | None
    stdout: str
    stderr: str


def run_fresh(code: str, *arguments: object, timeout: float = 300) -> Done:
    """Run a program in an interpreter of its own to its end."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"PYTHONPATH": path}
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run(code: str, *arguments: object, cwd: object = None, given: str = "", timeout: float = 300) -> Done:
    """Run a program to its end; beyond the timeout (s) it is killed, and its returncode is -SIGKILL."""
    with Program(code, *arguments, cwd=cwd) as program:
        said, errors = program.communicate(timeout, given)
        return Done(program.returncode, said, errors)


def said(code: str, *arguments: object, by: Callable[..., Done] = run) -> str:
    """What a program prints that ends well."""
    done = by(code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def ready(code: str, *arguments: object) -> Iterator[Program]:
    """A program that says "ready" when it is, and is killed at the end."""
    with Program(code, *arguments) as program:
        line = program.stdout.readline()
        assert line == "ready\n", line + program.communicate()[1]
        yield program


def _run(code: str, arguments: list[str], cwd: str | None, *pipes: Connection) -> None:
    """Be the program, and end as an interpreter ends: threads are waited for, and what asked for it is called."""
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["-c", *arguments]
    if cwd is not None:
        os.chdir(cwd)
    code_of_exit: Any = 0
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        code_of_exit = error.code
    except BaseException:
        traceback.print_exc()
        code_of_exit = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.exit(code_of_exit)
