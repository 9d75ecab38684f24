"""The report, read as a browser reads it: what is there, what it means, and that nothing in it can reach out."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import ImageFile
from spade_faiss.metrics.curves import image_roc
from spade_faiss.report.colour_scale import Scale
from spade_faiss.report.report import Report
from spade_faiss.report.result_folder import as_json
from spade_faiss.report.run_facts import RunFacts
from spade_faiss.store.source_images import SourceImages
from tests.helpers.images import make_images

VOID = {"meta", "img", "br", "line", "path", "rect", "stop", "use", "circle"}
HOSTILE = "<script>alert(1)</script>/\"'&amp;<img src=x onerror=alert(2)>{{ 7 * 7 }}.png"


class Page(HTMLParser):
    """The elements of a page, each (tag, attributes, text directly and deeper in it), with tags checked to match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, {name: value or "" for name, value in attrs}, text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            " ".join("".join(text).split())
            for found, given, text in self.elements
            if found == tag and attributes.items() <= {k.replace("-", "_"): v for k, v in given.items()}.items()
        ]

    def attributes(self, tag: str, name: str) -> list[str]:
        return [given[name] for found, given, _ in self.elements if found == tag and name in given]


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 12)


@pytest.fixture
def gallery(tmp_path: Path, normal: Path, toy: sf.Extractor) -> sf.Gallery:
    gallery = sf.Gallery.create(tmp_path / "toy.gallery", toy.spec)
    gallery.add_images(normal, toy)
    return gallery


@pytest.fixture
def detector(gallery: sf.Gallery, toy: sf.Extractor) -> sf.Detector:
    return sf.Detector(gallery, toy, sf.SearchOptions(k=6, kappa=2))


@pytest.fixture
def calibrated(detector: sf.Detector) -> sf.Detector:
    sf.calibrate(detector, 0.1).write(detector.gallery.path)
    return sf.Detector(detector.gallery, detector.extractor, detector.search)


@pytest.fixture
def bad() -> np.ndarray:
    """A white image, unlike any of the normal ones, with a grey square."""
    pixels = np.full((80, 96, 3), 255, np.uint8)
    pixels[20:50, 30:60] = 100
    return pixels


def scale_of(detector: sf.Detector) -> Scale:
    return Scale.from_calibration(detector.calibration) if detector.calibration else Scale(0.5, 20.0, basis="tests")


Make = Callable[..., Page]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a report of images, (key, pixels, mask, label), and read it."""

    def written(
        detector: sf.Detector,
        images: list[tuple[object, ...]],
        normal: Path | None = None,
        cards: int = 200,
        path: Path = tmp_path / "out" / "report.html",
        **end: object,
    ) -> Page:
        originals = SourceImages(detector.gallery.snapshot(), [normal] if normal else [])
        with Report(path, RunFacts.of(detector), scale_of(detector), "A <run>", originals, cards) as report:
            for key, pixels, *rest in images:
                report.add(key, pixels, detector.query(pixels), *rest)  # type: ignore[arg-type]
            report.close(**end)  # type: ignore[arg-type]
        assert sorted(tmp_path.glob("out/*")) == [path]
        return Page(path.read_text())

    return written


def test_a_row_and_a_card_for_every_image_worst_first(
    calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make
) -> None:
    good = decode(normal / "002.png")
    page = make(calibrated, [("good.png", good), ("bad.png", bad)], normal)
    assert page.texts("h1") == ["A <run>"]
    assert page.texts("th", scope="col") == ["image", "verdict", "score", "p-value", "map max", "seconds"]
    assert page.texts("th", scope="row") == ["bad.png", "good.png"]
    assert page.texts("th", aria_sort="descending") == ["score"]
    assert page.texts("h3") == ["bad.png", "good.png"]
    # Every link leads somewhere.
    targets = page.attributes("article", "id") + page.attributes("h2", "id") + page.attributes("symbol", "id")
    assert {f"#{target}" for target in targets} >= set(page.attributes("a", "href") + page.attributes("use", "href"))
    # A verdict is a word and a sign, in the row and in the card.
    assert page.texts("span", **{"class": "verdict anomalous"}) == ["anomalous"] * 2
    assert page.texts("span", **{"class": "verdict normal"}) == ["normal"] * 2
    assert sorted(page.attributes("use", "href")) == ["#anomalous"] * 2 + ["#normal"] * 2
    # Sorted by what was measured, not by what is printed.
    values = page.attributes("td", "data-value")
    expected = [calibrated.query(bad), calibrated.query(good)]
    assert [values[0], values[5]] == ["anomalous", "normal"]
    assert [float(values[1]), float(values[6])] == [detection.image_score for detection in expected]
    assert [float(values[2]), float(values[7])] == [d.judgement.p_value for d in expected if d.judgement]
    assert [float(values[3]), float(values[8])] == [detection.map_max for detection in expected]


def test_a_card_shows_neighbours_and_matches(
    calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make
) -> None:
    page = make(calibrated, [("bad.png", bad)], normal)
    detection = calibrated.query(bad)
    captions = page.texts("figcaption")
    near = detection.neighbours
    assert captions[3:8] == [f"{d:.4g}{key}" for key, d in zip(near.keys[:5], near.sq_distances[:5], strict=True)]
    assert "outlined" in captions[2]
    assert re.fullmatch(r"Region 1 peak [\d.]+, \d+ px", page.texts("h5")[0])
    # The first region's worst cell and its two matches, with source, position and distance.
    scores = detection.sq_distances.mean(axis=2)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    view, grid = calibrated.gallery.spec.view, scores.shape
    box = [f"{edge:.0f}" for edge in view.cell_box((80, 96), grid, int(row), int(column))]
    assert captions[8] == f"this imagerow {row}, column {column}x {box[0]}–{box[2]}, y {box[1]}–{box[3]} px"
    for caption, match, sq_distance in zip(
        captions[9:11], detection.matches[row, column], detection.sq_distances[row, column], strict=True
    ):
        key = near.keys[match[0]]
        box = [f"{edge:.0f}" for edge in view.cell_box((40, 48), grid, int(match[1]), int(match[2]))]
        place = f"row {match[1]}, column {match[2]}x {box[0]}–{box[2]}, y {box[1]}–{box[3]} px"
        assert caption == f"{sq_distance:.4g}{place} {key}"
    assert len(page.attributes("img", "src")) == 2 + 5 + 3 * len(page.texts("h5"))


def test_pictures_are_jpegs_of_the_size_that_they_say(
    calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make
) -> None:
    page = make(calibrated, [("bad.png", bad)], normal)
    images = [given for tag, given, _ in page.elements if tag == "img"]
    for given in images:
        kind, _, content = given["src"].partition(";base64,")
        assert kind == "data:image/jpeg"
        with Image.open(io.BytesIO(base64.b64decode(content))) as opened:
            assert opened.size == (int(given["width"]), int(given["height"]))
    assert [(given["width"], given["height"]) for given in images[:2]] == [("480", "400")] * 2


def test_hostile_names_stay_text(calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make) -> None:
    page = make(calibrated, [(HOSTILE, bad, None, "<b>kind</b>")], normal)
    assert page.texts("th", scope="row") == [HOSTILE]
    assert page.texts("h3") == [HOSTILE]
    assert len(page.texts("script")) == 1
    assert page.texts("td", data_value="<b>kind</b>") == ["<b>kind</b>"]
    assert not [name for _, given, _ in page.elements for name in given if name.startswith("on")]
    assert all(src.startswith("data:") for src in page.attributes("img", "src"))


def test_nothing_is_loaded_and_only_its_own_script_may_run(
    calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make, tmp_path: Path
) -> None:
    page = make(calibrated, [("bad.png", bad)], normal)
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"https?://|//\w|@import|url\((?!#)", re.sub(r"data:[\w/;,+=]+", "", text).replace("// ", ""))
    assert not [tag for tag, _, _ in page.elements if tag in ("link", "iframe", "object", "embed", "base", "form")]
    policy = next(content for content in page.attributes("meta", "content") if "default-src" in content)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert content is not None
        assert base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode() in policy
    assert not [given for _, given, _ in page.elements if "style" in given]  # which the policy would stop


def test_the_colour_scale_is_one_and_stated(calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make) -> None:
    for images in ([("bad.png", bad)], [("good.png", decode(normal / "002.png"))]):
        page = make(calibrated, images)
        (caption,) = [text for text in page.texts("figcaption") if text.startswith("Colour scale")]
        assert "half the median maximum of 12 normal maps to twice the pixel threshold" in caption
        threshold = calibrated.calibration.pixel_threshold  # type: ignore[union-attr]
        assert [text for text in page.texts("text") if "pixel threshold" in text] == [
            f"{threshold:.4g} pixel threshold"
        ]
        assert f"{2 * threshold:.4g}" in page.texts("text")


def test_without_a_calibration_there_are_no_verdicts(
    detector: sf.Detector, normal: Path, bad: np.ndarray, make: Make
) -> None:
    page = make(detector, [("bad.png", bad)], normal)
    assert page.texts("th", scope="col") == ["image", "score", "map max", "seconds"]
    assert "none: not calibrated" in page.texts("dd")
    assert [text.split()[0] for text in page.texts("h5")] == ["Map's"]
    assert page.texts("h4")[-1] == "What the cell of the map's maximum was matched with"
    assert "pixel threshold" not in " ".join(page.texts("text"))


def test_a_card_and_a_line_name_what_was_left_out(
    detector: sf.Detector, normal: Path, bad: np.ndarray, make: Make
) -> None:
    search = sf.SearchOptions(matching="by_level", kappa=1, distinct=True, leave_out=0.25)
    wary = sf.Detector(detector.gallery, detector.extractor, search, sf.ScoreOptions(fusion="relative"))
    found = wary.query(bad)
    keys = [found.neighbours.keys[at] for at in found.left_out]
    assert keys
    [said] = make(wary, [("bad.png", bad)], normal).texts("p", **{"class": "left-out"})
    assert said.endswith(f"on a few images: {', '.join(keys)}")
    source = ImageFile(normal / "bad.png", "bad.png")
    assert as_json(source, found)["left_out"] == keys
    assert "left_out" not in as_json(source, detector.query(bad))
    assert make(detector, [("bad.png", bad)], normal).texts("p", **{"class": "left-out"}) == []


@pytest.mark.parametrize("given", [False, True])
def test_missing_normal_files_are_said_in_place_of_the_pictures(
    calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make, given: bool
) -> None:
    (normal / f"{calibrated.query(bad).neighbours.keys[0]}").unlink()
    page = make(calibrated, [("bad.png", bad)], normal if given else None)
    missing = page.texts("span", **{"class": "missing"})
    if given:
        assert set(missing) == {"not found"}
        assert 1 <= len(missing) < len(page.attributes("img", "src"))
    else:
        assert set(missing) == {"no folder of normal images given"}
        assert len(missing) == 5 + 2 * len(page.texts("h5"))
    keys = " ".join(page.texts("figcaption"))
    assert all(key in keys for key in calibrated.query(bad).neighbours.keys[:5])
    assert re.search(r"\drow \d+, column \d+", keys)  # distance and position stay


def test_a_skipped_search_is_said(calibrated: sf.Detector, normal: Path, bad: np.ndarray, make: Make) -> None:
    options = replace(calibrated.search, localise="suspicious")
    detector = sf.Detector(calibrated.gallery, calibrated.extractor, options)
    page = make(detector, [("good.png", decode(normal / "002.png")), ("bad.png", bad)], normal)
    assert page.texts("span", **{"class": "missing"}) == ["not searched: image score at or under the threshold"]
    assert page.texts("h4").count("Image") == 1
    assert page.attributes("td", "data-value")[8] == ""  # of the good one: no map maximum, so last when sorted


def test_ground_truth_is_outlined(calibrated: sf.Detector, bad: np.ndarray, make: Make) -> None:
    mask = np.zeros((80, 96), bool)
    page = make(calibrated, [("a.png", bad, mask, "good"), ("b.png", bad, bad[..., 0] == 100, "square")])
    assert page.texts("th", scope="col")[1] == "kind"
    assert [text for text in page.texts("figcaption") if "ground truth" in text] == ["ground truth outlined in green"]
    first, second = page.attributes("img", "src")[0], page.attributes("img", "src")[3]
    assert first != second


def test_only_the_worst_have_cards_and_the_page_says_so(
    detector: sf.Detector, normal: Path, bad: np.ndarray, make: Make
) -> None:
    images = [(path.name, decode(path)) for path in sorted(normal.iterdir())[:5]]
    scores = {key: detector.query(pixels).image_score for key, pixels in images}
    order = sorted(scores, key=lambda key: -scores[key])
    for given in (images, images[::-1]):
        page = make(detector, given, cards=2)
        assert page.texts("th", scope="row") == order
        assert page.texts("h3") == order[:2]
        assert len(page.texts("a", href="#images")) == 2
        assert "Pictures of the 2 images with the highest score" in page.texts("h2")
    page = make(detector, images, cards=0)
    assert page.texts("h3") == []
    assert page.texts("th", scope="row") == order
    assert make(detector, []).texts("th", scope="row") == []


def test_metrics_and_curves(detector: sf.Detector, bad: np.ndarray, make: Make) -> None:
    curve = image_roc([3.0, 1.0, 2.0], [True, False, True])
    assert curve is not None
    limited = replace(curve, name="pixel_PRO", limit=0.3)
    page = make(
        detector, [("bad.png", bad)], metrics={"image_AUROC": 1.0, "image_AP": None, "pixel_AUPRO": 0.25},
        curves=[curve, limited], notes=["No <AP>."],
    )  # fmt: skip
    assert page.texts("td", **{"class": "number"})[:3] == ["1.0000", "–", "0.2500"]
    areas = [text for text in page.texts("figcaption") if ", area" in text]
    assert areas == ["image ROC, area 1.0000", "pixel PRO, area 0.2500"]
    assert curve.path(216, 200) in page.attributes("path", "d")
    assert "area counts up to 0.3" in page.texts("text")
    assert "No <AP>." in page.texts("p")


def test_left_early_it_writes_nothing(detector: sf.Detector, bad: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("of an earlier run")
    report = Report(path, RunFacts.of(detector), scale_of(detector), "run", SourceImages(detector.gallery.snapshot()))
    folder = Path(report._folder.name)
    with report:
        report.add("bad.png", bad, detector.query(bad))
        assert len(list(folder.iterdir())) == 1
    assert path.read_text() == "of an earlier run"
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_done(
    detector: sf.Detector, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(sf.OutputError, match="cannot write"):
        make(detector, [], path=tmp_path / "file" / "report.html")


def test_names_whose_bytes_are_no_text(detector: sf.Detector, bad: np.ndarray, tmp_path: Path) -> None:
    path, scale, originals = tmp_path / "report.html", scale_of(detector), SourceImages(detector.gallery.snapshot())
    with Report(path, RunFacts.of(detector), scale, "of a\udcff", originals) as report:
        report.add("b\udcff.png", bad, detector.query(bad), label="c\udcff")
        report.close(notes=["d\udcff"])
    text = path.read_text("utf-8")
    assert all(f"{name}\\udcff" in text for name in ("of a", "b", "c", "d"))
