"""Work in several threads, in each of which torch has a number of its own."""

from __future__ import annotations

import threading

import pytest
import torch

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
