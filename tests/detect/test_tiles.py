"""Images in tiles: maps, scores and verdicts of the whole image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.explanation import correspondences, match_arrays
from spade_faiss.images.tiling import cut, image_key
from spade_faiss.store.tiles import TileTable
from tests import reference
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

TILED = sf.FeatureOptions(tile=(32, 48), overlap=8)
SIZE = (70, 100)
ROBUST = sf.RECIPES["robust"]


def textures(folder: Path, n: int, seed: int = 0, size: tuple[int, int] = (64, 512)) -> Path:
    """Write n noisy textures around one grey."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        pixels = rng.normal(120, 12, (*size, 1)).clip(0, 255).astype(np.uint8).repeat(3, axis=2)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def clouds(folder: Path, n: int, seed: int = 0) -> Path:
    """Write n strips whose brightness changes slowly from left to right, as under uneven light."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        light = np.interp(np.arange(512), np.arange(0, 641, 128), rng.normal(120, 25, 6))
        pixels = (light + rng.normal(0, 3, (64, 512))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    """Images of several sizes: some in tiles, one no larger than a tile."""
    make_images(tmp_path / "normal", 6, size=SIZE)
    make_images(tmp_path / "normal" / "other", 2, seed=1, size=(32, 60))
    make_images(tmp_path / "normal" / "small", 2, seed=2, size=(30, 40))
    return tmp_path / "normal"


@pytest.fixture
def queries(tmp_path: Path) -> list[Path]:
    make_images(tmp_path / "test", 2, seed=3, size=SIZE)
    make_images(tmp_path / "test" / "small", 1, seed=4, size=(32, 48))
    make_images(tmp_path / "test" / "wide", 1, seed=5, size=(20, 99))
    return sorted((tmp_path / "test").rglob("*.png"))


@pytest.fixture
def tiled(tmp_path: Path, normal: Path) -> sf.Gallery:
    return make_gallery(tmp_path / "tiled", normal, TILED)[0]


@pytest.fixture
def of_tiles(tmp_path: Path, normal: Path, tiled: sf.Gallery) -> sf.Gallery:
    """A gallery without tiles, of files that are the tiles of the images."""
    for path in sorted(normal.rglob("*.png")):
        pixels = np.array(Image.open(path))
        for number, box in enumerate(tiled.spec.tiling.boxes(pixels.shape[:2])):
            target = tmp_path / "cut" / f"{path.relative_to(normal).with_suffix('')}-{number:02d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cut(pixels, box)).save(target)
    return make_gallery(tmp_path / "of_tiles", tmp_path / "cut")[0]


def detector_of(gallery: sf.Gallery, k: int | None = 4, score: sf.ScoreOptions | None = None) -> sf.Detector:
    return sf.Detector(gallery, gallery.load_extractor(), sf.SearchOptions(k=k), score)


def test_each_tile_is_an_image_of_the_gallery(tiled: sf.Gallery, of_tiles: sf.Gallery) -> None:
    assert len(tiled) == len(of_tiles) == 6 * 9 + 2 * 2 + 2
    keys = tiled.keys()
    assert keys[:2] == ["000.png", "000.png#xywh=26,0,48,32"]
    assert sum(image_key(key) == key for key in keys) == 10


@pytest.mark.parametrize("score", [sf.ScoreOptions(), sf.ScoreOptions(image_score="map_max", sigma=2)])
def test_a_whole_image_is_put_together_from_its_tiles(
    tiled: sf.Gallery, of_tiles: sf.Gallery, queries: list[Path], score: sf.ScoreOptions
) -> None:
    """The highest tile's score; and the mean of the tiles' maps, weighed by the distance to the tiles' edges."""
    whole, single = detector_of(tiled, score=score), detector_of(of_tiles, score=score)
    for path in queries:
        pixels = np.array(Image.open(path))
        found = whole.query(path)
        boxes = tiled.spec.tiling.boxes(pixels.shape[:2])
        tiles = single.query_batch([np.ascontiguousarray(cut(pixels, box)) for box in boxes])
        assert found.image_score == max(tile.image_score for tile in tiles)
        total, weights = np.zeros(pixels.shape[:2]), np.zeros(pixels.shape[:2])
        for box, tile in zip(boxes, tiles, strict=True):
            weight = np.outer(*(edge_weights(box, boxes, axis) for axis in (1, 0)))
            cut(total, box)[:] += weight * tile.anomaly_map
            cut(weights, box)[:] += weight
        np.testing.assert_allclose(found.anomaly_map, total / weights, rtol=1e-5, atol=1e-7)
        assert found.region == (0, 0, *pixels.shape[1::-1])
        if len(boxes) > 1:
            assert [tile.box for tile in found.tiles] == boxes
            for tile, expected in zip(found.tiles, tiles, strict=True):
                np.testing.assert_array_equal(tile.sq_distances, expected.sq_distances)
                np.testing.assert_array_equal(tile.matches, expected.matches)


def edge_weights(box: tuple[int, ...], boxes: list[tuple[int, int, int, int]], axis: int) -> np.ndarray:
    """The share of the way from a tile's edge to where its neighbour ends, at most 1; 1 at an edge of the image."""
    spans = sorted({(one[axis], one[axis + 2]) for one in boxes})
    at = spans.index((box[axis], box[axis + 2]))
    start, end = spans[at]
    pixel, weight = np.arange(start, end) + 0.5, np.ones(end - start)
    if at:
        weight *= np.minimum(1, (pixel - start) / (spans[at - 1][1] - start))
    if at + 1 < len(spans):
        weight *= np.minimum(1, (end - pixel) / (end - spans[at + 1][0]))
    return weight


@pytest.mark.parametrize("score", [None, ROBUST.score])
def test_where_one_tile_covers_the_image_nothing_changes(
    tmp_path: Path, queries: list[Path], score: sf.ScoreOptions | None
) -> None:
    make_images(tmp_path / "normal", 12, size=SIZE)
    answers = []
    for name, options in (("whole", None), ("tiled", sf.FeatureOptions(tile=(70, 128)))):
        detector = detector_of(make_gallery(tmp_path / name, tmp_path / "normal", options)[0], score=score)
        calibration = sf.calibrate(detector, 0.1)
        calibration.write(detector.gallery.path)
        found = detector_of(detector.gallery, score=score).query_batch(queries)
        answers.append((calibration.image_scores, calibration.map_maxima, found))
    (scores, maxima, whole), (other_scores, other_maxima, tiled) = answers
    np.testing.assert_array_equal(scores, other_scores)
    np.testing.assert_array_equal(maxima, other_maxima)
    for first, second in zip(whole, tiled, strict=True):
        np.testing.assert_array_equal(first.anomaly_map, second.anomaly_map)
        np.testing.assert_array_equal(first.matches, second.matches)
        assert (first.image_score, first.verdict, first.regions) == (second.image_score, second.verdict, second.regions)
        assert (first.neighbours.keys, second.tiles) == (second.neighbours.keys, ())


def test_single_queries_streams_and_batches_agree(tiled: sf.Gallery, queries: list[Path]) -> None:
    detector = detector_of(tiled)
    opened = [Image.open(path).convert("RGB") for path in queries]
    single, stream = [detector.query(path) for path in queries], list(detector.stream(opened))
    for one, two, three in zip(single, stream, detector.query_batch(queries), strict=True):
        np.testing.assert_array_equal(one.anomaly_map, two.anomaly_map)
        np.testing.assert_array_equal(one.anomaly_map, three.anomaly_map)
        assert one.image_score == two.image_score == three.image_score
        assert (one.path, two.path, three.path) == (one.path, None, one.path)


def test_an_image_that_cannot_be_read_is_raised_at_its_turn(tiled: sf.Gallery, queries: list[Path]) -> None:
    found: Iterator[sf.Detection] = detector_of(tiled).stream([queries[0], "gone.png", queries[1]])
    assert next(found).path == str(queries[0])
    with pytest.raises(sf.ImageError, match=r"gone\.png"):
        next(found)


def test_calibration_leaves_out_all_tiles_of_an_image(tmp_path: Path, normal: Path, tiled: sf.Gallery) -> None:
    """As if the image were not in the gallery; its score is that of its highest tile."""
    found = sf.calibrate(detector_of(tiled), 0.1)
    assert len(found.image_scores) == 10
    for number, name in enumerate(["000.png", "other/001.png", "small/000.png"]):
        others, _ = make_gallery(tmp_path / f"without-{number}", normal, TILED)
        others.remove([name])
        alone = detector_of(others).query(normal / name)
        keys = tiled.keys()
        at = [key for key in keys if image_key(key) == key].index(name)
        assert found.image_scores[at] == pytest.approx(alone.image_score, rel=1e-6)


def test_groups_go_by_the_names_of_images(tiled: sf.Gallery) -> None:
    sf.calibrate(detector_of(tiled), 0.1, group="^(other|small)")
    with pytest.raises(sf.OptionError, match="which matches none of 60"):
        sf.calibrate(detector_of(tiled), 0.1, group="xywh")


@pytest.mark.slow
def test_the_promise_holds_for_whole_images_and_small_defects_are_found(tmp_path: Path) -> None:
    """Seen whole, the defect of 8 px is shrunk to 1/16 of that, and missed."""
    normal, new = clouds(tmp_path / "normal", 40), clouds(tmp_path / "new", 20, seed=1)
    defective = []
    for number, path in enumerate(sorted(new.iterdir())[:8]):
        pixels = np.array(Image.open(path))
        left = 30 + 37 * number
        pixels[20:28, left : left + 8] //= 2
        defective.append((pixels, left))
    for options, hits in ((None, 2), (sf.FeatureOptions(tile=64), 8)):
        detector = detector_of(make_gallery(tmp_path / f"g{hits}", normal, options)[0], 10, ROBUST.score)
        sf.calibrate(detector, 0.05).write(detector.gallery.path)
        judging = detector_of(detector.gallery, 10, ROBUST.score)
        flagged = sum(one.verdict == "anomalous" for one in judging.stream(sorted(new.iterdir())))
        assert flagged <= 3
        found = [(judging.query(pixels), left) for pixels, left in defective]
        right = [
            any(region.box[0] < left + 8 and region.box[2] > left for region in one.regions) for one, left in found
        ]
        assert sum(right) <= hits if options is None else sum(right) == hits


def test_there_is_no_step_where_tiles_meet(tmp_path: Path) -> None:
    """With overlap, the map changes no faster there than elsewhere; with tiles side by side, unsmoothed, it does."""
    normal, [query] = textures(tmp_path / "normal", 8), textures(tmp_path / "test", 1, seed=1).iterdir()
    steepest = {}
    for overlap in (16, 0):
        gallery, _ = make_gallery(tmp_path / f"g{overlap}", normal, sf.FeatureOptions(tile=64, overlap=overlap))
        found = detector_of(gallery, score=sf.ScoreOptions(sigma=0)).query(query)
        steps = np.abs(np.diff(found.anomaly_map, axis=1)).max(axis=0)
        edges = {edge for tile in found.tiles for edge in (tile.box[0], tile.box[2])} - {0, 512}
        at_edges = [steps[edge - 1] for edge in edges]
        steepest[overlap] = max(at_edges) / np.delete(steps, [edge - 1 for edge in edges]).max()
    assert steepest[16] <= 1 < steepest[0]


def test_a_defect_that_crosses_tiles_is_one_region(tmp_path: Path) -> None:
    """Asked for in ultralytics/yolov5 issue 2301, of objects across the border of a crop."""
    gallery, _ = make_gallery(tmp_path / "g", textures(tmp_path / "normal", 12), sf.FeatureOptions(tile=64))
    detector = detector_of(gallery, score=ROBUST.score)
    sf.calibrate(detector, 0.1).write(gallery.path)
    pixels = np.array(Image.open(tmp_path / "normal" / "000.png"))
    pixels[28:36, 40:300] = 250
    [region] = detector_of(gallery, score=ROBUST.score).query(pixels).regions
    assert region.box[0] <= 44
    assert region.box[2] >= 296


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5])
def test_copies_of_images_in_tiles(tmp_path: Path, k: int) -> None:
    """All tiles of a copy are left out with the image; images that share some tiles are no copies of each other."""
    normal = textures(tmp_path / "normal", 12, size=(64, 150))
    for path in list(normal.iterdir())[:6]:
        pixels = np.array(Image.open(path))
        pixels[:, :64] = 0  # the first tile is black in half of the images
        Image.fromarray(pixels).save(path)
    scores = []
    for copies in (0, 5):
        for path in sorted(normal.iterdir())[:copies]:
            Image.open(path).save(tmp_path / "normal" / f"{path.stem}.bmp")
        gallery, extractor = make_gallery(tmp_path / f"g{copies}", normal, sf.FeatureOptions(tile=64))
        assert gallery.info()["copies"] == copies
        scores.append(sf.calibrate(sf.Detector(gallery, extractor, sf.SearchOptions(k=k), ROBUST.score), 0.1))
    assert len(scores[0].image_scores) == len(scores[1].image_scores) == 12
    assert np.sort(scores[1].image_scores) == pytest.approx(np.sort(scores[0].image_scores), rel=1e-4)


def test_the_first_stage_alone(tiled: sf.Gallery, queries: list[Path]) -> None:
    """Tiles that the first stage calls normal are not searched, nor the image if all are."""
    sf.calibrate(detector_of(tiled), 0.2).write(tiled.path)
    cascade = sf.Detector(tiled, tiled.load_extractor(), sf.SearchOptions(k=4, localise="suspicious"))
    for one, every in zip(cascade.stream(queries), detector_of(tiled).stream(queries), strict=True):
        assert (one.image_score, one.verdict) == (every.image_score, every.verdict)
        searched = [bool(tile.sq_distances.shape[2]) for tile in one.tiles or one.searched_tiles]
        assert one.is_searched == any(searched)
        if one.verdict == "normal" and one.image_score <= cascade.calibration.image_threshold:  # type: ignore[union-attr]
            assert not one.anomaly_map.any()


def test_suspects_are_tiles_of_images(tmp_path: Path) -> None:
    normal = textures(tmp_path / "normal", 12, size=(64, 200))
    pixels = np.array(Image.open(normal / "004.png"))
    pixels[10:40, 150:190] = (200, 40, 40)
    Image.fromarray(pixels).save(normal / "004.png")
    gallery, _ = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(tile=64))
    worst = sf.find_suspects(detector_of(gallery))[0]
    assert worst.key == "004.png#xywh=136,0,64,64"


def test_a_sample_of_an_audit_is_of_images(tiled: sf.Gallery) -> None:
    keys = [one.key for one in sf.find_suspects(detector_of(tiled), sample=3, seed=2)]
    images = {key.split("#")[0] for key in keys}
    assert len(images) == 3
    assert sorted(keys) == sorted(one for one in tiled.keys(tiled.snapshot().ids()) if one.split("#")[0] in images)


def test_explanations_say_where_in_the_image(tmp_path: Path) -> None:
    normal = textures(tmp_path / "normal", 12, size=(64, 200))
    gallery, _ = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(tile=64))
    pixels = np.array(Image.open(textures(tmp_path / "test", 1, 1, (64, 200)) / "000.png"))
    pixels[24:40, 150:166] = (200, 40, 40)
    found = detector_of(gallery).query(pixels)
    view = gallery.spec.view
    [cell] = correspondences(found, view)
    left, top, right, bottom = view.cell_box(cell.tile.size, (8, 8), cell.row, cell.column)
    x, y = cell.tile.box[0] + (left + right) / 2, cell.tile.box[1] + (top + bottom) / 2
    assert 145 <= x <= 171
    assert 19 <= y <= 45
    arrays = match_arrays(found)
    at = found.tiles.index(cell.tile)
    assert arrays["tiles"][at].tolist() == list(cell.tile.box)
    assert str(arrays["keys"][arrays["neighbour"][at, cell.row, cell.column, 0]]) == cell.matches[0].key
    assert arrays["sq_distance"].shape == (len(found.tiles), 8, 8, 1)


def test_patches_of_a_tile_are_those_of_the_oracle(tiled: sf.Gallery, queries: list[Path]) -> None:
    found, snapshot = detector_of(tiled).query(queries[0]), tiled.snapshot()
    extractor, pixels = tiled.load_extractor(), np.array(Image.open(queries[0]))
    tile = found.tiles[-1]
    own = extractor.extract([tiled.spec.view.apply(cut(pixels, tile.box))])
    ids = [row_id for row_id in snapshot.find_all(tile.neighbours.keys) if row_id is not None]
    expected, _ = reference.search_patches([level[0] for level in own.levels], snapshot.levels(ids), 1)
    np.testing.assert_allclose(tile.sq_distances, expected, rtol=1e-3, atol=1e-5)


def halves(seed: int) -> np.ndarray:
    """A bright tile beside a dark one."""
    pixels = np.random.default_rng(seed).normal(0, 5, (64, 128, 3))
    pixels[:, :64] += 180
    pixels[:, 64:] += 70
    return pixels.clip(0, 255).astype(np.uint8)


def test_tiles_at_their_own_place(tmp_path: Path) -> None:
    """Two halves that have changed places are normal tiles, each at the wrong place."""
    (tmp_path / "normal").mkdir()
    for number in range(12):
        Image.fromarray(halves(number)).save(tmp_path / "normal" / f"{number:03d}.png")
    gallery, extractor = make_gallery(tmp_path / "g", tmp_path / "normal", sf.FeatureOptions(tile=64, overlap=0))
    swapped = np.ascontiguousarray(np.roll(halves(20), 64, axis=1))
    for places, wrong in (("any", False), ("same", True), (None, True)):  # None: as it was calibrated last
        search = sf.SearchOptions(k=3, tile_places=places) if places else None  # type: ignore[arg-type]
        detector = sf.Detector(
            gallery, extractor, search, sf.ScoreOptions(image_score="map_max"), calibrated=not places
        )
        if places:
            calibration = sf.calibrate(detector, 0.1)
            assert ("tile_places" in calibration.settings) == wrong
            calibration.write(gallery.path)
            detector = sf.Detector(gallery, extractor)
        assert detector.query(halves(21)).verdict == "normal"
        found = detector.query(swapped)
        assert (found.verdict == "anomalous") == wrong
        if wrong:
            keys = {key.partition("#")[2] for key in found.tiles[1].neighbours.keys}
            assert keys == {"xywh=64,0,64,64"}
            with pytest.raises(
                sf.NotEnoughImagesError, match=r"another normal image with a tile at \(36, 0\), found none"
            ):
                detector.query(halves(22)[:, :100])


def test_places_are_the_nearest_among_those(tmp_path: Path, tiled: sf.Gallery, queries: list[Path]) -> None:
    """As the search over all tiles finds them, without the others."""
    every = detector_of(tiled, k=len(tiled)).query(queries[0])
    same = sf.Detector(tiled, tiled.load_extractor(), sf.SearchOptions(k=4, tile_places="same")).query(queries[0])
    for tile, among in zip(same.tiles, every.tiles, strict=True):
        place = (tile.box[0], tile.box[1], tile.box[2] - tile.box[0], tile.box[3] - tile.box[1])
        end = "" if place[:2] == (0, 0) else f"#xywh={','.join(map(str, place))}"
        wanted = [key for key in among.neighbours.keys if key == image_key(key) + end]
        assert tile.neighbours.keys == wanted[:4]


def test_keys_are_gone_through_once_for_all_queries(
    tiled: sf.Gallery, queries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To know which tiles lie where; and not at all where that does not matter."""
    made, real = [], TileTable.__init__
    monkeypatch.setattr(TileTable, "__init__", lambda self, *args: (made.append(args), real(self, *args))[1])
    gallery = sf.Gallery.open(tiled.path)
    for path in queries[:2]:
        detector_of(gallery).query(path)
    assert len(made) == 0
    detector = sf.Detector(gallery, gallery.load_extractor(), sf.SearchOptions(k=2, tile_places="same"))
    for _ in range(3):
        detector.query(queries[0])
    assert len(made) == 1


def test_places_take_tiles(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    with pytest.raises(sf.OptionError, match=r"tile_places: 'same' goes with a gallery of tiles, found .* without"):
        sf.Detector(gallery, extractor, sf.SearchOptions(tile_places="same"))
    with pytest.raises(sf.OptionError, match="tile_places: expected any or same, found 'here'"):
        sf.SearchOptions(tile_places="here")  # type: ignore[arg-type]


def test_neighbours_are_left_out_tile_by_tile(tiled: sf.Gallery, queries: list[Path]) -> None:
    """Those that an image names are the highest tile's, as its neighbours are."""
    search = sf.SearchOptions(k=8, matching="by_level", kappa=1, distinct=True, leave_out=0.25)
    detector = sf.Detector(tiled, sf.load_extractor("toy", options=TILED), search, sf.RECIPES["wary"].score)
    for detection in detector.stream(queries):
        assert all(tile.left_out for tile in detection.searched_tiles)
        [highest] = [tile for tile in detection.searched_tiles if tile.matches is detection.matches]
        assert highest.left_out == detection.left_out
        assert highest.neighbours.keys == detection.neighbours.keys
