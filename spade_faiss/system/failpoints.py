"""Steps of a commit at which a test can kill the process: nothing but a look at one name in normal runs.

`SPADE_FAISS_FAILPOINT="renamed gallery.json"` in the environment kills the process by SIGKILL when it first passes that
step, `"3 renamed gallery.json"` at the third time. Digits of a file's name are left out: `renamed N.h5` is any shard's.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "SPADE_FAISS_FAILPOINT"


def failpoint(step: str, path: Path | None = None) -> None:
    """Pass a named step, of a file where there is one."""
    if action is not None:
        action(step if path is None else f"{step} {re.sub('[0-9]+', 'N', path.stem)}{path.suffix}")


def killing(where: str) -> Callable[[str], None]:
    """Return an action that kills the process: at a step, or at the nth time that it is passed, as "n step"."""
    number, _, rest = where.partition(" ")
    left, step = (int(number), rest) if number.isdigit() else (1, where)

    def kill(passed: str) -> None:
        nonlocal left
        left -= passed == step
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


action: Callable[[str], None] | None = killing(os.environ[VARIABLE]) if VARIABLE in os.environ else None
