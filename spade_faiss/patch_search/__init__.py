"""The kappa nearest patches among all patches of the K neighbours, exactly.

`search` checks the levels and chooses an engine (`cost_model`): `flat` through FAISS, or `pyramid` through products at
native resolution (`pyramid_plan` prepares the query, `pyramid_kernels` and `pyramid_simd` are compiled loops,
`pyramid_torch` is for GPUs). `upsampling` turns levels into patches.
"""

from .search import ENGINES, search_patches

__all__ = ["ENGINES", "search_patches"]
