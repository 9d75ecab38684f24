"""The image index: every kind against brute force in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError, NotEnoughImagesError, OptionError
from spade_faiss.index.factory import Kind, check_kind, kinds
from spade_faiss.index.image_index import ImageIndex, IndexFile
from spade_faiss.index.metadata import IndexFacts
from tests.helpers.search import Held, brute_force

N, D = 300, 8
SINGLE_AND_BATCH = [1, 25]  # FAISS may search batches of 20 and more through BLAS

Build = Callable[..., ImageIndex]


def build(xb: np.ndarray, kind: str = "flat", device: str = "cpu", **options: Any) -> ImageIndex:
    return ImageIndex.build(Held(xb), xb.shape[1], sf.IndexOptions(kind, device=device, **options))


def worth_a_try(n: int, *options: Any, **named: Any) -> list[Kind]:
    """For 1280 dimensions of which 50 hold all the variance."""
    return list(kinds(sf.IndexOptions(*options, **named), n, 1280, lambda: np.r_[np.ones(50), np.zeros(1230)]))


def factory(n: int, *options: Any, **named: Any) -> str:
    return worth_a_try(n, *options, **named)[0].factory


def assert_equal(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-9)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At this size threads only wait for each other; those of a gallery's random life and of a query run with two."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture
def xb(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, D), np.float32)


@pytest.fixture
def xq(rng: np.random.Generator, xb: np.ndarray) -> np.ndarray:
    return rng.standard_normal((25, D), np.float32)


@pytest.fixture(params=[False, True], ids=["direct", "blas"])
def blas(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both of FAISS's ways to a distance; which one it takes by itself differs from release to release."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20 if request.param else 10**6
    yield request.param
    faiss.cvar.distance_compute_blas_threshold = before


@pytest.mark.parametrize("m", SINGLE_AND_BATCH)
@pytest.mark.parametrize("k", [1, 7, 150, N])
def test_flat_equals_brute_force(xb: np.ndarray, xq: np.ndarray, blas: bool, m: int, k: int) -> None:
    assert_equal(build(xb).search(xq[:m], k), brute_force(xq[:m], xb, k))


@pytest.mark.parametrize("m", SINGLE_AND_BATCH)
def test_small_distances_do_not_drown_in_large_norms(
    rng: np.random.Generator, xb: np.ndarray, blas: bool, m: int
) -> None:
    """|q|^2 + |x|^2 - 2 q x has only the precision of the largest of the three."""
    xb = xb + np.float32(3)
    index = build(xb)
    ids, sq_distances = index.search(xb[:m], 1)
    assert ids[:, 0].tolist() == list(range(m))
    assert sq_distances.max() == 0
    near = xb[:m] + (rng.standard_normal((m, D)) * 1e-3).astype(np.float32)
    assert_equal(index.search(near, 1), brute_force(near, xb, 1))


@pytest.mark.parametrize("m", SINGLE_AND_BATCH)
@pytest.mark.parametrize("k", [1, 3, 7, 130])
def test_ties_come_in_the_order_of_ids(rng: np.random.Generator, blas: bool, m: int, k: int) -> None:
    """Also which of several equal images are among the k: the same image, alone or in a batch, the same answer."""
    xb = np.tile(rng.standard_normal((40, 100), np.float32), (5, 1))
    xq = rng.standard_normal((m, 100), np.float32)
    ids, _ = build(xb).search(xq, k)
    assert ids.tolist() == brute_force(xq, xb, k)[0].tolist()


@pytest.mark.parametrize("kind", ["flat", "ivf", "IVF4,Flat"])
def test_all_images_equal(kind: str) -> None:
    xb = np.ones((200, D), np.float32)
    ids, sq_distances = build(xb, kind).search(xb[:2], 150)
    assert ids.tolist() == [list(range(150))] * 2
    assert sq_distances.max() == 0


def test_ivf_that_visits_every_list_equals_flat(xb: np.ndarray, xq: np.ndarray) -> None:
    index = build(xb, "ivf", nlist=10, nprobe=10)
    assert_equal(index.search(xq, 7), brute_force(xq, xb, 7))


def test_nprobe_of_a_call_is_of_that_call_alone(xb: np.ndarray, xq: np.ndarray) -> None:
    index = build(xb, "ivf", nlist=30, nprobe=1)
    few = index.search(xq, 3)
    exact = brute_force(xq, xb, 3)
    assert few[0].tolist() != exact[0].tolist()  # one list of 30 does not hold them all
    for _ in range(2):
        assert_equal(index.search(xq, 3, nprobe=30), exact)
        assert_equal(index.search(xq, 3, nprobe=10_000), exact)  # more than there are: all
        assert_equal(index.search(xq, 3), few)


def test_nprobe_of_calls_at_the_same_time(xb: np.ndarray, xq: np.ndarray) -> None:
    index = build(xb, "ivf", nlist=30, nprobe=1)
    expected = {nprobe: index.search(xq, 3, nprobe=nprobe) for nprobe in (1, 30)}
    with ThreadPoolExecutor(8) as pool:
        calls = [(nprobe, pool.submit(index.search, xq, 3, None, nprobe)) for nprobe in (1, 30) * 50]
    for nprobe, call in calls:
        assert_equal(call.result(), expected[nprobe])


def test_nprobe_reaches_an_ivf_behind_a_transform(xb: np.ndarray, xq: np.ndarray) -> None:
    index = build(xb, f"PCA{D},IVF30,Flat", nprobe=1)  # D of D dimensions: a rotation
    assert index.search(xq, 3)[0].tolist() != brute_force(xq, xb, 3)[0].tolist()
    ids, sq_distances = index.search(xq, 3, nprobe=30)
    expected = brute_force(xq, xb, 3)
    assert ids.tolist() == expected[0].tolist()
    np.testing.assert_allclose(sq_distances, expected[1], rtol=1e-4)


def test_lists_too_short_for_k_are_made_up_for(xb: np.ndarray, xq: np.ndarray) -> None:
    index = build(xb, "ivf", nlist=30, nprobe=1)
    ids, sq_distances = index.search(xq, 200)
    assert ids.min() >= 0
    assert all(len(set(row)) == 200 for row in ids.tolist())
    assert (np.diff(sq_distances, axis=1) >= 0).all()
    assert_equal(index.search(xq, N), brute_force(xq, xb, N))


def test_the_kind_is_chosen_from_the_number_of_images_and_the_memory() -> None:
    assert factory(1000) == "Flat"
    assert factory(1000, memory=10**6) == "PCA64,IVF25,SQ8"
    assert factory(1_000_000) == "PCA64,IVF4000,SQ8"
    assert factory(1_000_000, memory=72_000_000) == "PCA64,IVF4000,SQ8"
    assert factory(1_000_000, memory=71_999_999) == "PCA64,IVF4000,SQ4"
    assert factory(1_000_000, memory=24_000_000) == "PCA64,IVF4000,PQ16"
    assert factory(1_000_000, memory=16_000_000) == "PCA64,IVF4000,PQ8"
    assert factory(0, "ivf") == "IVF1,Flat"
    assert factory(390, "ivf") == "IVF10,Flat"  # enough training points for each list
    assert factory(390, "ivf", nlist=7) == "IVF7,Flat"
    assert factory(390, "ivf-sq") == "PCA64,IVF10,SQ8"
    assert factory(390, "ivf-pq") == "PCA64,IVF10,PQ32"
    assert factory(390, "hnsw") == "PCA64,HNSW32_SQ8"
    assert factory(390, "HNSW8", nlist=7) == "HNSW8"


def test_what_fits_no_memory_stays_in_the_file() -> None:
    kind = worth_a_try(1_000_000, memory=15_000_000)[0]
    assert (kind.factory, kind.mapped) == ("PCA64,IVF4000,SQ8", True)
    assert "72.0 MB for 15.0 MB of memory" in kind.reason


def test_what_keeps_too_little_is_followed_by_what_keeps_more() -> None:
    tried = [(kind.factory.partition(",IVF4000,"), kind.mapped) for kind in worth_a_try(1_000_000, memory=150_000_000)]
    in_memory = [("PCA64", "SQ8"), ("PCA128", "SQ8"), ("PCA256", "SQ4"), ("PCA512", "PQ128")]
    assert [(dims, code) for (dims, _, code), mapped in tried if not mapped] == in_memory
    assert [dims for (dims, _, _), mapped in tried if mapped][:-1] == ["PCA64", "PCA128", "PCA256", "PCA512"]
    assert worth_a_try(1_000_000)[4].factory == "IVF4000,SQ8"  # all dimensions


def test_the_training_sample_has_the_size_that_was_set(xb: np.ndarray, xq: np.ndarray) -> None:
    # With a list for each training image, every one of them is the centre of its list.
    index = build(xb, "ivf", nlist=20, nprobe=20, train_images=20)
    assert_equal(index.search(xq, 5), brute_force(xq, xb, 5))
    centres = faiss.extract_index_ivf(index._index).quantizer.reconstruct_n(0, 20)
    assert {row.tobytes() for row in centres} <= {row.tobytes() for row in xb}


def test_the_same_images_give_the_same_index(xb: np.ndarray, tmp_path: Path) -> None:
    checksums = [build(xb, "ivf", nlist=9, train_images=100).save(tmp_path / name) for name in "ab"]
    assert checksums[0] == checksums[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "ivf", "nlist": 301}, "at most the number of images, 300, found 301"),
        ({"kind": "ivf", "nlist": 50, "train_images": 20}, r"\b20\b.*\b50\b"),
        ({"kind": "IVF301,Flat"}, r"\b300\b.*\b301\b"),
    ],
)
def test_more_lists_than_images_name_both(xb: np.ndarray, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected) as caught:
        build(xb, **options)
    assert "\n" not in str(caught.value)


EXACT = ["Flat", "IVF4,Flat", "SQfp16", "HNSW32", "IVF4_HNSW8,Flat", "Flat,RFlat", "IVF4,SQ8,RFlat"]
APPROXIMATE = ["PCA4,Flat", "PCA4,IVF4,Flat", "IVF4,SQ8", "SQ8", "HNSW8", "PQ2x4", "L2norm,Flat", "PCA4,IVF4,SQ8,RFlat"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT + APPROXIMATE)
def test_any_factory_string(xb: np.ndarray, xq: np.ndarray, kind: str) -> None:
    check_kind(sf.IndexOptions(kind), D)
    index = build(xb, kind, nprobe=4)
    assert (len(index), index.dimension) == (N, D)
    without = np.arange(0, N, 3)
    ids, sq_distances = index.search(xq, 5, without)
    assert ids.shape == sq_distances.shape == (25, 5)
    assert (np.diff(sq_distances, axis=1) >= 0).all()
    assert not np.isin(ids, without).any()
    assert all(len(set(row)) == 5 for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < N
    recall = np.mean([len({*a} & {*b}) / 5 for a, b in zip(ids, brute_force(xq, xb, 5, without)[0], strict=True)])
    assert recall > (0.95 if kind in EXACT else 0.2)  # by chance: 0.025


@pytest.mark.parametrize("kind", ["nonsense", "Flat ", "Flat,Flat", "PQ3", "BFlat", "IVF", "IVF4,Nonsense"])
def test_a_factory_string_that_faiss_does_not_know(kind: str) -> None:
    with pytest.raises(OptionError, match="FAISS factory string") as caught:
        check_kind(sf.IndexOptions(kind), D)
    assert repr(kind) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["IDMap,Flat", "IDMap2,Flat", "IVF0,Flat"])
def test_a_factory_string_that_faiss_makes_but_cannot_fill_or_search(xb: np.ndarray, xq: np.ndarray, kind: str) -> None:
    """Refused before a gallery is made with it, or made to work; not an error of FAISS in the middle of an append."""
    try:
        check_kind(sf.IndexOptions(kind), D)
    except OptionError:
        return
    assert_equal(build(xb, kind).search(xq, 3), brute_force(xq, xb, 3))


@pytest.mark.parametrize(
    ("kind", "removed"), [(kind, removed) for kind in ("flat", "ivf") for removed in (1, 70, 290)] + [("HNSW32", 70)]
)
def test_removed_images_are_never_returned(
    rng: np.random.Generator, xb: np.ndarray, xq: np.ndarray, kind: str, removed: int
) -> None:
    without = rng.permutation(N)[:removed]
    k = min(5, N - removed)
    found = build(xb, kind, nprobe=100).search(xq, k, without)
    assert_equal(found, brute_force(xq, xb, k, without))


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_the_nearest_are_all_removed(xb: np.ndarray, kind: str) -> None:
    """More of them than are fetched in the place of removed ones at first."""
    query = xb[:1]
    without = brute_force(query, xb, 250)[0][0]
    found = build(xb, kind, nprobe=100).search(query, 10, without)
    assert_equal(found, brute_force(query, xb, 10, without))


@pytest.mark.parametrize("m", SINGLE_AND_BATCH)
def test_what_a_graph_does_not_lead_to_is_found_all_the_same(rng: np.random.Generator, m: int) -> None:
    """Nearly all images are removed, and the graph of what is left has parts that no way leads to."""
    xb = np.repeat(rng.standard_normal((12, D), np.float32), 25, axis=0) + rng.standard_normal((N, D), np.float32) / 1e3
    xq, without = rng.standard_normal((m, D), np.float32), rng.permutation(N)[: N - 9]
    index, removed = build(xb, "HNSW4"), np.zeros(N, np.bool_)
    removed[without[:200]] = True
    ids = index._index.search(xq, N)[1]
    assert min(np.isin(row, without, invert=True)[row >= 0].sum() for row in ids) < 9  # else this shows nothing
    found = index.search(xq, 9, without[200:], removed=removed)
    assert_equal(found, brute_force(xq, xb, 9, without))


def test_an_id_that_is_not_there_leaves_nothing_out(xb: np.ndarray, xq: np.ndarray) -> None:
    without = np.array([N, 10**9, -1])
    assert_equal(build(xb).search(xq, N, without), brute_force(xq, xb, N))


@pytest.mark.parametrize("kind", ["flat", "ivf", "SQ8"])
def test_fewer_images_than_k_names_both(xb: np.ndarray, xq: np.ndarray, kind: str) -> None:
    index = build(xb, kind)
    with pytest.raises(NotEnoughImagesError, match=f"K = 301 .* found {N}"):
        index.search(xq, N + 1)
    with pytest.raises(NotEnoughImagesError, match=r"K = 298 .* found 297"):
        index.search(xq, 298, without=np.array([5, 7, 9]))
    assert index.search(xq, 297, without=np.array([5, 7, 9]))[0].min() >= 0


def test_an_empty_index_has_no_neighbours(xq: np.ndarray) -> None:
    for kind in ("flat", "ivf", "SQ8"):
        index = build(np.empty((0, D), np.float32), kind)
        with pytest.raises(NotEnoughImagesError, match=r"K = 1 .* found 0"):
            index.search(xq, 1)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(xb: np.ndarray, xq: np.ndarray, k: int) -> None:
    with pytest.raises(sf.SpadeError, match=str(k)):
        build(xb).search(xq, k)


def test_no_queries(xb: np.ndarray, xq: np.ndarray) -> None:
    assert [array.shape for array in build(xb).search(xq[:0], 3)] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("kind", ["flat", "ivf", "PCA4,IVF4,SQ8", "HNSW8"])
def test_a_saved_index_is_the_same_index(tmp_path: Path, xb: np.ndarray, xq: np.ndarray, kind: str) -> None:
    index = build(xb, kind)
    path = tmp_path / "image.faiss"
    checksum = index.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = ImageIndex.load(IndexFile(path, checksum, D, index.facts), sf.IndexOptions(kind, device="cpu"), Held(xb))
    expected = index.search(xq, 7)
    for found, wanted in zip(loaded.search(xq, 7), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_images_added_later_are_found(tmp_path: Path, xb: np.ndarray, xq: np.ndarray, kind: str) -> None:
    index = build(xb[:200], kind, nprobe=100)
    checksum = index.save(tmp_path / "image.faiss")
    options = sf.IndexOptions(kind, nprobe=100, device="cpu")
    for grown in (index, ImageIndex.load(IndexFile(tmp_path / "image.faiss", checksum, D, index.facts), options)):
        grown.search(xq, 1)  # a search before must not fix what a search after finds
        grown.add(xb[200:250])
        grown.add(xb[250:250])
        grown.add(xb[250:])
        assert_equal(grown.search(xq, 7), brute_force(xq, xb, 7))


def test_a_file_that_was_changed_never_reaches_faiss(tmp_path: Path, xb: np.ndarray) -> None:
    path, options = tmp_path / "image.faiss", sf.IndexOptions(device="cpu")
    checksum = build(xb).save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(3)
    for place in rng.choice(len(content), 20, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with pytest.raises(CorruptGalleryError, match="expected checksum"):
            ImageIndex.load(IndexFile(path, checksum, D, IndexFacts()), options)
    for changed in (b"", content[:-1], content + b"\0", bytes(len(content))):
        path.write_bytes(changed)
        with pytest.raises(CorruptGalleryError, match="expected checksum"):
            ImageIndex.load(IndexFile(path, checksum, D, IndexFacts()), options)
    path.unlink()
    with pytest.raises(CorruptGalleryError, match=r"image\.faiss"):
        ImageIndex.load(IndexFile(path, checksum, D, IndexFacts()), options)
    path.write_bytes(content)
    assert len(ImageIndex.load(IndexFile(path, checksum, D, IndexFacts()), options)) == N


def test_an_index_of_another_dimension_is_refused(tmp_path: Path, xb: np.ndarray) -> None:
    checksum = build(xb).save(tmp_path / "image.faiss")
    with pytest.raises(CorruptGalleryError, match="expected an index of 9 dimensions, found 8"):
        ImageIndex.load(IndexFile(tmp_path / "image.faiss", checksum, 9, IndexFacts()), sf.IndexOptions())


def test_a_gpu_asked_for_by_name_that_is_not_there(xb: np.ndarray, xq: np.ndarray) -> None:
    with pytest.raises(sf.DeviceError, match="cuda:99"):
        build(xb, device="cuda:99").search(xq, 1)
    with pytest.raises(sf.DeviceError, match="expected auto, cpu, cuda"):
        build(xb, device="tpu").search(xq, 1)


@pytest.mark.faiss_gpu
@pytest.mark.parametrize("kind", ["flat", "ivf", "IVF16,SQ8"])
def test_the_gpu_finds_what_the_cpu_finds(rng: np.random.Generator, kind: str) -> None:
    xb, xq = rng.standard_normal((5000, 64), np.float32), rng.standard_normal((25, 64), np.float32)
    without = np.arange(0, 5000, 7)
    held = Held(xb)
    on_cpu, on_gpu = (
        ImageIndex.build(held, 64, sf.IndexOptions(kind, device=device, nprobe=128)) for device in ("cpu", "cuda")
    )
    for k in (1, 50, 3000):  # 3000 is more than FAISS's GPU indexes return
        cpu_ids, cpu_sq_distances = on_cpu.search(xq, k, without)
        gpu_ids, gpu_sq_distances = on_gpu.search(xq, k, without)
        np.testing.assert_allclose(gpu_sq_distances, cpu_sq_distances, rtol=1e-3)
        assert not np.isin(gpu_ids, without).any()
        if kind != "IVF16,SQ8":  # codes make ties, and rounding their order
            assert (gpu_ids == cpu_ids).mean() > 0.999
    on_gpu.add(xq[:1])
    held.xb = np.concatenate([xb, xq[:1]])
    assert on_gpu.search(xq[:1], 1)[0].tolist() == [[5000]]
