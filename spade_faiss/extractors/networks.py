"""Extractors that are pretrained networks: made by torch, or loaded as they were converted before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arrays import Pixels
from ..errors import WeightsError
from ..options import FeatureOptions, Runtime
from ..system.devices import as_typed, torch_device
from ..system.forks import remember
from ..system.recorded import Recorder
from ..system.transfers import downloaded, stacked_for, uploaded
from .features import Features
from .kept_networks import Request, keep, read_kept, request_of
from .openvino_network import Forward, is_installed
from .runtimes import choose, kept_runner, wanted_runtime
from .spec import LARGEST_IMAGE, ExtractorSpec

if TYPE_CHECKING:
    from .torch_networks import Made

RECORDED = 4  # sizes of batches on a GPU


class NetworkExtractor:
    """See registry.Extractor. `runtime` says what runs the network: torch or openvino."""

    def __init__(self, spec: ExtractorSpec, forward: Forward, options: FeatureOptions, weights: Path | None) -> None:
        """Keep what is run; the options have the device and the runtime that were chosen."""
        self.spec = spec
        self.batch_size = options.batch_size
        self.forward = forward  # views (n, h, w, 3) uint8 -> image features (n, d), levels [(n, c, h, w), ...]
        self.device = options.device
        self.runtime = options.runtime
        self._options = options
        self._weights = weights
        self._recorder: Recorder[list[Tensor]] = Recorder(RECORDED)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the call that loads the network: smaller than its tensors, and safer. The runtime stays."""
        options = replace(self._options, batch_size=self.batch_size)
        return load_network, (self.spec.name, self._weights, options)

    def extract(self, views: Sequence[Pixels]) -> Features:
        """Extract features; see registry.Extractor.extract. A caller's torch.autocast changes nothing.

        Raises:
            FeatureError: an activation does not fit the stored dtype; the message names the level.
        """
        device = torch.device(self.device)
        with as_typed(self.device):
            batch = stacked_for(device, views)
            stored = self._stored(batch, device) if device.type != "cpu" else None
            if stored is not None:
                return stored
            image, levels = self.forward(uploaded(batch, device))
            found = downloaded(image, *levels)
        return self.spec.cast(Features(found[0], found[1:]))

    def _stored(self, batch: Tensor, device: torch.device) -> Features | None:
        """Return features in the stored dtypes, as ExtractorSpec.cast does; None: it has something to say.

        A GPU casts them and looks at them in a hundredth of the time, and half as many bytes come from there.
        """
        with self._recorder.result(self._cast, [batch], device) as found:
            image, *levels, is_good = downloaded(*found)
        fits = is_good and [level.shape[1:] for level in levels] == list(self.spec.level_shapes)
        return Features(image, levels) if fits else None

    def _cast(self, batch: list[Tensor]) -> list[Tensor]:
        """Return image features and levels in the stored dtypes, and whether all values fit, a () bool."""
        image, levels = self.forward(batch[0])
        levels = [level.to(getattr(torch, self.spec.dtype)) for level in levels]
        fit = [level.isfinite().all() for level in levels]
        return [image, *levels, torch.stack([*fit, (image.abs() <= LARGEST_IMAGE).all()]).all()]


def load_network(name: str, weights: Path | None, options: FeatureOptions) -> NetworkExtractor:
    """Load a network by name; see registry.load_extractor."""
    wanted = wanted_runtime(options.runtime)
    on_cpu = wanted == "openvino" and options.device == "auto"
    device = torch_device("cpu" if on_cpu else options.device)
    placed = replace(options, device=device)
    may_keep = wanted != "torch" and device == "cpu" and is_installed() and not is_imported()
    request = request_of(name, weights, options) if may_keep else None
    if request and (kept := _kept(request, weights, placed, wanted)):
        return kept
    made = _made(name, weights, placed)
    with _in_float32():
        runtime, forward = choose(wanted, made.network, device)
    spec = replace(made.spec, runtime=runtime if made.spec.precision else None)
    if request and runtime == "openvino" and request == request_of(name, weights, options):
        keep(request, spec, made.network.identity)
    return NetworkExtractor(spec, forward, replace(placed, runtime=runtime), weights)


def is_imported() -> bool:
    """Return whether timm is imported: then little is saved, and models of the caller's own may have its names."""
    return "timm" in sys.modules


def _kept(request: Request, weights: Path | None, options: FeatureOptions, wanted: Runtime) -> NetworkExtractor | None:
    """Return the extractor that OpenVINO runs, without making the network; None: only who makes it can tell."""
    found = read_kept(request, weights)
    if found is None:
        return None
    spec, identity = found
    runner = kept_runner(wanted, identity, options.precision, _ByTorch(spec.name, weights, options, identity))
    return None if runner is None else NetworkExtractor(spec, runner, replace(options, runtime="openvino"), weights)


def _made(name: str, weights: Path | None, options: FeatureOptions) -> Made:
    from .torch_networks import make_network  # late: timm takes seconds to import

    with _in_float32(), torch.inference_mode(False):
        return make_network(name, weights, options)


class _ByTorch:
    """The forward pass of a network that torch makes at the first call: only forked processes need it."""

    def __init__(self, name: str, weights: Path | None, options: FeatureOptions, identity: dict[str, Any]) -> None:
        """Keep how it is made, and its identity: by then another file may have the path."""
        self._asked = name, weights and weights.absolute(), options
        self._identity = identity
        self._forward: Forward | None = None
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    def __call__(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run it; see openvino_network.Forward.

        Raises:
            WeightsError: the file of its weights is gone, or has others.
        """
        with self._lock:
            if self._forward is None:
                network = _made(*self._asked).network
                if network.identity != self._identity:
                    name, path, _ = self._asked
                    raise WeightsError(
                        f"{path or name}: expected the weights that this process began with, found others; load the "
                        "extractor again"
                    )
                self._forward = network.forward
        return self._forward(batch)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Make tensors of float32, whatever torch.set_default_dtype says: weights are in it, and are digested in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
