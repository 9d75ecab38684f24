"""What is recorded, and when; without a GPU, with stand-ins for what CUDA records."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from spade_faiss.system import recorded
from spade_faiss.system.recorded import AFTER, LATER, Recorder, branched
from spade_faiss.system.transfers import joined, parted

GPU = torch.device("cuda:0")


class StandIn(recorded._Recorded[str]):
    """What was recorded; it tells that it was started."""

    def start(self, inputs: Any) -> str:
        return "recorded"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder[str]:
    """A recorder whose calls run on no GPU."""
    monkeypatch.setattr(recorded, "uploaded", lambda each, _: each)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(Recorder, "_try", lambda *_: StandIn([], None, ""))
    return Recorder(2)


def results(recorder: Recorder[str], sizes: list[int], kind: Any = None) -> list[str]:
    """Call with inputs of some sizes, one after the other."""
    found = []
    for size in sizes:
        with recorder.result(lambda inputs: f"computed {len(inputs)}", [np.zeros(size)] * 2, GPU, kind) as result:
            found.append(result)
    return found


def test_what_comes_again_and_again_is_recorded_by_its_sizes(
    recorder: Recorder[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert results(recorder, [3] * AFTER) == ["computed 2"] * AFTER
    assert results(recorder, [4, 3, 4, 3, 4]) == ["computed 2", "recorded", "computed 2", "recorded", "recorded"]
    assert results(recorder, [3], "another kind") == ["computed 2"]
    assert recorder.recorded() == 2
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert results(recorder, [3]) == ["computed 2"]


def test_those_called_last_are_kept(recorder: Recorder[str]) -> None:
    for size in (1, 2, 3):
        assert results(recorder, [size] * (AFTER + 1))[-1] == "recorded"
        results(recorder, [1])  # again, so that it stays
    assert recorder.recorded() == 2
    assert results(recorder, [1, 3, 2]) == ["recorded", "recorded", "computed 2"]


def test_what_cannot_be_recorded_is_computed(recorder: Recorder[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(Recorder, "_try", lambda *_: tried.append(1))
    assert results(recorder, [3] * 6) == ["computed 2"] * 6
    assert tried == [1]
    monkeypatch.setattr(Recorder, "_try", lambda *_: StandIn([], None, ""))  # later it can
    assert results(recorder, [3] * 2 * LATER)[-1] == "recorded"


def test_one_at_a_time_reads_what_was_recorded(recorder: Recorder[str]) -> None:
    results(recorder, [3] * (AFTER + 1))
    others: list[str] = []
    with recorder.result(lambda _: "computed", [np.zeros(3)] * 2, GPU) as result:
        thread = threading.Thread(target=lambda: others.extend(results(recorder, [3])))
        thread.start()
        thread.join()
    assert (result, others) == ("recorded", ["computed 2"])
    with pytest.raises(KeyError), recorder.result(lambda _: "computed", [np.zeros(3)] * 2, GPU):
        raise KeyError
    assert results(recorder, [3]) == ["recorded"]  # whoever failed has let go of it


def test_on_the_cpu_nothing_is_recorded() -> None:
    recorder: Recorder[float] = Recorder(2)
    for _ in range(AFTER + 2):
        with recorder.result(lambda inputs: float(inputs[0].sum()), [np.ones(3)], torch.device("cpu")) as result:
            assert result == 3
    assert recorder.recorded() == 0
    assert branched([lambda: 1, lambda: 2]) == [1, 2]


def test_arrays_that_were_joined_come_apart() -> None:
    tensors = [torch.tensor([True, False, True]), torch.arange(6).view(2, 3), torch.tensor(0.5), torch.empty(0, 4)]
    for one, right in zip(parted(joined(tensors).numpy(), tensors), tensors, strict=True):
        assert one.dtype == right.numpy().dtype
        np.testing.assert_array_equal(one, right.numpy())
        one[...] = 0  # it is the caller's own
