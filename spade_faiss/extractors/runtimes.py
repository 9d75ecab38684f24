"""What runs a network on the CPU: torch, or OpenVINO where it gives the same features sooner."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, first_line
from ..options import Precision, Runtime
from ..system.devices import as_typed
from . import converted
from .converted import Conversion, DamagedError
from .openvino_network import (
    ConversionError,
    Forward,
    OpenVinoNetwork,
    convert,
    cpu_core,
    is_installed,
    load_openvino,
    platform,
)

VARIABLE = "SPADE_FAISS_RUNTIME"  # environment variable: what `auto` is
LARGEST_DIFFERENCE = 1e-4  # of OpenVINO's float32 features from torch's; see difference
AS_COARSE = 3  # times what torch's bfloat16 differs from its float32: more is no rounding
TINY = float(np.finfo(np.float32).tiny)
PROBES = 4  # images that both are compared and measured on


@dataclass(frozen=True)
class TorchNetwork:
    """A network as torch runs it, with what comes before and after it: from views to levels as they are stored."""

    name: str
    forward: Forward  # in its precision
    exact: Forward  # in float32
    precision: Precision
    crop: tuple[int, int]  # (height, width) px
    identity: dict[str, Any]  # what its features depend on, as JSON values


def wanted_runtime(wanted: Runtime) -> Runtime:
    """Return what `auto` is by the environment variable SPADE_FAISS_RUNTIME, if it is set.

    Raises:
        OptionError: the variable names no runtime.
    """
    value = os.environ.get(VARIABLE, "auto") if wanted == "auto" else wanted
    if value not in get_args(Runtime):
        raise OptionError(f"environment variable {VARIABLE}: expected auto, torch or openvino, found {value!r}")
    return value  # type: ignore[return-value,unused-ignore]


def choose(wanted: Runtime, network: TorchNetwork, device: str) -> tuple[Runtime, Forward]:
    """Choose what runs a network.

    `auto` takes OpenVINO if the device is the CPU and OpenVINO is installed, converts the network, gives torch's
    features and took less time for a batch. If one of the last three is not so, a warning says why, except that being
    slower is no fault. What was found is kept beside the converted network in the user's cache folder.

    Args:
        wanted: auto, torch or openvino.
        network: as torch runs it.
        device: "cpu" or "cuda:N", where torch runs it.

    Returns:
        torch or openvino, and the forward pass.

    Raises:
        OptionError: `openvino` was wanted, and cannot be had.
    """
    if wanted == "torch" or (wanted == "auto" and (device != "cpu" or not is_installed())):
        return "torch", network.forward
    if device != "cpu":
        raise OptionError(
            f"runtime: openvino runs networks on the CPU, found device {device}; take device='cpu' or runtime='torch'"
        )
    try:
        runner, conversion = _converted(network, retry=wanted == "openvino")
    except ConversionError as error:
        if wanted == "openvino":
            raise OptionError(
                f"runtime: expected OpenVINO to run {network.name}, found that {error}; take runtime='torch'"
            ) from error
        warnings.warn(f"torch runs {network.name}, because {error}", stacklevel=2)
        return "torch", network.forward
    if wanted == "auto" and not _is_faster(conversion):
        return "torch", network.forward
    return "openvino", runner


def kept_runner(
    wanted: Runtime, identity: dict[str, Any], precision: Precision, by_torch: Forward
) -> OpenVinoNetwork | None:
    """Return the network of the cache folder that `choose` would take; None: it would take none, or has to look.

    Args:
        wanted: auto or openvino.
        identity: see TorchNetwork.identity.
        precision: what it multiplies in.
        by_torch: the forward pass in a process that is forked later.
    """
    try:
        whole = _identity_of(identity)
        found = converted.read(converted.path_of(whole), whole)
        if found is None or found.parts is None or (wanted == "auto" and not _is_faster(found)):
            return None
        return _loaded(found.parts, precision, by_torch)
    except (ConversionError, DamagedError, OSError, KeyError, TypeError):
        return None  # `choose` says so, if it matters


def _is_faster(conversion: Conversion) -> bool:
    return conversion.seconds["openvino"] < conversion.seconds["torch"]


def _identity_of(identity: dict[str, Any]) -> dict[str, Any]:
    """Return what a converted network depends on; ConversionError: there is no OpenVINO for this machine."""
    return {"format": converted.VERSION, **identity, **platform()}


def _converted(network: TorchNetwork, retry: bool) -> tuple[OpenVinoNetwork, Conversion]:
    """Return a network converted: from the cache folder, or converted now, compared, measured and kept there.

    Args:
        network: as torch runs it.
        retry: convert it even if that is known to have failed.

    Raises:
        ConversionError: OpenVINO cannot run it, or gives other features.
    """
    identity = _identity_of(network.identity)
    path, found = _lookup(identity)
    if found is not None and not (found.error and retry):
        if found.parts is None:
            raise ConversionError(found.error)
        runner = _loaded(found.parts, network.precision, network.forward)
        if runner is not None:
            return runner, found
    try:
        runner, conversion = _make(network)
    except ConversionError as error:
        _keep(path, identity, Conversion(error=str(error)))
        raise
    _keep(path, identity, conversion)
    return runner, conversion


def _loaded(parts: tuple[bytes, bytes], precision: Precision, by_torch: Forward) -> OpenVinoNetwork | None:
    """Return a network of the cache folder; None: this OpenVINO cannot read it."""
    try:
        weights = load_openvino().Tensor(np.frombuffer(parts[1], np.uint8))
        model = cpu_core().read_model(parts[0].decode(), weights)
        return OpenVinoNetwork(model, precision, by_torch)
    except (RuntimeError, ValueError):
        return None


def _make(network: TorchNetwork) -> tuple[OpenVinoNetwork, Conversion]:
    """Convert a network, compare its features with torch's, and measure both."""
    probes = _probes(network.crop)
    parts = _serialized(convert(network.exact, probes[:1]))
    runner = _loaded(
        parts, network.precision, network.forward
    )  # as the next process does: read again, its last digits may be others
    if runner is None:
        raise ConversionError("OpenVINO cannot read what it has converted")
    with as_typed("cpu"):
        exact, own = network.exact(probes), network.forward(probes)
        try:
            different = difference(runner(probes), exact)
        except ValueError as error:
            raise ConversionError(f"OpenVINO's features have other shapes ({error})") from error
        most = max(LARGEST_DIFFERENCE, AS_COARSE * difference(own, exact))  # bfloat16 of torch is not exact either
        if not different <= most:  # NaN is not
            raise ConversionError(
                f"OpenVINO's features differ from torch's by {different:.2g} of a level's scale, more than {most:.2g}"
            )
        # Both have run a batch by now: this one is measured without what the first takes longer.
        seconds = {"torch": _seconds(network.forward, probes), "openvino": _seconds(runner, probes)}
    return runner, Conversion(parts, "", different, seconds)


def difference(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> float:
    """Return the largest difference of features, of the image feature and each level, as a share of its scale.

    It is the larger of two: the largest difference over the largest value, and the same of root mean squares.

    Raises:
        ValueError: the shapes differ.
    """
    shares = [0.0]
    for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        if one.shape != other.shape:
            raise ValueError(f"{tuple(one.shape)}, not {tuple(other.shape)}")
        pairs = [(_largest(one - other), _largest(other)), (_rms(one - other), _rms(other))]
        shares += [error / max(scale, TINY) for error, scale in pairs]
    return float(np.max(shares))  # NaN if one is


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _probes(crop: tuple[int, int]) -> Tensor:
    """Return PROBES views (n, h, w, 3) uint8 of coloured squares: something to see at every stride."""
    small = np.random.default_rng(0).integers(0, 256, (PROBES, -(-crop[0] // 8), -(-crop[1] // 8), 3), np.uint8)
    return torch.from_numpy(np.kron(small, np.ones((8, 8, 1), np.uint8))[:, : crop[0], : crop[1]].copy())


def _seconds(forward: Forward, batch: Tensor) -> float:
    """Return the seconds an image of a forward pass."""
    start = time.perf_counter()
    forward(batch)
    return (time.perf_counter() - start) / len(batch)


def _serialized(model: Any) -> tuple[bytes, bytes]:
    """Return a model as OpenVINO's XML and its weights."""
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder, "model.xml"), Path(folder, "model.bin")
        load_openvino().serialize(model, xml, weights)
        return xml.read_bytes(), weights.read_bytes()


def _lookup(identity: dict[str, Any]) -> tuple[Path | None, Conversion | None]:
    """Return where the cache folder has a converted network, or would have it, and what is there that can be used."""
    path = None
    try:
        path = converted.path_of(identity)
        return path, converted.read(path, identity)
    except DamagedError as error:
        warnings.warn(f"{path}: expected a converted network, found {error}; it is converted again", stacklevel=2)
    except OSError as error:
        _warn_of_cache(path, error)
        path = None
    return path, None


def _keep(path: Path | None, identity: dict[str, Any], conversion: Conversion) -> None:
    """Keep what became of a conversion for the next process, or say that it is not kept."""
    if path is None:
        return
    try:
        converted.write(path, identity, conversion)
    except OSError as error:
        _warn_of_cache(path, error)


def _warn_of_cache(path: Path | None, error: OSError) -> None:
    warnings.warn(
        f"the network is converted in memory, in each process: {path or 'the cache folder'} cannot be used: "
        f"{error.strerror or first_line(error)}; set XDG_CACHE_HOME to a folder that can be written",
        stacklevel=2,
    )
