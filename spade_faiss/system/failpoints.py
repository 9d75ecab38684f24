"""Named steps of a commit, at which a test can kill the process. In normal runs a step costs one comparison.

`SPADE_FAISS_FAILPOINT="renamed gallery.json"` in the environment kills the process by SIGKILL when it first passes that
step, `"3 renamed gallery.json"` when it passes it for the third time. N stands for the digits of a file's name, and for
a digest: `renamed N.h5` is the step of any shard.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "SPADE_FAISS_FAILPOINT"


def failpoint(step: str, path: Path | None = None) -> None:
    """Pass a named step.

    Args:
        step: what has just been done.
        path: file that it was done to; None: no file.
    """
    if action is not None:
        action(step if path is None else f"{step} {re.sub('[0-9a-f]{16,}|[0-9]+', 'N', path.stem)}{path.suffix}")


def killing(where: str) -> Callable[[str], None]:
    """Return an action that kills the process when it passes "step" first, or "n step" for the nth time."""
    number, _, rest = where.partition(" ")
    left, step = (int(number), rest) if number.isdigit() else (1, where)

    def kill(passed: str) -> None:
        nonlocal left
        left -= passed == step
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


action: Callable[[str], None] | None = killing(os.environ[VARIABLE]) if VARIABLE in os.environ else None
