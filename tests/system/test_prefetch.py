"""Reading ahead: order, bounds, exceptions, and what is left when nobody listens any more."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from spade_faiss.errors import ImageError
from spade_faiss.system.prefetch import batched, one_ahead, read_ahead


def test_read_ahead_keeps_the_order() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item % 4 == 0 else 0)
        return item * item

    assert list(read_ahead(range(40), slow_at_first, workers=4, ahead=8)) == [item * item for item in range(40)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_read_ahead_of_fewer_items_than_it_reads_ahead(count: int) -> None:
    assert list(read_ahead(range(count), str, workers=4, ahead=32)) == [str(item) for item in range(count)]


def test_read_ahead_runs_at_the_same_time() -> None:
    barrier = threading.Barrier(3)  # nobody passes unless three are there
    assert len(list(read_ahead(range(6), lambda _: barrier.wait(timeout=10), workers=3, ahead=3))) == 6


def test_read_ahead_is_bounded() -> None:
    taken = 0

    def count() -> Iterator[int]:
        nonlocal taken
        for item in itertools.count():
            taken += 1
            yield item

    results = read_ahead(count(), lambda item: item, workers=2, ahead=5)
    for number, result in enumerate(itertools.islice(results, 30)):
        assert result == number
        assert taken <= number + 1 + 5  # those handed out, and `ahead` more
    results.close()  # type: ignore[attr-defined]


def test_read_ahead_raises_at_the_items_turn() -> None:
    def fail_at_3(item: int) -> int:
        if item == 3:
            raise ImageError("item 3: no image")
        time.sleep(0.01)  # so that the failure is there long before its turn
        return item

    results = read_ahead(range(100), fail_at_3, workers=4, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ImageError, match="item 3"):
        next(results)


def test_read_ahead_closed_early_does_not_wait_for_the_rest() -> None:
    started = []

    def slow(item: int) -> int:
        started.append(item)
        time.sleep(0.05)
        return item

    results = read_ahead(itertools.count(), slow, workers=2, ahead=200)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(started) < 20  # all 200 would take five seconds


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (2, [[0, 1]]), (3, [[0, 1, 2]]), (7, [[0, 1, 2], [3, 4, 5], [6]])]
)
def test_batched(count: int, expected: list[list[int]]) -> None:
    assert list(batched(iter(range(count)), 3)) == expected


def test_batched_is_lazy() -> None:
    assert next(batched(itertools.count(), 2)) == [0, 1]


def failing_at(bad: int) -> Iterator[int]:
    for item in itertools.count():
        if item == bad:
            raise ImageError(f"item {bad}: no image")
        yield item


def test_batched_hands_on_what_comes_before_an_exception() -> None:
    batches = batched(failing_at(5), 3)
    assert [next(batches), next(batches)] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ImageError, match="item 5"):
        next(batches)
    with pytest.raises(ImageError, match="item 6"):  # at the start of a batch
        list(batched(failing_at(6), 3))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_one_ahead_keeps_the_order(count: int, background: bool) -> None:
    assert list(one_ahead(iter(range(count)), str, background)) == [str(item) for item in range(count)]


def test_one_ahead_computes_the_next_meanwhile_and_no_more() -> None:
    started: list[int] = []
    second = threading.Event()

    def note(item: int) -> int:
        started.append(item)
        if item == 1:
            second.set()
        return item

    results = one_ahead(itertools.count(), note)
    assert next(results) == 0
    assert second.wait(timeout=10)  # though nobody has asked for it yet
    time.sleep(0.02)
    assert started == [0, 1]
    assert next(results) == 1
    results.close()  # type: ignore[attr-defined]
    assert started[:2] == [0, 1]
    assert len(started) <= 3


@pytest.mark.parametrize("background", [True, False])
def test_one_ahead_raises_at_the_items_turn(background: bool) -> None:
    def fail_at_2(item: int) -> int:
        if item == 2:
            raise ImageError("item 2: no image")
        return item

    for results in (one_ahead(range(9), fail_at_2, background), one_ahead(failing_at(2), int, background)):
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ImageError, match="item 2"):
            next(results)
        assert list(results) == []


@pytest.mark.parametrize("background", [True, False])
def test_one_ahead_keeps_no_result(background: bool) -> None:
    class Result:
        pass

    alive: weakref.WeakSet[Result] = weakref.WeakSet()

    def make(item: int) -> Result:
        alive.add(result := Result())
        return result

    for result in one_ahead(range(50), make, background):
        assert len(alive) <= 3  # this one, the next, and for a moment the one after that
        assert result in alive
        del result
        assert len(alive) <= 2


def test_one_ahead_takes_items_in_the_callers_thread() -> None:
    def whose() -> Iterator[int]:
        for _ in range(5):
            yield threading.get_ident()

    assert set(one_ahead(whose(), lambda item: item)) == {threading.get_ident()}


def test_one_ahead_may_be_collected_in_its_own_thread() -> None:
    """Where it is part of a circle, the collector closes it wherever it happens to run; a warning would be an error."""
    dropped, collected = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item == 1:
            dropped.wait()
            gc.collect()
            collected.set()
        return item

    circle: list[Any] = [one_ahead(range(3), work)]
    next(circle[0])
    circle.append(circle)
    gc.disable()
    del circle
    dropped.set()
    assert collected.wait(10)
    gc.enable()


def test_one_ahead_closed_early_ends_its_thread() -> None:
    before = set(threading.enumerate())  # some may be an earlier test's, about to end: so none is counted
    results = one_ahead(range(9), lambda item: time.sleep(0.02) or item)
    next(results)
    assert len(set(threading.enumerate()) - before) == 1
    results.close()  # type: ignore[attr-defined]
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("ahead_of", [one_ahead, read_ahead])
def test_whoever_collects_a_generator_needs_no_lock_of_threads_that_end(ahead_of: Any) -> None:
    """A thread that starts holds it, and garbage was collected there: it waited for itself, for ever."""
    cycle = [ahead_of(range(9), lambda item: item)]
    cycle.append(cycle)
    assert next(cycle[0]) == 0
    ended = weakref.ref(cycle[0])
    with getattr(threading, "_shutdown_locks_lock", threading.Lock()):
        del cycle
        gc.collect()
    assert ended() is None
