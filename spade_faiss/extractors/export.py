"""An extractor's network as a file for other programs: ONNX, or OpenVINO's IR."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, first_line
from ..system.atomic_files import output_errors, publish
from .networks import NetworkExtractor
from .openvino_network import ConversionError, convert, load_openvino
from .registry import Extractor

SUFFIXES = (".onnx", ".xml")


def export_backbone(extractor: Extractor, path: str | Path) -> list[str]:
    """Write what an extractor does to views, from uint8 pixels to float32 features, as a file.

    The input is "views", (n, h, w, 3) uint8 RGB of the spec's crop, n at will. The outputs are "image", (n, d), and
    "level_NAME" of each level, (n, c, h, w), averaged over neighbourhoods, all float32. ONNX needs the packages of the
    extra `export`, and OpenVINO's IR (.xml, with a .bin beside it) that of the extra `openvino`.

    Args:
        extractor: a network in float32 that torch runs on the CPU; see load_extractor.
        path: ends in .onnx or .xml.

    Returns:
        the names of the outputs.

    Raises:
        OptionError: another kind of extractor or file, or the network cannot be exported.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise OptionError(f"export: expected a file that ends in {' or '.join(SUFFIXES)}, found {path}")
    if not isinstance(extractor, NetworkExtractor):
        raise OptionError(f"export: expected an extractor with a network, found {extractor.spec.name}, which has none")
    if (extractor.runtime, extractor.device) != ("torch", "cpu"):
        raise OptionError(
            f"export: expected a network that torch runs on the CPU, found {extractor.spec.name} by "
            f"{extractor.runtime} on {extractor.device}; load it with device='cpu' and runtime='torch'"
        )
    if extractor.spec.precision is not None:
        raise OptionError(f"export: expected a network of float32, found {extractor.spec.precision}")
    names = ["image", *(f"level_{name}" for name in extractor.spec.level_names)]
    with output_errors(f"cannot write {path}"), tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        write = _write_onnx if path.suffix == ".onnx" else _write_ir
        try:
            write(_Exported(extractor), Path(folder, path.name), names)
        except ConversionError as error:
            raise OptionError(f"export: found that {error}") from error
        for written in sorted(Path(folder).iterdir()):  # .bin before the .xml that refers to it
            publish(written, path.with_name(written.name))
    return names


class _Exported(torch.nn.Module):
    """What NetworkExtractor.extract does, as a module."""

    def __init__(self, extractor: NetworkExtractor) -> None:
        super().__init__()
        self._network, self._crop = extractor, extractor.spec.crop

    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        image, levels = self._network.forward(views)
        return image, *levels

    def example(self) -> Tensor:
        """Return two views of nothing: of one, ONNX's exporter would take the batch for fixed."""
        assert self._crop is not None
        return torch.zeros(2, *self._crop, 3, dtype=torch.uint8)


def _write_onnx(module: _Exported, path: Path, names: list[str]) -> None:
    try:
        import onnxscript  # noqa: F401 # torch's exporter needs it, and does not say how to have it
    except ImportError as error:
        raise OptionError(
            f"export: expected the package onnxscript, found none ({first_line(error)}); pip install "
            "'spade-faiss[export]'"
        ) from error
    shapes: Any = {"views": {0: torch.export.Dim("n")}}
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # on what the exporter itself uses
            torch.onnx.export(
                module.eval(), (module.example(),), str(path), input_names=["views"], output_names=names,
                dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
    except OSError:
        raise
    except Exception as error:  # a network's own code runs in it
        raise ConversionError(f"torch cannot export the network to ONNX ({first_line(error)})") from error


def _write_ir(module: _Exported, path: Path, names: list[str]) -> None:
    def forward(views: Tensor) -> tuple[Tensor, list[Tensor]]:
        image, *levels = module(views)
        return image, levels

    example = module.example()
    model = convert(forward, example, [-1, *example.shape[1:]])
    model.inputs[0].get_tensor().set_names({"views"})
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    load_openvino().save_model(model, path, compress_to_fp16=False)
