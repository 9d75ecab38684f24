"""Calibration in the background beside what people choose meanwhile."""

from __future__ import annotations

import shutil
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


@pytest.mark.parametrize("step", ["calibrate", "end"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_while_it_is_calibrated(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The log says whether the new thresholds are in force."""
    stopped = threading.Event()

    def stop(*given: Any, **named: Any) -> None:
        stopped.set()
        raise SystemExit  # nothing after it is done

    with serve() as served:
        served.client.delete(f"/v1/galleries/{NAME}/normal/003.png")
        monkeypatch.setattr(calibrations if step == "calibrate" else served.service.changes, step, stop)
        served.service.calibrations.ask(Order(NAME, 0.1))
        assert stopped.wait(20)
    monkeypatch.undo()
    with serve() as served:
        change = served.get("/v1/changes")["changes"][0]
        assert (change["what"], written(workspace).generation) == ("calibrate", 3 if step == "end" else 2)
        assert change["state"] == ("done" if step == "end" else "failed")


def test_a_gallery_that_is_loaded_later_with_stale_thresholds(serve: Callable[..., Any], workspace: Path) -> None:
    """They are found again, and metrics tell of it, also when it was unloaded and is loaded again."""
    path = workspace / "second.gallery"
    shutil.copytree(workspace / "tiles.gallery", path)
    with serve(galleries={NAME: workspace / "tiles.gallery", "second": path}, loaded=1, recalibrate=True) as served:
        for key, generation in (("000.png", 3), ("001.png", 4)):
            assert not served.service.registry.named("second").is_loaded
            with sf.Gallery.open(path) as gallery:
                gallery.remove([key])
            assert served.get("/v1/galleries/second")["generation"] == generation
            assert f'generation{{gallery="second"}} {generation}.0' in served.client.get("/metrics").text
            until(lambda expected=generation: calibrated(path) == expected)
            until(lambda: not served.service.calibrations.is_at("second"))
            served.get(f"/v1/galleries/{NAME}")  # unloads the second one
        assert done(served) == ["service", "service"]


def test_a_gallery_is_loaded_though_nobody_can_be_told(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = workspace / "tiles.gallery"
    with serve(galleries={NAME: path, "second": path}) as served:

        def fail(name: str) -> None:
            raise RuntimeError(name)

        monkeypatch.setattr(served.service.metrics.generation, "labels", fail)
        assert served.get("/v1/galleries/second")["loaded"] is True
    assert sum("nobody is told" in record.getMessage() for record in caplog.records) == 1


def calibrated(path: Path) -> int:
    found = sf.Calibration.read(path)
    assert found is not None
    return found.generation


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
