"""Networks that torch makes: which levels a network has, and what its features are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError, first_line
from ..options import FeatureOptions
from ..system.devices import as_typed
from .openvino_network import Forward
from .pooling import average_tensors
from .runtimes import TorchNetwork
from .spec import DEFAULT_EXTRACTOR, IMAGENET_MEAN, IMAGENET_STD, ExtractorSpec
from .tokens import blocks_at, require_no_tokens, require_tokens
from .weights import load_model, state_digest

LAYER_STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}  # a ResNet's

Views = tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]  # crop (h, w) px, mean, standard deviation


@dataclass(frozen=True)
class Made:
    """A network that torch has made: how it runs, and what its extractor is, but for what runs it."""

    network: TorchNetwork
    spec: ExtractorSpec


def make_network(name: str, weights: Path | None, options: FeatureOptions) -> Made:
    """Make a network by name, on the device of the options; see registry.load_extractor."""
    model = load_model(name, weights).eval().requires_grad_(False)
    mean, std = _normalisation(name, model, options)
    resized, crop = options.sizes(_native_size(model))
    pyramid = _prepare(name, model, crop, options)
    digest = state_digest(model.state_dict())
    spec = ExtractorSpec(
        name=name,
        level_shapes=pyramid.shapes,
        image_dim=pyramid.image_dim,
        dtype=options.dtype,
        neighbourhood=options.neighbourhood,
        count_include_pad=options.count_include_pad or None,
        level_names=pyramid.names,
        resized=resized,
        crop=crop,
        mean=mean,
        std=std,
        weights_sha256=digest,
        weights=weights.name if weights else "",
        bits=options.bits,
        tile=options.tile_size,
        overlap=options.overlap,
        tokens=None if options.tokens == "plain" else options.tokens,
        image_feature=None if options.image_feature == "pooled" else options.image_feature,
        precision=None if options.precision == "float32" else options.precision,
        weights_path=str(weights.absolute()) if weights else "",
    )
    return Made(_torch_network(name, pyramid, digest, (crop, mean, std), options), spec)


def _torch_network(name: str, pyramid: _Pyramid, digest: str, views: Views, options: FeatureOptions) -> TorchNetwork:
    """Describe a network as torch runs it, from views to averaged levels, with all that its features depend on."""
    crop, mean, std = views
    identity = {
        "name": name,
        "weights": digest,
        "crop": list(crop),
        "mean": list(mean),
        "std": list(std),
        "levels": list(pyramid.names),
        "neighbourhood": options.neighbourhood,
        "count_include_pad": bool(options.count_include_pad),
        "tokens": options.tokens or "plain",
        "image_feature": options.image_feature or "pooled",
        "precision": options.precision,
        "libraries": f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}",
    }
    shift, scale = (torch.tensor(each, device=options.device).view(1, 3, 1, 1) * 255 for each in (mean, std))

    def around(forward: Forward) -> Forward:
        def whole(views: Tensor) -> tuple[Tensor, list[Tensor]]:
            image, levels = forward(views.permute(0, 3, 1, 2).float().sub_(shift).div_(scale))
            levels = [level.float() for level in levels]
            return image.float(), average_tensors(levels, options.neighbourhood, bool(options.count_include_pad))

        return whole

    exact = around(pyramid.forward)
    forward = exact if options.precision == "float32" else around(_in_bfloat16(pyramid.forward))
    return TorchNetwork(name, forward, exact, options.precision, crop, identity)


def _in_bfloat16(forward: Forward) -> Forward:
    """Return a forward pass whose products are of bfloat16."""

    def rounded(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(batch.device.type, torch.bfloat16):
            return forward(batch)

    return rounded


def _normalisation(name: str, model: Any, options: FeatureOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of pixels; see FeatureOptions.normalisation."""
    customary = "imagenet" if name == DEFAULT_EXTRACTOR else "trained"
    if (options.normalisation or customary) == "trained" and hasattr(model, "pretrained_cfg"):
        mean, std = (tuple(map(float, model.pretrained_cfg[key])) for key in ("mean", "std"))
        return mean, std
    return IMAGENET_MEAN, IMAGENET_STD


def _native_size(model: Any) -> tuple[int, int]:
    """Return the (height, width) in pixels that a network was made for."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if config else None
    return (int(size[1]), int(size[2])) if size else (224, 224)


@dataclass(frozen=True)
class _Pyramid:
    """A network's chosen levels, and the forward pass that gives them."""

    names: tuple[str, ...]
    forward: Forward
    shapes: tuple[tuple[int, int, int], ...]  # (c, h, w) of each level
    image_dim: int


def _prepare(name: str, model: Any, crop: tuple[int, int], options: FeatureOptions) -> _Pyramid:
    """Put a network on the device of the options, choose its levels, and run it once to learn their shapes.

    Raises:
        OptionError: the network does not take images of the crop's size, or does not have these levels.
    """
    refused = f"extractor {name} does not take images of {crop[0]} x {crop[1]} px: "
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if crop[0] % patch[0] or crop[1] % patch[1]:
        raise OptionError(f"{refused}expected multiples of its patches, {patch[0]} x {patch[1]}")
    try:
        if crop != _native_size(model) and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=crop)  # vision transformers: position embeddings are resampled
        model.to(options.device, memory_format=torch.channels_last)
        names, forward = _choose_levels(name, model, options)
        with as_typed(options.device):
            image, levels = forward(torch.zeros(1, 3, *crop, device=options.device))
    except OptionError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise OptionError(f"{refused}{first_line(error)}") from error
    shapes = tuple((c, h, w) for c, h, w in (level.shape[1:] for level in levels))
    if list(shapes) != sorted(shapes, key=lambda shape: -shape[1] * shape[2]):
        raise OptionError(f"levels: expected finest first, found {names} with shapes {list(shapes)}")
    return _Pyramid(names, forward, shapes, image.shape[1])


def _choose_levels(name: str, model: Any, options: FeatureOptions) -> tuple[tuple[str, ...], Forward]:
    """Choose the levels of a model; return their names and the forward pass that gives them."""
    if isinstance(model, torchvision.models.ResNet):
        require_no_tokens(name, options)
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
    if len(set(reductions)) > 1:
        require_no_tokens(name, options)
        by_stride = tuple(level for level, stride in zip(known, reductions, strict=True) if stride in options.strides)
        wanted = wanted or by_stride
    else:
        require_tokens(name, model, options)
        if options.blocks and not wanted:
            wanted = tuple(known[block] for block in blocks_at(options.blocks, len(known)))
    if not wanted:  # every block has the same grid: after a quarter, half and three quarters of the depth
        wanted = tuple(known[max(0, len(known) * quarter // 4 - 1)] for quarter in (1, 2, 3))
    names = _choose(known, wanted)
    return names, _timm_forward(model, [int(name) for name in names], options)


def _choose(known: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the wanted names if they are some of the known ones, in their order."""
    if not wanted or not set(wanted) <= set(known) or list(wanted) != sorted(set(wanted), key=known.index):
        raise OptionError(f"levels: expected some of {', '.join(known)}, in that order, found {', '.join(wanted)}")
    return wanted


def _resnet_forward(model: Any, names: tuple[str, ...]) -> Forward:
    """Return a forward pass of a torchvision ResNet."""

    def forward(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = model.maxpool(model.relu(model.bn1(model.conv1(batch))))
        levels = {}
        for name in LAYER_STRIDES:
            x = levels[name] = getattr(model, name)(x)
        return model.avgpool(x).flatten(1), [levels[name] for name in names]

    return forward


def _timm_forward(model: Any, indices: list[int], options: FeatureOptions) -> Forward:
    """Return a forward pass of a timm model; see FeatureOptions.tokens and image_feature.

    The prefix of a vision transformer, its class token and registers, is in no level.
    """
    normalised = options.tokens == "normalised"
    more = {"norm": True} if normalised else {}

    def scaled(levels: list[Tensor]) -> list[Tensor]:
        return [F.normalize(level, dim=1) for level in levels] if normalised else levels

    def pooled(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        last, levels = model.forward_intermediates(batch, indices=indices, stop_early=False, **more)
        return model.forward_head(last, pre_logits=True).flatten(1), scaled(levels)

    def by_class_token(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = model.forward_intermediates(  # blocks after the last level's are not needed
            batch, indices=indices, stop_early=True, intermediates_only=True, return_prefix_tokens=True, **more
        )
        token = found[-1][1][:, 0]
        return F.normalize(token if normalised else model.norm(token)), scaled([level for level, _ in found])

    return by_class_token if options.image_feature == "class_token" else pooled
