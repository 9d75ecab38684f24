"""The kappa nearest patches among the patches of the K neighbours, exactly.

`search` takes the levels (`levels` checks them) and the settings (`settings`) and chooses an engine (`cost_model`):
`flat` through FAISS, or `pyramid` through products at native resolution (`pyramid_plan` prepares the query,
`pyramid_kernels` and `pyramid_simd` are compiled loops). On GPUs it is `pyramid_torch` (`patches_torch` upsamples,
`tiles` multiplies, `candidates_torch` measures what is likely, `refined_torch` and `settled_torch` what is in doubt;
`patches_triton` and `tiles_triton` are kernels, `recorded_torch` starts them all at once, `spaced_torch` searches with
spacing). `window` compares patches near each other's position only (`window_pieces`, `window_kernels` and `window_simd`
are compiled loops). `bounds` rules patches out by a few directions (`bounds_plan` chooses them, `bounds_gallery`
prepares the neighbours; `bounds_loading`, `bounds_panels`, `bounds_kernels`, `bounds_simd` are compiled loops);
`distinct` finds by it the nearest patch of each of several neighbours, and `spacing` how close normal patches lie
there. `cosine` turns levels into unit vectors. `upsampling` turns levels into patches, `sharing` shares work out among
threads.
"""

from .search import ENGINES, search_levels, search_patches

__all__ = ["ENGINES", "search_levels", "search_patches"]
