"""What a run of the command line gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TOY = ("--extractor", "toy", "--image-size", 64)  # instead of the recipe's 320 px: a query takes 0.05 s, not 0.5


@dataclass
class Run:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that says what is wrong."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("spade-faiss: error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


Spade = Callable[..., Run]
