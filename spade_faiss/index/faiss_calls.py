"""What one FAISS call needs: one thread, parameters of its own, an index on a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import faiss

from ..errors import OptionError
from ..options import MIB
from ..system import gpu_costs
from ..system.devices import faiss_device, free_gpu_bytes, gpu_number, gpu_resources


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit FAISS to one thread in this block; calls from other threads keep theirs."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def search_parameters(index: Any, nprobe: int) -> Any:
    """Return FAISS parameters with nprobe for one call: the index itself is shared by threads and never changed."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(index.index), nprobe)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(faiss.downcast_index(index.base_index), nprobe)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    return faiss.SearchParametersIVF(nprobe=nprobe)


def placed(index: Any, wanted: str) -> Any:
    """Copy an index to a GPU that was named, or for "auto" to one with enough free memory; else return it as it is."""
    device = faiss_device(wanted)
    if device == "cpu":
        return index
    needed = index.ntotal * index.d * 4 + 256 * MIB
    if wanted == "auto" and (_is_small(index) or needed > free_gpu_bytes(device)):
        return index
    try:
        return faiss.index_cpu_to_gpu(gpu_resources(), gpu_number(device), index)
    except RuntimeError as error:  # too little memory, or a kind without a GPU version
        if wanted != "auto":
            raise OptionError(f"index cannot be put on {device}: {str(error).splitlines()[0]}") from error
        warnings.warn(f"image index stays on the CPU: {str(error).splitlines()[0]}", stacklevel=2)
        return index


def _is_small(index: Any) -> bool:
    """Return whether an index was measured to be faster on the CPU, because it holds few images."""
    return bool(index.ntotal < gpu_costs.MEASURED.index_from)
