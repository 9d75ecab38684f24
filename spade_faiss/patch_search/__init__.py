"""The kappa nearest patches among the patches of the K neighbours, exactly.

`search` takes the levels (`levels` checks them) and the settings (`settings`), and chooses an engine (`cost_model`):
`flat` through FAISS, or one of the folders' engines, each of which begins in its own `search`. `bounds` rules most
patches out by a few directions, `pyramid` multiplies levels at their own resolution, `window` compares patches near
each other's place only, and `gpu` does the same on a GPU. `distinct` finds the nearest patch of each of several
neighbours (`matched`), and `spacing` how close normal patches lie there. `cosine` turns levels into unit vectors, and
`upsampling` levels into patches. `compiled` is how the engines' loops are compiled, `heaps` keep the nearest, and
`sharing` shares work out among threads.
"""

from .search import ENGINES, search_levels, search_patches

__all__ = ["ENGINES", "search_levels", "search_patches"]
