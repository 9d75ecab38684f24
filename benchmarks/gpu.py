"""A GPU measured in eight minutes: decode, network, retrieval, patch search, queries, build, beside the CPU.

python benchmarks/gpu.py               # writes results/gpu.json with the card's name, and what `auto` would take by it
python benchmarks/gpu.py --dry-run     # without a GPU: every path at tiny sizes on the CPU; writes nothing

It needs no network, no images and no FAISS. What there was no time, or no library for is in `left_out`. The file is
written after each part, so that what a machine had measured before it was gone is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import without_faiss  # before the package
from common import save
from gpu_parts import Run, decoding, networks, patch_search, product_rate, retrieval, ways
from gpu_whole import building, querying

from spade_faiss.system.gpu_costs import GpuCosts

SECONDS = 480.0
PARTS: dict[str, tuple[float, Callable[[Run], Any]]] = {  # each part with its share of the time
    "product_rate": (0.02, product_rate),
    "decode": (0.03, decoding),
    "patch_search": (0.38, patch_search),
    "queries": (0.17, querying),
    "build": (0.08, building),
    "retrieval": (0.12, retrieval),
    "network": (0.20, networks),
}


def missing(torch: Any) -> list[str]:
    """Return what a GPU's measurement needs and this machine does not have."""
    reasons = [] if torch.cuda.is_available() else ["torch sees no CUDA device"]
    if without_faiss.is_missing():
        reasons.append(without_faiss.WHY)
    else:
        import faiss

        if not getattr(faiss, "get_num_gpus", lambda: 0)():
            reasons.append("FAISS sees no GPU")
    return reasons


def costs_of(card: str, cells: list[dict[str, Any]], found: dict[str, Any]) -> GpuCosts | None:
    """Fit the costs of a patch search to what was measured; None: too little was."""
    import numpy as np
    from scipy.optimize import nnls

    if len(cells) < 4:
        return None
    pairs = np.array([cell["patches"] ** 2 * cell["k"] for cell in cells], float)
    channels = np.array([cell["channels"] for cell in cells], float)
    values = np.array([cell["patches"] * cell["k"] * cell["channels"] for cell in cells], float)
    taken = np.array([cell["torch_ms"] for cell in cells]) * 1e6
    columns = np.stack([np.ones(len(cells)), pairs * channels, pairs, values], axis=1)
    (query, multiply, pair, value), _ = nnls(columns / taken[:, None], np.ones(len(cells)))
    extra = [
        max(0.0, cell["upload_and_search_ms"] - cell["torch_ms"]) * 1e6 / (cell["k"] * cell["values"]) for cell in cells
    ]
    sizes = [
        int(n)
        for n, cell in found.get("retrieval", {}).items()
        if cell.get("faiss_flat_gpu_1_ms", np.inf) < cell.get("faiss_flat_cpu_1_ms", 0)
    ]
    rounded = [float(f"{one:.3g}") for one in (query, multiply, pair, value, np.median(extra))]
    return GpuCosts(card, *rounded, index_from=min(sizes, default=10**9))


def verdict(cells: list[dict[str, Any]]) -> dict[str, str]:
    """Return what `auto` would take at each size by these figures, the neighbours' upload included."""
    return {
        f"{cell['shapes']}, K = {cell['k']}": "GPU" if cell["upload_and_search_ms"] < cell["cpu_pyramid_ms"] else "CPU"
        for cell in cells
    }


def measured(run: Run, seconds: float) -> Iterator[dict[str, Any]]:
    """Run all parts, each until its share of the time is used up; a part that fails is named, and the rest goes on.

    Yields what was found, after each part: a machine that is lent for minutes may be gone before the last one.
    """
    found: dict[str, Any] = {}
    start = time.monotonic()
    end = 0.0
    for name, (share, part) in PARTS.items():
        end += share  # what a part leaves over is the next one's
        run.until = start + end * seconds
        began = time.monotonic()
        try:
            found[name] = part(run)
        except Exception as error:
            if run.dry:
                raise
            run.left_out.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="run every path at tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what it may take  [default: 480]")
    args = parser.parse_args()

    began = time.monotonic()
    import torch

    lacking = missing(torch)
    if lacking:
        print(f"missing on this machine: {'; '.join(lacking)}", flush=True)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("expected a CUDA device that torch sees, found none; --dry-run runs the same code on the CPU")
    card = "CPU, dry run" if args.dry_run else torch.cuda.get_device_name(0)
    run, costs = Run("cpu" if args.dry_run else "cuda:0", args.dry_run), None
    for number, found in enumerate(measured(run, args.seconds - (time.monotonic() - began)), start=1):
        cells = found.get("patch_search", [])
        costs = costs_of(card, cells, found) if "retrieval" in found else None  # they go together
        result = {
            "card": card, "cuda": torch.version.cuda, "folder": tempfile.gettempdir(),
            "seconds": round(time.monotonic() - began, 1),
            "left_out": run.left_out, "not_reached": list(PARTS)[number:], **found, "ways": ways(),
            "auto": verdict(cells), "measured": str(costs) if costs else None,
        }  # fmt: skip
        if not args.dry_run:
            save("gpu", result, show=number == len(PARTS))
    if args.dry_run:
        print(json.dumps(result, indent=1))
    elif costs:
        print(f"for `auto`, in spade_faiss/system/gpu_costs.py:\nMEASURED = {costs}")


if __name__ == "__main__":
    main()
