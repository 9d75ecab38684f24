"""How the loops of all engines are compiled: numba's decorator, and the vectors that innermost loops are spelt in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba.core import event, types
from numba.core.caching import NullCache
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from ..system.forks import free_at_forks

logger = logging.getLogger("spade_faiss")
VECTOR = 16  # float32 values: a register of AVX-512; LLVM splits what is longer than a processor's

F = TypeVar("F", bound=Callable[..., Any])


@cache
def sources() -> tuple[tuple[str, int, int], ...]:
    """Return what tells the source of all compiled functions from another state of it."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return tuple((file.relative_to(folder).as_posix(), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def jit(function: F) -> F:
    """Compile a function on its first call; the machine code is cached for later processes if a folder is writable.

    numba takes it from there while the function's own file is as it was. What it calls may be in another, so that here
    all files have to be.
    """
    try:
        compiled: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder is writable
        compiled = numba.njit(nogil=True)(function)
    file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if file is not None:
        file._source_stamp = (file._source_stamp, sources())
    found: F = compiled
    return found


free_at_forks(global_compiler_lock)  # a child could compile nothing, and take nothing from a folder


class Announcer(event.Listener):  # type: ignore[misc]
    """Logs that loops of ours are compiled, once in a process, before the first is: nothing else tells of the wait."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: event.Event) -> None:
        """Say so, unless it was said or the loop is not one of ours."""
        loop = event.data["dispatcher"]
        if self.said or not (loop.py_func.__module__ or "").startswith("spade_faiss."):
            return
        self.said = True
        if isinstance(loop._cache, NullCache):
            kept = "no folder for them can be written, so that each process compiles them: set NUMBA_CACHE_DIR to one"
        else:
            kept = "they are kept for later runs"
        logger.info("inner loops are compiled for this processor, for up to 40 s; %s", kept)

    def on_end(self, event: event.Event) -> None:
        """Say nothing at the end."""


announcer = Announcer()
event.register("numba:compile", announcer)


@jit
def address_of(array: Any) -> Any:
    """Return where an array begins."""
    return np.int64(array.ctypes.data)


FLOAT, HALF, INT, WORD = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, HALVES, INTS, BITS = (ir.VectorType(kind, VECTOR) for kind in (FLOAT, HALF, INT, ir.IntType(1)))


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(context: Any, value: Any) -> Any:
    """Reinterpret a float32 as uint32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], INT)


@intrinsic  # type: ignore[untyped-decorator]
def as_float(context: Any, value: Any) -> Any:
    """Reinterpret a uint32 as float32."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], FLOAT)
