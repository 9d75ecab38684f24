"""The kappa nearest patches among the patches of the K neighbours, exactly.

`search` takes the levels (`levels` checks them) and the settings (`settings`) and chooses an engine (`cost_model`):
`flat` through FAISS, or `pyramid` through products at native resolution (`pyramid_plan` prepares the query,
`pyramid_kernels` and `pyramid_simd` are compiled loops, `pyramid_torch` is for GPUs). `window` compares patches near
each other's position only (`window_kernels`, `window_torch`). `cosine` turns levels into unit vectors. `upsampling`
turns levels into patches, `sharing` shares work out among threads.
"""

from .search import ENGINES, search_levels, search_patches

__all__ = ["ENGINES", "search_levels", "search_patches"]
