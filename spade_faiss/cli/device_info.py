"""What `info --device` prints."""

from __future__ import annotations

import json
from typing import Any

import click

from ..gallery.gallery import Gallery
from ..options import MIB, SearchOptions
from ..system.devices_seen import advice, devices_seen
from .messages import one_line

K = 50  # neighbours that memory is told for


def print_devices(gallery: Gallery | None, as_json: bool) -> None:
    """Print what torch and FAISS see and, of a gallery, the memory that a search of it takes on a GPU."""
    seen = devices_seen()
    if gallery is not None:
        seen["memory"] = _memory(gallery)
    if as_json:
        click.echo(json.dumps(seen))
        return
    for name, value in _lines(seen):
        click.echo(f"{name:10} {one_line(value)}")


def _lines(seen: dict[str, Any]) -> list[tuple[str, str]]:
    torch, faiss = seen["torch"], seen["faiss"]
    lines = [("torch", f"{torch['version']}, {_built(torch['cuda'])}, sees {_gpus(len(torch['gpus']))}")]
    for number, gpu in enumerate(torch["gpus"]):
        free, all_of_it = (gpu[name] / 2**30 for name in ("free_bytes", "bytes"))
        text = f"{gpu['name']}, capability {gpu['capability']}, {free:.1f} of {all_of_it:.1f} GiB free"
        lines.append((f"cuda:{number}", text))
    lines.append(("faiss", f"{faiss['version']} ({faiss['options']}), sees {_gpus(faiss['gpus'])}"))
    lines.append(("auto", ", ".join(f"{stage} on {place}" for stage, place in seen["auto"].items())))
    lines.append(("measured", seen["measured"]))
    if memory := seen.get("memory"):
        text = (
            f"{memory['search_bytes'] / MIB:.0f} MiB for a search of K = {memory['k']}, "
            f"{memory['kept_bytes'] / MIB:.0f} MiB to keep all {memory['images']} images there (--device-cache-mib)"
        )
        lines.append(("memory", text))
    if text := advice(seen):
        lines.append(("to do", text))
    return lines


def _built(cuda: str | None) -> str:
    return "without CUDA" if cuda is None else f"built for CUDA {cuda}"


def _gpus(number: int) -> str:
    return "no GPU" if number == 0 else "1 GPU" if number == 1 else f"{number} GPUs"


def _memory(gallery: Gallery) -> dict[str, int]:
    """Return what a search of a gallery takes on a GPU, by its recipe."""
    import numpy as np

    from ..patch_search.gpu.memory import kept_bytes, search_bytes

    spec, recipe, images = gallery.spec, gallery.recipe, len(gallery)
    search = recipe.search if recipe else SearchOptions()
    k, itemsize = min(search.k or K, max(images, 1)), np.dtype(spec.dtype).itemsize
    together = [spec.level_shapes] if search.matching != "by_level" else [(shape,) for shape in spec.level_shapes]
    each = [search_bytes(shapes, k, search.kappa or 1, itemsize) for shapes in together]
    return {
        "k": k,
        "images": images,
        "search_bytes": max(each),
        "kept_bytes": kept_bytes(spec.level_shapes, images, itemsize),
    }
