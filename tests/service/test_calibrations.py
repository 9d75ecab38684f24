"""Calibration in the background beside what people choose meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf
from spade_faiss.service import calibrations
from spade_faiss.service.calibrations import Order
from tests.service.conftest import NAME, Served, until

RATE = f"/v1/galleries/{NAME}/false-alarms"
CALIBRATE = f"/v1/galleries/{NAME}/calibrate"


class Held:
    """The work of calibrating, which begins and then waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.release = threading.Semaphore(0), threading.Event()
        monkeypatch.setattr(calibrations, "calibrate", self._calibrate)

    def _calibrate(self, *given: Any, **named: Any) -> sf.Calibration:
        self.begun.release()
        assert self.release.wait(20)
        return sf.calibrate(*given, **named)


def written(workspace: Path) -> sf.Calibration:
    found = sf.Calibration.read(workspace / "tiles.gallery")
    assert found is not None
    return found


def done(served: Served) -> list[str]:
    """Who has asked for the calibrations that were made, the oldest first."""
    changes = served.get("/v1/changes")["changes"][::-1]
    return [one["who"] for one in changes if (one["what"], one["state"]) == ("calibrate", "done")]


@pytest.mark.parametrize("automatic", [True, False])
def test_a_rate_that_is_chosen_while_it_is_calibrated(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, automatic: bool
) -> None:
    """It stays, with the scores that were found."""
    held = Held(monkeypatch)
    with serve() as served:
        served.client.delete(f"/v1/galleries/{NAME}/normal/003.png")
        if automatic:
            served.service.calibrations.ask(Order(NAME, 0.1))
        else:
            assert served.client.post(CALIBRATE, json={"false_alarms": 0.2}).status_code == 200
        assert held.begun.acquire(timeout=20)
        assert served.client.put(RATE, json={"false_alarms": 0.3}).status_code == 200
        held.release.set()
        until(lambda: not served.service.calibrations.is_at(NAME))
        found = written(workspace)
        assert (found.false_alarms, found.generation, len(found.image_scores)) == (0.3, 3, 23)
        served.service.registry.look()
        assert served.get(f"/v1/galleries/{NAME}")["calibration"]["false_alarms"] == 0.3
        assert done(served) == ["service" if automatic else "local"]


@pytest.mark.parametrize("asked", [0.1, 0.2])
def test_an_order_of_the_service_promises_what_is_in_force(
    serve: Callable[..., Any], workspace: Path, asked: float
) -> None:
    """Whatever was in force when it was given."""
    with serve() as served:
        assert served.client.put(RATE, json={"false_alarms": 0.3}).status_code == 200
        served.service.calibrations.ask(Order(NAME, asked))
        until(lambda: done(served) == ["service"])
        assert written(workspace).false_alarms == 0.3


def test_what_a_person_asks_for_is_calibrated(serve: Callable[..., Any], workspace: Path) -> None:
    with serve() as served:
        assert served.client.post(CALIBRATE, json={"false_alarms": 0.2}).status_code == 200
        until(lambda: done(served) == ["local"])
        assert written(workspace).false_alarms == 0.2


def test_an_order_of_the_service_leaves_that_of_a_person(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with serve() as served:
        ask = served.service.calibrations.ask
        ask(Order(NAME, 0.1))
        assert held.begun.acquire(timeout=20)
        ask(Order(NAME, 0.1))
        for rate in (0.3, 0.2):  # a newer one of a person takes the place of an older
            headers = {"X-Request-ID": f"mine-{rate}"}
            assert served.client.post(CALIBRATE, json={"false_alarms": rate}, headers=headers).status_code == 200
        ask(Order(NAME, 0.1))
        held.release.set()
        until(lambda: len(done(served)) == 2 and not served.service.calibrations.is_at(NAME))
        assert done(served) == ["service", "local"]
        assert served.get("/v1/changes")["changes"][0]["request"] == "mine-0.2"
        assert written(workspace).false_alarms == 0.2
