"""Scales of normal images: settings that need one, and how often one is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import spade_faiss as sf
from spade_faiss.detect import known_baseline, measure_doubts
from spade_faiss.detect.baseline import Baseline
from spade_faiss.detect.pipeline import Pipeline

SEARCH = sf.SearchOptions(matching="by_level", kappa=1, distinct=True, leave_out=0.1)
SCORE = sf.RECIPES["wary"].score


def cache_of_doubts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder where scales will be kept; a dozen images are enough to doubt each other."""
    monkeypatch.setattr(measure_doubts, "FEWEST", 12)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spade-faiss" / "baselines"


def count_measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns how many baselines were measured since it was asked last."""
    runs, measure = list[Pipeline](), known_baseline.measure

    def and_count(pipeline: Pipeline) -> Baseline:
        runs.append(pipeline)
        return measure(pipeline)

    def number() -> int:
        found = len(runs)
        runs.clear()
        return found

    monkeypatch.setattr(known_baseline, "measure", and_count)
    return number
