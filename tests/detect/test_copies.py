"""Copies among the normal images: they never stand in for each other, however they came about."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.calibration import Calibration
from spade_faiss.store import copies
from spade_faiss.store.copies import Copies
from tests.helpers.galleries import make_gallery, random_features_of
from tests.helpers.images import make_images

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


ROBUST = sf.RECIPES["robust"]
N = 20


def textures(folder: Path, n: int = N, seed: int = 0) -> Path:
    """Write n noisy textures around one grey."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        pixels = rng.normal(120, 12, (16, 16, 3)).clip(0, 255).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def copied(folder: Path, n: int, suffix: str = "again.png") -> Path:
    """Save the first n images of a folder once more, in its subfolder `more`."""
    (folder / "more").mkdir()
    for path in sorted(folder.glob("*.png"))[:n]:
        Image.open(path).save(folder / "more" / f"{path.stem}-{suffix}")
    return folder


def detector_of(folder: Path, normal: Path, k: int | None = None) -> sf.Detector:
    gallery, extractor = make_gallery(folder, normal)
    return sf.Detector(gallery, extractor, sf.SearchOptions(k=k, level_weights="spread"), ROBUST.score)


def without_copies(patch: pytest.MonkeyPatch) -> None:
    """Put the mistake back: each image is left out alone."""
    patch.setattr(Copies, "of", lambda self, ids: [np.array([row]) for row in ids])
    patch.setattr(Copies, "repeated_if_quick", lambda self: None)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Calibration]:
    """Of the set without copies, by K."""
    folder = tmp_path_factory.mktemp("once")
    textures(folder / "normal")
    return cache(lambda k: sf.calibrate(detector_of(folder / f"g{k}", folder / "normal", k), 0.05))


@pytest.mark.parametrize(
    ("n", "suffix", "k"),
    [
        (4, "again.png", 1),
        (8, "again.png", 5),
        (10, "again.png", N),
        (N, "again.png", 5),
        (4, "other.bmp", 5),
        (8, "other.tiff", 1),
        (N, "other.webp", N),
    ],
)
def test_thresholds_are_those_of_the_set_without_copies(
    tmp_path: Path, once: Callable[[int], Calibration], n: int, suffix: str, k: int
) -> None:
    """By another name, in another folder, in another lossless format."""
    folder = tmp_path / "normal" / "more"
    copied(textures(tmp_path / "normal"), n, suffix)
    if suffix.endswith("webp"):
        for path in folder.iterdir():
            Image.open(folder.parent / f"{path.name[:3]}.png").save(path, lossless=True)
    found = sf.calibrate(detector_of(tmp_path / "twice", tmp_path / "normal", k), 0.05)
    assert len(found.image_scores) == N
    assert found.image_scores == pytest.approx(once(k).image_scores, rel=1e-4)
    assert found.map_maxima == pytest.approx(once(k).map_maxima, rel=1e-4)
    assert found.image_threshold == pytest.approx(once(k).image_threshold, rel=1e-4)


@pytest.mark.parametrize("n", [0, 20])
def test_false_alarms_are_as_promised_and_defects_are_found(tmp_path: Path, n: int) -> None:
    detector = detector_of(tmp_path / "g", copied(textures(tmp_path / "normal", 40), n), 10)
    sf.calibrate(detector, 0.05).write(detector.gallery.path)
    judging = sf.Detector(detector.gallery, detector.extractor)
    new = sorted(textures(tmp_path / "new", 60, seed=1).iterdir())
    assert sum(one.verdict == "anomalous" for one in judging.query_batch(new)) <= 60 * 0.07
    for path in new[:8]:
        pixels = np.array(Image.open(path))
        pixels[20:36, 20:36] = (200, 40, 40)
        assert judging.query(pixels).verdict == "anomalous"


@pytest.mark.parametrize(("n", "wrong"), [(8, "ceiling"), (N, "zero")])
def test_leaving_out_one_image_alone_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, wrong: str
) -> None:
    """The mistake is refused even where copies are not known to be such, as lossy ones are not."""
    normal = copied(textures(tmp_path / "normal"), n)
    without_copies(monkeypatch)
    detector = detector_of(tmp_path / "g", normal, 1)
    if wrong == "zero":
        with (
            pytest.warns(UserWarning, match="image scores tell little: .* found 0 for at least half of 40 normal"),
            pytest.raises(sf.OptionError, match="calibrate: expected image scores that differ, found 0 for 40 of 40"),
        ):
            sf.calibrate(detector, 0.05)
    else:
        with (
            pytest.warns(UserWarning, match="image scores tell little"),
            pytest.raises(sf.OptionError, match=r"found the ceiling, 1e\+30, for 12 of 28 normal"),
        ):
            sf.calibrate(detector, 0.05)


def test_copies_in_real_sets_are_equal_pixels_under_two_names(tmp_path: Path) -> None:
    """As in PIPED (Bianconi et al.), where PA_BDP01_TL_S_ND_01_8.bmp and PA_BDP01_TL_S_ND_03_6.bmp are one picture.

    The names say two sheets, and metadata may differ, so that the files do.
    """
    normal = textures(tmp_path / "normal", 12)
    buffer = io.BytesIO()
    Image.open(normal / "003.png").save(buffer, "BMP", dpi=(300, 300))
    (normal / "sheet_03_6.bmp").write_bytes(buffer.getvalue())
    gallery, _ = make_gallery(tmp_path / "g", normal)
    assert gallery.info()["copies"] == 1
    [same] = Copies(gallery.snapshot()).of(gallery.ids(["003.png"]))
    assert gallery.keys(same) == ["003.png", "sheet_03_6.bmp"]


def test_an_image_that_differs_a_little_is_no_copy(tmp_path: Path) -> None:
    normal = textures(tmp_path / "normal", 12)
    pixels = np.array(Image.open(normal / "003.png"))
    Image.fromarray(np.minimum(pixels, 254) + 1).save(normal / "brighter.png")
    pixels[:4, :4] += 30
    Image.fromarray(pixels).save(normal / "spot.png")
    gallery, _ = make_gallery(tmp_path / "g", normal)
    assert gallery.info()["copies"] == 0
    assert all(len(same) == 1 for same in Copies(gallery.snapshot()).of(gallery.snapshot().ids()))


def test_a_sample_counts_each_content_once(tmp_path: Path) -> None:
    detector = detector_of(tmp_path / "g", copied(textures(tmp_path / "normal"), N), 5)
    for sample in (10, N, 25):
        assert len(sf.calibrate(detector, 0.1, sample=sample).image_scores) == min(sample, N)
    with pytest.raises(sf.OptionError, match=r"at least 24 normal images .* found 20 \(40 images, 20 of them copies"):
        sf.calibrate(detector, 0.04)


def test_the_baseline_counts_each_content_once(tmp_path: Path) -> None:
    once = detector_of(tmp_path / "once", textures(tmp_path / "normal"), 1).baseline()
    twice = detector_of(tmp_path / "twice", copied(tmp_path / "normal", N), 1).baseline()
    assert once is not None
    assert twice is not None
    assert once.keys == twice.keys
    assert twice.peak.median == pytest.approx(once.peak.median, rel=1e-4)
    np.testing.assert_allclose(twice.total, once.total, rtol=1e-4)


def test_groups_take_the_copies_of_their_members_along(tmp_path: Path) -> None:
    """A copy of the other picture of a part, under a name of no group, does not vouch for the part."""
    normal = textures(tmp_path / "normal", 10)
    for path in sorted(normal.iterdir()):
        pixels = np.array(Image.open(path))
        pixels[:8, :8] ^= 8
        Image.fromarray(pixels).save(normal / f"{path.stem}-b.png")
    gallery, extractor = make_gallery(tmp_path / "one", normal)
    options = sf.SearchOptions(k=1)
    once = sf.calibrate(sf.Detector(gallery, extractor, options), 0.2, group=r"^(\d+)")
    for path in sorted(normal.glob("*-b.png")):
        (normal / f"copy-of-{path.name}").write_bytes(path.read_bytes())
    gallery, extractor = make_gallery(tmp_path / "two", normal)
    found = sf.calibrate(sf.Detector(gallery, extractor, options), 0.2, group=r"^(\d+)")
    assert found.image_scores == pytest.approx(once.image_scores, rel=1e-4)


def test_a_contamination_and_its_copy_come_first(tmp_path: Path) -> None:
    normal = textures(tmp_path / "normal", 16)
    pixels = np.array(Image.open(normal / "011.png"))
    pixels[20:36, 20:36] = (250, 20, 20)
    for name in ("011.png", "again.bmp"):
        Image.fromarray(pixels).save(normal / name)
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    found = sf.find_suspects(sf.Detector(gallery, extractor, sf.SearchOptions(k=3)))
    assert {one.key for one in found[:2]} == {"011.png", "again.bmp"}
    assert [one.copies for one in found] == [1, 1, *[0] * 15]
    assert found[1].outlier_score > 3 * found[2].outlier_score


@pytest.mark.parametrize("n", [2, 10])
def test_all_images_are_copies_of_one(tmp_path: Path, n: int) -> None:
    """There is nothing to calibrate with, but a query is compared with the one content."""
    normal = tmp_path / "normal"
    normal.mkdir()
    for number in range(n):
        Image.new("RGB", (32, 32), (128, 90, 60)).save(normal / f"{number}.{('png', 'bmp')[number % 2]}")
    detector = detector_of(tmp_path / "g", normal)
    message = f"expected other normal images to compare '0.png' with, found none: all {n} images are copies of one"
    with pytest.raises(sf.NotEnoughImagesError, match=message):
        sf.calibrate(detector, 0.5)
    with pytest.raises(sf.NotEnoughImagesError, match=message):
        sf.find_suspects(detector)
    assert detector.query(normal / "0.png").image_score == 0
    assert detector.query(np.full((32, 32, 3), 20, np.uint8)).image_score > 0
    assert detector.gallery.info()["copies"] == n - 1


@pytest.mark.parametrize(("image_score", "what"), [("knn", "maxima of maps"), ("map_max", "image scores")])
def test_thresholds_that_ties_have_driven_to_0_are_refused(
    tmp_path: Path, image_score: sf.options.ImageScore, what: str
) -> None:
    """Patches that are all equal, though the images are not: blank parts, or another network's dead levels."""
    toy = sf.load_extractor("toy")
    features = random_features_of(20, toy.spec)
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    levels = [np.ones_like(one) for one in features.levels]
    gallery.append([f"{number:03}" for number in range(20)], sf.Features(features.image, levels))
    detector = sf.Detector(gallery, toy, score=sf.ScoreOptions(image_score=image_score))
    with pytest.raises(sf.OptionError, match=f"expected {what} that differ, found 0 for 20 of 20 normal images"):
        sf.calibrate(detector, 0.1)


def test_a_calibration_of_an_earlier_release_with_such_thresholds_is_named(tmp_path: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", textures(tmp_path / "normal", 12))
    detector = sf.Detector(gallery, extractor)
    zeros = np.zeros(12)
    Calibration(gallery.generation, detector.settings(), 0.1, None, zeros, zeros).write(gallery.path)
    with pytest.warns(UserWarning, match="verdicts tell nothing: .* found 0 for 12 of 12 normal images"):
        sf.Detector(gallery, extractor)


@pytest.mark.parametrize("command", ["calibrate", "audit"])
def test_a_group_that_matches_no_key(tmp_path: Path, command: str) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", textures(tmp_path / "normal", 12))
    detector = sf.Detector(gallery, extractor)

    def run(group: str) -> object:
        if command == "audit":
            return sf.find_suspects(detector, group=group)
        return sf.calibrate(detector, 0.2, group=group)

    expected = "group: expected a pattern that matches keys of .*, as '000.png' and '001.png', found 'part', which "
    with pytest.raises(sf.OptionError, match=expected + "matches none of 12"):
        run("part")
    with pytest.raises(sf.NotEnoughImagesError, match="all 12 images are left out with it, as its group"):
        run(r"\.png")
    with pytest.warns(UserWarning, match="puts no two of 12 images together"):
        run(r"(\d+)\.png")


def test_make_images_differ(tmp_path: Path) -> None:
    """Images that other tests use are no copies."""
    gallery, _ = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 12))
    assert gallery.info()["copies"] == 0


@pytest.mark.parametrize(
    ("copies", "index", "k"),
    [(1, "flat", 1), (4, "flat", 5), (N, "flat", N), (N, "ivf", 1), (4, "ivf", 5), (1, "ivf", N)],
)
def test_a_query_finds_what_it_finds_without_copies(tmp_path: Path, copies: int, index: str, k: int) -> None:
    """Of K neighbours, no two are of one content, and as many are searched: maps and scores are equal."""
    normal, queries = textures(tmp_path / "normal"), textures(tmp_path / "test", 3, seed=1)
    gallery, extractor = make_gallery(tmp_path / "once", normal)
    images = [*sorted(queries.iterdir()), normal / "001.png"]
    gallery.reindex(index)
    once = sf.Detector(gallery, extractor, sf.SearchOptions(k=k)).query_batch(images)
    gallery, extractor = make_gallery(tmp_path / "twice", copied(normal, copies))
    gallery.reindex(index)
    assert len(gallery) == N + copies
    for found, expected in zip(
        sf.Detector(gallery, extractor, sf.SearchOptions(k=k)).query_batch(images), once, strict=True
    ):
        names = [
            key.removeprefix("more/").removesuffix("-again.png").removesuffix(".png") for key in found.neighbours.keys
        ]
        assert names == [key.removesuffix(".png") for key in expected.neighbours.keys]
        assert found.image_score == pytest.approx(expected.image_score, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-6)


def test_fewer_contents_than_k(tmp_path: Path) -> None:
    """One image 21 times: it is the one neighbour, and a query says so."""
    image = textures(tmp_path / "normal", 1) / "000.png"
    for number in range(N):
        Image.open(image).save(tmp_path / "normal" / f"again-{number}.bmp")
    gallery, extractor = make_gallery(tmp_path / "g", tmp_path / "normal")
    found = sf.Detector(gallery, extractor, sf.SearchOptions(k=15, k_score=10)).query(image)
    assert (len(found.neighbours.keys), found.image_score, found.matches.shape[-1]) == (1, 0.0, 3)


def test_images_that_differ_a_little_are_no_copies(tmp_path: Path) -> None:
    """One grey level more in each pixel is another image: every one of them takes a place."""
    pixels = np.array(Image.open(textures(tmp_path / "normal", 1) / "000.png"))
    for number in range(1, 6):
        Image.fromarray(pixels + np.uint8(number)).save(tmp_path / "normal" / f"{number:03d}.png")
    gallery, extractor = make_gallery(tmp_path / "g", tmp_path / "normal")
    found = sf.Detector(gallery, extractor, sf.SearchOptions(k=6)).query(tmp_path / "normal" / "003.png")
    assert len(set(found.neighbours.keys)) == 6


def test_levels_are_equal_up_to_rounding_wherever_they_differ() -> None:
    """A few values are compared first, and all of what these do not tell apart."""
    rng = np.random.default_rng(0)
    own = [rng.standard_normal((1, 5, side, side), np.float32).astype(np.float16) for side in (9, 4)]
    others = [np.repeat(level, 6, axis=0) for level in own]
    others[0][1] = (others[0][1].astype(np.float32) * (1 + 2**-11)).astype(np.float16)  # as rounding may have it
    others[0][2].flat[1] += 1
    others[0][3].flat[copies.GLANCE] += 1
    others[1][4].flat[-1] += 1
    others[1][5] = 0
    assert copies._equal_levels(own, others).tolist() == [True, True, False, False, False, False]
