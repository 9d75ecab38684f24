"""A federation finds what one gallery of all images finds, bit for bit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.detect import measure_doubts

SPEC = sf.ExtractorSpec(
    name="own", level_shapes=((5, 4, 5), (3, 2, 3), (2, 1, 1)), image_dim=6, resized=(16, 20), crop=(16, 20)
)
RECIPES = {
    "relative": (sf.RECIPES["relative"].search, sf.RECIPES["relative"].score),
    "wary": (dataclasses.replace(sf.RECIPES["wary"].search, leave_out=0.3), sf.RECIPES["wary"].score),
    "robust": (sf.RECIPES["robust"].search, sf.RECIPES["robust"].score),
    "paper": (sf.RECIPES["paper"].search, sf.RECIPES["paper"].score),
    "rad": (sf.RECIPES["rad"].search, sf.RECIPES["rad"].score),
    "wide": (sf.SearchOptions(matching="by_level", window=1, kappa=6), sf.ScoreOptions()),
    "cosine": (sf.SearchOptions(matching="by_level", metric="cosine", engine="pyramid"), sf.ScoreOptions()),
    "flat": (sf.SearchOptions(engine="flat"), sf.ScoreOptions()),
}


class Stored:
    """Makes features of what an image's pixels count as: a stand-in that needs no network."""

    spec = SPEC
    batch_size = 3

    def extract(self, views: Sequence[Pixels]) -> sf.Features:
        return features_of([int(view.sum()) for view in views])


def features_of(seeds: Sequence[int]) -> sf.Features:
    """Features by seed: those of even seeds have few digits, which makes distances tie; others round in every sum."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        values = [rng.standard_normal(shape) for shape in ((SPEC.image_dim,), *SPEC.level_shapes)]
        rows.append([np.round(one * 3) / 3 if seed % 2 == 0 else one + 0.1 for one in values])
    image, *levels = (np.stack(column) for column in zip(*rows, strict=True))
    return sf.Features(image.astype(np.float32), [level.astype(np.float16) for level in levels])


def of_two_sizes(seeds: Sequence[int]) -> sf.Features:
    """Features whose patches lie near 0 or near 100, in other shares for each seed: centring rounds the small ones."""
    images = []
    for seed in seeds:
        rng, share = np.random.default_rng([1, seed]), (1 + seed % 4) / 5
        values = [(rng.standard_normal(shape), rng.random(shape[1:]) < share) for shape in SPEC.level_shapes]
        images.append([np.where(small, one / 1000, one + 100).astype(np.float16) for one, small in values])
    levels = [np.stack(column) for column in zip(*images, strict=True)]
    return sf.Features(features_of(seeds).image, levels)


class OfTwoSizes(Stored):
    """Makes such features."""

    def extract(self, views: Sequence[Pixels]) -> sf.Features:
        return of_two_sizes([int(view.sum()) for view in views])


def filled(
    path: Path, seeds: Sequence[int], first: int, features: Callable[[Sequence[int]], sf.Features] = features_of
) -> sf.Gallery:
    gallery = sf.Gallery.create(path, SPEC, sf.IndexOptions(kind="flat", device="cpu"))
    for start in range(0, len(seeds), 3):  # several shards
        some = seeds[start : start + 3]
        gallery.append([f"{first + start + at:03d}" for at in range(len(some))], features(some))
    return gallery


def assert_equal(found: Any, expected: Any) -> None:
    """Compare detections, but for their seconds."""
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "seconds":
            continue
        if dataclasses.is_dataclass(other):
            assert_equal(one, other)
        elif isinstance(other, tuple) and other and dataclasses.is_dataclass(other[0]):
            assert len(one) == len(other)
            for pair in zip(one, other, strict=True):
                assert_equal(*pair)
        elif isinstance(other, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other, field.name


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="image scores tell little|.*different content")
        yield


@settings(max_examples=16)
@given(data=st.data())
def test_any_split_of_any_gallery(data: st.DataObject) -> None:
    """Members empty, of one image, all neighbours on one; copies within a member and across; ties; any K and kappa."""
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 1))
    seeds = [data.draw(st.integers(0, 12)) for _ in range(sum(sizes))]
    recipe = data.draw(st.sampled_from(sorted(RECIPES)))
    search, score = RECIPES[recipe]
    k = data.draw(st.integers(1, sum(sizes)))
    together = search.matching != "by_level"  # else the coarsest level has one patch of each neighbour
    kappa = data.draw(st.integers(1, 8 if together else min(k, 8)))
    search = dataclasses.replace(search, k=k, kappa=kappa)
    ids = sorted(data.draw(st.sets(st.integers(0, sum(sizes) - 1), min_size=1, max_size=3)))
    with TemporaryDirectory() as name:
        folder, start, members = Path(name), 0, {}
        filled(folder / "one.gallery", seeds, 0)
        for number, size in enumerate(sizes):
            filled(folder / f"{number}.gallery", seeds[start : start + size], start)
            members[f"m{number}"] = folder / f"{number}.gallery"
            start += size
        with sf.Gallery.open(folder / "one.gallery") as one, sf.Cluster.create(folder / "c", members) as cluster:
            try:
                detector = sf.Detector(one, Stored(), search, score)
                expected: Any = list(detector.leave_one_out(ids))
                image = np.full((16, 20, 3), data.draw(st.integers(0, 3)), np.uint8)
                expected += [detector.query(image)]
            except sf.SpadeError as error:
                expected = error
            federation = sf.Federation(cluster, Stored(), search, score)
            if isinstance(expected, sf.SpadeError):
                with pytest.raises(type(expected)):
                    [*federation.leave_one_out(ids), federation.query(np.zeros((16, 20, 3), np.uint8))]
                return
            found = [*federation.leave_one_out(ids), federation.query(image)]
            assert len(found) == len(expected)
            for pair in zip(found, expected, strict=True):
                assert_equal(*pair)


@pytest.mark.parametrize("distinct", [False, True])
def test_spacing_is_centred_as_in_one_gallery(tmp_path: Path, distinct: bool) -> None:
    """The last digits of a spacing depend on the mean that is subtracted: the query's, or the nearest image's."""
    search, score = RECIPES["relative"]
    search = dataclasses.replace(search, k=7, kappa=6, distinct=distinct)
    filled(tmp_path / "one.gallery", range(9), 0, of_two_sizes).close()
    members = {f"m{at}": tmp_path / f"{at}.gallery" for at in (0, 3, 6)}
    for at, path in zip((0, 3, 6), members.values(), strict=True):
        filled(path, range(at, at + 3), at, of_two_sizes).close()
    with sf.Gallery.open(tmp_path / "one.gallery") as one, sf.Cluster.create(tmp_path / "c", members) as cluster:
        detector = sf.Detector(one, OfTwoSizes(), search, score)
        federation = sf.Federation(cluster, OfTwoSizes(), search, score)
        for pair in zip(federation.leave_one_out(range(9)), detector.leave_one_out(range(9)), strict=True):
            assert_equal(*pair)


def test_what_normal_images_say_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of all members is that of one gallery, and queries leave out the same neighbours by it."""
    monkeypatch.setattr(measure_doubts, "FEWEST", 12)
    search, score = RECIPES["wary"]
    filled(tmp_path / "one.gallery", range(12), 0).close()
    members = {f"m{at}": tmp_path / f"{at}.gallery" for at in (0, 5)}
    filled(members["m0"], range(5), 0).close()
    filled(members["m5"], range(5, 12), 5).close()
    with sf.Gallery.open(tmp_path / "one.gallery") as one, sf.Cluster.create(tmp_path / "c", members) as cluster:
        expected = sf.calibrate(sf.Detector(one, Stored(), search, score), 0.1)
        found = sf.calibrate(sf.Federation(cluster, Stored(), search, score), 0.1)
        assert found.baseline is not None
        assert expected.baseline is not None
        assert found.baseline.doubts == expected.baseline.doubts
        assert len(found.baseline.doubts) == 12
        for side in (sf.Detector(one, Stored(), search, score), sf.Federation(cluster, Stored(), search, score)):
            uncalibrated = side.baseline()
            assert uncalibrated is not None
            assert uncalibrated.doubts == found.baseline.doubts
        np.testing.assert_array_equal(found.image_scores, expected.image_scores)
        expected.write(one.path)
        cluster.write_calibration(found)
        detector, federation = sf.Detector(one, Stored()), sf.Federation(cluster, Stored())
        left_out = 0
        for seed in range(20):
            image = np.full((16, 20, 3), seed, np.uint8)
            query = detector.query(image)
            assert_equal(federation.query(image), query)
            left_out += len(query.left_out)
        assert left_out
