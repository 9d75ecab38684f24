"""How an image index was made and is searched, as gallery.json keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

MOST_CANDIDATES = 100  # for each neighbour; tuning tries fewer
MOST = 2**63  # counts are below this: they become int64


@dataclass(frozen=True)
class IndexFacts:
    """How an image index was made and is searched, and what was measured."""

    factory: str = "Flat"  # FAISS factory string
    reason: str = ""  # why this kind was chosen
    nprobe: int | None = None  # IVF lists visited; None: no lists, or not tuned
    candidates: float = 1.0  # compared exactly for each neighbour
    recall: float | None = None  # share of the k nearest that it finds, see tuning.Tuning; None: not measured
    k: int = 0  # neighbours in that measurement
    imbalance: float = 1.0  # FAISS's imbalance factor of its lists; 1: all have the same length
    imbalance_trained: float = 1.0  # the same when it was built
    mapped: bool = False  # its lists stay in the file

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> IndexFacts:
        """Return facts from the values of gallery.json.

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
        checked_count(facts.k, "k")
        checked_count(0 if facts.nprobe is None else facts.nprobe, "nprobe")
        return facts


def checked_count(value: Any, name: str = "a count") -> int:
    """Return a count.

    Raises:
        ValueError: the value is not an int from 0 to 2^63 - 1; the message starts with `name`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MOST:
        raise ValueError(f"{name}: expected a number >= 0 and below 2^63, found {value!r:.80}")
    return value
