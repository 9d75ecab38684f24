"""Indexes at size, at a small one: what auto takes, its recall, exact distances, growth, files that stay on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import OptionError
from spade_faiss.extractors.features import Features
from spade_faiss.index import factory as index_factory
from spade_faiss.index import tuning
from spade_faiss.index.image_index import ImageIndex, IndexFile
from spade_faiss.index.tuning import _places, _recall, tune
from spade_faiss.store import secondary_indexes
from tests.helpers.search import Held, brute_force

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


N, D, K = 3000, 96, 50


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At this size threads only wait for each other."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(autouse=True)
def _large_from_a_few_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_factory, "IVF_FROM", 500)
    monkeypatch.setattr(secondary_indexes, "IVF_FROM", 500)


@pytest.fixture(autouse=True)
def _measured_on_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of building would go by in measuring."""
    monkeypatch.setattr(tuning, "HELD_OUT", 50)


def low_dimensional(rng: np.random.Generator, n: int) -> np.ndarray:
    """Clusters in 12 of 96 dimensions, and some noise in all."""
    frame = np.random.default_rng(7)
    centres, directions = frame.normal(size=(20, D)) * 2, frame.normal(size=(12, D))
    values = centres[rng.integers(20, size=n)] + rng.normal(size=(n, 12)) @ directions
    return (values + 0.1 * rng.normal(size=(n, D))).astype(np.float32)


@pytest.fixture
def xb(rng: np.random.Generator) -> np.ndarray:
    return low_dimensional(rng, N)


@pytest.fixture
def xq(rng: np.random.Generator, xb: np.ndarray) -> np.ndarray:
    return low_dimensional(rng, 100)


def build(xb: np.ndarray, **options: Any) -> ImageIndex:
    return ImageIndex.build(Held(xb), xb.shape[1], sf.IndexOptions(device="cpu", **options))


@pytest.fixture(scope="module")
def built() -> Callable[..., ImageIndex]:
    """Indexes of xb that are only searched: each is built once."""

    @functools.cache
    def build_once(kind: str = "auto", recall: float = 0.99) -> ImageIndex:
        return build(low_dimensional(np.random.default_rng(0), N), kind=kind, recall=recall)

    return build_once


def recall(index: ImageIndex, xq: np.ndarray, xb: np.ndarray, k: int = K) -> float:
    pairs = zip(index.search(xq, k)[0], brute_force(xq, xb, k)[0], strict=True)
    return float(np.mean([np.isin(found, true).mean() for found, true in pairs]))


@pytest.mark.slow
@pytest.mark.parametrize(  # from one cluster HNSW's graph does not always lead to the others
    ("kind", "target"), [("hnsw", 0.8), *[(kind, 0.99) for kind in ("auto", "ivf", "ivf-sq", "ivf-pq")]]
)
def test_the_recall_asked_for_is_had(
    built: Callable[..., ImageIndex], xb: np.ndarray, xq: np.ndarray, kind: str, target: float
) -> None:
    index = built(kind, target)
    assert index.facts.recall is not None
    assert index.facts.recall >= target
    assert recall(index, xq, xb) >= target - 0.02  # of other images than it was measured on
    assert index.facts.k == K


@pytest.mark.slow
def test_less_recall_is_less_work(built: Callable[..., ImageIndex]) -> None:
    few, many = (built("ivf-sq", target).facts for target in (0.5, 0.99))
    assert few.nprobe is not None
    assert many.nprobe is not None
    assert few.nprobe < many.nprobe <= 76


@pytest.mark.slow
def test_distances_are_exact_whatever_chose_the_images(
    built: Callable[..., ImageIndex], xb: np.ndarray, xq: np.ndarray
) -> None:
    for kind, target in (("ivf-sq", 0.5), ("ivf-pq", 0.99), ("hnsw", 0.8)):
        index = built(kind, target)
        ids, sq_distances = index.search(xq, 10)
        exact = ((xb[ids].astype(np.float64) - xq[:, None]) ** 2).sum(axis=2)
        np.testing.assert_allclose(sq_distances, exact, rtol=1e-5)
        assert (np.diff(sq_distances, axis=1) >= 0).all()
        assert index.search(xb[:5], 1)[1].tolist() == [[0]] * 5  # an image and itself


def test_removed_images_are_replaced_by_the_next(xb: np.ndarray, xq: np.ndarray, rng: np.random.Generator) -> None:
    removed = rng.random(N) < 0.6
    index = build(xb, recall=1.0)
    without = np.flatnonzero(~removed)[:3]
    ids, _ = index.search(xq, 10, without, removed=removed)
    expected, _ = brute_force(xq, xb, 10, [*np.flatnonzero(removed), *without])
    assert not removed[ids].any()
    assert not np.isin(ids, without).any()
    assert np.mean([np.isin(a, b).mean() for a, b in zip(ids, expected, strict=True)]) > 0.98


def test_images_that_are_all_equal(xq: np.ndarray) -> None:
    index = build(np.ones((N, D), np.float32))
    assert index.facts.recall is None  # whatever it finds is right
    ids, sq_distances = index.search(np.ones((2, D), np.float32), 20)
    assert sq_distances.max() == 0
    assert all(len(set(row)) == 20 for row in ids.tolist())


def test_images_that_are_all_there_several_times(rng: np.random.Generator) -> None:
    xb = np.repeat(low_dimensional(rng, N // 60), 60, axis=0)
    found = build(xb).facts.recall
    assert found is None or found >= 0.99


def test_a_given_nprobe_is_kept(xb: np.ndarray) -> None:
    facts = build(xb, kind="ivf-sq", nprobe=1).facts
    assert facts.nprobe == 1
    assert facts.recall is not None
    assert facts.recall < 0.99


@pytest.mark.slow
def test_the_same_images_are_tuned_alike(built: Callable[..., ImageIndex], xb: np.ndarray) -> None:
    assert build(xb).facts == built().facts


def test_recall_is_of_the_images_and_not_of_the_index(xb: np.ndarray) -> None:
    """A search that always finds the first k has the recall that these are worth."""
    xb = xb[np.argsort(xb[:, 0])]

    def first(queries: np.ndarray, many: int, nprobe: int) -> np.ndarray:
        return np.tile(np.arange(many), (len(queries), 1))

    assert tune(first, None, False, Held(xb), 0.99).recall == pytest.approx(K / N, abs=0.05)


def test_lists_that_stay_in_the_file(tmp_path: Path, xb: np.ndarray, xq: np.ndarray) -> None:
    index = build(xb, memory=1)
    assert index.facts.mapped
    checksum = index.save(tmp_path / "i.faiss")
    options = sf.IndexOptions(device="cpu", memory=1)
    file = IndexFile(tmp_path / "i.faiss", checksum, D, index.facts)
    mapped, grown = (ImageIndex.load(file, options, Held(xb), grows=grows) for grows in (False, True))
    for found, expected in zip(mapped.search(xq, K), index.search(xq, K), strict=True):
        assert found.tobytes() == expected.tobytes()
    more = xq[:40]  # a mapped one cannot grow: what is added is searched beside it
    for one in (mapped, grown):
        one._features = Held(np.concatenate([xb, more]))
        one.add(more[:30])
        one.add(more[30:])
        assert len(one) == N + 40
        assert one.search(more, 1)[0][:, 0].tolist() == [*range(N, N + 40)]
    found, expected = mapped.search(xq[40:], K)[0], grown.search(xq[40:], K)[0]
    assert (found == expected).mean() > 0.98
    grown.save(tmp_path / "j.faiss")


def gallery_of(path: Path, xb: np.ndarray, **options: Any) -> sf.Gallery:
    spec = sf.ExtractorSpec("own", ((1, 1, 1),), D)
    gallery = sf.Gallery.create(path, spec, sf.IndexOptions(device="cpu", **options), shard_bytes=200_000)
    append(gallery, xb, 0)
    return gallery


def append(gallery: sf.Gallery, xb: np.ndarray, start: int) -> None:
    keys = [f"{number:05d}" for number in range(start, start + len(xb))]
    gallery.append(keys, Features(xb, [np.zeros((len(xb), 1, 1, 1), np.float16)]))


@pytest.mark.slow
def test_adding_grows_the_index_and_reindex_builds_it_anew(
    tmp_path: Path, xb: np.ndarray, xq: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = gallery_of(tmp_path / "g", xb[:1000])
    lists, reader = gallery.index_state(), sf.Gallery.open(tmp_path / "g", "cpu")
    assert lists.entry is not None
    assert (lists.entry.trained, lists.outgrown) == (1000, ())
    assert "IVF25,SQ8" in str(lists)
    append(gallery, xb[1000:], 1000)
    grown = gallery.index_state()
    assert grown.entry is not None
    assert (grown.entry.images, grown.entry.trained) == (3000, 1000)  # with the lists that there were
    assert grown.outgrown == ("3000 images, built for 1000",)
    with monkeypatch.context() as patch:
        patch.setattr(secondary_indexes, "IVF_FROM", 50_000)
        assert gallery.index_state().outgrown == ()  # 3000 are few to FAISS: nobody gains by other lists
    expected = reader.search(xq, 10)
    state = gallery.reindex()
    assert state.entry is not None
    assert state.entry.trained == 3000
    assert "IVF76,SQ8" in state.entry.facts.factory
    for found, before in zip(reader.search(xq, 10), expected, strict=True):  # in its own generation still
        assert found.tobytes() == before.tobytes()
    reader.refresh()
    assert recall_of(reader, xq, xb) >= 0.97
    assert reader.verify() == []


def recall_of(gallery: sf.Gallery, xq: np.ndarray, xb: np.ndarray) -> float:
    pairs = zip(gallery.search(xq, K)[0], brute_force(xq, xb, K)[0], strict=True)
    return float(np.mean([np.isin(found, true).mean() for found, true in pairs]))


@pytest.mark.slow
def test_info_says_when_the_index_was_outgrown(
    tmp_path: Path, rng: np.random.Generator, xb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spade_faiss.store.secondary_indexes.IVF_FROM", 500)
    gallery = gallery_of(tmp_path / "g", xb[:1000], recall=0.95)
    elsewhere = np.full((1500, D), 40, np.float32) + low_dimensional(rng, 1500) * 0.01
    append(gallery, elsewhere, 1000)  # all in one list
    state = gallery.index_state()
    assert [text.split()[0] for text in state.outgrown[:2]] == ["2500", "lists"]
    assert "2500 images, built for 1000" in str(state)
    assert gallery.info()["index"]["outgrown"] == list(state.outgrown)
    assert gallery.reindex().outgrown == ()


@pytest.mark.parametrize(("kind", "is_told"), [("ivf", True), ("flat", False)])
def test_info_says_when_the_recall_was_measured_with_images_that_are_gone(
    tmp_path: Path, xb: np.ndarray, kind: str, is_told: bool
) -> None:
    gallery = gallery_of(tmp_path / "g", xb[:1000], kind=kind, recall=0.95, nlist=10 if kind == "ivf" else None)
    keys = gallery.keys()
    gallery.remove(keys[:500])
    assert gallery.index_state().outgrown == ()
    gallery.remove(keys[500:501])
    told = ("501 of 1000 images removed, which its recall was measured with",)
    assert gallery.index_state().outgrown == (told if is_told else ())
    assert gallery.reindex().outgrown == (told if is_told else ())
    gallery.compact()
    assert gallery.index_state().outgrown == ()


@pytest.mark.slow
def test_reindex_to_another_kind_and_back(tmp_path: Path, xb: np.ndarray, xq: np.ndarray) -> None:
    xb = xb[:1500]
    gallery = gallery_of(tmp_path / "g", xb)
    for kind, factory in (
        ("flat", "Flat"),
        ("ivf-pq", "IVF38,PQ16"),
        ("IVF10,Flat", "IVF10,Flat"),
        ("auto", "IVF38,SQ8"),
    ):
        assert factory in gallery.reindex(kind).entry.facts.factory  # type: ignore[union-attr]
        assert gallery.info()["index"]["kind"] == kind
        assert recall_of(gallery, xq, xb) >= 0.95
    gallery.reindex(memory=25_000)
    assert "PQ" in gallery.info()["index"]["factory"]
    assert gallery.info()["index"]["memory"] == 25_000


@pytest.mark.slow
def test_a_recall_that_cannot_be_had_is_refused_and_says_what_can(tmp_path: Path, xb: np.ndarray) -> None:
    gallery = gallery_of(tmp_path / "g", xb)
    before, generation = gallery.index_state(), gallery.generation
    with pytest.raises(
        OptionError, match=r"expected a recall of 0\.999, found 0\.\d+ of PCA32,IVF76,SQ8 \(1 lists vis"
    ):
        gallery.reindex("ivf-sq", recall=0.999, nprobe=1)
    with pytest.raises(OptionError, match="FAISS factory string"):
        gallery.reindex("nonsense")
    assert (gallery.index_state(), gallery.generation) == (before, generation)
    assert {path.name for path in (tmp_path / "g" / "index").iterdir() if path.suffix == ".faiss"} == {
        Path(before.entry.file).name  # type: ignore[union-attr]
    }


def test_building_with_a_recall_out_of_reach_says_so_in_info(tmp_path: Path, xb: np.ndarray) -> None:
    state = gallery_of(tmp_path / "g", xb, kind="ivf-sq", nprobe=1).index_state()
    [why] = state.outgrown
    assert why.startswith("recall 0.")
    assert why.endswith("less than the 0.99 wanted")


def test_recall_is_counted_row_by_row() -> None:
    """Rows are compared all at once: what one lacks, -1, must not be taken for what another has."""
    found = [np.array([4, 0, -1]), np.array([-1, -1]), np.array([1, 3, 4])]
    nearest, is_between = np.array([[0, 4], [1, 4], [4, 1]]), np.array([False, True, False])
    places = _places(found, nearest)
    assert places.tolist() == [[1, 0], [np.inf, np.inf], [2, 0]]
    assert _recall(places, 3, ~is_between) == 0
    assert _recall(places, 3, np.zeros(3, bool)) == pytest.approx(2 / 3)
    assert _recall(places, 1, np.zeros(3, bool)) == pytest.approx(1 / 3)
    assert _recall(_places(found[::-1], nearest), 3, np.zeros(3, bool)) == pytest.approx(1 / 3)
    assert np.isinf(_places([np.zeros(0, np.int64)] * 3, nearest)).all()
