"""Which runtime runs a network: what `auto` takes, and what is said of a network that OpenVINO cannot run."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spade_faiss as sf
from spade_faiss.extractors import openvino_network, runtimes
from spade_faiss.extractors.runtimes import TorchNetwork, choose
from tests.helpers.runtimes import SIDE, chosen, small

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]


def explained(network: TorchNetwork) -> str:
    """What auto says when torch runs a network; openvino, asked for by name, is refused for the same reason."""
    with pytest.warns(UserWarning, match=r"^torch runs small, because ") as caught:
        assert chosen(network) == "torch"
    [message] = [str(warning.message).partition(", because ")[2] for warning in caught]
    with pytest.raises(sf.OptionError, match=r"^runtime: expected OpenVINO to run small, found that ") as refused:
        chosen(network, "openvino")
    assert message in str(refused.value)
    assert str(refused.value).endswith("; take runtime='torch'")
    assert "\n" not in message
    return message


# --- what auto takes -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
def test_auto_takes_what_was_faster_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([2.0, 1.0])
    monkeypatch.setattr(runtimes, "_seconds", lambda *_: next(measured))  # torch's, then OpenVINO's
    assert chosen(small()) == "openvino"
    monkeypatch.setattr(runtimes, "convert", None)  # would fail: it is converted and measured once
    assert chosen(small()) == "openvino"
    monkeypatch.setenv(runtimes.VARIABLE, "torch")
    assert runtimes.wanted_runtime("auto") == "torch"
    assert runtimes.wanted_runtime("openvino") == "openvino"


@pytest.mark.usefixtures("own_cache")
def test_auto_leaves_a_slower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1.0, 2.0])
    monkeypatch.setattr(runtimes, "_seconds", lambda *_: next(measured))
    for _ in range(2):
        assert chosen(small()) == "torch"  # and says nothing: warnings are errors here
    assert chosen(small(), "openvino") == "openvino"


@pytest.mark.usefixtures("own_cache")
def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino_network.cpu_core.cache_clear()
    assert chosen(small()) == "torch"
    with pytest.raises(sf.OptionError, match=r"openvino cannot be imported .*pip install 'spade-faiss\[openvino\]'"):
        chosen(small(), "openvino")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("devices", [[], ["GPU"]])
def test_without_a_cpu_plug_in(monkeypatch: pytest.MonkeyPatch, devices: list[str]) -> None:
    class Core:
        available_devices = devices

    monkeypatch.setattr(openvino_network.load_openvino(), "Core", Core)
    openvino_network.cpu_core.cache_clear()
    assert f"has no CPU plug-in here, but {devices[0] if devices else 'no device'}" in explained(small())
    openvino_network.cpu_core.cache_clear()


def test_a_gpu_and_wrong_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", small(), "cuda:0")[0] == "torch"
    with pytest.raises(sf.OptionError, match="found device cuda:0; take device='cpu' or runtime='torch'"):
        choose("openvino", small(), "cuda:0")
    with pytest.raises(sf.OptionError, match=r"^runtime: expected auto, torch or openvino, found 'onnx'"):
        sf.FeatureOptions(runtime="onnx")  # type: ignore[arg-type]
    monkeypatch.setenv(runtimes.VARIABLE, "onnx")
    with pytest.raises(sf.OptionError, match=r"^environment variable SPADE_FAISS_RUNTIME: expected auto, torch or o"):
        runtimes.wanted_runtime("auto")
    with pytest.raises(sf.OptionError, match=r"^extractor toy has no network, found openvino"):
        sf.load_extractor("toy", options=sf.FeatureOptions(runtime="openvino"))


# --- networks that it cannot run -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_cache")
def test_a_network_that_cannot_be_converted() -> None:
    network = small(lambda batch: (torch.linalg.eigvals(batch[:, 0, :4, :4]).real, [batch]))
    assert explained(network).startswith("OpenVINO cannot convert the network (")
    assert "cannot convert" in explained(network)  # as is known from before


@pytest.mark.usefixtures("own_cache")
def test_a_network_whose_way_depends_on_its_input() -> None:
    """A trace has the way of one image only, so that others get the wrong features."""
    probes = runtimes._probes((SIDE, SIDE))
    assert (probes.mean(dim=(1, 2, 3))[0] > 0) != (probes.mean(dim=(1, 2, 3))[1:] > 0).all()

    def forward(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = [image * 2 if image.mean() > 0 else image.abs() for image in batch]
        return torch.stack([one.mean(dim=(1, 2)) for one in found]), [torch.stack(found)]

    assert "OpenVINO's features differ from torch's by " in explained(small(forward))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("off", "taken"), [(0.5e-4, True), (2e-4, False)])
def test_the_gate(monkeypatch: pytest.MonkeyPatch, off: float, taken: bool) -> None:
    """Features that differ by more than 1e-4 of their scale are torch's."""
    run = openvino_network.OpenVinoNetwork.__call__

    def other(self: Any, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        image, levels = run(self, batch)
        return image, [level * (1 + off) for level in levels]

    monkeypatch.setattr(openvino_network.OpenVinoNetwork, "__call__", other)
    if taken:
        assert chosen(small(), "openvino") == "openvino"
    else:
        assert "by 0.0002 of a level's scale, more than 0.0001" in explained(small())


def test_difference() -> None:
    image, level = torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 10.0, 0.0, 0.0])
    assert runtimes.difference((image, [level]), (image, [level])) == 0
    # a hundredth of the largest value; of the root mean squares, sqrt(2 / 4) * 0.1 / sqrt(100 / 4)
    off = level + torch.tensor([0.1, 0.0, 0.1, 0.0])
    assert runtimes.difference((image, [off]), (image, [level])) == pytest.approx(0.1 / 2**0.5 / 5)
    assert np.isnan(runtimes.difference((image, [level * np.nan]), (image, [level])))
    assert runtimes.difference((image * 0 + 1, [level]), (image * 0, [level])) > 1e30
    with pytest.raises(ValueError, match=r"\(3,\), not \(4,\)"):
        runtimes.difference((image, [level[:3]]), (image, [level]))
