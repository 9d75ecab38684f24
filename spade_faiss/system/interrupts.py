"""Ctrl-C while the command line is imported, which takes seconds: the program ends without a traceback.

From `main` on, Ctrl-C raises KeyboardInterrupt as usual, so that what was begun is cleaned up.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

STATUS = 130  # of a program that Ctrl-C ended, as shells have it
SCRIPTS = ("spade-faiss", "spade-faiss-script")  # how sys.argv names the program
MODULE = "spade_faiss.cli"  # or how `python -m` does


def end_quietly() -> None:
    """Let Ctrl-C end the process at once, if the process is this program and has no handler of its own."""
    name = Path(sys.argv[0]).name.removesuffix(".exe").removesuffix(".py") if sys.argv else ""
    is_program = name in SCRIPTS or (name == "-m" and MODULE in sys.orig_argv)
    if is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_as_usual() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_: int, __: FrameType | None) -> None:
    os._exit(STATUS)  # nothing was begun; what is half imported cannot be finalised


end_quietly()
