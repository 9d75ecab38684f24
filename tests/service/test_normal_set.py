"""Changes of the normal set: commits, taken up by every process within a second, and taken back."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.images.sources import ImageFile
from spade_faiss.service.normal_set import Author
from tests.service.conftest import NAME, png, until

NORMAL = f"/v1/galleries/{NAME}/normal"
PNG = {"Content-Type": "image/png"}


def test_a_false_alarm_becomes_normal_and_is_taken_back(serve: Callable[..., Any]) -> None:
    with serve() as served:
        first = served.inspect(png()).json()
        change = served.client.post(NORMAL, json={"inspection": first["id"]}).json()
        assert (change["generation_before"], change["state"]) == (2, "done")
        assert change["generation_after"] == served.generation > 2
        twin = served.inspect(png()).json()
        assert twin["neighbours"][0] == {"key": change["key"], "sq_distance": 0.0}
        assert (twin["generation"], twin["verdict"]) == (change["generation_after"], "normal")
        assert served.get(f"/v1/inspections/{first['id']}")["label"] == "false_alarm"
        picture = f"/v1/galleries/{NAME}/picture"
        assert served.client.get(picture, params={"key": change["key"]}).status_code == 200
        again = served.client.post(NORMAL, json={"inspection": first["id"]}).json()
        assert (again["key"], again["generation_after"]) == (change["key"], twin["generation"])  # twice is once
        undone = served.client.post(f"/v1/changes/{change['id']}/undo").json()
        assert (undone["what"], undone["undoes"]) == ("remove", change["id"])
        assert served.get(f"/v1/inspections/{first['id']}")["label"] is None
        assert served.client.get(picture, params={"key": change["key"]}).status_code == 200  # of the twin's neighbour
        for key in ("added/../../secret", f"added/{'0' * 16}.png"):
            assert served.client.get(picture, params={"key": key}).status_code == 404
        assert served.inspect(png()).json()["image_score"] == pytest.approx(first["image_score"], rel=1e-6)
        assert served.client.post(f"/v1/changes/{change['id']}/undo").status_code == 409


def test_adding_what_is_there_is_not_taken_back(serve: Callable[..., Any]) -> None:
    """Its image is another change's; and one that is gone is not taken out again."""
    with serve() as served:
        parts = [served.inspect(png()).json()["id"] for _ in range(2)]
        first, twin = (served.client.post(NORMAL, json={"inspection": part}).json() for part in parts)
        assert (first["facts"], twin["facts"]) == ({"new": True}, {"new": False})
        assert twin["generation_before"] == twin["generation_after"] == first["generation_after"]
        for facts in (twin["facts"], {}):  # a log of before says it by the generations
            with served.service.database.writing() as connection:
                connection.execute("UPDATE changes SET facts = ? WHERE id = ?", (json.dumps(facts), twin["id"]))
            refused = served.client.post(f"/v1/changes/{twin['id']}/undo")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_to_be_undone")
        assert served.get(NORMAL)["total"] == 25
        assert served.client.delete(f"{NORMAL}/{first['key']}").status_code == 200
        gone = served.client.post(f"/v1/changes/{first['id']}/undo")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_key")
        assert served.get("/v1/changes")["changes"][0]["what"] == "remove"  # a refusal is no change


def test_another_process_adds_the_same_image_first(serve: Callable[..., Any], workspace: Path) -> None:
    """What is new is what the commit says, not what was in memory."""
    with serve(poll_seconds=3600) as served:
        key = served.client.post(NORMAL, content=png(), headers=PNG).json()["key"]
        served.client.delete(f"{NORMAL}/{key}")
        with sf.Gallery.open(workspace / "tiles.gallery") as gallery:
            file = workspace / "service" / "normal" / NAME / key
            gallery.add_images([ImageFile(file, key)], gallery.load_extractor())
        twin = served.client.post(NORMAL, content=png(), headers=PNG).json()
        assert twin["facts"] == {"new": False}
        assert twin["generation_after"] > twin["generation_before"]
        assert served.client.post(f"/v1/changes/{twin['id']}/undo").status_code == 409


def test_an_image_taken_out_is_put_back(serve: Callable[..., Any]) -> None:
    with serve() as served:
        change = served.client.delete(f"{NORMAL}/003.png").json()
        assert served.get(NORMAL, search="003")["found"] == 0
        served.client.post(f"/v1/changes/{change['id']}/undo")
        assert served.get(NORMAL, search="003")["images"] == [{"key": "003.png", "added": False}]
        assert [one["what"] for one in served.get("/v1/changes")["changes"]] == ["add", "remove"]


def test_a_commit_of_another_process_is_taken_up(serve: Callable[..., Any], workspace: Path) -> None:
    with serve() as served:
        old = served.service.registry.named(NAME).current
        with sf.Gallery.open(workspace / "tiles.gallery") as gallery:
            gallery.remove(["000.png"])
        until(lambda: served.generation == 3, 5)
        answer = served.inspect(png()).json()
        assert (answer["generation"], answer["stale"]) == (3, True)
        assert served.get(f"/v1/galleries/{NAME}")["calibration"]["stale"] is True
        assert not old.enter()  # drained


def test_calibration_runs_again_and_is_swapped_in(serve: Callable[..., Any]) -> None:
    with serve(recalibrate=True) as served:
        served.client.delete(f"{NORMAL}/003.png")
        until(lambda: served.get(f"/v1/galleries/{NAME}")["calibration"]["generation"] == 3)
        found = served.get(f"/v1/galleries/{NAME}")["calibration"]
        assert (found["stale"], found["images"], found["false_alarms"]) == (False, 23, 0.1)


def test_another_rate_is_in_force_everywhere(serve: Callable[..., Any], workspace: Path) -> None:
    with serve() as served:
        parts = [served.inspect(png(seed)).json() for seed in range(100, 106)]
        tried = served.get(f"/v1/galleries/{NAME}/rejudge", false_alarms=0.3)
        change = served.client.put(f"/v1/galleries/{NAME}/false-alarms", json={"false_alarms": 0.3}).json()
        now = [served.inspect(png(seed)).json() for seed in range(100, 106)]
        assert [part["after"] for part in tried["parts"][::-1]] == [part["verdict"] for part in now]
        assert [part["before"] for part in tried["parts"][::-1]] == [part["verdict"] for part in parts]
        assert tried["changed"] == sum(part["verdict"] != one["verdict"] for part, one in zip(parts, now, strict=True))
        calibration = sf.Calibration.read(workspace / "tiles.gallery")
        assert calibration is not None
        assert calibration.false_alarms == 0.3
        served.client.post(f"/v1/changes/{change['id']}/undo")
        calibration = sf.Calibration.read(workspace / "tiles.gallery")
        assert calibration is not None
        assert calibration.false_alarms == 0.1
        few = served.client.put(f"/v1/galleries/{NAME}/false-alarms", json={"false_alarms": 0.001})
        assert few.status_code == 422


@pytest.mark.parametrize("recipe", ["relative", "wary"])
def test_one_press_is_enough(serve: Callable[..., Any], workspace: Path, recipe: str) -> None:
    """Under recipes that average over several neighbours, and leave some out; a query of the command line agrees."""
    shutil.rmtree(workspace / "tiles.gallery")
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    with sf.Gallery.create(workspace / "tiles.gallery", toy.spec, recipe=recipe) as gallery:
        gallery.add_images(workspace / "normal", toy)
        sf.calibrate(sf.Detector(gallery, toy), 0.1).write(gallery.path)
    alarm, other = plain("red", "yellow"), plain("blue", "cyan")
    with serve() as served:
        first, defect = served.inspect(alarm).json(), served.inspect(other).json()
        assert (first["verdict"], defect["verdict"]) == ("anomalous", "anomalous")
        change = served.client.post(NORMAL, json={"inspection": first["id"]}).json()
        with sf.Gallery.open(workspace / "tiles.gallery") as gallery:
            assert gallery.trusted() == [change["key"]]
            with pytest.warns(UserWarning, match="has changed"):
                detector = sf.Detector(gallery, toy)
            found = detector.query(alarm)
        twin = served.inspect(alarm).json()
        assert (twin["verdict"], twin["image_score"]) == ("normal", found.image_score)
        assert served.inspect(other).json()["verdict"] == "anomalous"
        taken_out = served.client.delete(f"{NORMAL}/{change['key']}").json()
        assert served.inspect(alarm).json()["image_score"] == pytest.approx(first["image_score"], rel=1e-6)
        served.client.post(f"/v1/changes/{taken_out['id']}/undo")  # with the trust that it had
        assert served.inspect(alarm).json()["image_score"] == twin["image_score"]


def plain(left: str, right: str) -> bytes:
    """A part in two colours, as no normal image is."""
    image = Image.new("RGB", (48, 40), left)
    image.paste(right, (24, 0, 48, 40))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("step", ["begun", "trusted", "committed"])
def test_a_kill_during_a_change_is_mended(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed between any two steps: the log says what became of the change, and the label goes with it."""
    with serve() as served:
        first = served.inspect(png()).json()

        def stop(name: str, path: Path | None = None) -> None:
            if name in (f"{step} a change", f"{step} an image"):
                raise SystemExit  # nothing after it is done

        monkeypatch.setattr("spade_faiss.service.normal_set.failpoint", stop)
        with pytest.raises(SystemExit):
            served.service.normal_set.add(NAME, png(), Author("a", "b"), first["id"])
    monkeypatch.undo()
    with serve() as served:
        [change] = served.get("/v1/changes")["changes"]
        there = served.get(NORMAL)["total"] == 25
        assert (change["state"], there) == (("done", True) if step == "committed" else ("failed", False))
        assert served.get(f"/v1/inspections/{first['id']}")["label"] == ("false_alarm" if there else None)
        assert served.get("/v1/inspections")["inspections"][0]["id"] == first["id"]


@pytest.mark.parametrize("is_written", [True, False])
def test_a_kill_while_a_rate_is_set(
    serve: Callable[..., Any], workspace: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """The log says done of a rate that is in force, and it can be taken back."""

    def stop(*given: Any) -> None:
        raise SystemExit  # nothing after it is done

    with serve() as served:
        where = (served.service.changes, "end") if is_written else (sf.Calibration, "write")
        monkeypatch.setattr(*where, stop)
        with pytest.raises(SystemExit):
            served.service.normal_set.set_false_alarms(NAME, 0.3, Author("a", "b"))
    monkeypatch.undo()
    with serve() as served:
        [change] = served.get("/v1/changes")["changes"]
        calibration = sf.Calibration.read(workspace / "tiles.gallery")
        assert calibration is not None
        assert (change["state"], calibration.false_alarms) == (("done", 0.3) if is_written else ("failed", 0.1))
        if is_written:
            assert served.client.post(f"/v1/changes/{change['id']}/undo").status_code == 200
            assert served.get(f"/v1/galleries/{NAME}")["calibration"]["false_alarms"] == 0.1


def test_an_audit_names_the_oddest(serve: Callable[..., Any]) -> None:
    with serve() as served:
        found = served.get(f"/v1/galleries/{NAME}/audit", top=3)
        detector = served.service.registry.named(NAME).current.detector
        assert [one["key"] for one in found["suspects"]] == [one.key for one in sf.find_suspects(detector)[:3]]
