"""How an image index was made and is searched, as gallery.json keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

MOST_CANDIDATES = 100  # for each neighbour; more than is ever tried
MOST = 2**63  # counts are less: they become int64


@dataclass(frozen=True)
class IndexFacts:
    """How an image index was made and is searched, and what was measured of that."""

    factory: str = "Flat"  # FAISS's name for it
    reason: str = ""  # why it was taken
    nprobe: int | None = None  # IVF lists visited; None: there are none, or it was not tuned
    candidates: float = 1.0  # for each neighbour, compared exactly
    recall: float | None = None  # share of the k nearest that it finds; None: not measured; see index_training.Tuning
    k: int = 0  # neighbours that the recall was measured for
    imbalance: float = 1.0  # FAISS's imbalance factor of its lists; 1: all of one length
    imbalance_trained: float = 1.0  # the same when it was built
    mapped: bool = False  # its lists stay in the file

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> IndexFacts:
        """Read it back.

        Raises:
            ValueError, TypeError: the values are not what was written.
        """
        if set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"index: expected all facts and no others, found {', '.join(values)}")
        facts = cls(**values)
        numbers = {
            "candidates": (facts.candidates, 1, MOST_CANDIDATES),
            "recall": (0.0 if facts.recall is None else facts.recall, 0, 1),
            "imbalance": (facts.imbalance, 1, math.inf),
            "imbalance_trained": (facts.imbalance_trained, 1, math.inf),
        }
        for name, (number, least, most) in numbers.items():
            if not isinstance(number, (int, float)) or not least <= number <= most or math.isinf(number):
                raise ValueError(f"{name}: expected a number from {least} to {most}, found {number!r}")
        if not (isinstance(facts.factory, str) and isinstance(facts.reason, str) and isinstance(facts.mapped, bool)):
            raise ValueError("index: expected factory and reason as text, and mapped as true or false")
        _count(facts.k, "k")
        _count(0 if facts.nprobe is None else facts.nprobe, "nprobe")
        return facts


def _count(value: Any, name: str = "a count") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST:
        raise ValueError(f"{name}: expected a number >= 0 and below 2^63, found {value!r:.80}")
    return value
