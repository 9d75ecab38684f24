"""A stand-in for FAISS where it is not installed, as on a machine that was lent for its GPU; import it first.

The package refuses to be imported without FAISS. What torch does needs none: network, patch search, caches. With the
stand-in all of the package can be imported, and whatever asks FAISS for something raises ERROR.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

WHY = "FAISS is not installed"
ERROR: type[BaseException] = ModuleNotFoundError


class Nothing:
    """What cannot be made without FAISS."""

    def __init__(self, *_: Any) -> None:
        raise ERROR(WHY)


class StandIn(ModuleType):
    """What the package asks FAISS for when it is imported, when it forks, and when it looks for GPUs."""

    __version__ = "none"

    @staticmethod
    def get_num_gpus() -> int:
        return 0

    @staticmethod
    def omp_get_max_threads() -> int:
        return 1

    @staticmethod
    def omp_set_num_threads(number: int) -> None:
        del number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("Index"):  # a kind of index, to compare others with
            return type(name, (Nothing,), {})
        raise ERROR(WHY)


def is_missing() -> bool:
    """Return whether FAISS is not installed; an installation that does not load is not missing."""
    if isinstance(sys.modules.get("faiss"), StandIn):
        return True
    try:
        importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        return error.name == "faiss"
    except ImportError:
        return False
    return False


if is_missing():
    sys.modules["faiss"] = StandIn("faiss")
