"""Work in several threads, in each of which torch has a number of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss.patch_search.levels import LARGE, _is_finite
from spade_faiss.patch_search.sharing import share_out
from spade_faiss.system import threads
from spade_faiss.system.threads import in_one_thread, side_by_side, single_threads, torch_threads


def test_work_goes_on_side_by_side_and_may_have_as_many_threads(two_threads: None) -> None:
    together = threading.Barrier(3, timeout=20)  # each waits for the others

    def work(number: int) -> tuple[int, int, int, bool, int]:
        together.wait()
        is_here = in_one_thread(threading.get_ident) == threading.get_ident()
        inside = single_threads(2).submit(torch_threads).result()
        return number, torch_threads(), torch.get_num_threads(), is_here, inside

    assert side_by_side(work, [7, 8, 9]) == [(7, 2, 1, True, 1), (8, 2, 1, True, 1), (9, 2, 1, True, 1)]
    assert torch.get_num_threads() == torch_threads() == 2


def test_one_thread_does_one_after_the_other() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert side_by_side(lambda _: threading.get_ident(), [1, 2]) == [threading.get_ident()] * 2
    finally:
        torch.set_num_threads(before)


def test_one_item_needs_no_thread(two_threads: None) -> None:
    assert side_by_side(lambda _: threading.get_ident(), [1]) == [threading.get_ident()]


def test_the_first_error_is_raised(two_threads: None) -> None:
    def work(number: int) -> float:
        return 1 / number

    with pytest.raises(ZeroDivisionError):
        side_by_side(work, [1, 0, 2])
    assert side_by_side(work, [1, 2, 4]) == [1, 0.5, 0.25]


def test_where_no_more_threads_may_be_started_none_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Limited(ThreadPoolExecutor):
        """As where a system's limit of threads is reached."""

        def submit(self, *args: Any, **options: Any) -> Any:
            if len(self._threads) == 3:
                raise RuntimeError("can't start new thread")
            return super().submit(*args, **options)

    before = set(threading.enumerate())
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        single_threads(37)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    monkeypatch.undo()
    assert list(single_threads(37).map(abs, [-1])) == [1]


def test_work_of_any_size_has_the_same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()
    original = threads._threads

    def noted(number: int, each: int) -> Any:
        asked.add(number)
        return original(number, each)

    class Worker:
        def run(self, work: Any) -> None:
            list(work)

    monkeypatch.setattr(threads, "_threads", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for number in (1, 2, 3, 4):
            share_out(range(9), [Worker() for _ in range(number)])
            assert _is_finite(np.zeros((number, LARGE // 4), np.float32))
    finally:
        torch.set_num_threads(before)
    assert asked == {4}
