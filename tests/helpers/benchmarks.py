"""Code that benchmarks and tests share: it lies in benchmarks/, which is no package."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers.processes import preload

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import bit_rot
import fuzz
import kills_trials

BENCHMARKS = Path(kills_trials.__file__).parent
preload()  # common.py has said what else

__all__ = ["BENCHMARKS", "bit_rot", "fuzz", "kills_trials"]
